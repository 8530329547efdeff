"""Trainings whose layers are computed as one: losses, adapters, memory settings, and the check before the first step.

Judge: the same training with train.kernels plain, and PEFT's own loading of what is saved.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from schemas.errors import RefusedError
from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TRAINING_RESULT_NAME
from tests.trainer.fast.families import FALLING_BACK, adapted
from tests.trainer.rank_groups import train_with_two_processes
from tests.trainer.tiny_models import tiny_run
from trainer.checkpoint import step_name
from trainer.fast.check import keep_if_right
from trainer.fast.layer import Manner
from trainer.fast.pointwise import PLAIN
from trainer.fast.taking import Taken, take_over
from trainer.job import plan_job
from trainer.train import train

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "layers": {"kernels": "layers"},
    "selective": {"gradient_checkpointing": "selective"},
    "full": {"kernels": "layers", "gradient_checkpointing": True},
    "long rows": {"gradient_checkpointing": "full", "offload_checkpoints": True, "mlp_tokens_at_once": 24},
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT's, not ours


def run_of(folder: Path, base: str = "plain", **settings: Any) -> PipelineConfig:
    return tiny_run(folder, train={"max_steps": 5, "base": base, **settings}, num_documents=20)


def losses_of(config: PipelineConfig) -> list[float]:
    (metrics,) = (config.run_root / "checkpoints").glob("*/metrics.jsonl")
    return [line["loss"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]


def adapter_of(config: PipelineConfig) -> Path:
    (folder,) = (config.run_root / "checkpoints").glob("*/adapter")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    config = run_of(tmp_path_factory.mktemp("plain"), kernels="plain")
    train(config)
    return config


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_adapter_are_those_of_the_plain_training(
    plain: PipelineConfig, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_of(tmp_path, **SETTINGS[name])
    train(config)
    said = capsys.readouterr().err
    assert "2 of 2 decoder layers computed as one\n" in said
    assert "compute their own way" not in said
    assert losses_of(config) == pytest.approx(losses_of(plain), abs=1e-5)
    expected = load_file(adapter_of(plain) / "adapter_model.safetensors")
    found = load_file(adapter_of(config) / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for tensor_name, tensor in found.items():
        assert torch.allclose(tensor, expected[tensor_name], atol=1e-3), tensor_name


def test_peft_alone_loads_the_adapter(tmp_path: Path) -> None:
    config = run_of(tmp_path, kernels="layers")
    train(config)
    assert config.model is not None
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    untrained = base(input_ids=ids).logits.detach()
    loaded = PeftModel.from_pretrained(base, adapter_of(config))
    assert (loaded(input_ids=ids).logits - untrained).abs().max() > 0.1


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    alone = run_of(tmp_path / "alone", kernels="layers", bins_per_step=4)
    train(alone)
    settings = {"kernels": "layers", "strategy": "ddp", "num_processes": 2, "bins_per_step": 4}
    together = run_of(tmp_path / "together", **settings)
    train_with_two_processes({"together": together}, tmp_path / "extensions")
    assert losses_of(together) == pytest.approx(losses_of(alone), abs=1e-5)


@pytest.mark.parametrize("base", ["nf4", "int8_rows"])
def test_over_bits_the_losses_are_those_of_the_fused_layers(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for name, settings in {"fused": {}, "as one": {"kernels": "layers"}}.items():
        config = run_of(tmp_path / name, base, **settings)
        train(config)
        losses.append(losses_of(config))
    said = capsys.readouterr().err
    assert "2 of 2 decoder layers computed as one\n" in said
    assert "compute their own way" not in said
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_training_goes_on_from_its_checkpoint_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_of(tmp_path / "whole", kernels="layers")
    train(whole)
    again = run_of(tmp_path / "again", kernels="layers")
    folder = again.run_root / "checkpoints" / train(again).key
    (folder / TRAINING_RESULT_NAME).unlink()
    shutil.rmtree(folder / step_name(5))
    train(again)
    assert "going on after step 4" in capsys.readouterr().err
    assert losses_of(again) == losses_of(whole)
    files = [adapter_of(config) / "adapter_model.safetensors" for config in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


# The check --------------------------------------------------------------------------------------------------


def checked(model: Any) -> tuple[Taken, str | None]:
    taken = take_over(model, Manner(PLAIN))
    return taken, keep_if_right(model, taken, device=CPU, dtype=torch.float32)


def test_layers_that_are_right_are_kept_and_the_adapters_untouched() -> None:
    model = adapted("llama")
    before = [p.detach().clone() for p in model.parameters()]
    taken, problem = checked(model)
    assert (len(taken.layers), problem) == (2, None)
    for parameter, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, expected)
        assert parameter.grad is None


def wrong_sign(out: torch.Tensor, gradient: torch.Tensor, *others: Any) -> None:
    PLAIN.unrotate_into(out, -gradient, *others)


def broken(*others: Any) -> torch.Tensor:
    raise RuntimeError("no such kernel\non this card")


@pytest.mark.parametrize(
    ("unrotate_into", "words"),
    [(wrong_sign, "gradients by .* of their norm"), (broken, "RuntimeError: no such kernel on")],
)
def test_layers_that_are_wrong_or_break_are_given_back(unrotate_into: Any, words: str) -> None:
    model = adapted("llama")
    taken = take_over(model, Manner(PLAIN._replace(unrotate_into=unrotate_into)))
    problem = keep_if_right(model, taken, device=CPU, dtype=torch.float32)
    assert problem is not None
    assert re.search(words, problem)
    assert not taken.layers
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT's, of experts
@pytest.mark.parametrize("family", FALLING_BACK)
def test_other_families_keep_their_layers_and_say_so(family: str) -> None:
    taken, problem = checked(adapted(family))
    assert problem is None
    assert str(taken).startswith("0 of 2 decoder layers computed as one; 2 are not: ")


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"kernels": "layers", "strategy": "zero2"}, "layers"),
        ({"kernels": "layers", "method": "full"}, "layers"),
        ({"mlp_tokens_at_once": 8, "kernels": "plain"}, "layers"),
        ({"offload_checkpoints": True}, "offload-checkpoints"),
    ],
)
def test_what_can_not_be_is_refused(tmp_path: Path, settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(RefusedError, match=f"^{rule}: "):
        plan_job(run_of(tmp_path, **settings))


def test_true_and_false_are_full_and_none_and_keep_the_key(tmp_path: Path) -> None:
    keys = {
        str(value): plan_job(run_of(tmp_path, gradient_checkpointing=value)).key
        for value in (False, "none", True, "full")
    }
    assert keys["False"] == keys["none"] != keys["True"] == keys["full"]
