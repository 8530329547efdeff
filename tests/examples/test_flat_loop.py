"""The plain loop of examples/ has the losses of the trainer, step by step."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.tiny_models import tiny_run
from trainer.train import train

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT in plain use
@pytest.mark.parametrize("settings", [{}, {"method": "full", "schedule": "linear", "weight_decay": 0.1}])
def test_its_losses_and_gradients_are_those_of_the_trainer(
    tmp_path: Path,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_run(tmp_path, train={**settings, "max_grad_norm": 0.5}, epochs=2)
    result = train(config)
    (config.run_root / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    text = (config.run_root / "checkpoints" / result.key / "metrics.jsonl").read_text()
    expected = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    capsys.readouterr()
    arguments = ["flat_loop.py", str(config.run_root), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "examples" / "flat_loop.py"), run_name="__main__")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == len(expected) > 10
    for name in ("loss", "grad_norm"):
        assert [step[name] for step in found] == pytest.approx([step[name] for step in expected], rel=2e-4)
    assert found[-1]["loss"] < 0.7 * found[0]["loss"], "and it learns"
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_it_can_be_read_in_one_sitting() -> None:
    source = (ROOT / "examples" / "flat_loop.py").read_text()
    assert len(source.splitlines()) <= 150
    for room in ("schemas", "pipelines", "trainer", "flows"):
        assert f"import {room}" not in source
        assert f"from {room}" not in source
