"""How much two sets of grams share: counted in full, and by how much at most, from 128 bits of each set."""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipelines.grams import GramSets, Hashes, Ints, ragged, runs

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]

_MAX_COUNTED = 2**20  # grams of both sides that are counted at a time
_NO_GRAM = np.uint64(2**64 - 1)


def jaccard(sets: GramSets, left: Ints, right: Ints) -> Floats:
    """Of each pair of rows; 1 for two empty sets."""
    sizes = sets.sizes
    total = sizes[left] + sizes[right]
    common = np.zeros(len(left), np.int64)
    for start, end in runs(total, limit=_MAX_COUNTED):
        common[start:end] = _num_common(sets, left[start:end], right[start:end])
    return np.where(total > 0, common / np.maximum(total - common, 1), 1.0)


def _num_common(sets: GramSets, left: Ints, right: Ints) -> Ints:
    """|left[i] ∩ right[i]| of each pair: with both sets in one sorted line, what they share stands there twice."""
    rows = np.stack([left, right], axis=1).ravel()
    sizes = sets.sizes[rows]
    hashes = sets.hashes[ragged(sets.starts[rows], sizes)]
    line_sizes = sizes[::2] + sizes[1::2]
    common = np.zeros(len(left), np.int64)
    for lines, table in sorted_lines(hashes, line_sizes):
        twice = (table[:, 1:] == table[:, :-1]) & _columns_below(line_sizes[lines], table, first=1)
        common[lines] = twice.sum(axis=1)
    return common


def sorted_lines(values: Hashes, sizes: Ints) -> Iterator[tuple[Ints, npt.NDArray[np.uint64]]]:
    """Sorts each of many short lines that stand one after another: numbers of lines, and a table with a row for each.

    Lines of about one length share a table; behind its end a row is filled up. One call for thousands of lines: a
    loop over them takes longer than the sorting.
    """
    starts = np.cumsum(sizes) - sizes
    # Widths in steps of about a fifth.
    width_class = np.ceil(4 * np.log2(np.maximum(sizes, 1))).astype(np.int64)
    for number in np.unique(width_class[sizes > 0]).tolist():
        lines = np.flatnonzero((width_class == number) & (sizes > 0))
        table = np.full((len(lines), int(sizes[lines].max())), _NO_GRAM, np.uint64)
        table[_columns_below(sizes[lines], table)] = values[ragged(starts[lines], sizes[lines])]
        table.sort(axis=1)
        yield lines, table


def _columns_below(sizes: Ints, table: npt.NDArray[np.uint64], first: int = 0) -> npt.NDArray[np.bool_]:
    return np.arange(first, table.shape[1]) < sizes[:, None]


def signatures(sets: GramSets) -> npt.NDArray[np.uint64]:
    """128 bits for each set: which of 128 values of a hash it has an odd number of times."""
    found = np.zeros((len(sets), 2), np.uint64)
    filled = np.flatnonzero(sets.sizes > 0)
    if len(filled):
        bit = np.uint64(1) << (sets.hashes & np.uint64(63))
        in_second = (sets.hashes & np.uint64(64)) != 0
        starts = sets.starts[filled]  # slices of empty sets have no length, so these touch
        found[filled, 0] = np.bitwise_xor.reduceat(np.where(in_second, np.uint64(0), bit), starts)
        found[filled, 1] = np.bitwise_xor.reduceat(np.where(in_second, bit, np.uint64(0)), starts)
    return found


def most_common(signature: npt.NDArray[np.uint64], sizes: Ints, left: Ints, right: Ints) -> Ints:
    """An upper bound of |left[i] ∩ right[i]|: each bit in which two sets differ is a gram that one of them lacks.

    (The bitmap filter of Sandes, Teodoro and Melo 2020: never too low, so no pair is lost by it.)
    """
    differing = np.bitwise_count(signature[left] ^ signature[right]).sum(axis=1, dtype=np.int64)
    return (sizes[left] + sizes[right] - differing) // 2
