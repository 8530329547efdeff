"""Training goes on while a checkpoint is written: it holds the state of its step, and what goes wrong is told."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import StorageError
from schemas.training_config import TrainConfig
from trainer import checkpoint, checkpoint_writer
from trainer.checkpoint import Progress, read_newest, step_name
from trainer.checkpoint_writer import CheckpointWriter
from trainer.optimizers import MasterOptimizer
from trainer.ranks import ALONE, Ranks

FACTS = {"key": "0123456789abcdef"}
WAIT_SECONDS = 30.0


class Gate:
    """Holds a function back until it is opened."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.is_open = threading.Event()
        self.was_reached = threading.Event()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.was_reached.set()
        assert self.is_open.wait(WAIT_SECONDS)
        return self._function(*arguments, **named)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate(checkpoint.write_part)
    monkeypatch.setattr(checkpoint, "write_part", gate)
    return gate


@pytest.fixture
def optimizer() -> MasterOptimizer:
    torch.manual_seed(0)
    found = MasterOptimizer(torch.nn.Linear(40, 30).named_parameters(), TrainConfig())
    update(found)
    return found


def update(optimizer: MasterOptimizer) -> None:
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.5)


def state_of(optimizer: MasterOptimizer) -> dict[tuple[str, str], torch.Tensor]:
    return {(piece.kind, piece.name): piece.values.clone() for piece in optimizer.pieces()}


def open_writer(folder: Path, optimizer: MasterOptimizer, ranks: Ranks = ALONE) -> CheckpointWriter:
    writer = CheckpointWriter(folder, ranks, facts=FACTS, keep=2)
    writer.reserve(optimizer)
    return writer


def save(writer: CheckpointWriter, optimizer: MasterOptimizer, step: int) -> float:
    """The seconds that training has waited."""
    told: list[float] = []
    progress = Progress(num_steps=step, num_updates=step)
    writer.save(optimizer, progress, when_copied=told.append, before_publishing=lambda: None)
    return told[0]


def assert_holds(folder: Path, step: int, expected: dict[tuple[str, str], torch.Tensor]) -> None:
    found = read_newest(folder, facts=FACTS, report=pytest.fail)
    assert found is not None
    assert found.progress.num_steps == step
    assert expected
    for (kind, name), values in expected.items():
        read = found.read(kind, name, 0, values.numel())
        assert read is not None
        assert torch.equal(read, values)


def test_training_goes_on_and_the_checkpoint_is_of_its_step(
    tmp_path: Path, optimizer: MasterOptimizer, slow_disk: Gate
) -> None:
    expected = state_of(optimizer)
    with open_writer(tmp_path, optimizer) as writer:
        seconds = save(writer, optimizer, 5)
        assert slow_disk.was_reached.wait(WAIT_SECONDS)
        update(optimizer)  # training does not wait, and changes what is being written
        writer.check()
        assert not (tmp_path / step_name(5)).exists()
        slow_disk.is_open.set()
        writer.wait()
        assert_holds(tmp_path, 5, expected)
    assert seconds < WAIT_SECONDS / 2
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_next_checkpoint_waits_for_the_one_before_and_tells_so(
    tmp_path: Path, optimizer: MasterOptimizer, slow_disk: Gate
) -> None:
    with open_writer(tmp_path, optimizer) as writer:
        save(writer, optimizer, 5)
        update(optimizer)
        expected = state_of(optimizer)
        threading.Timer(0.5, slow_disk.is_open.set).start()
        assert save(writer, optimizer, 6) > 0.4
        assert (tmp_path / step_name(5)).exists()
    assert_holds(tmp_path, 6, expected)


def test_what_goes_wrong_beside_the_training_ends_it_at_its_next_step(
    tmp_path: Path, optimizer: MasterOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StorageError("the disk is full")

    expected = state_of(optimizer)

    def train() -> None:
        with open_writer(tmp_path, optimizer) as writer:
            save(writer, optimizer, 5)
            writer.wait()
            monkeypatch.setattr(checkpoint, "complete", full)
            save(writer, optimizer, 6)
            deadline = time.monotonic() + WAIT_SECONDS
            while time.monotonic() < deadline:
                writer.check()
                time.sleep(0.01)

    with pytest.raises(StorageError, match="the disk is full"):
        train()
    assert_holds(tmp_path, 5, expected)
    assert not list(tmp_path.glob(".tmp-*"))


def test_after_an_error_of_the_training_a_begun_checkpoint_is_still_written(
    tmp_path: Path, optimizer: MasterOptimizer, slow_disk: Gate
) -> None:
    expected = state_of(optimizer)
    threading.Timer(0.2, slow_disk.is_open.set).start()

    def train() -> None:
        with open_writer(tmp_path, optimizer) as writer:
            save(writer, optimizer, 5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert_holds(tmp_path, 5, expected)


def test_a_state_too_large_to_be_copied_is_written_while_training_waits(
    tmp_path: Path, optimizer: MasterOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    original = checkpoint.write_part

    def watched(*arguments: Any, **named: Any) -> None:
        threads.append(threading.current_thread())
        original(*arguments, **named)

    monkeypatch.setattr(checkpoint, "write_part", watched)
    monkeypatch.setattr(checkpoint_writer, "free_machine_bytes", lambda: 1000)
    expected = state_of(optimizer)
    with open_writer(tmp_path, optimizer) as writer:
        save(writer, optimizer, 5)
        update(optimizer)
    assert threads == [threading.main_thread()]
    assert_holds(tmp_path, 5, expected)


@pytest.fixture
def two_ranks(tmp_path: Path, optimizer: MasterOptimizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two writers that take turns in one process; they agree on the number of their hidden folder."""
    monkeypatch.setattr(Ranks, "largest", lambda self, value: value or 77)
    monkeypatch.setattr(checkpoint_writer.os, "getpid", lambda: 77)
    writers = [open_writer(tmp_path, optimizer, Ranks(number, 2)) for number in range(2)]
    yield writers
    for writer in writers:
        writer.__exit__(KeyboardInterrupt)


def test_the_first_rank_publishes_once_all_have_written(
    tmp_path: Path,
    optimizer: MasterOptimizer,
    two_ranks: list[CheckpointWriter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = state_of(optimizer)
    shares = [
        MasterOptimizer(optimizer.parameters.items(), TrainConfig(), Ranks(number, 2)) for number in range(2)
    ]
    for share in shares:
        share._update = optimizer._update
        share.masters = optimizer.masters
    first, second = two_ranks
    save(first, shares[0], 5)
    time.sleep(0.2)
    assert not (tmp_path / step_name(5)).exists()
    save(second, shares[1], 5)
    second.wait()
    first.wait()
    monkeypatch.undo()
    assert_holds(tmp_path, 5, expected)
