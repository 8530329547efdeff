"""One side of the hold-out, and the loss of a model on each example of it.

Examples go through the model packed as the plan says, one bin at a time, so that no setting of training moves the
numbers. Virtual tokens are the exception: each example is a padded row, as in training.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import IntegrityError, LimitError, TrainingError
from schemas.evaluation import HeldOutLoss
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGE_FOLDERS
from trainer.attention import unwrapped, use_packed_attention, use_plain_attention
from trainer.data import MicroBatch, Plan, check_plan, read_plan, trained_bytes
from trainer.loss import token_losses
from trainer.padding import computed_batches
from trainer.shard_reader import ShardReader
from trainer.virtual_rules import tokens_of_a_bin
from trainer.virtual_tokens import needs_padded_rows

SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """One side of the hold-out. Arrays are [examples], in the order of the split."""

    reader: ShardReader
    plan: Plan
    tokens_per_bin: int
    num_trained_bytes: NDArray[np.int64]
    row_ids: list[str]
    pieces: list[int]
    sources: NDArray[np.str_]
    languages: NDArray[np.str_]


def read_held_out(config: PipelineConfig) -> HeldOut:
    """Raises LimitError when the side has nothing to measure, IntegrityError when its plan does not fit."""
    split = config.evaluate.split
    reader = ShardReader(config.run_root / STAGE_FOLDERS["split"], split)
    if int(reader.num_trained_bytes.sum()) == 0:
        raise LimitError(
            f"{reader.num_rows} examples with 0 bytes of trained text are in the held-out side {split!r}, expected "
            f"some: raise holdout.{split} (now {getattr(config.holdout, split)}), add data, or set evaluate.split"
        )
    check_plan(config.run_root)
    plan = read_plan(config.run_root, split, 0)
    named = np.unique(plan.examples)
    if not np.array_equal(named, np.arange(reader.num_rows)):
        raise IntegrityError(
            f"the plan of {split} names {len(named)} of {reader.num_rows} examples; run 'pack' again"
        )
    rows = range(reader.num_rows)
    return HeldOut(
        reader=reader,
        plan=plan,
        tokens_per_bin=tokens_of_a_bin(config),
        num_trained_bytes=np.rint(_by_example(plan, trained_bytes(plan, reader))).astype(np.int64),
        row_ids=[str(reader.value(row, "row_id")) for row in rows],
        pieces=[int(reader.value(row, "piece")) for row in rows],
        sources=reader.sources,
        languages=reader.languages,
    )


@torch.inference_mode()
def held_out_nats(model: torch.nn.Module, held_out: HeldOut, *, label: str) -> NDArray[np.float64]:
    """Sum of the nats of each example's trained tokens: float64 [examples]. Raises TrainingError if not finite."""
    device = unwrapped(model).device
    nats = np.zeros(held_out.reader.num_rows)
    show = progress(f"{label}: loss in tokens", int(held_out.reader.num_tokens.sum()))
    for batch in _batches(model, held_out):
        if batch.num_trained_tokens:
            losses = token_losses(model, batch.to(device)).double().cpu().numpy()
            documents = batch.target_documents.numpy()
            # Not +=, which takes one of several pieces of an example.
            np.add.at(nats, np.array(batch.rows)[documents], losses)
        show(batch.num_tokens)
    if not np.isfinite(nats).all():
        row = int(np.flatnonzero(~np.isfinite(nats))[0])
        raise TrainingError(
            f"the {label}'s loss on example {row} (row {held_out.row_ids[row]}) is {nats[row]}, expected a number: "
            "its weights are broken; train again with a lower learning rate"
        )
    return nats


def _batches(model: torch.nn.Module, held_out: HeldOut) -> Iterator[MicroBatch]:
    is_padded = needs_padded_rows(model)
    (use_plain_attention if is_padded else use_packed_attention)(model)
    tokens_per_bin = held_out.tokens_per_bin if is_padded else None
    for number in range(held_out.plan.num_bins):
        yield from computed_batches(
            held_out.plan, held_out.reader, number, number + 1, tokens_per_bin=tokens_per_bin
        )


def count_trained_tokens(held_out: HeldOut) -> NDArray[np.int64]:
    """Targets of each example: a first token has nothing before it and is none."""
    return _by_example(held_out.plan, held_out.plan.num_trained_tokens).astype(np.int64)


def _by_example(plan: Plan, values: np.ndarray) -> NDArray[np.float64]:
    """Sums over the pieces of each example: of a long document there are several."""
    return np.bincount(plan.examples, weights=values).astype(np.float64)


def held_out_loss(
    nats: NDArray[np.float64], num_tokens: NDArray[np.int64], num_bytes: NDArray[np.int64]
) -> HeldOutLoss:
    """Sums over examples, and their two ratios."""
    total, tokens, length = float(nats.sum()), int(num_tokens.sum()), int(num_bytes.sum())
    return HeldOutLoss(
        num_examples=len(nats),
        num_trained_tokens=tokens,
        num_trained_bytes=length,
        loss=total / tokens if tokens else None,
        bits_per_byte=total / math.log(2) / length if length else None,
    )


def progress(what: str, total: int) -> Callable[[int], None]:
    """Lines on stderr with rate and time left, one every ten seconds; call it with how much was done."""
    begun = shown = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done, now = done + count, time.monotonic()
        if now - shown >= SECONDS_BETWEEN_LINES:
            shown, rate = now, done / (now - begun)
            left = (total - done) / rate
            print(
                f"{what}: {done:,} of {total:,}, {rate:,.1f}/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    return advance
