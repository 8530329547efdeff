"""Shards, plans, steps and micro-batches: every token in its place, every sum known beforehand."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines import storage
from schemas.dataset import PLAN
from schemas.errors import InputError, IntegrityError
from tests.trainer.tiny_models import (
    Document,
    example_of,
    learnable_documents,
    plan_table,
    random_documents,
    write_plans,
    write_shards,
)
from trainer.data import (
    ShardReader,
    check_plan,
    collate,
    micro_batches,
    plan_from_table,
    read_plan,
)
from trainer.steps import plan_steps, step_bins


@st.composite
def documents(draw: st.DrawFn, min_size: int = 1) -> list[Document]:
    """Documents of 0 to 12 tokens with ascending spans that don't touch; some begin at token 0."""
    found = []
    for _ in range(draw(st.integers(min_size, 6))):
        length = draw(st.integers(0, 12))
        borders = sorted(draw(st.sets(st.integers(0, length), max_size=6)))
        spans = [(a, b, draw(st.sampled_from([0.25, 1.0, 3.0]))) for a, b in _pairs(borders)]
        found.append(Document([draw(st.integers(0, 300)) for _ in range(length)], spans))
    return found


def _pairs(borders: list[int]) -> list[tuple[int, int]]:
    return [(borders[n], borders[n + 1]) for n in range(0, len(borders) - 1, 2)]


def targets_by_hand(document: Document) -> list[tuple[int, int, float]]:
    """(place of the state that predicts, token, weight) in document order."""
    return [
        (place - 1, document.ids[place], weight)
        for start, end, weight in document.spans
        for place in range(start, end)
        if place > 0
    ]


@given(documents(), st.integers(0, 100))
def test_targets_are_the_trained_tokens_seen_from_the_position_before(
    chats: list[Document], pad_to: int
) -> None:
    batch = collate([example_of(chat, row) for row, chat in enumerate(chats)], pad_to)
    expected, offset = [], 0
    for number, chat in enumerate(chats):
        for position, token, weight in targets_by_hand(chat):
            expected.append((offset + position, token, weight, number))
        offset += len(chat.ids)
    found = zip(
        batch.target_positions.tolist(),
        batch.targets.tolist(),
        batch.weights.tolist(),
        batch.target_documents.tolist(),
        strict=True,
    )
    assert list(found) == expected
    assert batch.num_trained_tokens == len(expected)


@given(documents(), st.integers(0, 100))
def test_a_row_is_the_documents_one_after_the_other_and_padding_is_a_document_of_its_own(
    chats: list[Document], pad_to: int
) -> None:
    batch = collate([example_of(chat, row) for row, chat in enumerate(chats)], pad_to)
    ids = [token for chat in chats for token in chat.ids]
    assert batch.num_tokens == len(ids)
    assert batch.input_ids[0, : len(ids)].tolist() == ids
    assert batch.input_ids.shape == (1, max(len(ids), pad_to))
    borders = batch.cu_seqlens.tolist()
    assert borders[0] == 0
    assert borders[-1] == batch.input_ids.shape[1]
    lengths = np.diff(borders).tolist()
    assert lengths[: len(chats)] == [len(chat.ids) for chat in chats]
    assert batch.position_ids[0].tolist() == [place for length in lengths for place in range(length)]
    assert batch.max_seqlen == max(lengths)
    assert batch.rows == tuple(range(len(chats)))


def test_dtypes_are_what_kernels_want() -> None:
    batch = collate([example_of(document) for document in random_documents([5, 9])])
    assert batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
    assert batch.targets.dtype == batch.target_positions.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.weights.dtype == torch.float32
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.device.type == "meta"
    assert moved.rows == batch.rows


# Shards -----------------------------------------------------------------------------------------------------


@given(documents(), st.integers(1, 5))
def test_the_reader_gives_back_what_was_written(chats: list[Document], rows_per_batch: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        root = write_shards(Path(folder), {"train": chats}, rows_per_batch=rows_per_batch)
        reader = ShardReader(root, "train")
        assert len(reader) == len(chats)
        for row, chat in enumerate(chats):
            example = reader.example(row)
            assert example.input_ids.tolist() == chat.ids
            spans = zip(example.span_starts, example.span_ends, example.span_weights, strict=True)
            assert [tuple(span) for span in spans] == chat.spans
            expected = sum(weight for _, _, weight in targets_by_hand(chat))
            assert reader.weight_sums[row] == pytest.approx(expected)
            assert reader.value(row, "row_id") == f"{row:032x}"
        assert reader.num_tokens.tolist() == [len(chat.ids) for chat in chats]


def test_several_files_are_read_in_the_order_of_state_json(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"train": random_documents([5, 6])})
    other = write_shards(tmp_path / "other", {"train": random_documents([7, 8, 9], seed=1)})
    (other / "train/data-00000-of-00001.arrow").rename(folder / "train/data-b.arrow")
    state = {"_data_files": [{"filename": "data-b.arrow"}, {"filename": "data-00000-of-00001.arrow"}]}
    (folder / "train/state.json").write_text(json.dumps(state))
    manifest = storage.check_manifest(folder, stage="split")
    shards = [entry for entry in manifest.files if entry.path.endswith(".arrow")]
    names = ("train/data-b.arrow", "train/state.json")
    added = [storage.file_entry(folder / name, folder=folder) for name in names]
    storage.write_manifest(folder, manifest.model_copy(update={"files": (*shards, *added)}))
    reader = ShardReader(folder, "train")
    assert reader.num_tokens.tolist() == [7, 8, 9, 5, 6]
    assert reader.example(3).input_ids.tolist() == random_documents([5, 6])[0].ids
    with pytest.raises(IndexError):
        reader.example(5)


def test_a_shard_cut_at_a_message_border_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"train": random_documents([5] * 30)})
    path = folder / "train/data-00000-of-00001.arrow"
    whole = storage.read_arrow(path).num_rows
    # The reader of Arrow streams itself takes such a file for a shorter one.
    with pa.OSFile(str(tmp_path / "short"), "wb") as sink:
        table = storage.read_arrow(path)
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_batch(table.to_batches()[0])
    assert storage.read_arrow(tmp_path / "short").num_rows < whole
    (tmp_path / "short").replace(path)
    with pytest.raises(IntegrityError, match=r"data-00000-of-00001\.arrow"):
        ShardReader(folder, "train")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'split'"):
        ShardReader(tmp_path / "06_shards", "train")
    folder = write_shards(tmp_path, {"train": random_documents([5])})
    with pytest.raises(InputError, match="no split 'test'"):
        ShardReader(folder, "test")
    write_plans(tmp_path, {"train": random_documents([5])})
    with pytest.raises(InputError, match=r"train-epoch-0003\.arrow"):
        read_plan(tmp_path, "train", 3)


def test_a_file_that_the_manifest_does_not_name_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"train": random_documents([5])})
    manifest = storage.check_manifest(folder, stage="split")
    storage.write_manifest(folder, manifest.model_copy(update={"files": ()}))
    with pytest.raises(IntegrityError, match="not in the manifest"):
        ShardReader(folder, "train")


# Plans and steps --------------------------------------------------------------------------------------------


def test_a_plan_of_other_shards_is_refused(tmp_path: Path) -> None:
    reader = ShardReader(write_shards(tmp_path, {"train": random_documents([5, 9])}), "train")
    check_plan(plan_from_table(plan_table([5, 9]), split="train", epoch=0), reader)
    for lengths in ([9, 5], [5, 9, 3]):
        plan = plan_from_table(plan_table(lengths), split="train", epoch=0)
        with pytest.raises(IntegrityError, match="other shards"):
            check_plan(plan, reader)


def test_a_plan_whose_bins_are_out_of_order_is_refused() -> None:
    rows = [{"bin": number, "example": 0, "offset": 0, "num_tokens": 5} for number in (0, 2, 1)]
    with pytest.raises(IntegrityError, match="not sorted"):
        plan_from_table(pa.Table.from_pylist(rows, schema=PLAN), split="train", epoch=0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 3))
def test_steps_cover_every_bin_of_every_epoch_once_and_know_their_sums(
    lengths: list[int], bins_per_step: int, epochs: int
) -> None:
    import tempfile

    chats = random_documents(lengths)
    with tempfile.TemporaryDirectory() as folder:
        reader = ShardReader(write_shards(Path(folder), {"train": chats}), "train")
    plans = [
        plan_from_table(plan_table(lengths, epoch=epoch), split="train", epoch=epoch)
        for epoch in range(epochs)
    ]
    steps = plan_steps(plans, reader, bins_per_step=bins_per_step)
    assert [step.number for step in steps] == list(range(len(steps)))
    for plan in plans:
        bins = [(step.first_bin, step.end_bin) for step in steps if step.epoch == plan.epoch]
        assert [number for first, end in bins for number in range(first, end)] == list(range(plan.num_bins))
    for step in steps:
        batches = [
            batch
            for _, batch in micro_batches(
                plans[step.epoch], reader, step.first_bin, step.end_bin, bins_per_micro_step=2
            )
        ]
        assert step.num_tokens == sum(batch.num_tokens for batch in batches)
        assert step.num_trained_tokens == sum(batch.num_trained_tokens for batch in batches)
        assert step.weight_sum == pytest.approx(sum(float(batch.weights.sum()) for batch in batches))


def test_bins_of_a_step_are_a_function_of_its_number_alone() -> None:
    plan = plan_from_table(plan_table([40] * 7), split="train", epoch=0)
    assert [step_bins(plan, step, 3) for step in range(4)] == [
        range(3),
        range(3, 6),
        range(6, 7),
        range(7, 7),
    ]


def test_caps_end_before_the_step_that_would_pass_them(tmp_path: Path) -> None:
    chats = learnable_documents(40)
    reader = ShardReader(write_shards(tmp_path, {"train": chats}), "train")
    plan = plan_from_table(plan_table([len(chat.ids) for chat in chats]), split="train", epoch=0)
    every = plan_steps([plan, plan], reader, bins_per_step=2)
    assert plan_steps([plan, plan], reader, bins_per_step=2, max_steps=5) == every[:5]
    three = sum(step.num_tokens for step in every[:3])
    assert plan_steps([plan, plan], reader, bins_per_step=2, max_tokens=three) == every[:3]
    assert plan_steps([plan, plan], reader, bins_per_step=2, max_tokens=three - 1) == every[:2]
    assert plan_steps([plan, plan], reader, bins_per_step=2, max_tokens=1) == []


def test_padding_rounds_a_row_up_and_adds_no_target(tmp_path: Path) -> None:
    chats = learnable_documents(10)
    reader = ShardReader(write_shards(tmp_path, {"train": chats}), "train")
    plan = plan_from_table(plan_table([len(chat.ids) for chat in chats]), split="train", epoch=0)
    plain = list(micro_batches(plan, reader, 0, plan.num_bins, bins_per_micro_step=1))
    padded = list(micro_batches(plan, reader, 0, plan.num_bins, bins_per_micro_step=1, pad_multiple=64))
    for (_, one), (_, other) in zip(plain, padded, strict=True):
        assert other.input_ids.shape[1] % 64 == 0
        assert torch.equal(one.targets, other.targets)
        assert one.num_tokens == other.num_tokens
