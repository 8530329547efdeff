"""`sft-pipeline bench train` at toy size on a CPU: the shipped training and a peer, on the same tokens and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trainer.train
from flows.bench.contestants import PEERS_FOLDER
from schemas.pipeline_config import PipelineConfig
from tests.trainer.tiny_models import tiny_run
from trainer.bench import ours

ROOT = Path(__file__).parent.parent.parent
ARGUMENTS = (
    "--shape toy --device cpu --dtype float32 --tokens-per-step 1024 --capacity 256 --steps 3 --warm-up 1 --no-sweep "
    "--set engine.workers=1"
).split()


def run_bench(folder: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "bench",
        "train",
        *ARGUMENTS,
        "--folder",
        str(folder / "bench"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, "--json", str(folder / "bench.json"), *more],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def check_agreement(folder: Path, *names: str) -> dict[str, Any]:
    """Each ran as many steps of as many tokens, and began with the loss of ours."""
    found = json.loads((folder / "bench.json").read_bytes())
    by_name = {entry["name"]: entry for entry in found["contestants"]}
    (path,) = (folder / "bench" / "data").glob("*/documents.json")
    counts = json.loads(path.read_bytes())
    for name in names:
        (run,) = by_name[name]["runs"]
        assert by_name[name]["first_loss_difference"] < 1e-5, name
        assert run["first_loss"] == pytest.approx(6.24, abs=0.1), name  # near log(512): nothing is known yet
        assert run["num_trained_tokens"] / run["num_tokens"] == pytest.approx(0.65, abs=0.01), name
        assert run["tokens_per_second"] > 0
        assert run["resident_gib"] > 0.1
        if name != "padded":
            assert run["num_tokens"] == sum(step["num_tokens"] for step in counts[1:])
            assert run["num_tokens"] > 0.9 * 3 * 1024
    return by_name


@pytest.mark.slow
def test_ours_and_the_recipe_of_2023_begin_with_the_same_loss_and_absent_peers_are_named(
    tmp_path: Path,
) -> None:
    result = run_bench(tmp_path, "--rounds", "1", "--peer", "padded", "--peer", "unsloth")
    assert result.returncode == 0, result.stderr
    found = check_agreement(tmp_path, "ours", "padded")
    assert "LoRA layers fused" in found["ours"]["runs"][0]["kernel"]
    assert found["ours"]["runs"][0]["more"]["bins_at_once"] == 4
    assert "- unsloth is left out: unsloth is not installed." in result.stdout
    assert "| padded |" in result.stdout


@pytest.mark.stress
def test_trl_takes_the_same_steps_in_an_interpreter_of_its_own_and_a_second_call_goes_on(
    tmp_path: Path,
) -> None:
    more = ("--rounds", "1", "--peer", "trl", "--peer-python", f"trl={sys.executable}")
    first = run_bench(tmp_path, *more)
    assert first.returncode == 0, first.stderr
    found = check_agreement(tmp_path, "ours", "trl")
    ours_run, trl_run = (found[name]["runs"][0] for name in ("ours", "trl"))
    assert trl_run["grad_norms"][0] == pytest.approx(ours_run["grad_norms"][0], rel=1e-3)
    assert trl_run["kernel"] == "packed, sdpa, float32 adapters, checkpointing full"
    again = run_bench(tmp_path, *more, "--resume")
    assert again.stdout == first.stdout
    assert again.stderr.count("taken over from an earlier call") == 2


def test_ours_is_the_shipped_training_and_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, seen = trainer.train.train, []

    def watched(config: PipelineConfig) -> Any:
        seen.append(config)
        return shipped(config)

    monkeypatch.setattr(trainer.train, "train", watched)
    config = tiny_run(tmp_path, train={"max_steps": 3})
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    result = ours.train({"config": str(path)})
    assert [found.run_root for found in seen] == [config.run_root]
    (metrics,) = (config.run_root / "checkpoints").glob("*/metrics.jsonl")
    written = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [line["loss"] for line in written if "num_trained_tokens" in line]
    assert [step["loss"] for step in result["steps"]] == losses
    assert len(losses) == 3


def test_the_peers_programs_import_nothing_of_ours() -> None:
    """They may run in an interpreter that has none of it: here one whose path holds their own folder alone."""
    programs = sorted(str(path) for path in PEERS_FOLDER.glob("run_*.py"))
    code = (
        "import runpy, sys\n"
        f"sys.path = [{str(PEERS_FOLDER)!r}] + [path for path in sys.path if path != {str(ROOT)!r}]\n"
        f"for program in {programs}: runpy.run_path(program)\n"
        "print(sorted({'schemas', 'pipelines', 'trainer', 'flows'} & {name.split('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert len(programs) == 3
    assert result.stdout.strip() == "[]"
