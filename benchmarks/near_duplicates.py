"""Near-duplicates: recall and precision against counting every pair, speed on texts, speed and memory of the stage.

    python benchmarks/near_duplicates.py truth TEXTS.jsonl [--rows 5000] [--threshold 0.8]
    python benchmarks/near_duplicates.py texts TEXTS.jsonl [--threads 2] [--peers]
    python benchmarks/near_duplicates.py stage (TEXTS.jsonl | --made ROWS) --run-root FOLDER [--workers 2]

Each line has a `text`. `truth`: pairs on the edge are planted beside the rows of the file: their true similarity is up
to 0.02 below or above the threshold. The truth knows nothing of the join: sets of word triples as strings, and for each
pair of texts that share any triple the number that they share.

`texts` times what other programs time: from texts in memory to pairs, words and hashing included. `--peers`: datasketch
and rensa on the same texts, with one run of each (pip install datasketch rensa).

`stage` times `sft-pipeline step dedup` on chats in files, start-up, reading and all other duplicates included. Memory is
the sum of PSS over the process tree, read every 50 ms. Rows that lie in the folder from another time are taken again.
"""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # also as a script, the packages of this checkout

from benchmarks import etl, near_peers, near_rows
from pipelines.grams import GramSets, Ints, gram_sets
from pipelines.near_duplicates import greedy_survivors, joined, near_pairs
from pipelines.prefix_index import Pairs, PrefixIndex
from schemas.run import STAGE_FOLDERS

EDGE_WIDTH = 0.02
NUM_EDGE_PAIRS = 500
Pair = tuple[int, int]
Result = TypeVar("Result")


def main() -> None:
    options = _arguments()
    {"truth": truth, "texts": speed_on_texts, "stage": speed_of_stage}[options.mode](options)


def truth(options: argparse.Namespace) -> None:
    """Recall and precision on the first rows."""
    texts = list(itertools.islice(near_rows.read_texts(options.texts), options.rows))
    num_rows = len(texts)
    texts += edge_texts(texts, options.threshold)
    found = joined_pairs(texts, options.threshold)
    true = counted_pairs(texts, options.threshold - EDGE_WIDTH)
    near = {pair for pair, jaccard in true.items() if jaccard >= options.threshold}
    edge = sum(abs(jaccard - options.threshold) <= EDGE_WIDTH for jaccard in true.values())
    print(f"{num_rows} rows and {len(texts) - num_rows} planted ones, threshold {options.threshold}")
    print(f"true pairs {len(near)}, pairs within {EDGE_WIDTH} of the threshold {edge}")
    recall, precision = len(near & found) / max(len(near), 1), len(near & found) / max(len(found), 1)
    print(f"recall {recall:.6f}  precision {precision:.6f}")


def speed_on_texts(options: argparse.Namespace) -> None:
    """Texts in memory -> which rows go; and all pairs, for comparison with other programs."""
    texts = list(near_rows.read_texts(options.texts))
    before = memory_mib()
    (sets, index, survivor), seconds, cpu = timed(lambda: _survivors(texts, options))
    print(f"{len(texts):,} texts, {len(sets.hashes):,} grams, {len(index.entries):,} entries of the index")
    told = f"{seconds:.2f} s, {cpu:.2f} CPU s, {len(texts) / seconds:,.0f} rows/s"
    print(f"survivors: {(survivor >= 0).sum():,} rows near another one; {told}")
    pairs, more_seconds, more_cpu = timed(lambda: joined(near_pairs(index, np.arange(len(texts)))))
    less_seconds, less_cpu = seconds + more_seconds, cpu + more_cpu
    told = f"{less_seconds:.2f} s, {less_cpu:.2f} CPU s, {len(texts) / less_seconds:,.0f} rows/s with the survivors"
    print(f"all pairs: {len(pairs.left):,}; {told}")
    print(f"memory {memory_mib():,.0f} MiB at most, {before:,.0f} of them for the texts", flush=True)
    if options.peers:
        near_peers.compare(texts, options.threshold, pair_set([pairs]))


def speed_of_stage(options: argparse.Namespace) -> None:
    """The stage dedup as it is run on files."""
    run_root = options.run_root / "run"
    options.run_root.mkdir(parents=True, exist_ok=True)
    if (run_root / STAGE_FOLDERS["filter"]).exists():
        shutil.rmtree(run_root / STAGE_FOLDERS["dedup"], ignore_errors=True)
    elif options.made:
        near_rows.write_made(run_root, options.made, workers=options.workers or os.cpu_count() or 1)
    else:
        near_rows.write_texts(run_root, near_rows.read_texts(options.texts))
    num_bytes = sum(path.stat().st_size for path in run_root.rglob("*.parquet"))
    config = options.run_root / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "run_root": str(run_root.resolve()),
                "sources": [{"name": "texts", "path": "file.jsonl"}],
                "engine": {"workers": options.workers},
            }
        )
    )
    print(etl.HEAD)
    print(etl.measured("dedup", config, options.run_root, num_bytes))


def _survivors(texts: list[str], options: argparse.Namespace) -> tuple[GramSets, PrefixIndex, Ints]:
    sets = gram_sets(texts)
    index = PrefixIndex(sets, threshold=options.threshold, num_threads=options.threads)
    return sets, index, greedy_survivors(index, np.arange(len(texts)))[0]


def timed(work: Callable[[], Result]) -> tuple[Result, float, float]:
    """What it gives, seconds and CPU seconds."""
    started, cpu = time.monotonic(), time.process_time()
    result = work()
    return result, time.monotonic() - started, time.process_time() - cpu


def memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def joined_pairs(texts: list[str], threshold: float) -> set[Pair]:
    """The pairs that the product finds."""
    index = PrefixIndex(gram_sets(texts), threshold=threshold)
    return pair_set(near_pairs(index, np.arange(len(texts))))


def pair_set(found: Iterable[Pairs]) -> set[Pair]:
    """Each with its higher number first."""
    pairs = joined(found)
    return {(max(pair), min(pair)) for pair in zip(pairs.left.tolist(), pairs.right.tolist(), strict=True)}


def counted_pairs(texts: list[str], least: float) -> dict[Pair, float]:
    """All pairs with a Jaccard similarity of `least` or more, by counting what each text shares with those before it."""
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes: list[int] = []
    pairs: dict[Pair, float] = {}
    for row, text in enumerate(texts):
        members = triples(text)
        sizes.append(len(members))
        for other, common in Counter(other for triple in members for other in holders[triple]).items():
            if (jaccard := common / (len(members) + sizes[other] - common)) >= least:
                pairs[row, other] = jaccard
        for triple in members:
            holders[triple].append(row)
    return pairs


def triples(text: str) -> set[tuple[str, ...]]:
    """Of lower-case words; a shorter text is one gram."""
    words = text.lower().split()
    return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))} if words else set()


def edge_texts(texts: list[str], threshold: float) -> Iterator[str]:
    """Copies of long texts with a stretch of new words in the middle, as long as brings them nearest to the edge."""
    draw = random.Random(0)
    long_texts = [text for text in texts if len(text.split()) >= 60]
    for number, text in enumerate(draw.choices(long_texts, k=NUM_EDGE_PAIRS) if long_texts else []):
        words, wanted = text.split(), threshold + draw.uniform(-EDGE_WIDTH, EDGE_WIDTH)
        # n new words take n + 2 triples away and bring n + 2: (T - n - 2) / (T + n + 2) is the similarity.
        num_triples = len(words) - 2
        num_new = max(1, round(num_triples * (1 - wanted) / (1 + wanted)) - 2)
        start = draw.randint(2, len(words) - num_new - 2)
        words[start : start + num_new] = [f"new{number}x{n}" for n in range(num_new)]
        yield " ".join(words)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=["truth", "texts", "stage"])
    parser.add_argument("texts", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--made", type=int, default=0, metavar="ROWS")
    parser.add_argument("--run-root", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if not (options.texts or options.made) or (options.mode == "stage" and not options.run_root):
        parser.error("name TEXTS.jsonl, or for stage --made ROWS; stage needs --run-root")
    return options


if __name__ == "__main__":
    main()
