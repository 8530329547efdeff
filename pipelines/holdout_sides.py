"""The rules of the hold-out: on which side a new key goes, and which rows are too near another side to stay.

pipelines/holdout.py states them in words; here they are arrays. Nodes are rows and what the ledger holds out; a
side is its place in SPLITS.
"""

from dataclasses import dataclass

import numpy as np

from pipelines.grams import GramSets, Ints
from pipelines.near_duplicates import Bools, Pairs, greedy_survivors, joined, near_pairs
from schemas.conversation import blake2b_128
from schemas.dataset import SPLITS
from schemas.pipeline_config import HoldoutConfig

TRAIN, VALIDATION, TEST = range(3)  # places in SPLITS
FREE = 3  # a key without a side so far


@dataclass(frozen=True, slots=True)
class Nodes:
    row_ids: np.ndarray  # of str, rows ascending
    id_rank: Ints  # equal for equal row ids
    key: Ints  # place in key_names
    key_names: list[str]  # ascending
    train_only: Bools
    in_ledger: Bools  # the node is a line of the ledger
    held_out_before: Bools  # ... or a row with the key and the grams of one
    sets: GramSets


def sides_of_keys(nodes: Nodes, ledger_sides: Ints, present: Bools, config: HoldoutConfig) -> Ints:
    """The side of every key; components are named by their lowest key."""
    sides = ledger_sides.copy()
    pinned = nodes.key[nodes.train_only & present]
    sides[pinned[sides[pinned] == FREE]] = TRAIN
    component, touched = _components(nodes, sides, present, threshold=config.near_threshold)
    component_touched = np.zeros_like(touched)
    np.logical_or.at(component_touched, component, touched)
    num_touched = component_touched.sum(axis=1)
    for key in np.flatnonzero(sides == FREE).tolist():
        of_component = component_touched[component[key]]
        if num_touched[component[key]] == 0:
            sides[key] = SPLITS.index(draw_side(nodes.key_names[component[key]], config))
        elif num_touched[component[key]] == 1:
            sides[key] = np.argmax(of_component)
        else:
            sides[key] = next((side for side in (VALIDATION, TEST) if touched[key, side]), TRAIN)
    return sides


def _components(nodes: Nodes, sides: Ints, present: Bools, *, threshold: float) -> tuple[Ints, np.ndarray]:
    """Per key the lowest key of its component of free keys, and whether its rows are near each fixed side."""
    component, touched = np.arange(len(sides)), np.zeros((len(sides), len(SPLITS)), bool)
    label = np.where(present, sides[nodes.key], TRAIN)
    free = label == FREE
    if not free.any():
        return component, touched

    def between_components(left: Ints, right: Ints) -> Bools:
        different = component[nodes.key[left]] != component[nodes.key[right]]
        return free[left] & free[right] & different

    def unknown(left: Ints, right: Ints) -> Bools:
        """Of no pair twice the same news: clusters of k rows cost about k comparisons, not k²."""
        touching = (free[left] != free[right]) & present[left] & present[right]
        row, other = np.where(free[left], left, right), np.where(free[left], right, left)
        untouched = ~touched[nodes.key[row], np.minimum(label[other], TEST)]
        return between_components(left, right) | (touching & untouched)

    # Stars of a survivor and its copies first: cheap, and most pairs of a dense cluster need no look any more.
    survivor, _ = greedy_survivors(
        nodes.sets, np.flatnonzero(free), threshold=threshold, wanted=between_components
    )
    copies = np.flatnonzero(survivor >= 0)
    _unite(component, nodes.key[copies], nodes.key[survivor[copies]])
    for pairs in near_pairs(nodes.sets, threshold=threshold, wanted=unknown):
        both = free[pairs.left] & free[pairs.right]
        _unite(component, nodes.key[pairs.left[both]], nodes.key[pairs.right[both]])
        row = np.where(free[pairs.left], pairs.left, pairs.right)[~both]
        other = np.where(free[pairs.left], pairs.right, pairs.left)[~both]
        touched[nodes.key[row], label[other]] = True
    return component, touched


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


def conflicts_between_sides(nodes: Nodes, side: Ints, present: Bools, *, threshold: float) -> Pairs:
    """All near pairs on different sides, each in both directions."""

    def wanted(left: Ints, right: Ints) -> Bools:
        return (side[left] != side[right]) & present[left] & present[right]

    pairs = joined(near_pairs(nodes.sets, threshold=threshold, wanted=wanted))
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
