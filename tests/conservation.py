"""No row vanishes: recomputed from the files alone. Imports nothing of the product.

    python tests/conservation.py RUN_ROOT

Opens kept, dropped and piece files and compares multisets of row ids stage by stage:
rows in + pieces cut = rows out + drops, for each stage, row by row. At merge the rows in are the records of each
file, numbered from 0 without a gap; a record of several chats gives further rows.
"""

import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FOLDERS = ("01_merged", "02_cleaned", "03_filtered", "04_deduplicated", "05_held_out")


def check_run_root(run_root: Path) -> dict[str, dict[str, int]]:
    """Counts by folder; raises AssertionError naming what is missing or too much."""
    counts, left = check_rows(run_root, FOLDERS)
    counts["06_shards"] = check_shards(run_root / "06_shards", left)
    check_manifests(run_root, counts)
    check_plan(run_root)
    return counts


def check_rows(run_root: Path, folders: Sequence[str]) -> tuple[dict[str, dict[str, int]], Counter[str]]:
    """Counts by folder, from 01_merged on, and the row ids that are left behind the last."""
    counts = {}
    before: Counter[str] | None = None
    for folder in folders:
        kept, dropped = parquet_ids(run_root / folder, "part"), parquet_ids(run_root / folder, "dropped")
        if before is not None:
            assert kept + dropped == before, f"{folder}: {difference(before, kept + dropped)}"
        counts[folder] = {"kept": kept.total(), "dropped": dropped.total()}
        before = kept
    counts["01_merged"]["pieces_cut"] = further_rows(run_root / "01_merged")
    assert before is not None
    return counts, before


def further_rows(folder: Path) -> int:
    """Rows of 01_merged beyond one a record."""
    places: Counter[tuple[str, int]] = Counter(
        (row["source"], row["record"]) for row in rows_with_records(folder, "source", "record")
    )
    numbers: dict[str, set[int]] = {}
    for source, record in places:
        numbers.setdefault(source, set()).add(record)
    for source, found in numbers.items():
        assert found == set(range(len(found))), f"{source}: records are missing below {max(found)}"
    return places.total() - len(places)


def rows_with_records(folder: Path, *columns: str) -> Iterator[dict[str, Any]]:
    """Kept and dropped rows of a stage; `record` is the number in the file: a part's label names its first."""
    for part in json.loads((folder / "manifest.json").read_text())["parts"]:
        first_record = int(part["label"].rpartition(":")[2])
        for file in (*part["kept"], *([part["dropped"]] if part["dropped"] else [])):
            for row in pq.read_table(folder / file["path"], columns=list(columns)).to_pylist():
                yield row | {"record": first_record + row["record"]}


def parquet_ids(folder: Path, prefix: str) -> Counter[str]:
    ids: Counter[str] = Counter()
    for path in sorted(folder.rglob(f"{prefix}-*.parquet")):
        ids.update(pq.read_table(path, columns=["row_id"])["row_id"].to_pylist())
    return ids


def check_shards(folder: Path, before: Counter[str]) -> dict[str, int]:
    """Every row is dropped once, or stands in the shards as pieces 0..n-1 of rising message ranges."""
    dropped = parquet_ids(folder, "dropped")
    pieces: dict[str, list[tuple[int, int, int]]] = {}
    num_examples = 0
    for path in sorted(folder.glob("*/data-*.arrow")):
        table = read_stream(path)
        num_examples += table.num_rows
        columns = ("row_id", "piece", "first_message", "end_message")
        for row_id, *piece in zip(*(table[name].to_pylist() for name in columns), strict=True):
            pieces.setdefault(row_id, []).append(tuple(piece))
    assert Counter(pieces.keys()) + dropped == before, difference(before, Counter(pieces.keys()) + dropped)
    for row_id, found in pieces.items():
        assert [piece for piece, _, _ in found] == list(range(len(found))), (row_id, found)
        for (_, _, end), (_, first, _) in itertools.pairwise(found):
            assert first >= end, f"{row_id}: pieces overlap or go back: {found}"
    cut = num_examples - len(pieces)
    return {"kept": num_examples, "dropped": dropped.total(), "pieces_cut": cut}


def check_manifests(run_root: Path, counts: dict[str, dict[str, int]]) -> None:
    """What the manifests say is what the files hold."""
    for folder, found in counts.items():
        manifest = json.loads((run_root / folder / "manifest.json").read_text())
        assert manifest["num_rows_out"] == found["kept"], folder
        assert sum(manifest["drops"].values()) == found["dropped"], folder
        assert manifest["num_pieces_cut"] == found.get("pieces_cut", 0), folder
        left = manifest["num_rows_in"] + manifest["num_pieces_cut"]
        assert left == found["kept"] + found["dropped"], folder


def check_plan(run_root: Path) -> None:
    """Every example stands in each epoch's plan as often as its source's weight says, without overlap.

    A weight with a fraction gives one of two numbers of copies.
    """
    weights = json.loads((run_root / "07_plan" / "manifest.json").read_text())["config"]["pack"]["weights"]
    for path in sorted((run_root / "07_plan").glob("*.arrow")):
        split = path.name.split("-epoch-")[0]
        plan = read_stream(path)
        copies = Counter(plan["example"].to_pylist())
        for example, source in enumerate(sources_of(run_root / "06_shards" / split)):
            weight = weights.get(source, 1) if split == "train" else 1
            assert copies.pop(example, 0) in (math.floor(weight), math.ceil(weight)), (path, example, weight)
        assert not copies, (path, copies)
        check_bins(path, plan)


def sources_of(folder: Path) -> list[str]:
    tables = [read_stream(path) for path in sorted(folder.glob("data-*.arrow"))]
    return [source.split("/")[0] for table in tables for source in table["source"].to_pylist()]


def check_bins(path: Path, plan: pa.Table) -> None:
    end_of_bin: dict[int, int] = {}
    columns = (plan[name].to_pylist() for name in ("bin", "offset", "num_tokens"))
    for number, offset, length in zip(*columns, strict=True):
        assert offset == end_of_bin.get(number, 0), path
        end_of_bin[number] = offset + length


def read_stream(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all()


def difference(before: Counter[str], after: Counter[str]) -> str:
    lost, extra = before - after, after - before
    return f"lost {lost.total()} rows {list(lost)[:3]}, extra {extra.total()} rows {list(extra)[:3]}"


if __name__ == "__main__":
    for folder, counted in check_run_root(Path(sys.argv[1])).items():
        print(f"{folder:16} " + "  ".join(f"{name} {number}" for name, number in counted.items()))
