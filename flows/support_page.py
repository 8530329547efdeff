"""`sft-pipeline support`: what works together, as a grid for people, as JSON, and as docs/support-matrix.md."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flows.methods_table import Cells, cell_text, methods_table
from trainer.adaptations import ADAPTATIONS
from trainer.rules import Adaptation, Rule
from trainer.support import RULES
from trainer.support_matrix import AXES, Answer, answers, axes_that_matter

ROW_AXES = ("strategy", "offload", "method", "base")
GRID_METHODS = ("lora", "full")
"""Those that a grid of all settings is drawn of; of the others there is a table."""
HEAD = """\
# What works together

Every combination of {axes} has an answer: {counts}.
The same table refuses a config before the first stage. `sft-pipeline support` prints it, with `--strategy zero2` and the like for a part of it, with `--json` for programs.

- **works**: it trains as asked for.
- **adapted a**: it trains, and what note a says is done otherwise than asked for. The losses are the same.
- **refused 1**: for the reason of note 1, which names the nearest settings that work.

What an answer does not hang on is left out: {left_out}. Methods beside lora and full stand in [a table of their own](#the-other-methods); `sft-pipeline support --method freeze` prints the grid of one.

This page is written by `sft-pipeline support --markdown`.
"""


def support_text(chosen: Mapping[str, Sequence[Any]], *, as_json: bool, as_markdown: bool) -> str:
    """What the command prints."""
    found = list(answers(**chosen))
    if as_json:
        return json.dumps([_record(one) for one in found], indent=1) + "\n"
    if as_markdown:
        return support_page()
    return "\n".join(_lines(found, _aligned, is_split="method" not in chosen)) + "\n"


def support_page() -> str:
    """docs/support-matrix.md."""
    found = list(answers())
    in_grid = [one for one in found if one.settings["method"] in GRID_METHODS]
    kept = _row_axes(in_grid) + _column_axes(in_grid)
    left_out = ", ".join(name for name in AXES if name not in kept) or "nothing"
    counts = ", ".join(
        f"{sum(one.verdict == verdict for one in found)} {text}"
        for verdict, text in (("works", "work"), ("adapted", "work adapted"), ("refused", "are refused"))
    )
    head = HEAD.format(axes=", ".join(AXES), counts=counts, left_out=left_out)
    lines = [head, *_lines(found, _piped, is_split=True), "", *_other_rules()]
    return "\n".join(lines) + "\n"


def _record(one: Answer) -> dict[str, Any]:
    return {**one.settings, "answer": one.verdict, "reasons": list(one.reasons)}


# The grid ---------------------------------------------------------------------------------------------------


def _lines(found: Sequence[Answer], drawn: Any, *, is_split: bool) -> Iterator[str]:
    """The grid, the table of the methods that are not in it, and what the marks in both of them say."""
    is_page = drawn is _piped
    notes = {name: chr(ord("a") + number) for number, name in enumerate(_said(found, "adapted"))}
    notes |= {name: str(number) for number, name in enumerate(_said(found, "refused"), start=1)}
    in_grid = [one for one in found if not is_split or one.settings["method"] in GRID_METHODS]
    others = [one for one in found if is_split and one.settings["method"] not in GRID_METHODS]
    if in_grid:
        yield from _titled("The grid", drawn(_grid(in_grid, notes)), is_page=is_page)
    if others:
        yield from _titled("The other methods", drawn(methods_table(others, notes)), is_page=is_page)
    if is_page:
        yield from ("## Notes", "")
    for entry in (*ADAPTATIONS, *RULES):
        if entry.id in notes:
            yield f"{'- ' if is_page else ''}{notes[entry.id]}: {_about(entry, with_links=is_page)}"


def _titled(title: str, lines: Iterator[str], *, is_page: bool) -> Iterator[str]:
    if is_page:
        yield from (f"## {title}", "")
    yield from lines
    yield ""


def _said(found: Sequence[Answer], verdict: str) -> list[str]:
    """Ids that some answer gives, in the tables' order."""
    given = {name for one in found if one.verdict == verdict for name in one.reasons}
    entries: tuple[Rule | Adaptation, ...] = RULES if verdict == "refused" else ADAPTATIONS
    return [entry.id for entry in entries if entry.id in given]


def _grid(found: Sequence[Answer], notes: Mapping[str, str]) -> Cells:
    rows, columns = _row_axes(found), _column_axes(found)
    cells: dict[tuple[Any, ...], dict[tuple[Any, ...], str]] = {}
    for one in found:
        row = tuple(one.settings[axis] for axis in rows)
        column = tuple(one.settings[axis] for axis in columns)
        cells.setdefault(row, {})[column] = cell_text(one, notes)
    titles = list(next(iter(cells.values()), {}))
    head = [
        *rows,
        *(" ".join(_title(axis, v) for axis, v in zip(columns, c, strict=True)).strip() for c in titles),
    ]
    return [head, *([*map(str, row), *(line[title] for title in titles)] for row, line in cells.items())]


def _row_axes(found: Sequence[Answer]) -> list[str]:
    matter = axes_that_matter(found)
    return [axis for axis in ROW_AXES if axis in matter or (axis in AXES and axis != "offload")]


def _column_axes(found: Sequence[Answer]) -> list[str]:
    return [axis for axis in axes_that_matter(found) if axis not in ROW_AXES] or ["dtype"]


def _title(axis: str, value: Any) -> str:
    if isinstance(value, bool):
        return axis if value else ""
    return str(value)


def _aligned(cells: Cells) -> Iterator[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _piped(cells: Cells) -> Iterator[str]:
    head, *rows = cells
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    before: list[str] = []
    for row in rows:
        # A name that stands in the row above is not said again.
        same = list(
            itertools.takewhile(lambda pair: pair[0] == pair[1], zip(row[:2], before[:2], strict=False))
        )
        yield f"| {' | '.join([''] * len(same) + row[len(same) :])} |"
        before = row


# Words ------------------------------------------------------------------------------------------------------


def _about(entry: Rule | Adaptation, *, with_links: bool = True) -> str:
    seen = f" (seen in {', '.join(map(_link, entry.links))})" if entry.links and with_links else ""
    if isinstance(entry, Adaptation):
        return f"`{entry.id}`: {entry.change}, since {entry.reason}{seen}"
    return f"`{entry.id}`: {entry.reason}{seen}; {entry.alternative}"


def _link(name: str) -> str:
    repository, _, number = name.partition("#")
    return f"[{name}](https://github.com/{repository}/issues/{number})"


def _other_rules() -> Iterator[str]:
    given = set(_said(list(answers()), "refused"))
    yield "## Refused whatever the grid says"
    yield ""
    yield "By the model, the data or the machine:"
    yield ""
    for rule in RULES:
        if rule.id not in given:
            yield f"- {_about(rule)}"
