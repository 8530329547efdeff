"""A checkpoint is there whole or not at all, its numbers once each; a damaged one is refused, said, the one before taken."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipelines import storage
from schemas.errors import TrainingError
from trainer.checkpoint import (
    Checkpoint,
    Progress,
    complete,
    read_checkpoint,
    read_newest,
    settle,
    step_folders,
    step_name,
    write_part,
)
from trainer.folders import hidden, remove_leftovers
from trainer.piece_files import Index, StoredRun, check_covered
from trainer.pieces import KINDS, Piece, Shapes, check_shapes
from trainer.ranks import Ranks

FACTS = {"key": "0123456789abcdef", "num_steps": 40}
PIECES_NAME = "pieces-00001-of-00001.safetensors"
FILES = (PIECES_NAME, "index.json", "state.json", "manifest.json")
SHAPES: Shapes = {"a.weight": torch.Size([3, 4]), "b.weight": torch.Size([5]), "scale": torch.Size([])}


def progress_at(step: int) -> Progress:
    return Progress(num_steps=step, num_updates=step, first_loss=0.1 + 0.2, last_loss=1 / 3)


def numbers(step: int, kind: str, name: str) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1000 * step + 10 * KINDS.index(kind) + list(SHAPES).index(name))
    return torch.randn(SHAPES[name].numel(), generator=draws)


def pieces_at(step: int, cuts: Sequence[float] = (0, 1)) -> Iterator[Piece]:
    """Of each tensor the share between each two cuts. `scale` was never updated: it has no moments."""
    for name in SHAPES:
        for kind in KINDS if name != "scale" else KINDS[:1]:
            whole = numbers(step, kind, name)
            borders = [round(cut * len(whole)) for cut in cuts]
            for start, end in itertools.pairwise(borders):
                yield Piece(kind, name, start, whole[start:end])


def write(folder: Path, step: int, *, keep: int = 2) -> Path:
    final = folder / step_name(step)
    aside = hidden(final)
    write_part(aside, SHAPES, lambda: pieces_at(step))
    assert complete(aside, final, progress_at(step), facts=FACTS)
    settle(folder, newest=final, keep=keep)
    return final


def read(folder: Path, facts: dict[str, Any] = FACTS) -> tuple[Checkpoint | None, list[str]]:
    said: list[str] = []
    return read_newest(folder, facts=facts, report=said.append), said


def assert_is(found: Checkpoint | None, step: int) -> None:
    assert found is not None
    assert found.progress == progress_at(step)
    assert found.shapes == SHAPES
    for name in SHAPES:
        for kind in KINDS:
            values = found.read(kind, name, 0, SHAPES[name].numel())
            if name == "scale" and kind != "weight":
                assert values is None
            else:
                assert values is not None
                assert torch.equal(values, numbers(step, kind, name))


def test_what_was_written_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path, 10)
    final = write(tmp_path, 20)
    assert final.name == "step-00000020"
    assert sorted(path.name for path in final.iterdir()) == sorted(FILES)
    assert (tmp_path / "latest").read_text() == "step-00000020\n"
    found, said = read(tmp_path)
    assert_is(found, 20)
    assert said == []


def test_the_pieces_are_a_file_that_the_safetensors_library_reads(tmp_path: Path) -> None:
    found = load_file(write(tmp_path, 10) / PIECES_NAME)
    assert len(found) == 3 + 3 + 1
    assert torch.equal(found["exp_avg.a.weight:0"], numbers(10, "exp_avg", "a.weight"))
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


# Any number of processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(0, 1), (0, 0.5, 1), (0, 0.1, 0.7, 1), (0, 0, 0.3, 0.3, 1)])
def test_any_range_is_read_from_any_cut(tmp_path: Path, cuts: tuple[float, ...]) -> None:
    """Each rank writes the share between two cuts; some have none of a small tensor."""
    count = len(cuts) - 1
    aside, final = hidden(tmp_path / step_name(10)), tmp_path / step_name(10)
    for number in range(count):
        share = cuts[number : number + 2]
        write_part(aside, SHAPES, lambda share=share: pieces_at(10, share), Ranks(number, count))  # type: ignore[misc]
    assert complete(aside, final, progress_at(10), facts=FACTS, num_parts=count)
    found = read_checkpoint(final, facts=FACTS)
    assert_is(found, 10)
    whole = numbers(10, "exp_avg_sq", "a.weight")
    for start in range(12):
        for end in range(start, 13):
            part = found.read("exp_avg_sq", "a.weight", start, end)
            assert part is not None
            assert torch.equal(part, whole[start:end])
    assert len(list(final.glob("pieces-*.safetensors"))) == count


def test_a_checkpoint_is_not_published_before_all_parts_are_there(tmp_path: Path) -> None:
    aside, final = hidden(tmp_path / step_name(10)), tmp_path / step_name(10)
    write_part(aside, SHAPES, lambda: pieces_at(10, (0, 0.5)), Ranks(0, 2))
    asked = iter([False, False, True])
    assert not complete(
        aside, final, progress_at(10), facts=FACTS, num_parts=2, is_given_up=lambda: next(asked)
    )
    assert not final.exists()


@pytest.mark.parametrize(
    ("cuts", "said"),
    [
        ((0, 0.6), "numbers 7 to 12 of weight of a.weight are missing"),
        ((0.5, 1), "numbers 0 to 6"),
        ((), "missing"),
    ],
)
def test_numbers_that_no_process_has_written_are_no_checkpoint(
    tmp_path: Path, cuts: tuple[float, ...], said: str
) -> None:
    aside, final = hidden(tmp_path / step_name(10)), tmp_path / step_name(10)
    write_part(aside, SHAPES, lambda: pieces_at(10, cuts))
    with pytest.raises(ValueError, match=said):
        complete(aside, final, progress_at(10), facts=FACTS)
    assert not final.exists()


def test_numbers_that_two_processes_have_written_are_no_checkpoint(tmp_path: Path) -> None:
    aside, final = hidden(tmp_path / step_name(10)), tmp_path / step_name(10)
    for number in range(2):
        write_part(aside, SHAPES, lambda: pieces_at(10), Ranks(number, 2))
    with pytest.raises(ValueError, match="are there twice"):
        complete(aside, final, progress_at(10), facts=FACTS, num_parts=2)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=6))
def test_runs_are_taken_if_and_only_if_each_number_is_in_one_of_them(runs: list[tuple[int, int]]) -> None:
    """Judge: counting."""
    counts = [sum(start <= place < start + length for start, length in runs) for place in range(20)]
    is_whole = counts == [1] * 9 + [0] * 11
    stored = tuple(sorted((StoredRun("f", start, start + n) for start, n in runs), key=lambda run: run.start))
    index = Index(shapes={"w": (3, 3)}, runs={"weight": {"w": stored}, "exp_avg": {}, "exp_avg_sq": {}})
    if is_whole:
        check_covered(index)
    else:
        with pytest.raises(ValueError, match="numbers"):
            check_covered(index)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(TrainingError, match="first difference extra"):
        check_shapes({**SHAPES, "extra": torch.Size([1])}, SHAPES)
    with pytest.raises(TrainingError, match=r"scale has shape \(1,\), expected \(\)"):
        check_shapes({**SHAPES, "scale": torch.Size([1])}, SHAPES)


# Which one is taken -----------------------------------------------------------------------------------------


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert read(tmp_path / "absent") == (None, [])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep=3)
    assert [folder.name for folder in step_folders(tmp_path)] == [f"step-0000000{n}" for n in (5, 4, 3)]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_checkpoint_of_the_first_format_is_refused_by_its_number(tmp_path: Path) -> None:
    write(tmp_path, 10)
    path = write(tmp_path, 20) / "manifest.json"
    storage.write_record(path, {"format_version": 1, "stage": "train", "files": []})
    found, said = read(tmp_path)
    assert_is(found, 10)
    assert "it has format_version 1, this version reads 2" in said[0]


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
    (tmp_path / ".tmp-77-step-00000020" / PIECES_NAME).write_bytes(b"half")
    (tmp_path / ".tmp-77-latest").write_bytes(b"ste")
    before = storage.file_sha256(tmp_path / "step-00000010" / PIECES_NAME)
    assert_is(read(tmp_path)[0], 10)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010"]
    assert storage.file_sha256(tmp_path / "step-00000010" / PIECES_NAME) == before
