"""numpy views of Arrow columns without nulls, without copies and without pandas, which pyarrow's own imports."""

import numpy as np
import pyarrow as pa

from schemas.errors import IntegrityError


def list_views(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [rows + 1] and values, without a copy; the offsets of a slice count from its parent's start."""
    return view(column.offsets), view(column.values)


def joined(batches: list[pa.RecordBatch], column: str) -> np.ndarray:
    parts = [view(batch.column(column)) for batch in batches]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


_NUMPY_TYPES = {pa.int32(): np.int32, pa.float32(): np.float32, pa.float64(): np.float64}


def view(array: pa.Array) -> np.ndarray:
    """The numbers of an array, without a copy. Raises IntegrityError when one is null."""
    dtype = _NUMPY_TYPES[array.type]
    data = array.buffers()[1]
    if array.null_count:
        raise IntegrityError(
            f"{array.null_count} of {len(array)} numbers are null; run 'split' and 'pack' again"
        )
    if data is None:
        return np.zeros(0, dtype)
    return np.frombuffer(data, dtype, count=len(array), offset=array.offset * np.dtype(dtype).itemsize)


def column_view(table: pa.Table, name: str) -> np.ndarray:
    chunks = [view(chunk) for chunk in table.column(name).chunks]
    none = np.zeros(0, _NUMPY_TYPES[table.schema.field(name).type])
    return chunks[0] if len(chunks) == 1 else np.concatenate([none, *chunks])
