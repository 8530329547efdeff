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
    check_plan,
    collate,
    micro_batch,
    plan_from_table,
    read_plan,
)
from trainer.shard_reader import ShardReader
from trainer.steps import plan_steps, share_out


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
    added = [storage.file_entry(folder / name, folder=folder, num_rows=3) for name in names]
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
    reader = ShardReader(folder, "train")
    for read in (reader.check_files, lambda: reader.example(0), lambda: reader.num_tokens):
        with pytest.raises(IntegrityError, match=r"data-00000-of-00001\.arrow"):
            read()


def test_a_file_with_other_rows_than_its_manifest_says_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"train": random_documents([5, 6])})
    manifest = storage.check_manifest(folder, stage="split")
    entries = tuple(entry.model_copy(update={"num_rows": 3}) for entry in manifest.files)
    storage.write_manifest(folder, manifest.model_copy(update={"files": entries}))
    with pytest.raises(IntegrityError, match="has 2 rows, its manifest says 3"):
        ShardReader(folder, "train").example(2)


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
    chats = {"train": random_documents([5, 9])}
    shards, plans = write_shards(tmp_path, chats), write_plans(tmp_path, chats)
    check_plan(tmp_path)
    manifest = storage.check_manifest(plans, stage="pack")
    storage.write_manifest(plans, manifest.model_copy(update={"inputs": {shards.name: "another key"}}))
    with pytest.raises(IntegrityError, match="other shards"):
        check_plan(tmp_path)


@pytest.mark.parametrize("lengths", [[9, 5], [5, 9, 3], [5, 10]])
def test_a_document_with_other_tokens_than_its_plan_says_is_refused(
    tmp_path: Path, lengths: list[int]
) -> None:
    reader = ShardReader(write_shards(tmp_path, {"train": random_documents([5, 9])}), "train")
    plan = plan_from_table(plan_table(random_documents(lengths)), split="train", epoch=0)
    with pytest.raises(IntegrityError, match="which are not in"):
        micro_batch(plan, reader, 0, plan.num_bins)


def test_a_plan_whose_bins_are_out_of_order_is_refused() -> None:
    plan = plan_table(random_documents([40, 40, 40]))
    with pytest.raises(IntegrityError, match="not sorted"):
        plan_from_table(plan.take([0, 2, 1]), split="train", epoch=0)


@given(documents(), st.data())
def test_a_piece_of_a_document_is_its_tokens_and_their_spans(
    chats: list[Document], data: st.DataObject
) -> None:
    for chat in chats:
        first = data.draw(st.integers(0, len(chat.ids)))
        num_tokens = data.draw(st.integers(0, len(chat.ids) - first))
        piece = example_of(chat).piece(first, num_tokens)
        assert piece.input_ids.tolist() == chat.ids[first : first + num_tokens]
        weights = {place: weight for start, end, weight in chat.spans for place in range(start, end)}
        found = {
            first + place: weight
            for start, end, weight in zip(piece.span_starts, piece.span_ends, piece.span_weights, strict=True)
            for place in range(start, end)
        }
        assert found == {p: w for p, w in weights.items() if first <= p < first + num_tokens}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 3))
def test_steps_cover_every_bin_of_every_epoch_once_and_know_their_sums(
    lengths: list[int], bins_per_step: int, epochs: int
) -> None:
    import tempfile

    chats = random_documents(lengths)
    with tempfile.TemporaryDirectory() as folder:
        reader = ShardReader(write_shards(Path(folder), {"train": chats}), "train")
        reader.check_files()  # mapped from here on, also without a name on the disk
    plans = [
        plan_from_table(plan_table(chats, epoch=epoch), split="train", epoch=epoch) for epoch in range(epochs)
    ]
    steps = plan_steps(plans, bins_per_step=bins_per_step)
    assert [step.number for step in steps] == list(range(len(steps)))
    for plan in plans:
        bins = [(step.first_bin, step.end_bin) for step in steps if step.epoch == plan.epoch]
        assert [number for first, end in bins for number in range(first, end)] == list(range(plan.num_bins))
    for step in steps:
        batches = [
            micro_batch(plans[step.epoch], reader, first, min(first + 2, step.end_bin))
            for first in range(step.first_bin, step.end_bin, 2)
        ]
        assert step.num_tokens == sum(batch.num_tokens for batch in batches)
        assert step.num_trained_tokens == sum(batch.num_trained_tokens for batch in batches)
        assert step.weight_sum == pytest.approx(sum(float(batch.weights.sum()) for batch in batches))


def test_bins_of_a_step_are_a_function_of_its_number_alone() -> None:
    plan = plan_from_table(plan_table(random_documents([40] * 7)), split="train", epoch=0)
    steps = plan_steps([plan], bins_per_step=3)
    assert [range(step.first_bin, step.end_bin) for step in steps] == [
        range(3),
        range(3, 6),
        range(6, 7),
    ]


def test_caps_end_before_the_step_that_would_pass_them() -> None:
    chats = learnable_documents(40)
    plan = plan_from_table(plan_table(chats), split="train", epoch=0)
    every = plan_steps([plan, plan], bins_per_step=2)
    assert plan_steps([plan, plan], bins_per_step=2, max_steps=5) == every[:5]
    three = sum(step.num_tokens for step in every[:3])
    assert plan_steps([plan, plan], bins_per_step=2, max_tokens=three) == every[:3]
    assert plan_steps([plan, plan], bins_per_step=2, max_tokens=three - 1) == every[:2]
    assert plan_steps([plan, plan], bins_per_step=2, max_tokens=1) == []


def test_padding_rounds_a_row_up_and_adds_no_target(tmp_path: Path) -> None:
    chats = learnable_documents(10)
    reader = ShardReader(write_shards(tmp_path, {"train": chats}), "train")
    plan = plan_from_table(plan_table(chats), split="train", epoch=0)
    for number in range(plan.num_bins):
        one = micro_batch(plan, reader, number, number + 1)
        other = micro_batch(plan, reader, number, number + 1, pad_multiple=64)
        assert other.input_ids.shape[1] % 64 == 0
        assert torch.equal(one.targets, other.targets)
        assert one.num_tokens == other.num_tokens


# Ranks ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 8))
def test_ranks_get_equally_many_pieces_of_work(costs: list[int], num_ranks: int) -> None:
    ranks = share_out(costs, num_ranks)
    counts = [ranks.count(rank) for rank in range(num_ranks)]
    assert sum(counts) == len(costs)
    assert max(counts) - min(counts) <= 1


def test_ranks_get_nearly_the_same_squares_of_lengths_in_each_step() -> None:
    """A mix of long chats and short instructions, 8 ranks: taking turns leaves a rank a quarter over the mean."""
    draws = np.random.default_rng(0)
    lengths = np.concatenate([np.full(500, 4096), draws.integers(100, 4096, 1500)]).astype(np.float64)
    excess: dict[str, list[float]] = {"shared": [], "turns": []}
    for _ in range(50):
        costs = draws.choice(lengths, 64) ** 2
        shared, turns = np.array(share_out(costs.tolist(), 8)), np.arange(64) % 8
        for name, ranks in (("shared", shared), ("turns", turns)):
            sums = np.bincount(ranks, weights=costs)
            excess[name].append(float(sums.max() / sums.mean() - 1))
    assert np.mean(excess["shared"]) < 0.03
    assert np.mean(excess["turns"]) > 0.2
