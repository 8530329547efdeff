"""From a split's examples to the plan of one epoch: who is in it, in which order, in which bin, with which sums."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pyarrow as pa

from pipelines.epochs import (
    Sources,
    epoch_weights,
    examples_of_epoch,
    mixed,
    read_sources,
    row_keys,
    salt_of,
)
from schemas.dataset import PLAN
from schemas.pipeline_config import PackConfig


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """What a plan must know of a split, 28 bytes an example: all arrays are [examples].

    `keys` uint64; `num_tokens`, `num_trained_tokens` int32; `weight_sums` float64.
    """

    sources: Sources
    keys: np.ndarray
    num_tokens: np.ndarray
    num_trained_tokens: np.ndarray
    weight_sums: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """One side as it is planned. `document_sources` are names of sources whose examples may be cut anywhere.

    `open_table` maps the shards, for the spans of documents; `read_scores` float64 [examples] is asked for with
    order: score alone.
    """

    examples: Examples
    is_trained: bool
    capacity: int
    open_table: Callable[[], pa.Table]
    read_scores: Callable[[], np.ndarray]
    document_sources: frozenset[str] = frozenset()


def read_examples(tables: Iterable[pa.Table]) -> Examples:
    """From the shards of a split, one after the other: mapped pages of a table that is let go count no longer."""
    names: dict[str, int] = {}
    parts: list[tuple[np.ndarray, ...]] = []
    for table in tables:
        sources = read_sources(table)
        codes = np.array([names.setdefault(name, len(names)) for name in sources.names], np.int16)
        num_tokens = table["num_tokens"].to_numpy().copy()
        parts.append((codes[sources.codes], row_keys(table), num_tokens, *_example_sums(table)))
    nothing = (np.int16, np.uint64, np.int32, np.int32, np.float64)
    columns = [
        np.concatenate([np.zeros(0, dtype), *(part[number] for part in parts)])
        for number, dtype in enumerate(nothing)
    ]
    return Examples(Sources(tuple(names), columns[0]), *columns[1:])


def plan_split(module: ModuleType, config: PackConfig, split: Split, epoch: int) -> pa.Table:
    """The plan of one epoch, as schemas.dataset.PLAN. `module` is pipelines.pack.

    Held-out sides are measured as they are: weights, temperature and order are for training alone.
    """
    known = split.examples
    weights = epoch_weights(known.sources, config.weights, temperature=config.temperature)
    examples, keys = examples_of_epoch(
        known.sources, known.keys, weights if split.is_trained else {}, seed=config.seed, epoch=epoch
    )
    lengths = known.num_tokens[examples]
    is_document = _is_document(known.sources, examples, split.document_sources)
    first_tokens = None
    if is_document is not None and config.documents == "window":
        window = np.where(is_document, config.window_tokens or split.capacity, lengths)
        first_tokens = window_starts(lengths, keys, window, seed=config.seed, epoch=epoch)
        lengths, is_document = np.minimum(lengths, window), None
    plan: pa.Table = module.plan_epoch(
        lengths,
        keys,
        capacity=split.capacity,
        seed=config.seed,
        epoch=epoch,
        mode=config.mode,
        order=_order(config, split, examples) if split.is_trained else None,
        is_document=is_document,
    )
    return _with_sums(plan, split, examples, first_tokens)


def window_starts(
    num_tokens: np.ndarray, keys: np.ndarray, window: np.ndarray | int, *, seed: int, epoch: int
) -> np.ndarray:
    """First token of the stretch of `window` tokens that an epoch trains of each document, int32 [documents].

    A function of seed, epoch and the document's key alone; every place is as likely as any other.
    """
    places = np.maximum(num_tokens.astype(np.int64) - window, 0).astype(np.uint64) + np.uint64(1)
    return (mixed(keys, salt_of(f"{seed}/{epoch}/window")) % places).astype(np.int32)


def _is_document(sources: Sources, examples: np.ndarray, documents: frozenset[str]) -> np.ndarray | None:
    chosen = np.array([name in documents for name in sources.names], np.bool_)
    return chosen[sources.codes[examples]] if chosen.any() else None


def _order(config: PackConfig, split: Split, examples: np.ndarray) -> np.ndarray | None:
    """What bins are ordered by, float64 [examples of the epoch]; None for shuffled."""
    if config.order == "shuffled":
        return None
    orders: Mapping[str, Callable[[], np.ndarray]] = {
        "length": lambda: split.examples.num_tokens,
        "source": lambda: np.arange(len(split.examples.keys)),
        "score": split.read_scores,
    }
    values = orders[config.order]().astype(np.float64)[examples]
    return -values if config.descending else values


# Sums -------------------------------------------------------------------------------------------------------


def _with_sums(
    plan: pa.Table, split: Split, examples: np.ndarray, first_tokens: np.ndarray | None
) -> pa.Table:
    """The plan with row numbers in place of numbers in the epoch, and with what each piece trains."""
    known, entries = split.examples, plan["example"].to_numpy()
    rows, num_tokens = examples[entries], plan["num_tokens"].to_numpy()
    first = plan["first_token"].to_numpy() if first_tokens is None else first_tokens[entries]
    trained, weight_sums = known.num_trained_tokens[rows], known.weight_sums[rows]
    cut = np.flatnonzero((first > 0) | (num_tokens < known.num_tokens[rows]))
    if len(cut):
        trained[cut], weight_sums[cut] = _piece_sums(
            split.open_table(), rows[cut], first[cut], num_tokens[cut]
        )
    columns = {
        "example": rows,
        "first_token": first,
        "num_trained_tokens": trained,
        "weight_sum": weight_sums,
    }
    arrays = [pa.array(columns[name]) if name in columns else plan[name] for name in PLAN.names]
    return pa.table(arrays, schema=PLAN)


def _example_sums(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Trained tokens and the sum of their weights of whole examples: int32 and float64 [examples]."""
    columns = ["span_starts", "span_ends", "span_weights"]
    found = [_batch_sums(batch) for batch in table.select(columns).to_batches()]
    trained = np.concatenate([np.zeros(0, np.int32), *(sums[0] for sums in found)])
    return trained, np.concatenate([np.zeros(0), *(sums[1] for sums in found)])


def _batch_sums(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    starts, ends, weights = (column.flatten().to_numpy() for column in batch.columns)
    offsets = batch.column(0).offsets.to_numpy()
    # Nothing stands before token 0, so it is never a target.
    lengths = np.maximum(ends - np.maximum(starts, 1), 0)
    sums = []
    for values in (lengths, lengths * weights.astype(np.float64)):
        running = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values, dtype=values.dtype)])
        sums.append(running[offsets[1:] - offsets[0]] - running[offsets[:-1] - offsets[0]])
    return sums[0], sums[1]


def _piece_sums(
    table: pa.Table, rows: np.ndarray, first: np.ndarray, num_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same of tokens [first, first + num_tokens) of some examples, the first of them never a target."""
    spans = table.select(["span_starts", "span_ends", "span_weights"]).take(pa.array(rows))
    starts, ends, weights = (spans[name].combine_chunks().flatten().to_numpy() for name in spans.column_names)
    sizes = spans["span_starts"].combine_chunks().value_lengths().to_numpy()
    piece = np.repeat(np.arange(len(rows)), sizes)
    low = np.maximum(starts, first[piece] + 1)
    lengths = np.maximum(np.minimum(ends, (first + num_tokens)[piece]) - low, 0)
    trained = np.bincount(piece, weights=lengths, minlength=len(rows))
    weight_sums = np.bincount(piece, weights=lengths * weights.astype(np.float64), minlength=len(rows))
    return trained.astype(np.int32), weight_sums


def bin_costs(plan: pa.Table) -> np.ndarray:
    """Sum of the squared lengths of each bin's pieces, which attention costs: float64 [bins]."""
    bins, lengths = plan["bin"].to_numpy(), plan["num_tokens"].to_numpy().astype(np.float64)
    return np.bincount(bins, weights=lengths * lengths)
