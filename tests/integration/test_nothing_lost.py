"""Thousands of spoiled records in every container, from merge to dedup: no crash, each kept or dropped with a reason."""

import csv
import gzip
import hashlib
import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.conservation import check_rows, rows_with_records
from tests.integration.mutated import mutated_line, spoiled_line
from tests.integration.test_etl import run

FOLDERS = ("01_merged", "02_cleaned", "03_filtered", "04_deduplicated")
PLAIN = b'{"prompt": "a first line", "completion": "that is whole"}'
"""First in its file: the kind of a file is told by its beginning."""

PROGRAM = """
import sys
from pathlib import Path
from pipelines.stage import run_stage
from schemas.config_file import load_config

if __name__ == "__main__":
    config = load_config(Path(sys.argv[1]), sys.argv[2:])
    for stage in ("merge", "clean", "filter", "dedup"):
        run_stage(stage, config)
"""

Writer = Callable[[Path, list[bytes], random.Random], list[bytes] | None]
"""Writes records to a file; returns the raw bytes of each where these are what is read."""


def lines(path: Path, records: list[bytes], draw: random.Random) -> list[bytes]:
    path.write_bytes(b"\n".join(records) + b"\n")
    return records


def array(path: Path, records: list[bytes], draw: random.Random) -> list[bytes]:
    path.write_bytes(b"[" + b",\n".join(records) + b"]")
    return records


def packed(path: Path, records: list[bytes], draw: random.Random) -> list[bytes]:
    pack = gzip.compress if path.suffix == ".gz" else zstandard.compress
    path.write_bytes(pack(b"\n".join(records)))
    return records


def zipped(path: Path, records: list[bytes], draw: random.Random) -> list[bytes]:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.jsonl", b"\n".join(records))
    return records


def keyed(path: Path, records: list[bytes], draw: random.Random) -> None:
    members = (b'"key %d": %b' % (number, record) for number, record in enumerate(records))
    path.write_bytes(b"{" + b",".join(members) + b"}")


def utf_16(path: Path, records: list[bytes], draw: random.Random) -> list[bytes]:
    text = b"\n".join(records).decode("utf-8", "surrogatepass")
    path.write_bytes(text.encode("utf-16", "surrogatepass"))
    return records


def table(path: Path, records: list[bytes], draw: random.Random) -> None:
    """The records as texts in columns, whatever they are."""
    texts = [record.decode("utf-8", "replace") for record in records]
    columns = {"prompt": texts, "completion": texts[::-1], "number": list(range(len(texts)))}
    if path.suffix == ".csv":
        rows = io.StringIO(newline="")
        csv.writer(rows).writerows([("prompt", "completion"), *zip(texts, texts[::-1], strict=True)])
        path.write_text(rows.getvalue(), newline="")
    elif path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=100)
    else:
        with pa.ipc.new_file(path, pa.table(columns).schema) as writer:
            writer.write_table(pa.table(columns), max_chunksize=100)


FILES: dict[str, tuple[Writer, bool]] = {
    "lines.jsonl": (lines, True),
    "named.json": (lines, True),
    "array.json": (array, False),
    "lines.jsonl.gz": (packed, True),
    "lines.jsonl.zst": (packed, True),
    "archive.zip": (zipped, True),
    "keyed.json": (keyed, False),
    "utf16.jsonl": (utf_16, False),
    "table.csv": (table, False),
    "table.parquet": (table, False),
    "table.arrow": (table, False),
}
"""Name -> how it is written, and whether its lines may be spoiled in their bytes."""


def write_files(folder: Path, number: int, seed: int) -> dict[str, list[bytes] | int]:
    """Files of `number` records in all -> what each must give: raw records, or how many."""
    expected: dict[str, list[bytes] | int] = {}
    folder.mkdir()
    for name, (write, may_spoil) in FILES.items():
        draw = random.Random(f"{seed} {name}")
        records = [PLAIN]
        for _ in range(number // len(FILES)):
            spoil = may_spoil and draw.random() < 0.3
            records.append(spoiled_line(draw) if spoil else mutated_line(draw))
        raw = write(folder / name, records, draw)
        expected[name] = len(records) if raw is None else [record.strip(b" \t\r\n") for record in raw]
    return expected


def record_hash(raw: bytes) -> str:
    """As META_KEYS says, written anew."""
    return hashlib.blake2b(len(raw).to_bytes(8, "little") + raw, digest_size=16).hexdigest()


def merged_hashes(run_root: Path) -> dict[str, dict[int, str]]:
    """File -> record number -> hash of its bytes, from kept and dropped rows."""
    found: dict[str, dict[int, str]] = {}
    for row in rows_with_records(run_root / "01_merged", "source", "record", "meta"):
        name = row["source"].partition("/")[2].removesuffix("/inner.jsonl")
        found.setdefault(name, {})[row["record"]] = json.loads(row["meta"])["record_hash"]
    return found


CONFIG = """
run_root: run
sources:
  - {name: spoiled, path: files, assistant_side: second}
merge: {max_record_bytes: 250000, part_bytes: 200000, max_decompressed_ratio: 5000}
engine: {workers: 2, min_free_gib: 0.1}
"""


@pytest.mark.parametrize(
    ("number", "seed"),
    [pytest.param(1_500, 1, marks=pytest.mark.slow), pytest.param(20_000, 2, marks=pytest.mark.stress)],
)
def test_every_spoiled_record_is_kept_or_dropped_with_a_reason(
    tmp_path: Path, number: int, seed: int
) -> None:
    expected = write_files(tmp_path / "files", number, seed)
    (tmp_path / "config.yaml").write_text(CONFIG)
    result = run(tmp_path / "config.yaml", program=PROGRAM)
    assert result.returncode == 0, result.stderr[-3000:]
    counts, _ = check_rows(tmp_path / "run", FOLDERS)
    assert counts["01_merged"]["kept"] > number // 5
    assert counts["01_merged"]["dropped"] > number // 10
    found = merged_hashes(tmp_path / "run")
    for name, records in expected.items():
        if isinstance(records, int):
            assert sorted(found[name]) == list(range(records)), name
        else:
            assert sorted(found[name]) == list(range(len(records))), name
            wrong = [
                n for n, raw in enumerate(records) if found[name][n] != record_hash(raw) and is_followed(raw)
            ]
            assert not wrong, (name, wrong[:5], records[wrong[0]][:200])


def is_followed(raw: bytes) -> bool:
    """Of lines that are too large the line break behind them counts as theirs."""
    return len(raw) <= 250_000
