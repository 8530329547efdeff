"""The rules of the hold-out: on which side a new key goes, and which rows are too near another side to stay.

pipelines/holdout.py states them in words; here they are arrays. Nodes are rows and what the ledger holds out; a
side is its place in SPLITS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.grams import Hashes, Ints, StoredSets
from pipelines.near_duplicates import greedy_survivors, joined, near_pairs, pairs_between
from pipelines.overlap import Bools
from pipelines.prefix_index import Pairs, PrefixIndex
from schemas.conversation import blake2b_128
from schemas.dataset import SPLITS
from schemas.pipeline_config import HoldoutConfig

TRAIN, VALIDATION, TEST = range(3)  # places in SPLITS
FREE = 3  # a key without a side so far
_ABSENT = -1
_LARGE_STAR = 64
_MAX_DRAWN = 2**18  # keys that stand in memory as Python strings


@dataclass(frozen=True, slots=True)
class Nodes:
    """Rows as they lie in their files, then lines of the ledger. What is decided hangs on row ids, not on places."""

    row_ids: Callable[[Ints], pa.ChunkedArray]  # of these nodes; read where they are asked for
    id_rank: Ints  # places in the order of row ids; equal for equal ones
    key: Ints  # place in the order of all keys, those of rows and those of the ledger
    key_names: Callable[[Ints], pa.ChunkedArray]
    ledger_key: Ints  # of each line of the ledger, also of those that hold no row out
    train_only: Bools
    in_ledger: Bools  # the node is a line of the ledger
    held_out_before: Bools  # ... or a row with the key and the grams of one
    sets: StoredSets
    digests: Hashes  # of the sets

    @property
    def num_keys(self) -> int:
        return int(max(self.key.max(initial=-1), self.ledger_key.max(initial=-1))) + 1

    def by_id(self, chosen: Bools) -> Ints:
        """The chosen nodes in the order of their row ids."""
        found = np.flatnonzero(chosen)
        return found[np.argsort(self.id_rank[found], kind="stable")]


def sides_of_keys(
    index: PrefixIndex, nodes: Nodes, ledger_sides: Ints, present: Bools, config: HoldoutConfig
) -> Ints:
    """The side of every key; components are named by their lowest key."""
    sides = ledger_sides.copy()
    pinned = nodes.key[nodes.train_only & present]
    sides[pinned[sides[pinned] == FREE]] = TRAIN
    label = np.where(present, sides[nodes.key], _ABSENT)
    component = _components(index, nodes, nodes.by_id(label == FREE))
    touched = np.stack([_touched(index, nodes, label, side) for side in range(len(SPLITS))], axis=1)
    component_touched = np.zeros_like(touched)
    np.logical_or.at(component_touched, component, touched)
    free = np.flatnonzero(sides == FREE)
    of_component = component_touched[component[free]]
    own = np.where(touched[free, VALIDATION], VALIDATION, np.where(touched[free, TEST], TEST, TRAIN))
    num_touched = of_component.sum(axis=1)
    sides[free] = np.where(num_touched == 1, np.argmax(of_component, axis=1), own)
    drawn = free[num_touched == 0]
    lowest, number = np.unique(component[drawn], return_inverse=True)
    sides[drawn] = _drawn_sides(nodes, lowest, config)[number]
    return sides


def _drawn_sides(nodes: Nodes, keys: Ints, config: HoldoutConfig) -> Ints:
    sides = np.empty(len(keys), np.int64)
    for start in range(0, len(keys), _MAX_DRAWN):
        names = nodes.key_names(keys[start : start + _MAX_DRAWN]).to_pylist()
        sides[start : start + len(names)] = [SPLITS.index(draw_side(name, config)) for name in names]
    return sides


def _components(index: PrefixIndex, nodes: Nodes, free: Ints) -> Ints:
    """Per key the lowest key of those that it hangs together with by these rows; most often itself."""
    component = np.arange(nodes.num_keys)

    def apart(left: Ints, right: Ints) -> Bools:
        return component[nodes.key[left]] != component[nodes.key[right]]

    # Stars of a survivor and its copies first: then pairs inside a dense cluster need no look any more.
    survivor, _ = greedy_survivors(index, free, wanted=apart)
    star = np.where(survivor < 0, np.arange(len(survivor)), survivor)[free]
    _unite(component, nodes.key[free], nodes.key[star])
    large = np.flatnonzero(np.bincount(star, minlength=1) >= _LARGE_STAR)
    clusters = [free[star == center] for center in large.tolist()]
    for pairs in near_pairs(index, free[~np.isin(star, large)], clusters=clusters, wanted=apart):
        _unite(component, nodes.key[pairs.left], nodes.key[pairs.right])
    return component


def _touched(index: PrefixIndex, nodes: Nodes, label: Ints, side: int) -> Bools:
    """Per key: whether one of its free rows is near a row that is on this side for certain."""
    touched = np.zeros(nodes.num_keys, bool)
    free, fixed = np.flatnonzero(label == FREE), np.flatnonzero(label == side)

    def untouched(left: Ints, right: Ints) -> Bools:
        return ~touched[nodes.key[left]]

    for pairs in pairs_between(index, free, fixed, wanted=untouched):
        touched[nodes.key[pairs.left]] = True
    return touched


def _unite(component: Ints, first: Ints, second: Ints) -> None:
    """In place: after it, component[first[i]] == component[second[i]], each named by its lowest member."""
    while (component[first] != component[second]).any():
        low = np.minimum(component[first], component[second])
        np.minimum.at(component, component[first], low)
        np.minimum.at(component, component[second], low)
        while (component != component[component]).any():
            component[:] = component[component]


def draw_side(holdout_key: str, config: HoldoutConfig) -> str:
    """The side of a key by nothing but its hash and the seed."""
    digest = blake2b_128(str(config.seed).encode(), holdout_key.encode())
    share = int(digest[:16], 16) / 2**64
    if share < config.validation:
        return "validation"
    return "test" if share < config.validation + config.test else "train"


def conflicts_between_sides(index: PrefixIndex, side: Ints, present: Bools) -> Pairs:
    """All near pairs on different sides, each in both directions."""
    train, validation, test = (
        np.flatnonzero(present & (side == number)) for number in (TRAIN, VALIDATION, TEST)
    )
    near_validation = pairs_between(index, np.append(train, test), validation)
    pairs = joined([*near_validation, *pairs_between(index, train, test)])
    return Pairs(
        left=np.append(pairs.left, pairs.right),
        right=np.append(pairs.right, pairs.left),
        jaccard=np.append(pairs.jaccard, pairs.jaccard),
    )


def kept_nodes(nodes: Nodes, side: Ints, conflicts: Pairs) -> Bools:
    """Rule 4."""
    precedence = np.where(nodes.held_out_before, 0, np.where(side == TRAIN, 1, 2))
    involved = np.unique(conflicts.left)
    others: dict[int, list[int]] = {node: [] for node in involved.tolist()}
    for node, other in zip(conflicts.left.tolist(), conflicts.right.tolist(), strict=True):
        others[node].append(other)
    kept = np.ones(len(side), bool)
    kept[involved] = False
    for node in involved[np.lexsort((nodes.id_rank[involved], precedence[involved]))].tolist():
        kept[node] = not any(kept[other] for other in others[node])
    return kept
