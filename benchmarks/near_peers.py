"""datasketch and rensa on the same texts, the same word triples and the same threshold."""

import time

Pair = tuple[int, int]
NUM_PERMUTATIONS = 128


def compare(texts: list[str], threshold: float, true: set[Pair]) -> None:
    """Seconds, and recall and precision by the exact pairs."""
    for name, peer in {"datasketch": _datasketch, "rensa, 16 bands and a check": _rensa}.items():
        started = time.monotonic()
        found = peer(texts, threshold)
        seconds = time.monotonic() - started
        good = len(found & true)
        told = f"recall {good / max(len(true), 1):.4f}, precision {good / max(len(found), 1):.4f}"
        print(f"{name}: {seconds:.2f} s, {len(texts) / seconds:,.0f} rows/s, {told}", flush=True)


def _triples(text: str) -> set[str]:
    words = text.lower().split()
    return {" ".join(words[start : start + 3]) for start in range(max(1, len(words) - 2))}


def _datasketch(texts: list[str], threshold: float) -> set[Pair]:
    from datasketch import MinHash, MinHashLSH

    encoded = [[triple.encode() for triple in _triples(text)] for text in texts]
    sketches = MinHash.bulk(encoded, num_perm=NUM_PERMUTATIONS)
    index = MinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS)
    found = set()
    for row, sketch in enumerate(sketches):
        near = (other for other in index.query(sketch) if sketch.jaccard(sketches[other]) >= threshold)
        found.update((row, other) for other in near)
        index.insert(row, sketch)
    return found


def _rensa(texts: list[str], threshold: float) -> set[Pair]:
    from rensa import RMinHash, RMinHashLSH

    sets = [_triples(text) for text in texts]
    tokens = [list(triples) for triples in sets]
    sketches = RMinHash.from_token_sets(tokens, num_perm=NUM_PERMUTATIONS, seed=42)
    index = RMinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS, num_bands=16)
    index.insert_many(sketches)
    candidates = enumerate(index.query_all(sketches))
    pairs = ((row, other) for row, others in candidates for other in others if other < row)
    return {(row, other) for row, other in pairs if _jaccard(sets[row], sets[other]) >= threshold}


def _jaccard(one: set[str], other: set[str]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)
