"""Near-duplicates: an exact join of gram sets by Jaccard similarity.

The join is the prefix filter (Chaudhuri et al. 2006, AllPairs 2007) with the positional filter (PPJoin 2008):
if |A ∩ B| >= t·|A|, then the |A| - ceil(t·|A|) + 1 rarest grams of A hold one of B's, so only rows that share
such a gram are compared, and all of these are counted in full. Nothing is estimated: recall and precision are 1
(up to equal 64-bit hashes of different grams). One process; made for up to about half a million rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipelines.grams import GramSets, Hashes, Ints, ragged, runs

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Wanted: TypeAlias = Callable[[Ints, Ints], Bools]
"""Given rows left[i] and right[i]: which of these pairs the caller wants to have compared."""

_MAX_BLOCK_ROWS = 512  # pairs inside a block are all compared: a template's first block costs 512²/2 once
_MAX_BLOCK_GRAMS = 2**16  # bounds the block's table of rows x different grams
_MAX_EXPANDED = 2**22  # pairs or grams that stand in memory at a time


@dataclass(frozen=True, slots=True)
class Pairs:
    """Verified pairs of rows; three columns of one length."""

    left: Ints
    right: Ints
    jaccard: Floats


def any_pair(left: Ints, right: Ints) -> Bools:
    return np.ones(len(left), bool)


def greedy_survivors(index: "PrefixIndex", order: Ints, *, wanted: Wanted = any_pair) -> tuple[Ints, Floats]:
    """Walks the rows of `order`; one that is near an earlier survivor is dropped, else it survives.

    Returns per row of the index the first survivor in `order` that it is near to (-1: none) and their Jaccard.
    So each dropped row was compared with its own survivor; similarity is never passed on from row to row:
    transitive closure has made 2 rows out of 859,092. Only survivors are entered, hence a template shared by
    k rows costs k comparisons, not k².
    """
    index.clear()
    rank = np.empty(len(index.sets), np.int64)
    rank[order] = np.arange(len(order))
    survivor, jaccard = np.full(len(rank), -1, np.int64), np.zeros(len(rank))
    for block in _blocks(index.sets, order):
        _settle(index.probe(block, wanted), rank, survivor, jaccard)
        rest = block[survivor[block] < 0]
        index.enter(rest)

        def inside(left: Ints, right: Ints, first_rank: int = int(rank[block[0]])) -> Bools:
            return (rank[right] >= first_rank) & (rank[right] < rank[left]) & wanted(left, right)

        _settle(index.probe(rest, inside), rank, survivor, jaccard)
        index.leave(rest)
        index.enter(rest[survivor[rest] < 0])
    return survivor, jaccard


def _settle(found: Iterable[Pairs], rank: Ints, survivor: Ints, jaccard: Floats) -> None:
    """Walks the pairs by rank of the later, then of the earlier row; the first survivor met takes the row."""
    pairs = joined(found)
    for i in np.lexsort((rank[pairs.right], rank[pairs.left])).tolist():
        left, right = pairs.left[i], pairs.right[i]
        if survivor[left] < 0 and survivor[right] < 0:
            survivor[left], jaccard[left] = right, pairs.jaccard[i]


def near_pairs(
    index: "PrefixIndex", rows: Ints, *, clusters: Sequence[Ints] = (), wanted: Wanted = any_pair
) -> Iterator[Pairs]:
    """All near pairs among `rows` and `clusters`, save those inside a cluster, which are not even looked up.

    A generator, so that `wanted` may look at what the caller has learned from the pairs before.
    """
    index.clear()
    for block in _blocks(index.sets, rows):
        index.enter(block)
        yield from index.probe(block, lambda left, right: (right < left) & wanted(left, right))
    for cluster in clusters:
        for block in _blocks(index.sets, cluster):
            yield from index.probe(block, wanted)
        index.enter(cluster)


def pairs_between(
    index: "PrefixIndex", left: Ints, right: Ints, *, wanted: Wanted = any_pair
) -> Iterator[Pairs]:
    """All near pairs of a row of `left` and a row of `right`."""
    index.clear()
    index.enter(right)
    for block in _blocks(index.sets, left):
        yield from index.probe(block, wanted)


def _blocks(sets: GramSets, rows: Ints) -> Iterator[Ints]:
    for start, end in runs(sets.sizes[rows], limit=_MAX_BLOCK_GRAMS, max_items=_MAX_BLOCK_ROWS):
        yield rows[start:end]


def joined(found: Iterable[Pairs]) -> Pairs:
    slices = list(found)
    empty = np.empty(0, np.int64)
    return Pairs(
        left=np.concatenate([empty, *(pairs.left for pairs in slices)]),
        right=np.concatenate([empty, *(pairs.right for pairs in slices)]),
        jaccard=np.concatenate([np.empty(0), *(pairs.jaccard for pairs in slices)]),
    )


class PrefixIndex:
    """Which rows hold a rare gram; rows are entered in blocks, others probe for those near to them.

    An entry is (row, gram of its prefix, position in the prefix); entries of a row lie together. Postings of a
    gram are a slice with room for all its entries, `filled` says how many are in.
    """

    def __init__(self, sets: GramSets, *, threshold: float, also: GramSets | None = None) -> None:
        """`also`: further sets of the same rows that must be as near, where any of the two is not empty."""
        self.sets, self.threshold, self.sizes, self.also = sets, threshold, sets.sizes, also
        rows, grams, positions = _prefixes(sets, threshold)
        _, ids, counts = np.unique(grams, return_inverse=True, return_counts=True)
        shared = counts[ids] > 1  # a gram of one prefix alone never makes a pair: most entries go here
        self.entry_row, self.entry_position = rows[shared], positions[shared]
        _, self.entry_gram, counts = np.unique(ids[shared], return_inverse=True, return_counts=True)
        self.row_starts = np.searchsorted(self.entry_row, np.arange(len(sets) + 1))
        self.gram_starts = np.cumsum(counts) - counts
        self.filled = np.zeros(len(counts), np.int64)
        self.postings = np.empty(len(self.entry_row), np.int64)
        self.largest_bucket_rows = int(counts.max(initial=0))
        """Most rows that share one gram of their prefixes. No cap: all that can be near are compared."""

    def clear(self) -> None:
        self.filled[:] = 0

    def enter(self, rows: Ints) -> None:
        entries = self._entries(rows)
        entries = entries[np.argsort(self.entry_gram[entries], kind="stable")]
        grams, first, counts = np.unique(self.entry_gram[entries], return_index=True, return_counts=True)
        place = np.arange(len(entries)) - np.repeat(first, counts)
        self.postings[place + np.repeat(self.gram_starts[grams] + self.filled[grams], counts)] = entries
        self.filled[grams] += counts

    def leave(self, rows: Ints) -> None:
        """Takes back the newest `enter`, which must have been of the same rows."""
        grams, counts = np.unique(self.entry_gram[self._entries(rows)], return_counts=True)
        self.filled[grams] -= counts

    def probe(self, rows: Ints, wanted: Wanted) -> Iterator[Pairs]:
        """Verified pairs (left of `rows`, right entered) that are wanted. Memory grows with the number of rows."""
        for left, right in self._candidates(rows, wanted):
            for start, end in runs(self.sizes[right], limit=_MAX_EXPANDED):
                yield self._verified(left[start:end], right[start:end])

    def _entries(self, rows: Ints) -> Ints:
        return ragged(self.row_starts[rows], self.row_starts[rows + 1] - self.row_starts[rows])

    def _candidates(self, rows: Ints, wanted: Wanted) -> Iterator[tuple[Ints, Ints]]:
        """Different pairs that share a gram of both prefixes and can still reach the threshold."""
        entries = self._entries(rows)
        expanded = np.concatenate([[0], np.cumsum(self.filled[self.entry_gram[entries]])])
        row_ends = np.cumsum(self.row_starts[rows + 1] - self.row_starts[rows])
        row_weights = np.diff(expanded[np.concatenate([[0], row_ends])])
        for start, end in runs(row_weights, limit=_MAX_EXPANDED):
            first = row_ends[start - 1] if start else 0
            left, right = self._meetings(entries[first : row_ends[end - 1]])
            chosen = wanted(left, right)
            pairs = np.unique(left[chosen] * len(self.sets) + right[chosen])
            yield pairs // len(self.sets), pairs % len(self.sets)

    def _meetings(self, entries: Ints) -> tuple[Ints, Ints]:
        grams = self.entry_gram[entries]
        left_entry = np.repeat(entries, self.filled[grams])
        right_entry = self.postings[ragged(self.gram_starts[grams], self.filled[grams])]
        left, right = self.entry_row[left_entry], self.entry_row[right_entry]
        left_position, right_position = self.entry_position[left_entry], self.entry_position[right_entry]
        left_size, right_size = self.sizes[left], self.sizes[right]
        # Grams before a shared one can meet only each other, grams behind it too: the most that can be common.
        behind = np.minimum(left_size - left_position, right_size - right_position)
        most = np.minimum(left_position, right_position) + behind
        possible = most >= self.threshold * (left_size + right_size - most) - 1e-6
        return left[possible], right[possible]

    def _verified(self, left: Ints, right: Ints) -> Pairs:
        jaccard = _jaccard(self.sets, left, right)
        near = jaccard >= self.threshold
        if self.also is not None:
            near[near] = _jaccard(self.also, left[near], right[near]) >= self.threshold
        return Pairs(left=left[near], right=right[near], jaccard=jaccard[near])


def _prefixes(sets: GramSets, threshold: float) -> tuple[Ints, Hashes, Ints]:
    """(row, gram, position) of each row's rarest grams, by row.

    The order of grams is (class of frequency, hash) in one number. Any fixed order is right; rare first is fast.
    Frequencies are of hash buckets and logarithmic above 127, and 8 bits of the hash give way to the class:
    that may join two grams to one here and cost a comparison, never a pair.
    """
    length = sets.sizes - np.ceil(threshold * sets.sizes - 1e-9).astype(np.int64) + 1
    length = np.where(sets.sizes > 0, length, 0)
    bucket_bits = np.uint64(64 - min(26, max(10, len(sets.hashes).bit_length() + 1)))
    bucket_counts = np.zeros(1 << (64 - int(bucket_bits)), np.int64)
    for start in range(0, len(sets.hashes), _MAX_EXPANDED):
        buckets = (sets.hashes[start : start + _MAX_EXPANDED] >> bucket_bits).astype(np.int64)
        bucket_counts += np.bincount(buckets, minlength=len(bucket_counts))
    rare = np.where(bucket_counts < 128, bucket_counts, 72 + 8 * np.log2(np.maximum(bucket_counts, 1)))
    classes = np.minimum(rare, 255).astype(np.uint64) << np.uint64(56)
    chosen = [np.empty(0, np.uint64)]
    for first, end in runs(sets.sizes, limit=_MAX_EXPANDED):
        starts = sets.starts[first : end + 1] - sets.starts[first]
        hashes = sets.hashes[sets.starts[first] : sets.starts[end]]
        ordered = classes[hashes >> bucket_bits] | (hashes & np.uint64(2**56 - 1))
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            ordered[start:stop].sort()
        chosen.append(ordered[ragged(starts[:-1], length[first:end])])
    rows = np.repeat(np.arange(len(sets)), length)
    return rows, np.concatenate(chosen), ragged(np.zeros(len(sets), np.int64), length)


def _jaccard(sets: GramSets, left: Ints, right: Ints) -> Floats:
    """Of each pair; 1 for two empty sets."""
    total = sets.sizes[left] + sets.sizes[right]
    common = np.zeros(len(left), np.int64)
    filled = np.flatnonzero((sets.sizes[left] > 0) & (sets.sizes[right] > 0))
    if len(filled):
        common[filled] = _num_common(sets, left[filled], right[filled])
    return np.where(total > 0, common / np.maximum(total - common, 1), 1.0)


def _num_common(sets: GramSets, left: Ints, right: Ints) -> Ints:
    """|left[i] ∩ right[i]| of each pair; few different rows on the left, no empty ones."""
    rows, row_number = np.unique(left, return_inverse=True)
    different, gram_number = np.unique(
        sets.hashes[ragged(sets.starts[rows], sets.sizes[rows])], return_inverse=True
    )
    holds = np.zeros((len(rows), len(different)), bool)
    holds[np.repeat(np.arange(len(rows)), sets.sizes[rows]), gram_number] = True
    sizes = sets.sizes[right]
    asked = sets.hashes[ragged(sets.starts[right], sizes)]
    place = np.minimum(np.searchsorted(different, asked), max(len(different) - 1, 0))
    hit = (different[place] == asked) & holds[np.repeat(row_number, sizes), place]
    counted = np.concatenate([[0], np.cumsum(hit)])
    return np.diff(counted[np.concatenate([[0], np.cumsum(sizes)])])
