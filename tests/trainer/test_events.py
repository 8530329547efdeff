"""TensorBoard itself reads what was written: every curve, every step, and none that a killed run had to do again."""

import resource
from pathlib import Path

import pytest

from schemas.errors import StorageError
from trainer.events import Events

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = accumulators.EventAccumulator(str(folder))
    found.Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]
    }


def test_tensorboard_reads_every_curve(tmp_path: Path) -> None:
    with Events(tmp_path, num_steps_done=0) as events:
        events.add({"loss": 2.5, "learning_rate": 0.25}, 1)
        events.add({"loss": 1.5}, 2)
    assert curves(tmp_path) == {"loss": [(1, 2.5), (2, 1.5)], "learning_rate": [(1, 0.25)]}


def test_steps_that_a_resumed_run_does_again_count_once(tmp_path: Path) -> None:
    with Events(tmp_path, num_steps_done=0) as events:
        for step in (1, 2, 3):
            events.add({"loss": float(step)}, step)
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.0000000001.before")
    with Events(tmp_path, num_steps_done=1) as events:
        events.add({"loss": 9.0}, 2)
    assert curves(tmp_path) == {"loss": [(1, 1.0), (2, 9.0)]}


def test_a_full_disk_is_told_at_once_by_the_name_of_the_file(tmp_path: Path) -> None:
    with Events(tmp_path, num_steps_done=0) as events:
        (path,) = tmp_path.iterdir()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
        try:
            with pytest.raises(StorageError, match=rf"{path.name}: File too large"):
                events.add({"loss": 1.0}, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
