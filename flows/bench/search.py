"""A contestant's fastest way on this card, found by changing one thing after the other."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

from flows.bench.contestants import Dimensions, Variant


@dataclass(frozen=True, slots=True)
class Tried:
    """A variant of the search: its speed, or why there is none."""

    variant: Variant
    tokens_per_second: float | None
    problem: str = ""


def first_of(dimensions: Dimensions) -> Variant:
    """The safe one, with which a search begins."""
    return {name: values[0] for name, values in dimensions.items()}


def search(dimensions: Dimensions, measure: Callable[[Variant], Tried]) -> Variant:
    """The fastest variant that is found by changing one thing after the other; each is measured once."""
    chosen = first_of(dimensions)
    measured: dict[str, float] = {}
    for name, values in dimensions.items():
        if len(values) == 1:
            continue
        for value in values:
            variant = chosen | {name: value}
            key = json.dumps(variant, sort_keys=True)
            if key not in measured:
                tried = measure(variant)
                measured[key] = tried.tokens_per_second or 0.0
                speed = f"{measured[key]:,.0f} tokens/s" if tried.tokens_per_second else tried.problem
                say(f"trying {name} {value}: {speed}")
        chosen[name] = max(
            values, key=lambda value: measured[json.dumps(chosen | {name: value}, sort_keys=True)]
        )
    return chosen


def say(message: str) -> None:
    """To the people who wait."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
