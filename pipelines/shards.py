"""Examples on disk: a DatasetDict folder of Arrow streams, memory-mapped by the trainer and by `datasets`.

dataset_dict.json
<split>/data-<n>-of-<N>.arrow    IPC stream (`load_from_disk` refuses the IPC file format)
<split>/dataset_info.json        columns, in the form of datasets 5
<split>/state.json               names of the data files; the fingerprint is a digest of their content
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.pieces import Example
from pipelines.storage import (
    durable_file,
    file_sha256,
    read_arrow,
    read_json,
    sync_folder,
    write_bytes,
    write_json,
)
from schemas.conversation import blake2b_128
from schemas.dataset import SHARD
from schemas.errors import IntegrityError

FILE_BYTES = 256 * 2**20
"""A new data file begins after this many bytes."""

END_MARK = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""The last 8 bytes of an IPC stream. A stream cut at the border of a batch reads short without an error."""

Written = list[tuple[Path, int]]
"""Files and the rows in them."""


def write_dataset(
    folder: Path, tables: Mapping[str, Iterable[pa.Table]], *, batch_rows: int, file_bytes: int = FILE_BYTES
) -> Written:
    """Write the examples of each split, in order, as one DatasetDict folder. Equal rows give equal bytes.

    All record batches but a split's last have `batch_rows` rows, wherever the tables were cut.
    """
    written: Written = []
    for split, parts in tables.items():
        data = _write_data(folder / split, _batches(parts, batch_rows), file_bytes)
        fingerprint = blake2b_128(*(bytes.fromhex(file_sha256(path)) for path, _ in data))
        state, info = folder / split / "state.json", folder / split / "dataset_info.json"
        write_json(state, _state([path.name for path, _ in data], split, fingerprint))
        # Not by write_json, which sorts: features must stand in the order of the columns.
        write_bytes(info, json.dumps(_dataset_info(split, data), indent=2).encode() + b"\n")
        written += [*data, (state, 0), (info, 0)]
    write_json(folder / "dataset_dict.json", {"splits": list(tables)})
    return [*written, (folder / "dataset_dict.json", 0)]


def open_split(folder: Path, split: str) -> pa.Table:
    """All examples of a split, memory-mapped. Digests are the caller's to check.

    Raises InputError when there is no such split, IntegrityError for a file without its end or with other columns.
    """
    return pa.concat_tables(list(open_files(folder, split)))


def open_files(folder: Path, split: str) -> Iterator[pa.Table]:
    """The same, one file after the other."""
    state = read_json(folder / split / "state.json")
    for file in state["_data_files"]:
        yield _open(folder / split / file["filename"])


def examples_to_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Examples as one record batch of schemas.dataset.SHARD."""
    columns: list[pa.Array] = []
    for field in SHARD:
        values = [getattr(example, field.name) for example in examples]
        columns.append(
            _lists(values, field.type) if pa.types.is_list(field.type) else pa.array(values, field.type)
        )
    return pa.RecordBatch.from_arrays(columns, schema=SHARD)


def table_to_examples(table: pa.Table) -> list[Example]:
    """The inverse of examples_to_batch; arrays are views of the table."""
    columns = {field.name: _values(table[field.name].combine_chunks(), field.type) for field in SHARD}
    return [Example(**{name: values[row] for name, values in columns.items()}) for row in range(len(table))]


def _values(column: pa.Array, arrow_type: pa.DataType) -> list[Any]:
    if not pa.types.is_list(arrow_type):
        return list(column.to_pylist())
    values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    return [values[start:end] for start, end in pairwise(offsets.tolist())]


def _lists(values: list[np.ndarray], list_type: pa.ListType) -> pa.ListArray:
    lengths = np.array([0, *(len(value) for value in values)], np.int64)
    offsets = np.cumsum(lengths)
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"{offsets[-1]} tokens in one batch: Arrow lists count to 2**31 - 1; make parts smaller"
        )
    flat = np.concatenate([np.zeros(0, list_type.value_type.to_pandas_dtype()), *values])
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(flat, list_type.value_type), type=list_type
    )


# Data files -------------------------------------------------------------------------------------------------


def _batches(tables: Iterable[pa.Table], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """The rows of all tables in batches of the same size; only the last may be smaller."""
    waiting: list[pa.Table] = []
    num_waiting = 0
    for table in tables:
        waiting.append(table)
        num_waiting += table.num_rows
        while num_waiting >= batch_rows:
            joined = pa.concat_tables(waiting)
            yield _one_batch(joined.slice(0, batch_rows))
            waiting = [joined.slice(batch_rows)]
            num_waiting -= batch_rows
    if num_waiting:
        yield _one_batch(pa.concat_tables(waiting))


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    # With an empty array beside them, chunks are always copied: a slice would be written with its parent's buffers.
    columns = [
        pa.concat_arrays([*column.chunks, pa.array([], column.type), pa.array([], column.type)])
        for column in table.columns
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SHARD)


def _write_data(folder: Path, batches: Iterator[pa.RecordBatch], file_bytes: int) -> Written:
    written: Written = []
    batch = next(batches, None)
    while batch is not None or not written:
        path = folder / f"data-{len(written):05d}.arrow"
        num_rows = 0
        with (
            durable_file(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_stream(sink, SHARD) as writer,
        ):
            # A split without rows gets a file too: `datasets` can't load one without files.
            while batch is not None and (num_rows == 0 or sink.tell() < file_bytes):
                writer.write_batch(batch)
                num_rows += batch.num_rows
                batch = next(batches, None)
        written.append((path, num_rows))
    return _named_with_their_number(written)


def _named_with_their_number(written: Written) -> Written:
    renamed = [
        (path.with_name(f"{path.stem}-of-{len(written):05d}.arrow"), num_rows) for path, num_rows in written
    ]
    for (path, _), (new_path, _) in zip(written, renamed, strict=True):
        os.replace(path, new_path)
    sync_folder(written[0][0].parent)
    return renamed


def _open(path: Path) -> pa.Table:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - len(END_MARK)))
            end = file.read()
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing; run the stage 'split' again") from None
    if end != END_MARK:
        raise IntegrityError(
            f"{path} ends without the mark of a whole Arrow stream; run the stage 'split' again"
        )
    try:
        table = read_arrow(path)
    except pa.ArrowInvalid as error:
        raise IntegrityError(
            f"{path} is not an Arrow stream ({error}); run the stage 'split' again"
        ) from error
    if not table.schema.equals(SHARD):
        raise IntegrityError(f"{path} has the columns {table.schema.names}, expected {SHARD.names}")
    return table


# What `datasets` wants to know ------------------------------------------------------------------------------


def _state(names: list[str], split: str, fingerprint: str) -> dict[str, Any]:
    return {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }


def _dataset_info(split: str, data: Written) -> dict[str, Any]:
    num_bytes = sum(path.stat().st_size for path, _ in data)
    num_examples = sum(num_rows for _, num_rows in data)
    return {
        "citation": "",
        "description": "",
        "features": {field.name: _feature(field.type) for field in SHARD},
        "homepage": "",
        "license": "",
        "splits": {split: {"name": split, "num_bytes": num_bytes, "num_examples": num_examples}},
    }


def _feature(arrow_type: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(arrow_type):
        return {"feature": _feature(arrow_type.value_type), "_type": "List"}
    return {"dtype": _DTYPES.get(str(arrow_type), str(arrow_type)), "_type": "Value"}


_DTYPES = {"float": "float32", "double": "float64"}
