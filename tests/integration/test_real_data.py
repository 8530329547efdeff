"""Every published file that the formats cover, through stages 1-7: nothing lost, and the known cases found."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conservation import check_run_root
from tests.integration.test_etl import ROOT, RUN

pytestmark = [pytest.mark.slow, pytest.mark.real_data, pytest.mark.smollm]

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
NOT_RECORDS = ("lang.json", "sources.json", "lingua_sentences.json.gz")  # objects keyed by chat or language


def test_all_real_data_is_kept_or_dropped_with_a_reason(
    tmp_path: Path, real_data: Path, smollm: Path
) -> None:
    files = [
        path
        for path in sorted(real_data.rglob("*"))
        if path.name.endswith(SUFFIXES) and not path.name.endswith(NOT_RECORDS)
    ]
    sources = "".join(
        f"  - {{name: s{number}, path: '{path}'}}\n"
        for number, path in enumerate(files)
        if path.stat().st_size
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
    assert counts["01_merged"]["kept"] > 55_000
    assert counts["06_shards"]["pieces_cut"] > 100
