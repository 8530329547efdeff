"""Any checkpoint becomes a folder that transformers and PEFT load. Judge: what a finished training has published."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from schemas.errors import InputError, IntegrityError, TrainingError
from schemas.pipeline_config import PipelineConfig
from tests.trainer.tiny_models import tiny_run, write_model
from trainer.checkpoint import complete, read_checkpoint, write_part
from trainer.consolidate import consolidate, find_checkpoint
from trainer.folders import hidden
from trainer.job import plan_job
from trainer.pieces import KINDS, Piece
from trainer.ranks import Ranks
from trainer.train import train


def run_of(folder: Path, *, dtype: str = "float32", **settings: Any) -> PipelineConfig:
    model = folder.parent / "model"
    if not model.exists():
        write_model(model)
    common: dict[str, Any] = {"checkpoint_every_steps": 2, "max_steps": 4}
    return tiny_run(folder, train=common | settings, model={"path": str(model), "dtype": dtype})


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "adapter"),
        ({"dtype": "bfloat16"}, "adapter"),
        ({"method": "full", "dtype": "bfloat16"}, "model"),
        ({"method": "freeze", "freeze": {"last_layers": 1}, "dtype": "bfloat16"}, "model"),
        ({"method": "expand", "expand": {"new_layers": 1}}, "model"),
    ],
)
def test_the_last_checkpoint_gives_the_folder_that_training_has_published(
    tmp_path: Path, settings: dict[str, Any], name: str
) -> None:
    config = run_of(tmp_path / "run", **settings)
    train(config)
    out = consolidate(config, out=tmp_path / "out")
    assert folder_bytes(out) == folder_bytes(plan_job(config).folder / name)


def test_an_earlier_checkpoint_and_one_of_several_processes_are_taken_too(tmp_path: Path) -> None:
    config = run_of(tmp_path / "run", keep_best=True)
    train(config)
    training = plan_job(config).folder
    early = consolidate(config, checkpoint="step-00000002", out=tmp_path / "early")
    late = consolidate(config, checkpoint="best", out=tmp_path / "late")
    assert folder_bytes(early).keys() == folder_bytes(late).keys()
    weights = "adapter_model.safetensors"
    assert (early / weights).read_bytes() != (late / weights).read_bytes()
    other = in_three_parts(training / "step-00000002", tmp_path / "elsewhere" / "step-00000002")
    found = consolidate(config, checkpoint=str(other), out=tmp_path / "from-parts")
    assert folder_bytes(found) == folder_bytes(early)


def in_three_parts(folder: Path, final: Path) -> Path:
    """The same numbers, each tensor cut at thirds over three ranks."""
    whole = read_checkpoint(folder, facts=None)
    aside = hidden(final)
    for number in range(3):
        pieces = []
        for name, shape in whole.shapes.items():
            start, end = (shape.numel() * n // 3 for n in (number, number + 1))
            for kind in KINDS:
                values = whole.read(kind, name, start, end)
                assert values is not None
                pieces.append(Piece(kind, name, start, values))
        write_part(aside, whole.shapes, lambda pieces=pieces: pieces, Ranks(number, 3))  # type: ignore[misc]
    assert complete(aside, final, whole.progress, facts=whole.facts, num_parts=3)
    return final


def test_what_is_not_there_or_not_whole_is_refused(tmp_path: Path) -> None:
    config = run_of(tmp_path / "run")
    with pytest.raises(InputError, match="has no checkpoint; train first"):
        find_checkpoint(config, "latest")
    train(config)
    with pytest.raises(InputError, match="has no checkpoint best; there are step-00000004, step-00000002"):
        find_checkpoint(config, "best")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there already"):
        consolidate(config, out=tmp_path / "there")
    with pytest.raises(TrainingError, match=r"has shape \(16, 64\), expected \(8, 64\)"):
        consolidate(run_of(tmp_path / "run", lora={"rank": 8}), out=tmp_path / "other")
    folder = find_checkpoint(config, "latest")
    path = folder / "pieces-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="is not the file its manifest names"):
        consolidate(config, out=tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
    assert load_file(folder.parent / "adapter" / "adapter_model.safetensors")
