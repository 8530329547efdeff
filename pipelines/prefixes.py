"""The rarest grams of each row, as far as other rows have them among their rarest too: what a join starts from.

Read in one pass for how frequent grams are, then in as many passes as memory asks for: each takes one share of all
hashes and keeps what at least two rows have. Any number of passes and threads gives the same entries.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pipelines.freed_memory import give_back_freed
from pipelines.grams import GramSets, Hashes, Ints, StoredSets, ragged
from pipelines.overlap import Bools, signatures, sorted_lines

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_READ_GRAMS = 2**20  # a block of rows that is looked at at a time, by each thread
_MAX_PASS_ENTRIES = 2**24  # about 30 bytes each while a pass works
_MAX_BUCKET_BITS = 26
_CLASSED_AT_ONCE = 2**20
_HASH_BITS = np.uint64(2**56 - 1)
_NOT_ALONE = np.uint64(2 << 56)  # from the class on of buckets with two grams or more


@dataclass(frozen=True, slots=True)
class Entries:
    """A row's shared grams lie together, by row; grams are numbered from 0. Columns of one length."""

    row: npt.NDArray[np.int32]
    gram: npt.NDArray[np.int32]
    position: npt.NDArray[Any]  # of the gram in the row's order of grams; uint16 where that is enough
    counts: npt.NDArray[np.int32]  # entries of each gram

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class _Survey:
    signatures: npt.NDArray[np.uint64]
    frequency_class: npt.NDArray[np.uint8]  # of each bucket of hashes
    bucket_shift: np.uint64


def shared_entries(
    sets: StoredSets, threshold: float, *, among: Bools | None = None, num_threads: int = 1
) -> tuple[Entries, npt.NDArray[np.uint64]]:
    """Entries of all rows, or those `among`, and the signatures of all (pipelines/overlap.py)."""
    sizes = sets.sizes
    survey = _survey(sets, sizes, num_threads)
    give_back_freed()
    length = np.where(sizes > 0, sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1, 0)
    length = length if among is None else np.where(among, length, 0)
    num_passes = max(1, -(-int(length.sum()) // _MAX_PASS_ENTRIES))
    found: list[Entries] = []
    for number in range(num_passes):
        first_gram = sum(len(entries.counts) for entries in found)
        found.append(_pass(sets, length, survey, (number, num_passes), first_gram, num_threads))
        give_back_freed()
    return _by_row(found), survey.signatures


def _survey(sets: StoredSets, sizes: Ints, num_threads: int) -> _Survey:
    """Frequencies are of hash buckets and logarithmic above 127."""
    bits = min(_MAX_BUCKET_BITS, max(10, int(sizes.sum()).bit_length() + 1))
    shift = np.uint64(64 - bits)
    counts = np.zeros(1 << bits, np.uint16)
    signature = np.zeros((len(sets), 2), np.uint64)

    def of_block(block: tuple[int, GramSets]) -> tuple[int, npt.NDArray[np.uint64], Hashes, Ints]:
        buckets, number = np.unique(block[1].hashes >> shift, return_counts=True)
        return block[0], signatures(block[1]), buckets, number

    for first, found, buckets, number in _in_threads(of_block, sets.blocks(_MAX_READ_GRAMS), num_threads):
        signature[first : first + len(found)] = found
        counts[buckets] = np.minimum(counts[buckets] + number, 2**16 - 1)
    number = np.arange(2**16)
    classes = np.where(number < 128, number, 72 + 8 * np.log2(np.maximum(number, 1))).astype(np.uint8)
    frequency_class = np.empty(len(counts), np.uint8)
    # At once they would become places of 8 bytes each.
    for start in range(0, len(counts), _CLASSED_AT_ONCE):
        frequency_class[start : start + _CLASSED_AT_ONCE] = classes[counts[start : start + _CLASSED_AT_ONCE]]
    return _Survey(signature, frequency_class, shift)


def _pass(
    sets: StoredSets, length: Ints, survey: _Survey, share: tuple[int, int], first_gram: int, num_threads: int
) -> Entries:
    """Entries of the grams of one share of all hashes that at least two rows have."""

    small = np.uint16 if int(length.max(initial=0)) < 2**16 else np.int64

    def of_block(block: tuple[int, GramSets]) -> tuple[Hashes, npt.NDArray[np.int32], npt.NDArray[Any]]:
        grams, rows, positions = _prefixes(block[1], length[block[0] : block[0] + len(block[1])], survey)
        chosen = grams >= _NOT_ALONE
        if share[1] > 1:
            chosen &= (grams & _HASH_BITS) % np.uint64(share[1]) == share[0]
        return grams[chosen], (rows[chosen] + block[0]).astype(np.int32), positions[chosen].astype(small)

    grams: list[npt.NDArray[Any]] = [np.empty(0, np.uint64)]
    rows: list[npt.NDArray[Any]] = [np.empty(0, np.int32)]
    positions: list[npt.NDArray[Any]] = [np.empty(0, small)]
    for found in _in_threads(of_block, sets.blocks(_MAX_READ_GRAMS), num_threads):
        grams.append(found[0])
        rows.append(found[1])
        positions.append(found[2])
    numbers, counts = _shared_numbers(_drained(grams))
    kept = numbers >= 0
    return Entries(
        _drained(rows)[kept], numbers[kept] + np.int32(first_gram), _drained(positions)[kept], counts
    )


def _drained(slices: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """All in one, and the list empty: what is in it does not stand in memory twice for long."""
    together = np.concatenate(slices)
    slices.clear()
    return together


def _shared_numbers(grams: Hashes) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Of each gram its number among those that are there twice or more, -1 for the others; and how often each is."""
    order = np.argsort(grams)
    grams = grams[order]  # the caller's are not needed any more
    begins = np.ones(len(grams), bool)
    begins[1:] = grams[1:] != grams[:-1]
    del grams
    first = np.flatnonzero(begins)
    counts = np.diff(np.append(first, len(order))).astype(np.int32)
    del first, begins
    number = np.cumsum(counts > 1, dtype=np.int32) - np.int32(1)
    number[counts < 2] = -1
    numbers = np.empty(len(order), np.int32)
    numbers[order] = np.repeat(number, counts)
    return numbers, counts[counts > 1]


def _prefixes(sets: GramSets, length: Ints, survey: _Survey) -> tuple[Hashes, Ints, Ints]:
    """(gram, row, position) of each row's rarest grams.

    The order of grams is (class of frequency, hash) in one number. Any fixed order is right; rare first is fast.
    8 bits of the hash give way to the class: that may join two grams to one here and cost a comparison, never a
    pair.
    """
    classes = survey.frequency_class[sets.hashes >> survey.bucket_shift].astype(np.uint64) << np.uint64(56)
    classes |= sets.hashes & _HASH_BITS
    chosen = np.empty(int(length.sum()), np.uint64)
    starts = np.cumsum(length) - length
    sizes = np.where(length > 0, sets.sizes, 0)
    if not len(chosen):
        return chosen, np.empty(0, np.int64), np.empty(0, np.int64)
    values = classes if (length > 0).all() else classes[np.repeat(length > 0, sets.sizes)]
    for lines, table in sorted_lines(values, sizes):
        columns = np.arange(table.shape[1]) < length[lines][:, None]
        chosen[ragged(starts[lines], length[lines])] = table[columns]
    return chosen, np.repeat(np.arange(len(sets)), length), ragged(np.zeros(len(sets), np.int64), length)


def _by_row(found: list[Entries]) -> Entries:
    """Empties `found`: a column at a time stands in memory twice."""
    if len(found) == 1:
        return found[0]
    rows, grams = [entries.row for entries in found], [entries.gram for entries in found]
    positions = [entries.position for entries in found]
    counts = np.concatenate([entries.counts for entries in found])
    found.clear()
    row = _drained(rows)
    order = np.argsort(row, kind="stable")
    row = row[order]
    return Entries(row, _drained(grams)[order], _drained(positions)[order], counts)


def _in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int
) -> Iterator[Result]:
    """Results in the order of the items; no more items are read than are worked on. NumPy lets threads run."""
    if num_threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        running: deque[Future[Result]] = deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > num_threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
