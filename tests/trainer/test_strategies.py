"""Two processes train what one trains. Judges: strategy single with the same base, plain transformers and PEFT."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from schemas.errors import RefusedError
from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TrainingResult
from tests.trainer import ranks_program
from tests.trainer.tiny_models import tiny_run, write_model
from trainer import stepping
from trainer.checkpoint import step_name
from trainer.data import Plan
from trainer.job import plan_job, read_result
from trainer.ranks import ALONE, joined_ranks
from trainer.steps import Step, micro_steps
from trainer.support import ONE_PROCESS
from trainer.train import train

ROOT = Path(__file__).parent.parent.parent
DISTRIBUTED = ("ddp", "zero1", "zero2")
SETTINGS: dict[str, Any] = {
    "bins_per_step": 3,  # over two processes: one of them computes a filler in each step
    "lora": {"dropout": 0.1},
    "max_steps": 20,
    "checkpoint_every_steps": 10,
    "keep_checkpoints": 9,
}
FULL: dict[str, Any] = {"method": "full", "weight_decay": 0.1, "learning_rate": 1e-3, "max_steps": 6}
POISONED: dict[str, Any] = {"seed": ranks_program.POISONED_SEED, "max_steps": 8}
MAX_LOSS_DIFFERENCE = {("float32", "plain"): 1e-5, ("float32", "int8"): 1e-3, ("bfloat16", "plain"): 2e-2}


@dataclass(frozen=True)
class Finished:
    """A finished training."""

    config: PipelineConfig
    result: TrainingResult

    @property
    def folder(self) -> Path:
        return self.config.run_root / "checkpoints" / self.result.key

    @property
    def losses(self) -> list[float | None]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        (path,) = (self.folder / self.result.output).glob("*.safetensors")
        return load_file(path)


def run_of(folder: Path, *, dtype: str = "float32", **train_settings: Any) -> PipelineConfig:
    """Run roots beside each other share the model."""
    model = folder.parent / "model"
    if not model.exists():
        write_model(model)
    settings = SETTINGS | train_settings
    if settings["strategy"] not in ONE_PROCESS:
        settings.setdefault("num_processes", 2)
    return tiny_run(folder, epochs=4, train=settings, model={"path": str(model), "dtype": dtype})


def unfinished_after(step: int, other: Finished, folder: Path, **settings: Any) -> PipelineConfig:
    """A run that stands where `other` stood after that step, to be gone on with under other settings."""
    config = run_of(folder, **settings)
    copy = folder / "run" / "checkpoints" / other.result.key
    shutil.copytree(other.folder, copy)
    (copy / "training.json").unlink()
    shutil.rmtree(copy / "adapter")
    for later in copy.glob("step-*"):
        if later.name > step_name(step):
            shutil.rmtree(later)
    assert (copy / step_name(step)).is_dir()
    return config


def train_with_two_processes(configs: dict[str, PipelineConfig], extensions: Path) -> str:
    return train_with_processes(configs, extensions, count=2)


def train_with_processes(configs: dict[str, PipelineConfig], extensions: Path, *, count: int) -> str:
    """All of them, in one group of processes; what they said."""
    paths = []
    for config in configs.values():
        paths.append(config.run_root / "config.json")
        paths[-1].write_text(config.model_dump_json())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.trainer.ranks_program", *map(str, paths)]
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | place | {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(extensions)}
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, "\n".join(said)
    return "".join(said)


@dataclass(frozen=True)
class Trainings:
    finished: dict[str, Finished]
    said: str
    """By the two processes."""
    extensions: Path
    """Where torch would have put programs that were compiled for them."""


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """By "<what>-<strategy>". Those of strategy single ran in this process, all others in one pair of processes."""
    folder = tmp_path_factory.mktemp("strategies")
    alone = {
        "plain-single": {},
        "int8-single": {"base": "int8"},
        "bfloat16-single": {"dtype": "bfloat16"},
        "full-single": FULL,
        "poisoned-single": POISONED,
    }
    finished: dict[str, Finished] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "summed_loss", stepping.summed_loss)  # so that it is put back
        for name, settings in alone.items():
            config = run_of(folder / name, strategy="single", **settings)
            if settings is POISONED:  # the last one
                ranks_program.poison_some_losses(config)
            finished[name] = Finished(config, train(config))
    configs: dict[str, PipelineConfig] = {}
    for name, settings in alone.items():
        for strategy in DISTRIBUTED:
            other = name.replace("single", strategy)
            configs[other] = run_of(folder / other, **settings, strategy=strategy)
    for strategy in DISTRIBUTED:
        name = f"resumed-{strategy}"
        configs[name] = unfinished_after(10, finished["plain-single"], folder / name, strategy=strategy)
    said = train_with_two_processes(configs, folder / "extensions")
    for name, config in configs.items():
        result = read_result(plan_job(config))
        assert result is not None
        finished[name] = Finished(config, result)
    return Trainings(finished, said, folder / "extensions")


slow = pytest.mark.slow


@slow
@pytest.mark.parametrize("strategy", DISTRIBUTED)
@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("plain", ("float32", "plain")),
        ("int8", ("float32", "int8")),
        ("bfloat16", ("bfloat16", "plain")),
        ("full", ("float32", "plain")),
        ("resumed", ("float32", "plain")),
    ],
)
def test_each_step_of_two_processes_has_the_loss_of_one(
    trainings: Trainings, what: str, kind: tuple[str, str], strategy: str
) -> None:
    """Dropout is on: the draws are the same, whoever makes them."""
    ours = trainings.finished[f"{what}-{strategy}"]
    expected = trainings.finished[f"{what.replace('resumed', 'plain')}-single"]
    assert ours.result.num_processes == 2
    assert ours.result.strategy == strategy
    assert ours.result.key == expected.result.key
    assert len(ours.losses) == len(expected.losses) == expected.result.num_steps
    np.testing.assert_allclose(
        np.array(ours.losses, float), np.array(expected.losses, float), atol=MAX_LOSS_DIFFERENCE[kind]
    )
    assert ours.result.validation_loss == pytest.approx(
        expected.result.validation_loss, abs=MAX_LOSS_DIFFERENCE[kind]
    )


@slow
@pytest.mark.parametrize("strategy", DISTRIBUTED)
@pytest.mark.parametrize(
    ("what", "limit"), [("plain", 1e-4), ("int8", 1e-3), ("full", 1e-4), ("resumed", 1e-4)]
)
def test_the_weights_that_are_gathered_are_those_of_one_process(
    trainings: Trainings, what: str, limit: float, strategy: str
) -> None:
    ours = trainings.finished[f"{what}-{strategy}"].weights
    expected = trainings.finished[f"{what.replace('resumed', 'plain')}-single"].weights
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert tensor.numel() > 0
        assert tensor.abs().max() > 0, name
        difference = (tensor - expected[name]).norm() / expected[name].norm()
        assert difference < limit, (name, float(difference))


@slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's, not ours
@pytest.mark.parametrize("strategy", DISTRIBUTED)
@pytest.mark.parametrize("base", ["plain", "int8"])
def test_an_adapter_over_an_8_bit_base_loads_in_plain_peft_over_either_base(
    trainings: Trainings, base: str, strategy: str
) -> None:
    settings = trainings.finished["int8-single"].config.model
    assert settings is not None
    quantisation = BitsAndBytesConfig(load_in_8bit=True) if base == "int8" else None

    def logits(adapter: Path | None) -> torch.Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(
            settings.path, dtype=torch.float32, quantization_config=quantisation
        )
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 40)[None]).logits
        return found

    ours = logits(trainings.finished[f"int8-{strategy}"].folder / "adapter")
    expected = logits(trainings.finished["int8-single"].folder / "adapter")
    assert (ours - expected).abs().max() < 1e-2
    assert (ours - logits(None)).abs().max() > 1


@slow
@pytest.mark.parametrize("strategy", ["single", *DISTRIBUTED])
def test_a_loss_or_gradient_that_is_not_finite_on_one_process_skips_the_step_on_all(
    trainings: Trainings, strategy: str
) -> None:
    found = trainings.finished[f"poisoned-{strategy}"]
    assert [number for number, loss in enumerate(found.losses) if loss is None] == [2, 5]
    assert (found.result.num_steps, found.result.num_updates) == (8, 6)
    expected = trainings.finished["poisoned-single"].losses
    for ours, theirs in zip(found.losses, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@slow
@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_one_process_goes_on_where_two_have_stopped(
    trainings: Trainings, strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken = trainings.finished[f"plain-{strategy}"]
    shutil.copytree(unbroken.config.run_root.parent.parent / "model", tmp_path / "model")
    config = unfinished_after(10, unbroken, tmp_path / strategy, strategy="single")
    resumed = Finished(config, train(config))
    assert "going on after step 10" in capsys.readouterr().err
    np.testing.assert_allclose(np.array(resumed.losses, float), np.array(unbroken.losses, float), atol=1e-5)


@slow
def test_nothing_is_compiled_and_nothing_warned_about(trainings: Trainings) -> None:
    assert not trainings.extensions.exists()
    assert "arning" not in trainings.said
    assert "built" not in trainings.said
    assert "[INFO]" not in trainings.said
    # The first process alone speaks.
    assert trainings.said.count("trained weights in") == 3 * 5 + 3


# Dealing out a step -----------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=1, max_size=12),
    bins_per_micro_step=st.integers(1, 4),
    num_ranks=st.integers(1, 5),
)
def test_every_useful_micro_step_is_computed_by_exactly_one_rank(
    weights: list[float], bins_per_micro_step: int, num_ranks: int
) -> None:
    count = len(weights)
    ones, zeros = np.ones(count, int), np.zeros(count, int)
    plan = Plan("train", 0, np.arange(count), ones, zeros, ones, np.array(weights), np.arange(count + 1))
    step = Step(0, 0, 0, count, count, count, sum(weights))

    def deal(rank: int, ranks: int) -> list[Any]:
        options: Any = {"bins_per_micro_step": bins_per_micro_step, "rank": rank, "num_ranks": ranks}
        return micro_steps(plan, step, **options)

    alone = deal(0, 1)
    assert not any(micro_step.is_filler for micro_step in alone)
    assert sum(sum(weights[m.first_bin : m.end_bin]) for m in alone) == sum(weights)
    shares = [deal(rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(share) for share in shares}) == 1
    real = [m for share in shares for m in share if not m.is_filler]
    assert sorted(real, key=lambda m: m.first_bin) == alone


# Who this process is ----------------------------------------------------------------------------------------


def test_one_process_is_alone(tmp_path: Path) -> None:
    with joined_ranks(run_of(tmp_path / "run", strategy="single")) as ranks:
        assert ranks is ALONE


@pytest.mark.parametrize(
    ("strategy", "num_started", "said"),
    [
        ("single", "2", "2 processes were started, strategy single"),
        ("zero2", "3", "3 processes were started, strategy zero2 with train.num_processes 2 expects 2"),
    ],
)
def test_a_number_of_processes_that_the_config_does_not_want_is_refused(
    tmp_path: Path, strategy: str, num_started: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", num_started)
    config = run_of(tmp_path / "run", strategy=strategy)
    with pytest.raises(RefusedError, match=said), joined_ranks(config):
        pass


def test_strategy_and_number_of_processes_are_outside_the_key_and_the_base_is_inside(tmp_path: Path) -> None:
    keys = {
        name: plan_job(run_of(tmp_path / "run", **settings)).key
        for name, settings in {
            "single": {"strategy": "single"},
            "zero2": {"strategy": "zero2"},
            "int8": {"strategy": "zero2", "base": "int8"},
        }.items()
    }
    assert keys["single"] == keys["zero2"] != keys["int8"]
