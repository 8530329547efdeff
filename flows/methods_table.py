"""Methods by strategy, a line for each form of the base: what a grid of all settings would say on twenty screens.

A cell is the answer to the usual settings, and to the way of packing that suits the method best. What else a method
does not go with stands at the end of its line.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.support_matrix import AXES, Answer

USUAL = {"dtype": "bfloat16", "checkpointing": False, "compile": False}
ORDER = ("works", "adapted", "refused")
Cells = list[list[str]]


def methods_table(found: Sequence[Answer], notes: Mapping[str, str]) -> Cells:
    """The head and a line for each method and base. `notes` are the marks of rules and adaptations."""
    strategies = _values(found, "strategy")
    table = [["method", "base", "packing", *strategies, "not with"]]
    for method in _values(found, "method"):
        for base in _values(found, "base"):
            row = [one for one in found if _has(one, method=method, base=base)]
            usual = [one for one in row if _is_usual(one, found)]
            cells = [_best([one for one in usual if _has(one, strategy=name)]) for name in strategies]
            left_out = ", ".join(_not_with(row, usual, found, notes)) or "-"
            table.append([method, base, _packing(usual), *(cell_text(one, notes) for one in cells), left_out])
    return table


def cell_text(one: Answer, notes: Mapping[str, str]) -> str:
    marks = ", ".join(notes[reason] for reason in one.reasons)
    return f"{one.verdict} {marks}".strip()


def _values(found: Sequence[Answer], axis: str) -> list[Any]:
    there = {one.settings[axis] for one in found}
    return [value for value in AXES[axis] if value in there]


def _has(one: Answer, **settings: Any) -> bool:
    return all(one.settings[axis] == value for axis, value in settings.items())


def _is_usual(one: Answer, found: Sequence[Answer]) -> bool:
    """Of what was asked for: where the usual value was left out, the first one that was not."""
    for axis, value in USUAL.items():
        there = _values(found, axis)
        if one.settings[axis] != (value if value in there else there[0]):
            return False
    return True


def _best(answers: Sequence[Answer]) -> Answer:
    return min(answers, key=lambda one: ORDER.index(one.verdict))


def _packing(usual: Sequence[Answer]) -> str:
    possible = [
        mode
        for mode in _values(usual, "packing")
        if any(one.verdict != "refused" for one in usual if _has(one, packing=mode))
    ]
    return "any" if len(possible) == len(AXES["packing"]) else ", ".join(possible) or "-"


def _not_with(
    row: Sequence[Answer], usual: Sequence[Answer], found: Sequence[Answer], notes: Mapping[str, str]
) -> Iterator[str]:
    """Single settings that refuse whatever goes without them."""
    going = [one for one in usual if one.verdict != "refused"]
    for axis in USUAL:
        for value in _values(found, axis):
            changed = [_changed(one, row, axis, value) for one in going]
            if changed and all(one.verdict == "refused" for one in changed):
                given = {reason for one in changed for reason in one.reasons}
                name = str(value) if axis == "dtype" else axis
                yield f"{name} {' '.join(mark for reason, mark in notes.items() if reason in given)}"


def _changed(one: Answer, row: Sequence[Answer], axis: str, value: Any) -> Answer:
    wanted = {**one.settings, axis: value}
    return next(other for other in row if other.settings == wanted)
