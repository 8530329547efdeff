"""Which examples share a bin: lengths in, a bin for each out. Three ways, named by pack.mode in FILLERS.

What a bin holds hangs on the lengths, the order in which examples are visited and a salt, on nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from pipelines.epochs import mixed

GROUP_BINS = 64
"""A group of examples that are near each other in an order fills about this many bins."""

GOOD_SHARE = 1.001
"""As many bins as this, counted in the fewest possible, are good enough: no other way is tried."""

MANY_EXAMPLES = 1_000_000
"""From here on only two ways are tried: among so many examples the first one is good."""


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """`entries` int32 [placed] are numbers of examples, in any order; `bins` int32 [placed] goes with it."""

    entries: np.ndarray
    bins: np.ndarray
    num_bins: int


def packed(lengths: np.ndarray, visited: np.ndarray, capacity: int, salt: int) -> Placement:
    """Nearly as few bins as there can be, of examples that meet by chance.

    Long examples by best-fit decreasing (each into the fullest bin that has room, the longest first); between
    them the others as they are visited; then best-fit decreasing again with what stands over a bin's end and a
    few short ones that were held back. Pure best-fit decreasing needs as many bins or more, gives equal lengths
    a bin of their own, and the same partners in each epoch. It is tried last, for lengths that fit badly.
    """
    fewest = fewest_bins(lengths[visited], capacity)
    ways = _WAYS if len(visited) < MANY_EXAMPLES else (_WAYS[0], _WAYS[-1])
    best: Placement | None = None
    for way in ways:
        found = _packed_by(way, lengths, visited, capacity, salt)
        if best is None or found.num_bins < best.num_bins:
            best = found
        if best.num_bins <= fewest * GOOD_SHARE:
            break
    assert best is not None
    return best


def one_each(lengths: np.ndarray, visited: np.ndarray, capacity: int, salt: int) -> Placement:
    """A bin for each example."""
    return Placement(visited, np.arange(len(visited), dtype=np.int32), len(visited))


def by_length(lengths: np.ndarray, visited: np.ndarray, capacity: int, salt: int) -> Placement:
    """Bins of examples of like length: as many as fit into `capacity` when each is padded to the longest."""
    entries = visited[_descending(lengths[visited])]
    sorted_lengths = lengths[entries]
    starts: list[int] = []
    start = 0
    while start < len(entries):
        starts.append(start)
        start += max(capacity // int(sorted_lengths[start]), 1)
    sizes = np.diff([*starts, len(entries)])
    return Placement(entries, np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), len(sizes))


Filler = Callable[[np.ndarray, np.ndarray, int, int], Placement]

FILLERS: dict[str, Filler] = {"packed": packed, "unpacked": one_each, "token_budget": by_length}


def in_groups(
    fill: Filler, lengths: np.ndarray, visited: np.ndarray, capacity: int, salt: int
) -> tuple[Placement, np.ndarray]:
    """Fill group after group of neighbours in `visited`, so that bins stay near the order.

    Also the group of each bin, int32 [bins].
    """
    ends = np.cumsum(lengths[visited], dtype=np.int64)
    groups = (ends - 1) // (capacity * GROUP_BINS)
    borders = np.unique([0, *(np.flatnonzero(np.diff(groups)) + 1), len(visited)]).tolist()
    placements = [fill(lengths, visited[start:end], capacity, salt) for start, end in pairwise(borders)]
    sizes = [placement.num_bins for placement in placements]
    firsts = np.cumsum([0, *sizes], dtype=np.int64).tolist()
    none = np.zeros(0, np.int32)
    bins = [p.bins + np.int32(first) for p, first in zip(placements, firsts[:-1], strict=True)]
    joined = Placement(
        np.concatenate([none, *(p.entries for p in placements)]), np.concatenate([none, *bins]), firsts[-1]
    )
    return joined, np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


def fewest_bins(lengths: np.ndarray, capacity: int) -> int:
    """Below this no packing can go: all tokens over capacity, or the examples longer than half of it."""
    num_tokens = int(lengths.sum(dtype=np.int64))
    return max(-(-num_tokens // capacity), int(np.count_nonzero(lengths > capacity // 2)))


# Packing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Way:
    """Long is above 1/`long_part` of the capacity; `held_back` is a share of the others.

    `blur` shortens each length by up to this share before long examples are ordered: other pairs in each epoch.
    """

    long_part: int
    held_back: float
    blur: float


# Measured on Alpaca, chats, both, and uniform lengths, at capacities from 1,200 to 32,768.
_WAYS = (_Way(4, 0.05, 0.3), _Way(4, 0.15, 0.0), _Way(8, 0.15, 0.3), _Way(16, 0.05, 0.0), _Way(2**31, 0, 0.0))


def _packed_by(way: _Way, lengths: np.ndarray, visited: np.ndarray, capacity: int, salt: int) -> Placement:
    is_long = lengths[visited] > capacity // way.long_part
    long, others = visited[is_long], visited[~is_long]
    if way.blur:
        long = long[_blurred(lengths[long], capacity, way.blur, salt)]
    else:
        long = long[_descending(lengths[long])]
    open_bins = _OpenBins(capacity)
    long_bins = _best_fit(lengths[long], open_bins)
    rooms = capacity - _sums(long_bins, lengths[long], open_bins.num_bins)
    others, others_bins, rest, rooms = _poured(lengths, others, rooms, capacity, way.held_back, salt)
    rest = rest[_descending(lengths[rest])]
    open_bins = _opened(rooms, capacity)
    rest_bins = _best_fit(lengths[rest], open_bins)
    entries = np.concatenate([long, others, rest]).astype(np.int32, copy=False)
    return Placement(entries, np.concatenate([long_bins, others_bins, rest_bins]), open_bins.num_bins)


def _poured(
    lengths: np.ndarray, visited: np.ndarray, rooms: np.ndarray, capacity: int, held_back: float, salt: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Examples laid end to end over the rooms of bins: those inside of a room, with their bins; the rest, which
    stand over an end or were held back; and the rooms that are left, of old and new bins.
    """
    stays = _held_back(lengths[visited], held_back)
    poured, rest = visited[~stays], visited[stays]
    ends = np.cumsum(lengths[poured], dtype=np.int64)
    order = np.argsort(mixed(np.arange(len(rooms), dtype=np.uint64), salt))
    num_new = max(0, (int(ends[-1]) if len(ends) else 0) - int(rooms.sum())) // capacity
    rooms = np.concatenate([rooms, np.full(num_new, capacity, np.int64)])
    order = np.concatenate([order, np.arange(len(order), len(rooms))])
    borders = np.concatenate([[0], np.cumsum(rooms[order])])
    places = np.searchsorted(borders, ends, side="left") - 1  # the room in which an example ends
    inside = places < len(rooms)
    inside[inside] &= (ends - lengths[poured])[inside] >= borders[places[inside]]
    bins = order[places[inside]].astype(np.int32)
    left = rooms - _sums(bins, lengths[poured[inside]], len(rooms))
    return poured[inside], bins, np.concatenate([poured[~inside], rest]), left


def _held_back(lengths: np.ndarray, share: float) -> np.ndarray:
    """True for a share of the examples, of the shorter half: the last ones visited."""
    stays = np.zeros(len(lengths), np.bool_)
    if share and len(lengths):
        short = np.flatnonzero(lengths <= np.median(lengths))
        stays[short[len(short) - int(share * len(lengths)) :]] = True
    return stays


def _sums(bins: np.ndarray, lengths: np.ndarray, num_bins: int) -> np.ndarray:
    return np.bincount(bins, weights=lengths, minlength=num_bins).astype(np.int64)


def _blurred(lengths: np.ndarray, capacity: int, blur: float, salt: int) -> np.ndarray:
    """Roughly from the longest to the shortest; equal lengths stay together, in the order that they have."""
    draws = mixed(np.arange(capacity + 1, dtype=np.uint64), salt).astype(np.float64) / 2.0**64
    return np.lexsort((lengths, -lengths * (1.0 - blur * draws[lengths])))


def _descending(lengths: np.ndarray) -> np.ndarray:
    """Stable order from the longest to the shortest."""
    if not len(lengths):
        return np.zeros(0, np.int64)
    shorter = int(lengths.max()) - lengths
    # numpy sorts 16 bits by radix, in a fifth of the time.
    small = shorter.astype(np.uint16) if int(shorter.max()) < 2**16 else shorter
    return np.argsort(small, kind="stable")


def _best_fit(lengths: np.ndarray, open_bins: "_OpenBins") -> np.ndarray:
    """Bin of each example, int32 [examples]; equal lengths stand together.

    They are placed together: the fullest bin that takes one takes as many as it can hold, for it stays the
    fullest. So the work is one step for each (length, room) pair and not for each example.
    """
    bins = np.empty(len(lengths), np.int32)
    starts = np.flatnonzero(np.diff(lengths, prepend=-1))
    for start, end in pairwise([*starts.tolist(), len(lengths)]):
        length = int(lengths[start])
        while start < end:
            room, used = open_bins.take(length, end - start)
            per_bin = room // length
            num_placed = min(end - start, len(used) * per_bin)
            bins[start : start + num_placed] = np.repeat(np.array(used, np.int32), per_bin)[:num_placed]
            num_in_last = num_placed - (len(used) - 1) * per_bin
            open_bins.put(room - per_bin * length, used[:-1])
            open_bins.put(room - num_in_last * length, used[-1:])
            start += num_placed
    return bins


@dataclass(slots=True)
class _OpenBins:
    """Bins by the room they have left; bit r of `rooms` is set where a bin has room for r more tokens."""

    capacity: int
    num_bins: int = 0
    rooms: int = 0
    by_room: dict[int, list[int]] = field(default_factory=dict)

    def take(self, length: int, num_examples: int) -> tuple[int, list[int]]:
        """The fullest bins that take a length, all with the same room: as many as the examples need."""
        fitting = self.rooms >> length
        if not fitting:
            num_new = -(-num_examples // (self.capacity // length))
            self.num_bins += num_new
            return self.capacity, list(range(self.num_bins - num_new, self.num_bins))
        room = length + (fitting & -fitting).bit_length() - 1
        found = self.by_room[room]
        used = [found.pop() for _ in range(min(len(found), -(-num_examples // (room // length))))]
        if not found:
            self.rooms &= ~(1 << room)
        return room, used

    def put(self, room: int, bins: list[int]) -> None:
        """Put bins back with the room that they have now."""
        if bins and room:
            self.by_room.setdefault(room, []).extend(bins)
            self.rooms |= 1 << room


def _opened(rooms: np.ndarray, capacity: int) -> _OpenBins:
    """Bins with these rooms."""
    open_bins = _OpenBins(capacity, num_bins=len(rooms))
    order = np.argsort(rooms, kind="stable")
    starts = np.flatnonzero(np.diff(rooms[order], prepend=-1))
    for start, end in pairwise([*starts.tolist(), len(rooms)]):
        open_bins.put(int(rooms[order[start]]), order[start:end].tolist())
    return open_bins
