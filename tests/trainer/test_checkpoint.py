"""A checkpoint is there whole or not at all; a damaged one is refused, said, and the one before it taken."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import storage
from trainer.checkpoint import (
    Checkpoint,
    Progress,
    read_newest,
    remove_leftovers,
    step_folders,
    write_checkpoint,
)

FACTS = {"key": "0123456789abcdef", "num_steps": 40}
FILES = ("weights.safetensors", "moments.safetensors", "state.json", "manifest.json")


def checkpoint_of(step: int) -> Checkpoint:
    draws = torch.Generator().manual_seed(step)
    weights = {name: torch.randn(3, 4, generator=draws) for name in ("a.weight", "b.weight")}
    moments = {f"exp_avg.{name}": torch.randn(3, 4, generator=draws) for name in weights}
    progress = Progress(num_steps=step, num_updates=step, first_loss=0.1 + 0.2, last_loss=1 / 3)
    return Checkpoint(progress, weights, moments)


def write(folder: Path, step: int, *, keep: int = 2) -> Path:
    return write_checkpoint(folder, checkpoint_of(step), facts=FACTS, keep=keep)


def read(folder: Path, facts: dict[str, Any] = FACTS) -> tuple[Checkpoint | None, list[str]]:
    said: list[str] = []
    return read_newest(folder, facts=facts, report=said.append), said


def assert_is(found: Checkpoint | None, step: int) -> None:
    expected = checkpoint_of(step)
    assert found is not None
    assert found.progress == expected.progress
    for ours, theirs in ((found.weights, expected.weights), (found.moments, expected.moments)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_was_written_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path, 10)
    final = write(tmp_path, 20)
    assert final.name == "step-00000020"
    assert (tmp_path / "latest").read_text() == "step-00000020\n"
    found, said = read(tmp_path)
    assert_is(found, 20)
    assert said == []


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert read(tmp_path / "absent") == (None, [])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep=3)
    assert [folder.name for folder in step_folders(tmp_path)] == [f"step-0000000{n}" for n in (5, 4, 3)]
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_a_damaged_file_makes_the_checkpoint_unusable_and_the_one_before_is_taken(
    tmp_path: Path, name: str, damage: str
) -> None:
    write(tmp_path, 10)
    path = write(tmp_path, 20) / name
    whole = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        path.write_bytes({"flip": bytes(flipped), "cut": whole[:-1], "empty": b""}[damage])
    if name == "manifest.json" and damage == "cut":
        return  # the file's last byte is a line end: what is left says all that it said
    found, said = read(tmp_path)
    assert_is(found, 10)
    assert len(said) == 1
    assert "step-00000020" in said[0]


def test_every_flipped_byte_of_the_manifest_is_noticed_or_harmless(tmp_path: Path) -> None:
    write(tmp_path, 10)
    path = write(tmp_path, 20) / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(bytes(flipped))
        found, _ = read(tmp_path)
        assert found is not None
        assert_is(found, found.progress.num_steps)


def test_a_checkpoint_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path, 10)
    found, said = read(tmp_path, {**FACTS, "num_steps": 41})
    assert found is None
    assert "other settings" in said[0]


def test_a_refused_checkpoint_makes_way_when_training_passes_it_again(tmp_path: Path) -> None:
    write(tmp_path, 10)
    (write(tmp_path, 20) / "state.json").write_bytes(b"{}")
    write(tmp_path, 15)
    assert_is(read(tmp_path)[0], 15)
    write(tmp_path, 20)
    found, said = read(tmp_path)
    assert_is(found, 20)
    assert said == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_ends_at_any_call_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    """Each call that changes the disk is once the last one of a process."""
    found_steps = []
    for call in range(200):
        folder = tmp_path / str(call)
        write(folder, 20, keep=1)
        has_finished = ends_at_call(folder, call)
        found, said = read(folder)
        assert said == []
        assert found is not None
        assert_is(found, found.progress.num_steps)
        found_steps.append(found.progress.num_steps)
        remove_leftovers(folder)
        assert not list(folder.glob(".tmp-*"))
        if has_finished:
            break
    assert has_finished
    assert len(found_steps) > 15
    assert found_steps == sorted(found_steps)
    assert set(found_steps) == {20, 30}


def ends_at_call(folder: Path, number: int) -> bool:
    """Write step 30 in a child that dies at its call `number`; True if it came to its end."""
    child = os.fork()
    if child == 0:
        calls = 0
        for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
            real = getattr(os, name)

            def counted(*arguments: Any, real: Any = real, **named: Any) -> Any:
                nonlocal calls
                if calls == number:
                    os._exit(9)
                calls += 1
                return real(*arguments, **named)

            setattr(os, name, counted)
        try:
            write(folder, 30, keep=1)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 9)
    return os.waitstatus_to_exitcode(status) == 0


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 10)
    (tmp_path / ".tmp-77-step-00000020").mkdir()
    (tmp_path / ".tmp-77-step-00000020" / "weights.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-77-latest").write_bytes(b"ste")
    before = storage.file_sha256(tmp_path / "step-00000010" / "weights.safetensors")
    assert_is(read(tmp_path)[0], 10)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010"]
    assert storage.file_sha256(tmp_path / "step-00000010" / "weights.safetensors") == before
