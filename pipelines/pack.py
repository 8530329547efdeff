"""Stage 7: which examples share a bin of `capacity` tokens, and in which order the bins are trained.

The plan hangs on lengths, keys, seed and epoch alone: another machine, or the trainer itself, makes the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.bins import FILLERS, Placement, fewest_bins, in_groups
from pipelines.epochs import as_keys, mixed, salt_of
from schemas.dataset import PLAN
from schemas.errors import LimitError
from schemas.pipeline_config import PipelineConfig

STAGE_VERSION = 2


def versions(config: PipelineConfig) -> dict[str, str]:
    """Nothing but the code and the shards shapes a plan."""
    return {}


PLACES = pa.schema([PLAN.field(name) for name in ("bin", "example", "offset", "num_tokens", "first_token")])
"""A plan without its sums."""


def plan_epoch(
    num_tokens: np.ndarray,
    row_keys: np.ndarray | Sequence[bytes],
    *,
    capacity: int,
    seed: int,
    epoch: int,
    mode: str = "packed",
    order: np.ndarray | None = None,
    is_document: np.ndarray | None = None,
) -> pa.Table:
    """The packing plan of one epoch, as PLACES.

    `num_tokens` is int [examples]; `row_keys` are 64-bit keys, uint64 [examples] or bytes of any length, that
    stay with an example whatever else is in the data (see epochs.row_keys). `mode` is a key of bins.FILLERS.
    `order`, float [examples], is a value by which bins are ordered, equal ones by hash(seed, epoch, key) as all are
    without it. Examples of which `is_document` is true, bool [examples], are joined and cut into exact blocks.
    Raises LimitError for any other example over capacity.
    """
    lengths = np.asarray(num_tokens).astype(np.int32, copy=False)
    keys = mixed(as_keys(row_keys, len(lengths)), salt_of(f"{seed}/{epoch}"))
    visited = _visiting_order(keys, order)
    blocks = visited[:0]
    if is_document is not None:
        blocks, visited = visited[is_document[visited]], visited[~is_document[visited]]
    _check_lengths(lengths, visited, capacity)
    whole = _whole_examples(mode, lengths, visited, capacity, keys, order, salt_of(f"{seed}/{epoch}/fit"))
    return _table(_joined([whole, _exact_blocks(lengths, blocks, capacity, keys, order)]))


def packing_summary(plan: pa.Table, capacity: int) -> dict[str, int | float]:
    """How full the bins are: num_bins, num_tokens, fill_share, and fewest_bins, below which no packing can go.

    fewest_bins = max(ceil(tokens / capacity), examples longer than half of it).
    """
    lengths = plan["num_tokens"].to_numpy()
    num_bins = int(plan["bin"].to_numpy().max(initial=-1)) + 1
    num_tokens = int(lengths.sum(dtype=np.int64))
    return {
        "num_bins": num_bins,
        "num_tokens": num_tokens,
        "fewest_bins": fewest_bins(lengths, capacity),
        "fill_share": num_tokens / (num_bins * capacity) if num_bins else 0.0,
    }


def _check_lengths(lengths: np.ndarray, visited: np.ndarray, capacity: int) -> None:
    found = lengths[visited]
    wrong = visited[(found > capacity) | (found < 1)]
    if len(wrong):
        example = int(wrong.min())
        raise LimitError(
            f"example {example} has {lengths[example]} tokens, a bin takes 1 to {capacity} ({len(wrong)} such "
            "examples): raise pack.capacity to split.max_tokens or more"
        )


# Bins with their places in the epoch ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Filled:
    """Pieces of examples in bins: all [pieces] but `bin_keys` and `bin_values` [bins].

    A bin's pieces lie in the order in which they stand here; bins are trained in the order of value, then key.
    """

    placement: Placement
    first_tokens: np.ndarray
    num_tokens: np.ndarray
    bin_keys: np.ndarray
    bin_values: np.ndarray


def _visiting_order(keys: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Numbers of the examples, int32: by value where there is one, then by key. Equal keys are equal examples."""
    by_key = np.argsort(keys, kind="stable").astype(np.int32)
    return by_key if order is None else by_key[np.argsort(order[by_key], kind="stable")]


def _whole_examples(
    mode: str,
    lengths: np.ndarray,
    visited: np.ndarray,
    capacity: int,
    keys: np.ndarray,
    order: np.ndarray | None,
    salt: int,
) -> _Filled:
    fill = FILLERS[mode]
    if mode == "unpacked" or (order is None and mode == "packed"):
        placement, groups = fill(lengths, visited, capacity, salt), None
    else:  # batches of like length are made of neighbours in a shuffled order, so that partners change
        placement, groups = in_groups(fill, lengths, visited, capacity, salt)
    first = _first_of_bins(placement)
    bin_keys = mixed(keys[placement.entries[first]], salt)
    values = np.zeros(placement.num_bins, np.float64)
    if order is not None:
        values = order[placement.entries[first]].astype(np.float64)
        if groups is not None:  # bins of a group are shuffled: all have the value of its first bin
            values = values[np.searchsorted(groups, groups, side="left")]
    num_tokens = lengths[placement.entries]
    return _Filled(placement, np.zeros(len(num_tokens), np.int32), num_tokens, bin_keys, values)


def _exact_blocks(
    lengths: np.ndarray, visited: np.ndarray, capacity: int, keys: np.ndarray, order: np.ndarray | None
) -> _Filled:
    """Documents end to end, cut each `capacity` tokens: every token once, all blocks full but the last."""
    ends = np.cumsum(lengths[visited], dtype=np.int64)
    starts = ends - lengths[visited]
    num_pieces = np.where(ends > starts, (ends - 1) // capacity - starts // capacity + 1, 0)
    which = np.repeat(np.arange(len(visited)), num_pieces)
    number = np.arange(len(which)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    bins = starts[which] // capacity + number
    first = np.maximum(starts[which], bins * capacity)
    end = np.minimum(ends[which], (bins + 1) * capacity)
    num_bins = int(bins[-1]) + 1 if len(bins) else 0
    placement = Placement(visited[which], bins.astype(np.int32), num_bins)
    opening = placement.entries[_first_of_bins(placement)]
    # A long document opens several blocks.
    bin_keys = mixed(keys[opening] + np.arange(num_bins, dtype=np.uint64), 0)
    values = np.zeros(num_bins) if order is None else order[opening].astype(np.float64)
    return _Filled(
        placement,
        (first - starts[which]).astype(np.int32),
        (end - first).astype(np.int32),
        bin_keys,
        values,
    )


def _first_of_bins(placement: Placement) -> np.ndarray:
    """Where in the placement each bin's first entry stands, int64 [bins]."""
    first = np.empty(placement.num_bins, np.int64)
    # Of several values for one place numpy keeps the last.
    first[placement.bins[::-1]] = np.arange(len(placement.bins) - 1, -1, -1)
    return first


def _joined(parts: Sequence[_Filled]) -> _Filled:
    parts = [part for part in parts if part.placement.num_bins] or list(parts[:1])
    if len(parts) == 1:
        return parts[0]
    firsts = np.cumsum([0, *(part.placement.num_bins for part in parts)])
    placement = Placement(
        np.concatenate([part.placement.entries for part in parts]),
        np.concatenate(
            [part.placement.bins + np.int32(n) for part, n in zip(parts, firsts[:-1], strict=True)]
        ),
        int(firsts[-1]),
    )
    names = ("first_tokens", "num_tokens", "bin_keys", "bin_values")
    return _Filled(placement, *(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _table(filled: _Filled) -> pa.Table:
    """Sorted by the bins' places in the epoch."""
    num_bins = filled.placement.num_bins
    places = np.empty(num_bins, np.int32)
    places[np.lexsort((filled.bin_keys, filled.bin_values))] = np.arange(num_bins, dtype=np.int32)
    bins = places[filled.placement.bins]
    by_bin = np.argsort(bins, kind="stable").astype(np.int32)
    bins, num_tokens = bins[by_bin], filled.num_tokens[by_bin]
    starts = np.cumsum(num_tokens, dtype=np.int64) - num_tokens
    first_of_bin = np.flatnonzero(np.diff(bins, prepend=-1))
    starts -= np.repeat(starts[first_of_bin], np.diff([*first_of_bin, len(bins)]))
    columns = (bins, filled.placement.entries[by_bin], starts, num_tokens, filled.first_tokens[by_bin])
    return pa.table([pa.array(column.astype(np.int32, copy=False)) for column in columns], schema=PLACES)
