"""Near-duplicates: an exact join of gram sets by Jaccard similarity.

The join is the prefix filter (Chaudhuri et al. 2006, AllPairs 2007) with the positional filter (PPJoin 2008):
if |A ∩ B| >= t·|A|, then the |A| - ceil(t·|A|) + 1 rarest grams of A hold one of B's, so only rows that share
such a gram are compared, and all of these are counted in full, save those that 128 bits of each rule out for certain.
Nothing is estimated: recall and precision are 1 (up to equal 64-bit hashes of different grams). In memory stand the
entries of grams that two rows share among their rarest, 14 bytes each, and some numbers of each row; sets may lie on
the disk.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pipelines.grams import Ints, runs
from pipelines.overlap import Bools, Floats
from pipelines.prefix_index import Pairs, PrefixIndex, Wanted

_MAX_BLOCK_ROWS = 512
_MAX_BLOCK_GRAMS = 2**16
_MAX_GROWN_ROWS = 2**13
_MAX_INSIDE_MEETINGS = 2**18  # in a block that has grown: pairs inside of one are all looked at


def any_pair(left: Ints, right: Ints) -> Bools:
    return np.ones(len(left), bool)


def greedy_survivors(index: PrefixIndex, order: Ints, *, wanted: Wanted = any_pair) -> tuple[Ints, Floats]:
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
    for block in _growing_blocks(index, order):
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
    order = np.lexsort((rank[pairs.right], rank[pairs.left]))
    lefts, rights = pairs.left[order].tolist(), pairs.right[order].tolist()
    for left, right, value in zip(lefts, rights, pairs.jaccard[order].tolist(), strict=True):
        if survivor[left] < 0 and survivor[right] < 0:
            survivor[left], jaccard[left] = right, value


def near_pairs(
    index: PrefixIndex, rows: Ints, *, clusters: Sequence[Ints] = (), wanted: Wanted = any_pair
) -> Iterator[Pairs]:
    """All near pairs among `rows` and `clusters`, save those inside a cluster, which are not even looked up.

    A generator, so that `wanted` may look at what the caller has learned from the pairs before.
    """
    index.clear()
    for block in _blocks(index, rows):
        index.enter(block)
        yield from index.probe(block, lambda left, right: (right < left) & wanted(left, right))
    for cluster in clusters:
        for block in _blocks(index, cluster):
            yield from index.probe(block, wanted)
        index.enter(cluster)


def pairs_between(
    index: PrefixIndex, left: Ints, right: Ints, *, wanted: Wanted = any_pair
) -> Iterator[Pairs]:
    """All near pairs of a row of `left` and a row of `right`."""
    index.clear()
    index.enter(right)
    for block in _blocks(index, left):
        yield from index.probe(block, wanted)


def _blocks(index: PrefixIndex, rows: Ints) -> Iterator[Ints]:
    for start, end in runs(index.sizes[rows], limit=_MAX_BLOCK_GRAMS, max_items=_MAX_BLOCK_ROWS):
        yield rows[start:end]


def _growing_blocks(index: PrefixIndex, rows: Ints) -> Iterator[Ints]:
    """Blocks grow while few of their rows share grams: the fewer blocks, the faster; a template keeps them small."""
    start, num_rows = 0, _MAX_BLOCK_ROWS
    while start < len(rows):
        block = rows[start : start + num_rows]
        if len(block) > _MAX_BLOCK_ROWS and index.num_meetings(block) > _MAX_INSIDE_MEETINGS:
            num_rows = max(num_rows // 2, _MAX_BLOCK_ROWS)
            continue
        yield block
        start, num_rows = start + len(block), min(2 * num_rows, max(_MAX_GROWN_ROWS, _MAX_BLOCK_ROWS))


def joined(found: Iterable[Pairs]) -> Pairs:
    slices = list(found)
    empty = np.empty(0, np.int64)
    return Pairs(
        left=np.concatenate([empty, *(pairs.left for pairs in slices)]),
        right=np.concatenate([empty, *(pairs.right for pairs in slices)]),
        jaccard=np.concatenate([np.empty(0), *(pairs.jaccard for pairs in slices)]),
    )
