"""Stage 4 over the files of all parts: verdicts by row numbers, turned into drops one part at a time.

A million Python strings are a hundred megabytes: ids and verdicts of all rows stay in Arrow's columns.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.caps import over_cap
from pipelines.earlier_runs import kept_rows
from pipelines.executors import close_workers
from pipelines.feature_files import feature_files
from pipelines.grams import Ints
from pipelines.overlap import Bools
from pipelines.parts import StageRun
from schemas.conversation import Drop

MANY_ROWS = 1_000_000  # worth the second in which workers start again: until then their memory is free


@dataclass(frozen=True, slots=True)
class Decided:
    """Verdicts on the rows of all parts, numbered over all of them."""

    verdicts: pa.Table
    counts: dict[str, int]
    row_ids: pa.ChunkedArray
    part_starts: Ints  # one more than parts
    is_again: Bools  # the row's id stands in an earlier row
    _rows: Ints  # of each verdict, ascending
    _lines: Ints  # and its line

    def ids_of_parts(self) -> Iterator[list[str]]:
        for start, end in self._borders():
            yield self.row_ids.slice(start, end - start).to_pylist()

    def over_cap(
        self, sources: Iterable[str], leaked: Mapping[str, Drop], caps: Mapping[str, int]
    ) -> dict[str, Drop]:
        """Drops by row id; sources are those of the parts."""
        if not caps:
            return {}
        dropped = {*leaked, *self.verdicts["row_id"].to_pylist()}
        return over_cap(zip(sources, self.ids_of_parts(), strict=True), dropped, caps)

    def drops_of_parts(self, more: Mapping[str, Drop]) -> Iterator[dict[int, Drop]]:
        """For each part its drops by row number in the part; `more` are by row id."""
        for (start, end), ids in zip(self._borders(), self.ids_of_parts(), strict=True):
            drops = (
                {number: more[row_id] for number, row_id in enumerate(ids) if row_id in more} if more else {}
            )
            drops |= self._decided_between(start, end)
            for number in np.flatnonzero(self.is_again[start:end]).tolist():
                drops[number] = Drop(
                    "duplicate", "same record in an earlier file of this source", ids[number]
                )
            yield drops

    def _decided_between(self, start: int, end: int) -> dict[int, Drop]:
        first, last = np.searchsorted(self._rows, [start, end]).tolist()
        lines = self.verdicts.take(pa.array(self._lines[first:last]))
        columns = (lines[name].to_pylist() for name in ("reason", "detail", "survivor"))
        numbers = (self._rows[first:last] - start).tolist()
        return {number: Drop(*told) for number, *told in zip(numbers, *columns, strict=True)}

    def _borders(self) -> Iterator[tuple[int, int]]:
        yield from itertools.pairwise(self.part_starts.tolist())


def decide_files(
    run: StageRun,
    module: ModuleType,
    paths: Sequence[Path],
    leaked: Mapping[str, Drop],
    earlier: Sequence[tuple[Path, Path]],
) -> Decided:
    """`paths` are the features of the parts. Leaked rows are nobody's survivor; of equal ids the first counts."""
    features = feature_files(module.FEATURES, [*paths, *(path for path, _ in earlier)])
    starts = np.concatenate([[0], np.cumsum(features.num_rows, dtype=np.int64)])
    num_ours = int(starts[len(paths)])
    if num_ours > MANY_ROWS:
        close_workers()
    ids = features.column("row_id")
    ours = ids.slice(0, num_ours)
    again = is_again(ours)
    present = np.ones(len(features), bool)
    present[:num_ours] = ~again
    if leaked:
        gone = pc.is_in(ours, value_set=pa.array(list(leaked), pa.large_string()))
        present[:num_ours] &= ~gone.to_numpy()
    for (_, part), start, end in zip(
        earlier, starts[len(paths) :].tolist(), starts[len(paths) + 1 :].tolist(), strict=False
    ):
        present[start:end] = kept_rows(ids.slice(start, end - start), part)
    del ids, ours  # 40 bytes of each row; they are read again when the join has ended
    decision = module.decide_rows(features, run.config, present=present, num_ours=num_ours)
    lines = np.argsort(decision.rows)
    return Decided(
        verdicts=decision.verdicts,
        counts=decision.counts,
        row_ids=features.column("row_id").slice(0, num_ours),
        part_starts=starts[: len(paths) + 1],
        is_again=again,
        _rows=decision.rows[lines],
        _lines=lines,
    )


def is_again(ids: pa.ChunkedArray) -> Bools:
    order = pc.sort_indices(ids).to_numpy()  # stable: of equal ids the first comes first
    ordered = ids.take(pa.array(order))
    again = np.zeros(len(ids), bool)
    if len(ids) > 1:
        equal = pc.equal(ordered.slice(1), ordered.slice(0, len(ids) - 1)).to_numpy()
        again[order[1:][equal]] = True
    return again
