"""Near-duplicates: recall and precision of the join against counting every pair, on the first rows of a file.

    python benchmarks/near_duplicates.py TEXTS.jsonl [--rows 5000] [--threshold 0.8]

Each line has a `text`. Pairs on the edge are planted beside the rows of the file: their true similarity is up to 0.02
below or above the threshold. The truth knows nothing of the join: sets of word triples as strings, and for each pair
of texts that share any triple the number that they share.
"""

import argparse
import itertools
import json
import random
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipelines.grams import gram_sets
from pipelines.near_duplicates import PrefixIndex, near_pairs

EDGE_WIDTH = 0.02
NUM_EDGE_PAIRS = 500
Pair = tuple[int, int]


def main() -> None:
    arguments = _arguments()
    with arguments.texts.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, arguments.rows)]
    num_rows = len(texts)
    texts += edge_texts(texts, arguments.threshold)
    started = time.process_time()
    found = joined_pairs(texts, arguments.threshold)
    seconds = time.process_time() - started
    true = counted_pairs(texts, arguments.threshold - EDGE_WIDTH)
    near = {pair for pair, jaccard in true.items() if jaccard >= arguments.threshold}
    edge = sum(abs(jaccard - arguments.threshold) <= EDGE_WIDTH for jaccard in true.values())
    print(f"{num_rows} rows and {len(texts) - num_rows} planted ones, threshold {arguments.threshold}")
    print(f"true pairs {len(near)}, pairs within {EDGE_WIDTH} of the threshold {edge}")
    print(
        f"recall {len(near & found) / max(len(near), 1):.6f}  precision {len(near & found) / max(len(found), 1):.6f}"
    )
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{len(texts) / seconds:,.0f} rows/s of process time; {megabytes:.0f} MB at most, the counting included"
    )


def joined_pairs(texts: list[str], threshold: float) -> set[Pair]:
    """The pairs that the product finds."""
    index = PrefixIndex(gram_sets(texts), threshold=threshold)
    pairs = near_pairs(index, np.arange(len(texts)))
    return {
        (max(pair), min(pair))
        for found in pairs
        for pair in zip(found.left.tolist(), found.right.tolist(), strict=True)
    }


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("texts", type=Path)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--threshold", type=float, default=0.8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
