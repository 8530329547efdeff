"""Stage 7: which examples share a bin of `capacity` tokens, and in which order the bins are trained.

Best-fit decreasing: the longest examples first, each into the fullest bin that still has room. It uses at most
11/9 of the fewest possible bins, plus four (Johnson et al. 1974), and on chats hardly more than the fewest. The
plan hangs on lengths, keys, seed and epoch alone: another machine, or the trainer itself, makes the same.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa

from schemas.dataset import PLAN
from schemas.errors import LimitError
from schemas.pipeline_config import PipelineConfig

STAGE_VERSION = 1

_COPY_STEP = 0x9E3779B97F4A7C15  # odd, so that the copies of an example get different keys


def versions(config: PipelineConfig) -> dict[str, str]:
    """Nothing but the code and the shards shapes a plan."""
    return {}


def plan_epoch(
    num_tokens: np.ndarray, row_keys: np.ndarray | Sequence[bytes], *, capacity: int, seed: int, epoch: int
) -> pa.Table:
    """The packing plan of one epoch, as schemas.dataset.PLAN.

    `num_tokens` is int [examples]; `row_keys` are 64-bit keys, uint64 [examples] or bytes of any length, that
    stay with an example whatever else is in the data (see row_keys). Equal lengths are ordered by
    hash(seed, epoch, key), bins by hash(seed, epoch, first key). Raises LimitError for an example over capacity.
    """
    lengths = np.asarray(num_tokens, np.int64)
    _check_lengths(lengths, capacity)
    keys = _mixed(_as_keys(row_keys, len(lengths)), seed, epoch)
    order = np.lexsort((np.arange(len(lengths)), keys, -lengths))
    bins, num_bins = _best_fit(lengths[order], capacity)
    return _table(order, bins, lengths[order], _shuffled(keys[order], bins, num_bins, seed, epoch))


def row_keys(table: pa.Table) -> np.ndarray:
    """Keys of a split's examples, uint64 [examples]: row id and piece, nothing of their place."""
    ids, pieces = table["row_id"].to_pylist(), table["piece"].to_pylist()
    named = b"".join(_key(f"{row_id}/{piece}".encode()) for row_id, piece in zip(ids, pieces, strict=True))
    return np.frombuffer(named, "<u8").astype(np.uint64)


def weighted_examples(
    sources: Sequence[str], keys: np.ndarray, weights: Mapping[str, float], *, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which examples stand in an epoch, and a key for each: int64 and uint64 [examples of the epoch].

    `sources` and `keys` are by example. A weight's whole part is a number of copies; its fraction is the share of
    examples that get one more, other ones in each epoch, by hash(seed, epoch, key).
    """
    weight = np.array([weights.get(source, 1.0) for source in sources], np.float64)
    draws = _mixed(keys, seed, epoch).astype(np.float64) / 2.0**64
    copies = (np.floor(weight) + (draws < weight % 1.0)).astype(np.int64)
    examples = np.repeat(np.arange(len(keys)), copies)
    number = np.arange(len(examples)) - np.repeat(np.cumsum(copies) - copies, copies)
    return examples, keys[examples] + number.astype(np.uint64) * np.uint64(_COPY_STEP)


def packing_summary(plan: pa.Table, capacity: int) -> dict[str, int | float]:
    """How full the bins are: num_bins, num_tokens, fill_share, and fewest_bins, below which no packing can go.

    fewest_bins = max(ceil(tokens / capacity), examples longer than half of it).
    """
    lengths = plan["num_tokens"].to_numpy().astype(np.int64)
    num_bins = int(plan["bin"].to_numpy().max(initial=-1)) + 1
    num_tokens = int(lengths.sum())
    fewest = max(-(-num_tokens // capacity), int(np.count_nonzero(2 * lengths > capacity)))
    return {
        "num_bins": num_bins,
        "num_tokens": num_tokens,
        "fewest_bins": fewest,
        "fill_share": num_tokens / (num_bins * capacity) if num_bins else 0.0,
    }


# Best fit ---------------------------------------------------------------------------------------------------


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Bin of each example, int64 [examples], and the number of bins; `lengths` descend.

    Equal lengths are placed together: the fullest bin that takes one takes as many as it can hold, for it stays
    the fullest. So the work is one step for each (length, room) pair and not for each example.
    """
    bins = np.empty(len(lengths), np.int64)
    open_bins = _OpenBins(capacity)
    starts = np.flatnonzero(np.diff(lengths, prepend=-1))
    for start, end in pairwise([*starts.tolist(), len(lengths)]):
        length = int(lengths[start])
        while start < end:
            room, used = open_bins.take(length, end - start)
            per_bin = room // length
            num_placed = min(end - start, len(used) * per_bin)
            bins[start : start + num_placed] = np.repeat(used, per_bin)[:num_placed]
            num_in_last = num_placed - (len(used) - 1) * per_bin
            open_bins.put(room - per_bin * length, used[:-1])
            open_bins.put(room - num_in_last * length, used[-1:])
            start += num_placed
    return bins, open_bins.num_bins


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


def _check_lengths(lengths: np.ndarray, capacity: int) -> None:
    wrong = np.flatnonzero((lengths > capacity) | (lengths < 1))
    if len(wrong):
        example = int(wrong[0])
        raise LimitError(
            f"example {example} has {lengths[example]} tokens, a bin takes 1 to {capacity} ({len(wrong)} such "
            "examples): raise pack.capacity to split.max_tokens or more"
        )


def _table(order: np.ndarray, bins: np.ndarray, lengths: np.ndarray, places: np.ndarray) -> pa.Table:
    """Sorted by the bins' places in the epoch; inside a bin the longest first."""
    by_bin = np.argsort(places[bins], kind="stable") if len(bins) else np.zeros(0, np.int64)
    bins, lengths = places[bins][by_bin] if len(bins) else bins, lengths[by_bin]
    ends = np.cumsum(lengths)
    first_of_bin = np.flatnonzero(np.diff(bins, prepend=-1))
    before = np.repeat((ends - lengths)[first_of_bin], np.diff([*first_of_bin, len(bins)]))
    columns = (bins, order[by_bin], ends - lengths - before, lengths)
    return pa.table([pa.array(column.astype(np.int32)) for column in columns], schema=PLAN)


def _shuffled(keys: np.ndarray, bins: np.ndarray, num_bins: int, seed: int, epoch: int) -> np.ndarray:
    """Place of each bin in the epoch, int64 [bins], by the key of its longest example."""
    _, first = np.unique(bins, return_index=True)
    order = np.lexsort((np.arange(num_bins), _mixed(keys[first], seed, ~epoch)))
    places = np.empty(num_bins, np.int64)
    places[order] = np.arange(num_bins)
    return places


# Keys -------------------------------------------------------------------------------------------------------


def _as_keys(keys: np.ndarray | Sequence[bytes], num_examples: int) -> np.ndarray:
    if not isinstance(keys, np.ndarray):
        keys = np.frombuffer(b"".join(_key(key) for key in keys), "<u8")
    if len(keys) != num_examples:
        raise ValueError(f"{len(keys)} row keys for {num_examples} examples")
    return keys.astype(np.uint64)


def _key(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=8).digest()


def _mixed(keys: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A hash of (key, seed, epoch), uint64: splitmix64's finaliser (Steele, Lea, Flood 2014) over their sum."""
    salt = int.from_bytes(_key(f"{seed}/{epoch}".encode()), "little")
    mixed = keys ^ np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
