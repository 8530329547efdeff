"""Which decoder layer a weight belongs to, told from its name alone. Light: no torch.

What is trained of a model is so known from the headers of its files too, before it is loaded.
"""

import re
from collections.abc import Iterable, Sequence

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def layer_number(name: str) -> int | None:
    """Of a parameter's name; None for what is in no layer."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def num_layers(names: Iterable[str]) -> int:
    """Of a model that has parameters of these names."""
    return 1 + max((number for name in names if (number := layer_number(name)) is not None), default=-1)


def is_in_last(name: str, count: int, *, num_layers: int) -> bool:
    """Whether it belongs to one of the last `count` layers."""
    number = layer_number(name)
    return number is not None and number >= num_layers - count


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def copied_layers(num_layers: int, new_layers: int) -> list[int]:
    """The layers that get a copy behind them: the last one of each of `new_layers` groups as equal as can be."""
    return [(group + 1) * num_layers // new_layers - 1 for group in range(new_layers)]
