"""The largest clusters of duplicates, with texts: written before any part is cut, so that a person can look."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    ids_by_part: Sequence[list[str]],
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
    dropped = {row["row_id"]: row for row in verdicts.to_pylist()}
    members: dict[str, list[str]] = {}
    for row_id in dropped:
        members.setdefault(_last_survivor(row_id, dropped), []).append(row_id)
    largest = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))[:n]
    return [_cluster(survivor, sorted(rows), dropped) for survivor, rows in largest]


def _last_survivor(row_id: str, dropped: dict[str, dict[str, Any]]) -> str:
    survivor: str = dropped[row_id]["survivor"]
    # A row that stands in an earlier run as well is its own survivor.
    while survivor in dropped and dropped[survivor]["survivor"] != survivor:
        survivor = dropped[survivor]["survivor"]
    return survivor


def _cluster(survivor: str, rows: list[str], dropped: dict[str, dict[str, Any]]) -> dict[str, Any]:
    shown = [row for row in rows if row != survivor][: NUM_SHOWN_ROWS - 1]
    told = [{"row_id": row} | {name: dropped[row][name] for name in ("reason", "detail")} for row in shown]
    return {
        "survivor": survivor,
        "num_rows_dropped": len(rows),
        "reasons": dict(sorted(Counter(dropped[row]["reason"] for row in rows).items())),
        "rows": [{"row_id": survivor}, *told],
    }


def _texts(
    wanted: set[str], folder: Path, before: Manifest, ids_by_part: Sequence[list[str]]
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
