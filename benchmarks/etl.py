"""Stages 1-7 on files of yours: rows/s, MB/s, peak memory and the drops of each stage.

    python benchmarks/etl.py --model FOLDER --run-root NEW_FOLDER NAME=FILE [NAME=FILE ...] [--workers 2]

Each stage runs as `sft-pipeline step` in a process of its own, start-up included. Memory is the sum of PSS over
the process tree, read every 50 ms: pages that processes share count once.
"""

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from measure import Cost, run_measured

from schemas.run import STAGE_FOLDERS, STAGES

HEAD = (
    "| stage | rows in | rows out | seconds | CPU s | rows/s | MB/s of input files | peak PSS MiB | dropped |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
LIBRARIES = ("pyarrow", "polars", "tokenizers", "html-to-markdown", "fasttext-predict")


def main() -> None:
    options = parse_arguments()
    options.run_root.mkdir(parents=True)
    config = write_config(options)
    num_bytes = sum(Path(path).stat().st_size for _, path in options.sources)
    print(machine(options.workers, num_bytes), "\n")
    print(HEAD)
    for stage in STAGES:
        print(measured(stage, config, options.run_root, num_bytes), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources", nargs="+", type=lambda text: tuple(text.split("=", 1)), metavar="NAME=FILE"
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--run-root", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0)
    return parser.parse_args()


def write_config(options: argparse.Namespace) -> Path:
    sources = [{"name": name, "path": str(Path(path).resolve())} for name, path in options.sources]
    config = {
        "run_root": str((options.run_root / "run").resolve()),
        "sources": sources,
        "model": {"path": str(options.model.resolve())},
        "engine": {"workers": options.workers},
    }
    path = options.run_root / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def measured(stage: str, config: Path, run_root: Path, num_bytes: int) -> str:
    cost = run_measured([str(Path(sys.executable).parent / "sft-pipeline"), "step", stage, str(config)])
    manifest = json.loads((run_root / "run" / STAGE_FOLDERS[stage] / "manifest.json").read_text())
    return row(stage, manifest, cost, num_bytes)


def row(stage: str, manifest: dict[str, Any], cost: Cost, num_bytes: int) -> str:
    drops = ", ".join(f"{reason} {count}" for reason, count in sorted(manifest["drops"].items())) or "none"
    numbers = (
        f"{manifest['num_rows_in']:,} | {manifest['num_rows_out']:,} | {cost.seconds:.1f} | {cost.cpu_seconds:.1f} | "
        f"{manifest['num_rows_in'] / cost.seconds:,.0f} | {num_bytes / 1e6 / cost.seconds:.1f} | {cost.peak_mib:,.0f}"
    )
    return f"| {stage} | {numbers} | {drops} |"


def machine(workers: int, num_bytes: int) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return (
        f"{platform.system()} {platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}, "
        f"{libraries}; workers {workers or psutil.cpu_count()}; input {num_bytes / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
