"""Shards: `datasets` reads them with equal content, equal rows give equal bytes, a cut stream is refused."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.pieces import Example
from pipelines.shards import END_MARK, examples_to_batch, open_split, write_dataset
from schemas.dataset import SHARD, SPLITS
from schemas.errors import InputError, IntegrityError


def example_of(number: int, num_tokens: int = 5) -> Example:
    return Example(
        input_ids=np.arange(number, number + num_tokens, dtype=np.int32),
        span_starts=np.array([1, 3][: number % 3], np.int32),
        span_ends=np.array([2, 5][: number % 3], np.int32),
        span_weights=np.array([1.0, 0.5][: number % 3], np.float32),
        num_tokens=num_tokens,
        num_trained_tokens=number % 3,
        num_trained_bytes=number,
        row_id=f"row {number}",
        piece=number % 2,
        first_message=0,
        end_message=2,
        source="source/ä.json",
        language="und",
    )


def tables_of(numbers: range, cuts: list[int]) -> list[pa.Table]:
    borders = [0, *sorted(cuts), len(numbers)]
    return [
        pa.Table.from_batches([examples_to_batch([example_of(n) for n in numbers[start:end]])])
        for start, end in pairwise(borders)
    ]


def write(
    folder: Path, cuts: list[int], *, num_rows: int = 25, file_bytes: int = 2**28
) -> list[tuple[Path, int]]:
    tables = {"train": tables_of(range(num_rows), cuts), "validation": tables_of(range(3), []), "test": []}
    return write_dataset(folder, tables, batch_rows=10, file_bytes=file_bytes)


def test_datasets_reads_what_was_written(tmp_path: Path) -> None:
    import datasets

    write(tmp_path, [7])
    loaded = datasets.load_from_disk(tmp_path)
    assert list(loaded) == list(SPLITS)
    assert [len(loaded[split]) for split in SPLITS] == [25, 3, 0]
    assert loaded["train"].column_names == SHARD.names
    assert loaded["train"].features == datasets.Features.from_arrow_schema(SHARD)
    expected = pa.concat_tables(tables_of(range(25), []))
    assert loaded["train"].data.table.combine_chunks().equals(expected.combine_chunks())
    assert loaded["train"][4]["input_ids"] == [4, 5, 6, 7, 8]
    assert loaded["train"].info.splits["train"].num_examples == 25
    assert loaded["train"]._fingerprint != loaded["validation"]._fingerprint


def test_a_split_opens_memory_mapped_with_equal_content(tmp_path: Path) -> None:
    write(tmp_path, [])
    allocated = pa.total_allocated_bytes()
    table = open_split(tmp_path, "train")
    assert pa.total_allocated_bytes() - allocated < 1024
    assert table.schema.equals(SHARD)
    assert table.to_pylist() == pa.concat_tables(tables_of(range(25), [])).to_pylist()
    assert open_split(tmp_path, "test").num_rows == 0


def test_batches_have_the_same_rows_but_the_last(tmp_path: Path) -> None:
    write(tmp_path, [3, 4, 4, 21])
    batches = open_split(tmp_path, "train").to_batches()
    assert [batch.num_rows for batch in batches] == [10, 10, 5]


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, 25), max_size=5))
def test_equal_rows_give_equal_bytes_wherever_parts_were_cut(
    cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folders = [tmp_path_factory.mktemp("shards") for _ in range(2)]
    written = [write(folder, folder_cuts) for folder, folder_cuts in zip(folders, ([], cuts), strict=True)]
    names = [[path.relative_to(folder) for path, _ in w] for folder, w in zip(folders, written, strict=True)]
    assert names[0] == names[1]
    for (one, num_rows), (other, other_num_rows) in zip(*written, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert num_rows == other_num_rows


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    def fingerprint(folder: str, num_rows: int) -> str:
        write(tmp_path / folder, [], num_rows=num_rows)
        return str(json.loads((tmp_path / folder / "train" / "state.json").read_text())["_fingerprint"])

    assert fingerprint("a", 25) == fingerprint("b", 25) != fingerprint("c", 24)


def test_a_new_file_begins_when_one_is_large_enough(tmp_path: Path) -> None:
    written = write(tmp_path, [], file_bytes=1)
    data = [(path.name, num_rows) for path, num_rows in written if path.suffix == ".arrow"]
    assert data[:3] == [(f"data-{n:05d}-of-00003.arrow", rows) for n, rows in enumerate((10, 10, 5))]
    assert data[3:] == [("data-00000-of-00001.arrow", 3), ("data-00000-of-00001.arrow", 0)]
    assert open_split(tmp_path, "train").num_rows == 25
    on_disk = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert on_disk == sorted(path for path, _ in written), "nothing is left that is not reported"


@pytest.mark.parametrize("keep", ["border of a batch", "all but the end mark", "half a message", "nothing"])
def test_a_stream_without_its_end_is_refused(tmp_path: Path, keep: str) -> None:
    write(tmp_path, [])
    path = tmp_path / "train" / "data-00000-of-00001.arrow"
    content = path.read_bytes()
    schema_and_batch = pa.BufferOutputStream()
    with pa.ipc.new_stream(schema_and_batch, SHARD) as writer:
        writer.write_batch(open_split(tmp_path, "train").to_batches()[0])
    at_border = schema_and_batch.getvalue().size - len(END_MARK)
    lengths = {"border of a batch": at_border, "half a message": 1000, "nothing": 0}
    path.write_bytes(content[: lengths.get(keep, len(content) - len(END_MARK))])
    with pytest.raises(IntegrityError, match="ends without the mark"):
        open_split(tmp_path, "train")


def test_files_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [])
    path = tmp_path / "train" / "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(path, pa.schema([("x", pa.int32())])):
        pass
    with pytest.raises(IntegrityError, match="has the columns"):
        open_split(tmp_path, "train")
    path.write_bytes(b"x" * 100 + END_MARK)
    with pytest.raises(IntegrityError, match="not an Arrow stream"):
        open_split(tmp_path, "train")
    path.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        open_split(tmp_path, "train")
    with pytest.raises(InputError):
        open_split(tmp_path, "validatoin")


def test_no_examples_are_a_batch_without_rows() -> None:
    batch = examples_to_batch([])
    assert batch.num_rows == 0
    assert batch.schema.equals(SHARD)
