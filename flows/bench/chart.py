"""Bars of tokens a second out of the benchmark's JSON, as an SVG that a README shows: no plotting library."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from schemas.errors import InputError

WIDTH, BAR_HEIGHT, GAP, LABEL_WIDTH, NUMBER_WIDTH, HEAD_HEIGHT = 760, 22, 8, 160, 190, 34
LABELS = {"ours": "sft-pipeline", "trl": "TRL", "unsloth": "Unsloth", "padded": "padded, as in 2023"}
COLOURS = {"ours": "#1f6feb"}
OTHER_COLOUR = "#8b949e"
TEXT = 'font-family="sans-serif" font-size="13" fill="#6e7681"'


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    tokens_per_second: float
    note: str
    colour: str


@dataclass(frozen=True, slots=True)
class Group:
    """The contestants of one benchmark."""

    title: str
    bars: tuple[Bar, ...]


def write_chart(paths: Sequence[Path], out: Path) -> None:
    """One group of bars a file, all to one scale. Raises InputError."""
    groups = [read_group(path) for path in paths]
    out.write_text(svg(groups), encoding="utf-8")


def read_group(path: Path) -> Group:
    try:
        found = json.loads(path.read_bytes())
        finished = [entry for entry in found["contestants"] if entry["runs"]]
        return Group(_title(found["options"], finished[0]), tuple(_bar(entry) for entry in finished))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{path} is no result of `bench train --json` ({type(error).__name__}: {error})"
        ) from None


def _title(options: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    base = "" if options["base"] == "plain" else f", base {options['base']}"
    device = ours["runs"][0]["device"]
    return f"{options['shape']}, {options['method']} r{options['rank']}{base}, {options['data']} lengths: {device}"


def _bar(entry: Mapping[str, Any]) -> Bar:
    reserved = [run["reserved_gib"] for run in entry["runs"] if run["reserved_gib"] is not None]
    note = f", {max(reserved):.0f} GiB" if reserved else ""
    version = entry["runs"][0]["versions"].get(entry["name"], "")
    label = f"{LABELS.get(entry['name'], entry['name'])} {version}".strip()
    return Bar(label, entry["tokens_per_second"], note, COLOURS.get(entry["name"], OTHER_COLOUR))


def svg(groups: Sequence[Group]) -> str:
    most = max(bar.tokens_per_second for group in groups for bar in group.bars)
    parts: list[str] = []
    top = 0
    for group in groups:
        parts.append(f'<text x="0" y="{top + 20}" {TEXT} font-weight="bold">{escape(group.title)}</text>')
        top += HEAD_HEIGHT
        for bar in group.bars:
            parts += _drawn(bar, top, most)
            top += BAR_HEIGHT + GAP
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *parts, "</svg>", ""])


def _drawn(bar: Bar, top: int, most: float) -> list[str]:
    length = (WIDTH - LABEL_WIDTH - NUMBER_WIDTH) * bar.tokens_per_second / most
    middle = top + BAR_HEIGHT - 6
    number = f"{bar.tokens_per_second:,.0f} tokens/s{bar.note}"
    return [
        f'<text x="0" y="{middle}" {TEXT}>{escape(bar.label)}</text>',
        f'<rect x="{LABEL_WIDTH}" y="{top}" width="{length:.1f}" height="{BAR_HEIGHT}" fill="{bar.colour}"/>',
        f'<text x="{LABEL_WIDTH + length + 8:.1f}" y="{middle}" {TEXT}>{escape(number)}</text>',
    ]
