"""Which rows share a rare gram: rows are entered, others probe for those near to them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipelines.grams import GramSets, Ints, SetsOfRows, StoredSets, ragged, runs
from pipelines.overlap import Bools, Floats, jaccard, most_common
from pipelines.prefixes import shared_entries

Wanted: TypeAlias = Callable[[Ints, Ints], Bools]
"""Given rows left[i] and right[i]: which of these pairs the caller wants to have compared."""

_MAX_EXPANDED = 2**21  # meetings, or grams of pairs, that stand in memory at a time


@dataclass(frozen=True, slots=True)
class Pairs:
    """Verified pairs of rows; three columns of one length."""

    left: Ints
    right: Ints
    jaccard: Floats


@dataclass(frozen=True, slots=True)
class Also:
    """Further sets of the same rows that must be as near, where any of the two is not empty."""

    sets: SetsOfRows
    differs: Bools  # rows whose set is another one here; two rows without need no second look


class PrefixIndex:
    """An entry is (row, gram of its prefix, position in the prefix); entries of a row lie together. Postings of a
    gram are a slice with room for all its entries, `filled` says how many are in.
    """

    def __init__(
        self,
        sets: StoredSets,
        *,
        threshold: float,
        also: Also | None = None,
        among: Bools | None = None,
        num_threads: int = 1,
    ) -> None:
        """`among`: the rows that will be entered or probe; all others are near nothing."""
        self.sets, self.threshold, self.sizes, self.also = sets, threshold, sets.sizes, also
        self.entries, self.signatures = shared_entries(sets, threshold, among=among, num_threads=num_threads)
        counts = self.entries.counts
        self.row_starts = np.searchsorted(self.entries.row, np.arange(len(sets) + 1, dtype=np.int32))
        self.gram_starts = np.cumsum(counts, dtype=np.int64) - counts
        self.filled = np.zeros(len(counts), np.int32)
        self.postings = np.empty(len(self.entries), np.int32)
        self.largest_bucket_rows = int(counts.max(initial=0))
        """Most rows that share one gram of their prefixes. No cap: all that can be near are compared."""

    def clear(self) -> None:
        self.filled[:] = 0

    def enter(self, rows: Ints) -> None:
        entries = self._entries(rows)
        entries = entries[np.argsort(self.entries.gram[entries], kind="stable")]
        grams, first, counts = np.unique(self.entries.gram[entries], return_index=True, return_counts=True)
        place = np.arange(len(entries)) - np.repeat(first, counts)
        self.postings[place + np.repeat(self.gram_starts[grams] + self.filled[grams], counts)] = entries
        self.filled[grams] += counts.astype(np.int32)

    def leave(self, rows: Ints) -> None:
        """Takes back the newest `enter`, which must have been of the same rows."""
        grams, counts = np.unique(self.entries.gram[self._entries(rows)], return_counts=True)
        self.filled[grams] -= counts.astype(np.int32)

    def num_meetings(self, rows: Ints) -> int:
        """How often two of these rows share an entry's gram."""
        _, counts = np.unique(self.entries.gram[self._entries(rows)], return_counts=True)
        return int((counts * (counts - 1)).sum()) // 2

    def probe(self, rows: Ints, wanted: Wanted) -> Iterator[Pairs]:
        """Verified pairs (left of `rows`, right entered) that are wanted. Memory grows with the number of rows."""
        for left, right in self._candidates(rows, wanted):
            for start, end in runs(self.sizes[left] + self.sizes[right], limit=_MAX_EXPANDED):
                yield self._verified(left[start:end], right[start:end])

    def _entries(self, rows: Ints) -> Ints:
        return ragged(self.row_starts[rows], self.row_starts[rows + 1] - self.row_starts[rows])

    def _candidates(self, rows: Ints, wanted: Wanted) -> Iterator[tuple[Ints, Ints]]:
        """Different pairs that share a gram of both prefixes and can still reach the threshold."""
        entries = self._entries(rows)
        expanded = np.concatenate([[0], np.cumsum(self.filled[self.entries.gram[entries]], dtype=np.int64)])
        row_ends = np.cumsum(self.row_starts[rows + 1] - self.row_starts[rows])
        row_weights = np.diff(expanded[np.concatenate([[0], row_ends])])
        for start, end in runs(row_weights, limit=_MAX_EXPANDED):
            first = row_ends[start - 1] if start else 0
            left, right = self._meetings(entries[first : row_ends[end - 1]])
            chosen = wanted(left, right)
            pairs = np.unique(left[chosen] * len(self.sets) + right[chosen])
            left, right = pairs // len(self.sets), pairs % len(self.sets)
            most = most_common(self.signatures, self.sizes, left, right)
            possible = self._can_be_near(most, self.sizes[left] + self.sizes[right])
            yield left[possible], right[possible]

    def _meetings(self, entries: Ints) -> tuple[Ints, Ints]:
        grams = self.entries.gram[entries]
        left_entry = np.repeat(entries, self.filled[grams])
        right_entry = self.postings[ragged(self.gram_starts[grams], self.filled[grams].astype(np.int64))]
        left, right = (self.entries.row[entry].astype(np.int64) for entry in (left_entry, right_entry))
        left_size, right_size = self.sizes[left], self.sizes[right]
        left_position, right_position = (
            self.entries.position[entry].astype(np.int64) for entry in (left_entry, right_entry)
        )
        # Grams before a shared one can meet only each other, grams behind it too: the most that can be common.
        behind = np.minimum(left_size - left_position, right_size - right_position)
        most = np.minimum(left_position, right_position) + behind
        possible = self._can_be_near(most, left_size + right_size)
        return left[possible], right[possible]

    def _can_be_near(self, most_common: Ints, total: Ints) -> npt.NDArray[np.bool_]:
        possible: Bools = most_common >= self.threshold * (total - most_common) - 1e-6
        return possible

    def _verified(self, left: Ints, right: Ints) -> Pairs:
        found = _jaccard_of_rows(self.sets, left, right)
        near = found >= self.threshold
        if self.also is not None:
            asked = near & (self.also.differs[left] | self.also.differs[right])
            near[asked] = _jaccard_of_rows(self.also.sets, left[asked], right[asked]) >= self.threshold
        return Pairs(left=left[near], right=right[near], jaccard=found[near])


def _jaccard_of_rows(sets: SetsOfRows, left: Ints, right: Ints) -> Floats:
    if isinstance(sets, GramSets):
        return jaccard(sets, left, right)
    rows, place = np.unique(np.append(left, right), return_inverse=True)
    return jaccard(sets.of_rows(rows), place[: len(left)], place[len(left) :])
