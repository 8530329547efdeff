"""`sft-pipeline init FOLDER`: look at the dumps, write a config that says what was seen and what can be set.

The settings and their comments are those of the schemas, so the file never tells of a key that is not there.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flows.look import FileLook, look_at
from flows.recipe import recipe_text, with_model, with_sources
from pipelines.sources import SUFFIXES, files_below, is_dump
from schemas.config_file import load_config
from schemas.errors import ConfigError, InputError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import ModelConfig

MAX_SINGLE_SOURCES = 20
COMMENT_COLUMN = 44


def write_config(
    folder: Path | None, *, model: Path | None, out: Path, force: bool, recipe: str | None = None
) -> Path:
    """Write a config for the dumps in a folder, of a recipe or both; its path. Raises ConfigError, InputError."""
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already: give another name with --out, or --force")
    if folder is None and recipe is None:
        raise ConfigError("name a folder of dumps, a recipe with --recipe, or both")
    looks = _looks(folder) if folder is not None else []
    if recipe is None:
        lines = config_lines(looks, model=model, beside=out.parent)
    else:
        lines = _recipe_lines(recipe, looks, model=model, beside=out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    load_config(out)  # what we write, we can read
    return out


def _recipe_lines(
    recipe: str, looks: Sequence[FileLook], *, model: Path | None, beside: Path
) -> Iterator[str]:
    text = recipe_text(recipe)
    lines = with_sources(text, _source_lines(looks, beside)) if looks else iter(text.splitlines())
    return lines if model is None else with_model(lines, _quoted(_relative(model, beside)))


def _looks(folder: Path) -> list[FileLook]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the one that the dumps lie in")
    files = dump_files(folder)
    if not files:
        raise InputError(
            f"{folder} holds no {', '.join(SUFFIXES)} file (also .gz, .zst, .bz2 and .xz); texts need format: text"
        )
    looks = [look_at(path) for path in files]
    usable = [look for look in looks if look.num_rows]
    if not usable:
        raise InputError(f"no file in {folder} holds a chat that can be read; first: {looks[0].summary()}")
    return looks


def dump_files(folder: Path) -> list[Path]:
    """Files that look like dumps by their names, in sub-folders too, hidden ones left out; sorted."""
    return sorted(path for path in files_below(folder) if is_dump(path.name))


def config_lines(looks: Sequence[FileLook], *, model: Path | None, beside: Path) -> Iterator[str]:
    """The file, line by line: what was found is set, everything else is there as a comment."""
    yield "# Written by `sft-pipeline init`. Paths are relative to this file; every key can also be set by --set a.b=value."
    yield "run_root: runs/first"
    yield "# Folder of everything that a run writes."
    yield ""
    yield "sources:"
    yield from _source_lines(looks, beside)
    yield ""
    yield from _model_lines(model, beside)
    for name, field in PipelineConfig.model_fields.items():
        section = field.annotation
        if name != "model" and isinstance(section, type) and issubclass(section, BaseModel):
            yield ""
            yield f"# {name}:"
            yield from (f"#   {line}" for line in _setting_lines(section))
        elif name not in ("model", "run_root", "sources"):
            yield ""
            yield f"# {_setting_line(name, field)}"


def _source_lines(looks: Sequence[FileLook], beside: Path) -> Iterator[str]:
    names: set[str] = set()
    for look in looks:
        yield f"  # {look.summary()}"
        if not look.num_rows:
            if "no_assistant_side" in look.drops:
                yield "  # people talk here: name the assistant with assistant_side to read it"
            yield f"  # left out: {_quoted(_relative(look.path, beside))}"
            continue
        yield f"  - name: {_unique_name(look.path, names)}"
        yield f"    path: {_quoted(_relative(look.path, beside))}"


def _model_lines(model: Path | None, beside: Path) -> Iterator[str]:
    if model is None:
        yield "# Needed from the stage split on: its tokenizer makes the shards."
        yield "# model:"
        yield "#   path: models/my-model"
        return
    yield "model:"
    yield f"  path: {_quoted(_relative(model, beside))}"
    yield from (f"  # {line}" for line in _setting_lines(ModelConfig) if not line.startswith("path:"))


def _setting_lines(section: type[BaseModel], indent: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield f"{indent}{name}:"
            yield from _setting_lines(type(field.default), indent + "  ")
            continue
        yield f"{indent}{_setting_line(name, field)}"


def _setting_line(name: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    value = "..." if default is PydanticUndefined else _yaml_value(default)
    about = " ".join((field.description or "").split())
    line = f"{name}: {value}"
    return f"{line:<{COMMENT_COLUMN}}  # {about}" if about else line


def _yaml_value(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    """Plain where YAML reads it back as the same text, else in double quotes."""
    if re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./+-]*", text) and text not in ("null", "true", "false"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _relative(path: Path, beside: Path) -> str:
    return Path(os.path.relpath(path.resolve(), beside.resolve())).as_posix()


def _unique_name(path: Path, taken: set[str]) -> str:
    stem = path.name.split(".")[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_") or "source"
    number = 1
    while (candidate := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    taken.add(candidate)
    return candidate
