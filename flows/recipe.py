"""Recipes: short configs of whole routes, each named by method, model and cards. They come with the package.

sft-pipeline recipes                          what there is
sft-pipeline recipes NAME                     one of them, as it is
sft-pipeline init FOLDER --recipe NAME        its settings for the dumps in a folder
"""

import difflib
from collections.abc import Iterator
from pathlib import Path

from schemas.errors import ConfigError

RECIPES_FOLDER = Path(__file__).parent / "recipes"


def print_recipes(name: str | None) -> None:
    """One recipe, or a line for each."""
    if name is not None:
        print(recipe_text(name), end="")
        return
    names = recipe_names()
    width = max(map(len, names))
    for one in names:
        print(f"{one:<{width}}  {summary(one)}")


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def summary(name: str) -> str:
    """What it trains, and on what: its first line."""
    return recipe_text(name).partition("\n")[0].removeprefix("# ")


def recipe_text(name: str) -> str:
    """The file. Raises ConfigError with the nearest name."""
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}" if near else "`sft-pipeline recipes` lists them"
        raise ConfigError(f"no recipe is named {name!r}; {hint}")
    return (RECIPES_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def with_sources(text: str, source_lines: Iterator[str]) -> Iterator[str]:
    """The recipe's lines with these in place of its own sources."""
    is_source = False
    for line in text.splitlines():
        if line == "sources:":
            is_source = True
            yield line
            yield from source_lines
        elif not is_source or not line.startswith((" ", "#")):
            is_source = False
            yield line


def with_model(lines: Iterator[str], model: str) -> Iterator[str]:
    """The same with another model.path."""
    for line in lines:
        head, braced, rest = line.partition("model: {path: ")
        if not head and braced:
            end = min(place for place in (rest.find(","), rest.find("}")) if place >= 0)
            line = f"{braced}{model}{rest[end:]}"
        yield line
