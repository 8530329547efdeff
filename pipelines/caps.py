"""Most rows that a source may keep after dedup: those with the lowest ids stay.

Ids are hashes of what was said, so it is a random choice that does not hang on files or their order; a row that
comes in pushes one out at most.
"""

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from schemas.conversation import Drop


def over_cap(
    rows: Iterable[tuple[str, Collection[str]]], dropped: Collection[str], caps: Mapping[str, int]
) -> dict[str, Drop]:
    """The rows that are too many. `rows` are (source name, row ids), each id of a source once or more."""
    left: dict[str, set[str]] = defaultdict(set)
    for source, ids in rows:
        if source in caps:
            left[source].update(row_id for row_id in ids if row_id not in dropped)
    drops: dict[str, Drop] = {}
    for source, ids in left.items():
        kept = set(heapq.nsmallest(caps[source], ids))
        # No count of the others: a part whose rows stay or go as before keeps its bytes.
        drop = Drop("over_cap", f"dedup.caps keeps {caps[source]} rows of {source}")
        drops |= dict.fromkeys(ids - kept, drop)
    return drops
