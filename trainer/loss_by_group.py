"""Loss over a held-out split: of all of it, of each source and of each language."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from trainer.data import MicroBatch, Plan, trained_bytes
from trainer.ranks import Ranks
from trainer.shard_reader import ShardReader


@dataclass(frozen=True, slots=True)
class SplitLoss:
    """`loss` is weighted, in nats a token; bits per byte count every trained token, and accuracy is the share of them
    that was the most likely one. Not a number where there is nothing to divide by.
    """

    loss: float
    bits_per_byte: float
    token_accuracy: float
    num_trained_tokens: int
    by_source: Mapping[str, "SplitLoss"] = field(default_factory=dict)
    by_language: Mapping[str, "SplitLoss"] = field(default_factory=dict)


class LossSums:
    """Added up on each rank for what it computed, and over the ranks once at the end.

    A row of numbers for each source and for each language: nats, weight x nats, weights, trained tokens, those
    of them that were predicted.
    """

    def __init__(self, reader: ShardReader, plan: Plan) -> None:
        self._sources = _Groups.of(reader.sources)
        self._languages = _Groups.of(reader.languages)
        self._plan = plan
        self._num_bytes = trained_bytes(plan, reader)
        self._sums = np.zeros((len(self._sources.names) + len(self._languages.names), 5))

    def add(self, batch: MicroBatch, losses: torch.Tensor, is_right: torch.Tensor) -> None:
        """Of the batch's trained tokens, unweighted, float64 on the CPU."""
        rows = np.array(batch.rows, np.int64)[batch.target_documents.cpu().numpy()]
        nats, weights = losses.numpy(), batch.weights.double().cpu().numpy()
        columns = np.stack([nats, nats * weights, weights, np.ones(len(rows)), is_right.numpy()], axis=1)
        # Not +=, which takes one of several tokens of a group.
        np.add.at(self._sums, self._sources.of_row[rows], columns)
        np.add.at(self._sums, len(self._sources.names) + self._languages.of_row[rows], columns)

    def result(self, ranks: Ranks, device: torch.device) -> SplitLoss:
        """The same on all ranks."""
        sums = ranks.add_up(torch.from_numpy(self._sums).to(device)).cpu().numpy()
        num_sources = len(self._sources.names)
        by_source = self._losses(self._sources, sums[:num_sources])
        by_language = self._losses(self._languages, sums[num_sources:])
        total = _loss(sums[:num_sources].sum(axis=0), float(self._num_bytes.sum()))
        return replace(total, by_source=by_source, by_language=by_language)

    def _losses(self, groups: "_Groups", sums: np.ndarray) -> dict[str, SplitLoss]:
        num_bytes = np.bincount(
            groups.of_row[self._plan.examples], weights=self._num_bytes, minlength=len(groups.names)
        )
        return {
            name: _loss(row, float(length))
            for name, row, length in zip(groups.names, sums, num_bytes, strict=True)
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """Names in order, and the number of the name of each row of the split."""

    names: list[str]
    of_row: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "_Groups":
        names, of_row = np.unique(values, return_inverse=True)
        return cls([str(name) for name in names], of_row)


def _loss(sums: np.ndarray, num_bytes: float) -> SplitLoss:
    nats, weighted, weight_sum, num_trained_tokens, num_right = sums.tolist()
    return SplitLoss(
        loss=weighted / weight_sum if weight_sum else math.nan,
        bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else math.nan,
        token_accuracy=num_right / num_trained_tokens if num_trained_tokens else math.nan,
        num_trained_tokens=int(num_trained_tokens),
    )
