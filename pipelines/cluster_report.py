"""The largest clusters of duplicates, with texts: written before any part is cut, so that a person can look."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.parts import StageRun
from pipelines.storage import check_file, file_entry, write_json
from schemas.conversation import utf8
from schemas.run import FileEntry, Manifest, first_record

NUM_CLUSTERS = 20
NUM_SHOWN_ROWS = 3
MAX_SHOWN_CHARS = 400


def write_clusters(
    run: StageRun,
    key: str,
    verdicts: pa.Table,
    folder: Path,
    before: Manifest,
    ids_by_part: Iterable[list[str]],
) -> tuple[FileEntry, list[dict[str, Any]]]:
    """clusters-*.json: of each its survivor, rows, reasons, and the texts of the survivor and of two that leave."""
    clusters = largest_clusters(verdicts)
    wanted = {row["row_id"] for cluster in clusters for row in cluster["rows"]}
    texts = _texts(wanted, folder, before, ids_by_part)
    for cluster in clusters:
        for row in cluster["rows"]:
            row |= texts.get(row["row_id"], {"text": "a row of an earlier run"})
    path = run.folder / f"clusters-{key[:32]}.json"
    write_json(path, clusters)
    return file_entry(path, folder=run.folder, num_rows=len(clusters)), clusters


def largest_clusters(verdicts: pa.Table, n: int = NUM_CLUSTERS) -> list[dict[str, Any]]:
    """Survivors and the rows dropped for them, most first; a survivor that was dropped too passes its rows on."""
    columns = (verdicts[name].cast(pa.large_string()) for name in ("row_id", "survivor"))
    both = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.large_string())
    encoded = both.combine_chunks().dictionary_encode()
    last = _last_survivors(encoded.indices.to_numpy(), len(verdicts))
    numbers, counts = np.unique(last, return_counts=True)
    # The smallest that may be told are those of its size: which of them is a matter of their ids.
    least = np.sort(counts)[-n:].min(initial=len(verdicts))
    found = [
        (-int(count), encoded.dictionary[number].as_py(), number)
        for number, count in zip(numbers[counts >= least].tolist(), counts[counts >= least], strict=True)
    ]
    return [
        _cluster(survivor, verdicts.take(pa.array(np.flatnonzero(last == number))))
        for _, survivor, number in sorted(found)[:n]
    ]


def _last_survivors(numbers: npt.NDArray[np.int32], num_rows: int) -> npt.NDArray[np.int32]:
    """Of each dropped row; `numbers` are those of the rows, then of their survivors: equal ids, equal numbers."""
    survivor = np.arange(numbers.max(initial=-1) + 1, dtype=np.int32)
    # A row that stands in an earlier run as well is its own survivor.
    survivor[numbers[:num_rows]] = numbers[num_rows:]
    while (survivor[survivor] != survivor).any():
        survivor = survivor[survivor]
    return survivor[numbers[:num_rows]]


def _cluster(survivor: str, dropped: pa.Table) -> dict[str, Any]:
    others = dropped.filter(pc.not_equal(dropped["row_id"], survivor)).sort_by("row_id")
    shown = others.select(["row_id", "reason", "detail"]).slice(0, NUM_SHOWN_ROWS - 1)
    reasons = {count["values"]: count["counts"] for count in pc.value_counts(dropped["reason"]).to_pylist()}
    return {
        "survivor": survivor,
        "num_rows_dropped": dropped.num_rows,
        "reasons": dict(sorted(reasons.items())),
        "rows": [{"row_id": survivor}, *shown.to_pylist()],
    }


def _texts(
    wanted: set[str], folder: Path, before: Manifest, ids_by_part: Iterable[list[str]]
) -> dict[str, dict[str, Any]]:
    texts: dict[str, dict[str, Any]] = {}
    for part, ids in zip(before.parts, ids_by_part, strict=True):
        if wanted.isdisjoint(ids):
            continue
        table = pq.read_table(
            check_file(folder, part.kept[0]),
            columns=["row_id", "source", "record", "messages"],
            page_checksum_verification=True,
        )
        for row in table.filter(
            pc.is_in(table["row_id"], pa.array(sorted(wanted), pa.large_string()))
        ).to_pylist():
            record = first_record(part.label) + row["record"]
            place = {"source": row["source"], "record": record, "text": _shown(row["messages"])}
            texts.setdefault(row["row_id"], place)
    return texts


def _shown(messages: list[dict[str, str]]) -> str:
    said = "\n".join(f"{message['role']}: {message['content'][:MAX_SHOWN_CHARS]}" for message in messages[:8])
    return utf8(said[:MAX_SHOWN_CHARS]).decode("utf-8", "replace")
