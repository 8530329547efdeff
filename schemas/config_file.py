"""YAML file + overrides -> PipelineConfig. All mistakes at once, each with its line and the nearest known key.

ruamel.yaml reads YAML 1.2: PyYAML takes 1e-4 for text, `no` for false, and keeps the last of two equal keys.
"""

import difflib
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from schemas.errors import ConfigError
from schemas.pipeline_config import BUILT_IN_TEMPLATES, PipelineConfig, names_function

MAX_CONFIG_BYTES = 1 << 20


def load_config(path: Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> PipelineConfig:
    """Read, override, check; relative paths are taken from the config file's folder.

    `overrides` are {"train.max_steps": 5} or ["train.max_steps=5", ...]; values are read as YAML.
    Raises ConfigError.
    """
    document = _read_yaml(path)
    for key, value in _pairs(overrides):
        _set(document, key, value)
    return _resolve(_validate(document, path), path.resolve().parent)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no config file at {path}; write one with `sft-pipeline init FOLDER`")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes; a config has at most {MAX_CONFIG_BYTES}")
    document = _parse(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path} holds {type(document).__name__}, expected keys such as sources: and run_root:"
        )
    return document


def _parse(text: str, where: str) -> Any:
    # Aliases are refused: nine levels of them expand to gigabytes.
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = False
    try:
        if any(type(event).__name__ == "AliasEvent" for event in yaml.parse(text)):
            raise ConfigError(f"{where}: YAML aliases (*name) are not read; write the value out")
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {_yaml_problem(error)}") from None


def _yaml_problem(error: YAMLError) -> str:
    """What and where. The library's own text quotes the line, which may hold half of a password."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    said = " ".join(str(error.problem).split())
    return f"{said}, line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"


def _pairs(overrides: Mapping[str, Any] | Sequence[str]) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {text!r}: expected section.key=value, such as train.max_steps=5")
        pairs.append((key, _parse(value, f"override {text!r}") if value else None))
    return pairs


def _set(document: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    place: Any = document
    for section in sections:
        place = _descend(place, section, key)
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    else:
        place[last] = value


def _descend(place: Any, section: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, section, key)]
    if place.get(section) is None:
        place[section] = {}
    if not isinstance(place[section], (dict, list)):
        raise ConfigError(f"override {key!r}: {section!r} is a single value and has no keys below it")
    return place[section]


def _index(place: list[Any], text: str, key: str) -> int:
    if not text.isdigit() or int(text) >= len(place):
        raise ConfigError(f"override {key!r}: {text!r} is not a number below {len(place)}")
    return int(text)


def _validate(document: dict[str, Any], path: Path) -> PipelineConfig:
    try:
        return PipelineConfig.model_validate(document)
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors(include_url=False)]
        raise ConfigError(f"{path}: " + "; ".join(problems)) from None


def _problem(detail: Any) -> str:
    location = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {location!r}{_nearest(detail['loc'])}"
    if detail["type"] == "missing":
        return f"{location!r} is missing"
    if detail["loc"][:2] == ("engine", "secret_env"):  # the value may be the secret itself, by mistake
        return f"{location!r}: expected VARIABLE: name-of-a-Prefect-Secret-block, never the secret itself"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{location!r} is {detail['input']!r}: {message}" if location else message


def _nearest(location: tuple[str | int, ...]) -> str:
    known = _known_keys(PipelineConfig, location[:-1])
    matches = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    if matches:
        return f", did you mean {'.'.join([*map(str, location[:-1]), matches[0]])!r}?"
    return f"; known here: {', '.join(known)}"


def _known_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    for part in location:
        if isinstance(part, str):
            model = _model_of(model.model_fields[part].annotation)
    return list(model.model_fields)


def _model_of(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        if inner is not type(None):
            return _model_of(inner)
    raise AssertionError(f"no section behind {annotation!r}")


def _resolve(config: PipelineConfig, folder: Path) -> PipelineConfig:
    sources = [
        source.model_copy(update={"path": _absolute(folder, source.path)}) if source.path else source
        for source in config.sources
    ]
    benchmarks = [
        benchmark.model_copy(update={"path": _absolute(folder, benchmark.path)})
        for benchmark in config.benchmarks
    ]
    updates: dict[str, Any] = {
        "run_root": Path(_absolute(folder, str(config.run_root))),
        "sources": sources,
        "benchmarks": benchmarks,
        "earlier_runs": [_absolute(folder, root) for root in config.earlier_runs],
    }
    if config.model is not None:
        model = config.model
        updates["model"] = model.model_copy(
            update={
                "path": _model_path(folder, model.path),
                "tokenizer": _model_path(folder, model.tokenizer),
            }
        )
    template = config.split.chat_template
    if template is not None and template not in BUILT_IN_TEMPLATES:
        template = _absolute(folder, template)
        updates["split"] = config.split.model_copy(update={"chat_template": template})
    if config.filter.quality and not names_function(config.filter.quality):
        quality = _absolute(folder, config.filter.quality)
        updates["filter"] = config.filter.model_copy(update={"quality": quality})
    return config.model_copy(update=updates)


def _absolute(folder: Path, path: str) -> str:
    return path if "://" in path else os.path.normpath(folder.joinpath(Path(path).expanduser()))


def _model_path(folder: Path, path: str | None) -> str | None:
    # "org/name" may be a hub name: it is a path only when it is written as one or exists.
    if path is None:
        return None
    local = Path(_absolute(folder, path))
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    return str(local) if local.exists() or looks_local else path
