"""Packing: time, memory and padding of a plan, beside TRL's best-fit decreasing where its Python is named.

    python benchmarks/packing.py NAME=SHARDS [NAME=SHARDS ...] [--capacity 4096] [--examples 10000000] [--peer PYTHON]

SHARDS is a folder 06_shards, with #SOURCE behind it for the examples of one source, or a .npy file of lengths. Beside them stand `--examples` lengths of a log-normal
distribution (median 245, capped at the capacity), which are too many for TRL: it packs the tokens themselves, and is
given the first `--peer-examples` of them, of one byte each. TRL packs each 1,000 rows by themselves unless it is told
otherwise ("whole"). Every measurement is a process of its own; seconds are its CPU seconds for the packing alone, memory
is its peak resident set, imports and lengths included. Spread: standard deviation over mean of the bins' sums of squared
lengths, what attention costs.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

HEAD = "| lengths | examples | packed by | CPU s | peak MiB | bins | fewest possible | padding | spread |"

PEER = """
import json, sys, time
import numpy as np, pyarrow as pa, trl
from datasets import Dataset, disable_caching, disable_progress_bars
disable_caching(); disable_progress_bars()
lengths, capacity, batch = np.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
ids = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(offsets[-1], np.int8)))
data = Dataset(pa.table({"input_ids": ids}))
pack = trl.pack_dataset  # imported when first asked for
started = time.process_time()
packed = pack(data, capacity, "bfd", {"batch_size": batch, "keep_in_memory": True})
seconds = time.process_time() - started
sums = [sum(n * n for n in row) for row in packed["seq_lengths"]]
status = open("/proc/self/status").read()
memory = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps({"seconds": seconds, "memory": memory, "num_bins": len(packed), "by": "TRL " + trl.__version__,
                  "spread": float(np.std(sums) / np.mean(sums))}))
"""


def main() -> None:
    options = parse_arguments()
    if options.child:
        print(json.dumps(measure(np.load(options.child), options.capacity)))
        return
    print(
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__},"
    )
    print(f"pyarrow {version('pyarrow')}; capacity {options.capacity}\n\n{HEAD}\n" + "|---" * 9 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for name, lengths in all_lengths(options):
            np.save(f"{folder}/lengths.npy", lengths)
            print(row(name, lengths, options.capacity, own(folder, options.capacity)), flush=True)
            if options.peer:
                some = lengths[: options.peer_examples]
                np.save(f"{folder}/lengths.npy", some)
                for batch, how in ((1000, "default"), (len(some), "whole")):
                    found = peer(options.peer, folder, options.capacity, batch)
                    found["by"] += f", {how}"
                    print(row(name, some, options.capacity, found), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shards", nargs="*", type=lambda text: tuple(text.split("=", 1)), metavar="NAME=SHARDS"
    )
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--examples", type=int, default=10_000_000, help="0: only what is named")
    parser.add_argument("--peer", help="python of an environment with trl")
    parser.add_argument("--peer-examples", type=int, default=500_000)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def all_lengths(options: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    found = [(name, read_lengths(*path.partition("#")[::2])) for name, path in options.shards]
    if options.examples:
        drawn = np.random.default_rng(0).lognormal(5.5, 1.0, options.examples)
        found.append(("log-normal", np.clip(drawn, 1, options.capacity).astype(np.int32)))
    return found


def read_lengths(path: str, source: str) -> np.ndarray:
    if path.endswith(".npy"):
        lengths: np.ndarray = np.load(path)
        return lengths
    from pipelines.shards import open_split

    table = open_split(Path(path), "train")
    if source:
        table = table.filter(pc.starts_with(table["source"], f"{source}/"))
    return np.array(table["num_tokens"])


# One measurement --------------------------------------------------------------------------------------------


def own(folder: str, capacity: int) -> dict[str, Any]:
    return said([sys.executable, __file__, "--child", f"{folder}/lengths.npy", "--capacity", str(capacity)])


def peer(python: str, folder: str, capacity: int, batch: int) -> dict[str, Any]:
    return said([python, "-c", PEER, f"{folder}/lengths.npy", str(capacity), str(batch)])


def said(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(lengths: np.ndarray, capacity: int) -> dict[str, Any]:
    from pipelines.pack import packing_summary, plan_epoch
    from pipelines.plans import bin_costs

    keys = np.random.default_rng(1).integers(0, 2**64, len(lengths), dtype=np.uint64)
    started = time.process_time()
    plan = plan_epoch(lengths, keys, capacity=capacity, seed=0, epoch=0)
    seconds = time.process_time() - started
    # Not getrusage: there the peak of the process that started this one counts too.
    memory = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    costs = bin_costs(plan)
    num_bins = packing_summary(plan, capacity)["num_bins"]
    spread = float(costs.std() / costs.mean())
    return {
        "seconds": seconds,
        "memory": memory,
        "num_bins": num_bins,
        "by": "sft-pipeline",
        "spread": spread,
    }


def row(name: str, lengths: np.ndarray, capacity: int, found: dict[str, Any]) -> str:
    from pipelines.bins import fewest_bins

    padding = 1 - lengths.sum(dtype=np.int64) / (found["num_bins"] * capacity)
    return (
        f"| {name} | {len(lengths):,} | {found['by']} | {found['seconds']:.2f} | {found['memory']:,.0f} | "
        f"{found['num_bins']:,} | {fewest_bins(lengths, capacity):,} | {padding:.3%} | {found['spread']:.2f} |"
    )


if __name__ == "__main__":
    main()
