"""How much is done again after 1 % of rows was inserted into a JSON array: rows worked on, stage by stage.

    python benchmarks/reruns.py sharegpt.json.gz --run-root NEW_FOLDER [--megabytes 200] [--workers 2]

The array is made of the dump (see enlarge.py). After a first run, new records go in as one block at each of some
random places in turn, then scattered over five places at once. Each time the run is that of before, whose parts are
taken over; what is counted are the rows that really passed through the stage's functions.
"""

import argparse
import os
import random
import shutil
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # also as a script, the packages of this checkout

from benchmarks.enlarge import MEGABYTE, as_json, copies, read_records
from pipelines.parts import StageResult
from pipelines.stage import run_stage
from schemas.pipeline_config import EngineConfig, MergeConfig, PipelineConfig
from schemas.run import STAGES
from schemas.source_config import SourceConfig

INSERTED_SHARE = 0.01


def main() -> None:
    options = parse_arguments()
    options.run_root.mkdir(parents=True)
    records, added = make_records(options.data, options.megabytes)
    places = [random.Random(number).random() for number in range(options.places)]
    print(
        f"{len(records):,} records of {sum(map(len, records)) / MEGABYTE:.1f} MB, {len(added):,} inserted\n"
    )
    print("| inserted | stage | rows | worked on | share | seconds |")
    print("|---|---|---|---|---|---|")
    first = run(records, options, "first")
    show("nothing: the first run", first)
    for place in places:
        show(f"a block at {place:.0%}", run_again(inserted(records, added, [place]), options))
    show(f"at {len(places)} places", run_again(inserted(records, added, places), options))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a JSON array of ShareGPT records, .json or .json.gz")
    parser.add_argument("--run-root", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--places", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--part-bytes", type=int, default=MergeConfig().part_bytes)
    parser.add_argument("--until", choices=STAGES[:5], default="filter")
    return parser.parse_args()


def make_records(data: Path, megabytes: float) -> tuple[list[bytes], list[bytes]]:
    """Records of that size together, and 1 % more."""
    source = map(as_json, copies(read_records(data)))
    records: list[bytes] = []
    num_bytes = 0
    while num_bytes < megabytes * MEGABYTE:
        records.append(next(source))
        num_bytes += len(records[-1])
    return records, list(islice(source, max(1, round(len(records) * INSERTED_SHARE))))


def inserted(records: list[bytes], added: list[bytes], places: list[float]) -> list[bytes]:
    """As many of the added ones at each place, given as shares of the whole."""
    result: list[bytes] = []
    begin = 0
    for number, place in enumerate(sorted(places)):
        end = int(place * len(records))
        result += [*records[begin:end], *added[number :: len(places)]]
        begin = end
    return result + records[begin:]


def run_again(records: list[bytes], options: argparse.Namespace) -> list[StageResult]:
    """On a copy of the first run; its files are links, since none is ever changed in place."""
    shutil.rmtree(options.run_root / "again", ignore_errors=True)
    shutil.copytree(options.run_root / "first", options.run_root / "again", copy_function=os.link)
    return run(records, options, "again")


def run(records: list[bytes], options: argparse.Namespace, name: str) -> list[StageResult]:
    path = options.run_root / "records.json"
    path.write_bytes(b"[\n" + b",\n".join(records) + b"\n]\n")
    config = PipelineConfig(
        run_root=options.run_root / name,
        sources=[SourceConfig(name="chats", path=str(path))],
        merge=MergeConfig(part_bytes=options.part_bytes),
        engine=EngineConfig(workers=options.workers),
    )
    stages = STAGES[: STAGES.index(options.until) + 1]
    return [run_stage(stage, config) for stage in stages]


def show(what: str, results: list[StageResult]) -> None:
    for result in results:
        num_rows = result.manifest.num_rows_in
        share = result.num_rows_run / num_rows
        numbers = f"{num_rows:,} | {result.num_rows_run:,} | {share:.2%} | {result.seconds:.1f}"
        print(f"| {what} | {result.manifest.stage} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
