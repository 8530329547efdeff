"""Each method on five families, 20 steps: what moves, how the loss falls, what plain libraries load, and resuming.

Judges: plain PEFT and transformers. method_cases.py is the table. By default each method trains on one family, each
family meets some methods; `make stress` has all pairs.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TrainingResult
from tests.trainer.method_cases import CASES, FAMILIES, Case
from tests.trainer.tiny_models import learnable_documents, tiny_run, write_model, write_plans
from trainer import checkpoint
from trainer import train as train_module
from trainer.attention import use_packed_attention, use_plain_attention
from trainer.train import train

NUM_STEPS = 20
DOCUMENTS = {
    "train": learnable_documents(8),
    "validation": learnable_documents(6, seed=1),
    "test": learnable_documents(6, seed=2),
}
"""What tiny_run writes of eight."""
MAX_LOGIT_DIFFERENCE = 1e-4
"""Of logits of 10: in fp32, by fused layers here and plain ones there."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished training, and what was seen of its model before it was let go."""

    case: Case
    base: Path
    config: PipelineConfig
    result: TrainingResult
    names: frozenset[str]
    moved: frozenset[str]
    logits: torch.Tensor

    @property
    def folder(self) -> Path:
        return self.config.run_root / "checkpoints" / self.result.key


def pairs() -> list[Any]:
    """Of method and family. Those of the default run step through the families with the methods."""
    found = []
    for number, (name, case) in enumerate(CASES.items()):
        short = case.families[number % len(case.families)]
        for family in case.families:
            marks = [] if family == short else [pytest.mark.stress]
            found.append(pytest.param((name, family), id=f"{name}-{family}", marks=marks))
    return found


@pytest.fixture(scope="module", params=pairs())
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    name, family = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{family}".replace(" ", "-"))
    yield train_case(folder, CASES[name], family)
    shutil.rmtree(folder)


def train_case(folder: Path, case: Case, family: str) -> Trained:
    base = write_model(folder / "base", family, **FAMILIES[family], **case.shape)
    config = config_of(folder, case, base)
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "run_steps", watched(seen, train_module.run_steps))
        result = train(config)
    return Trained(case, base, config, result, **seen)


def config_of(folder: Path, case: Case, base: Path) -> PipelineConfig:
    """Each step trains on all documents, so its loss hangs on nothing but the steps before it."""
    changes = {
        "bins_per_step": 1000,
        "bins_per_micro_step": 4,
        "checkpoint_every_steps": NUM_STEPS // 2,
        "learning_rate": 1e-2,
        "trackers": [],
    }
    config = tiny_run(
        folder,
        model={"path": str(base), **case.model},
        train={**changes, **case.train},
        num_documents=len(DOCUMENTS["train"]),
        epochs=NUM_STEPS,
        **case.sections,
    )
    write_plans(config.run_root, DOCUMENTS, epochs=NUM_STEPS, capacity=case.capacity)
    return config


def watched(seen: dict[str, Any], run_steps: Any) -> Any:
    """The steps, with a look at the model before and after them."""

    def run(job: Any, model: torch.nn.Module, *others: Any) -> Any:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        progress = run_steps(job, model, *others)
        after = dict(model.named_parameters())
        seen["names"] = frozenset(before)
        seen["moved"] = frozenset(name for name, p in after.items() if not torch.equal(p, before[name]))
        use_plain_attention(model)
        seen["logits"] = logits_of(model)
        use_packed_attention(model)
        return progress

    return run


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=torch.tensor([DOCUMENTS["test"][0].ids])).logits
    return logits


def losses(training: Trained) -> list[float]:
    lines = [json.loads(line) for line in (training.folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_what_the_method_trains_moves_and_nothing_else(trained: Trained) -> None:
    expected = {name for name in trained.names if re.fullmatch(trained.case.moves, name)}
    assert expected
    assert trained.moved == expected


def test_the_loss_falls(trained: Trained) -> None:
    first, *_, last = found = losses(trained)
    assert len(found) == NUM_STEPS
    assert first - last > trained.case.min_fall


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_plain_libraries_load_what_was_saved_and_compute_the_same(trained: Trained) -> None:
    output = trained.folder / trained.result.output
    loaded = logits_of(trained.case.load(trained.base, output))
    assert float((loaded - trained.logits).abs().max()) < MAX_LOGIT_DIFFERENCE


def test_a_training_that_goes_on_from_a_checkpoint_ends_in_the_same_bytes(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that came after the checkpoint in the middle is taken away."""
    (trained.folder / "training.json").unlink()
    shutil.rmtree(trained.folder / trained.result.output)
    shutil.rmtree(trained.folder / checkpoint.step_name(NUM_STEPS))
    assert train(trained.config) == trained.result  # names every output file with its sha256
    assert f"going on after step {NUM_STEPS // 2}" in capsys.readouterr().err
