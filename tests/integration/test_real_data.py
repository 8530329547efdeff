"""Every published file through stages 1-7: each record that Python's own json counts is there, and nothing is lost."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conservation import check_run_root, rows_with_records
from tests.integration.test_etl import ROOT, RUN

pytestmark = [pytest.mark.stress, pytest.mark.real_data, pytest.mark.smollm]

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".txt", ".md")
NOT_DATA = ("README.md", "tokenizers", "chat_templates")
OBJECTS_OF_RECORDS = {"chitchat.json.gz", "sharegpt_html.sources.json"}
BROKEN = {"broken_alpaca_part.json": 2801}


def num_records(path: Path) -> int:
    """As json and str.splitlines count them."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    if path.name in BROKEN:
        return BROKEN[path.name]
    if path.suffix in (".txt", ".md"):
        return 1
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return sum(1 for line in text.split("\n") if line.strip())
    return len(found) if isinstance(found, list) or path.name in OBJECTS_OF_RECORDS else 1


@pytest.mark.timeout(1800)
def test_all_real_data_is_kept_or_dropped_with_a_reason(
    tmp_path: Path, real_data: Path, smollm: Path
) -> None:
    files = [
        path
        for path in sorted(real_data.rglob("*"))
        if path.name.endswith(SUFFIXES) and not set(path.relative_to(real_data).parts) & set(NOT_DATA)
    ]
    sources = "".join(
        f"  - {{name: s{number}, path: '{path}', assistant_side: second}}\n"
        for number, path in enumerate(files)
    )
    config = tmp_path / "config.yaml"
    config.write_text(f"run_root: run\nsources:\n{sources}model: {{path: '{smollm}'}}\n")
    script = tmp_path / "run_stages.py"
    script.write_text(RUN)
    command = [sys.executable, str(script), str(config)]
    result = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    counts = check_run_root(tmp_path / "run")
    assert counts["01_merged"]["kept"] > 80_000
    assert counts["06_shards"]["pieces_cut"] > 100
    assert merged_records(tmp_path / "run") == {
        f"s{number}/{path.name}": num_records(path) for number, path in enumerate(files)
    }


def merged_records(run_root: Path) -> dict[str, int]:
    """Source file -> different record numbers among kept and dropped rows."""
    numbers: dict[str, set[int]] = {}
    for row in rows_with_records(run_root / "01_merged", "source", "record"):
        numbers.setdefault(row["source"], set()).add(row["record"])
    return {source: len(found) for source, found in numbers.items()}
