"""How much two workers are worth: the same data with one and with two, as one JSON array and as eight gzip files.

    python benchmarks/workers.py sharegpt.json.gz --folder NEW_FOLDER [--megabytes 1000] [--until filter] [--rounds 1]

The data is made of the dump (see enlarge.py). Each run is a process of its own in a new run root; one worker and two
take turns, so that a machine that others use slows both. CPU seconds are those of the whole process tree.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # also as a script, the packages of this checkout

from benchmarks.enlarge import MEGABYTE, copies, read_records, write_array, write_files
from schemas.run import STAGES

WORKERS = (1, 2)
RUN = """
import json, shutil, sys, time
import psutil
from pipelines.stage import run_stage
from schemas.pipeline_config import PipelineConfig

def cpu_seconds():
    parent = psutil.Process()
    times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
    return sum(time.user + time.system for time in times)

if __name__ == "__main__":
    config = PipelineConfig.model_validate_json(sys.argv[1])
    seconds = {}
    for stage in sys.argv[2:]:
        started = time.monotonic()
        run_stage(stage, config)
        seconds[stage] = time.monotonic() - started
    print(json.dumps({"seconds": seconds, "cpu": cpu_seconds()}))
    shutil.rmtree(config.run_root)
"""


def main() -> None:
    options = parse_arguments()
    options.folder.mkdir(parents=True)
    script = options.folder / "run.py"
    script.write_text(RUN)
    array, files = options.folder / "array.json", options.folder / "files"
    records, num_bytes = read_records(options.data), int(options.megabytes * MEGABYTE)
    write_array(copies(records), array, num_bytes=num_bytes)
    write_files(copies(records), files, num_bytes=num_bytes, num_files=8)
    print(
        "| data | round | stage | 1 worker, seconds | 2 workers | times as fast |\n|---|---|---|---|---|---|"
    )
    for name, path in (("one JSON array", array), ("8 gzip files", files)):
        for number in range(1, options.rounds + 1):
            one, two = (measured(script, path, workers, options) for workers in WORKERS)
            for what, seconds, faster in rows(one, two):
                print(f"| {name} | {number} | {what} | {seconds} | {faster:.2f} |", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a JSON array of ShareGPT records, .json or .json.gz")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--until", choices=STAGES[:5], default="filter")
    return parser.parse_args()


def measured(script: Path, data: Path, workers: int, options: argparse.Namespace) -> dict[str, Any]:
    config = {
        "run_root": str(options.folder.resolve() / "run"),
        "sources": [{"name": "chats", "path": str(data.resolve())}],
        "engine": {"workers": workers},
    }
    stages = STAGES[: STAGES.index(options.until) + 1]
    command = [sys.executable, str(script), json.dumps(config), *stages]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def rows(one: dict[str, Any], two: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Each stage, all of them, and their CPU seconds."""
    for stage in one["seconds"]:
        yield stage, *compared(one["seconds"][stage], two["seconds"][stage])
    yield "all", *compared(sum(one["seconds"].values()), sum(two["seconds"].values()))
    yield "CPU seconds", *compared(one["cpu"], two["cpu"])


def compared(one: float, two: float) -> tuple[str, float]:
    return f"{one:.1f} | {two:.1f}", one / two


if __name__ == "__main__":
    main()
