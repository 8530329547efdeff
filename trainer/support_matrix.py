"""What works together, over every combination of the settings that meet: asked of the rules, one answer each.

    answers()                      all combinations with their answers
    answers(strategy=["zero2"])    those that keep to the choices given

Light: no torch. An answer of works is backed by trainings: tests/trainer/test_support_matrix.py trains such rows
for three steps and compares the losses with strategy single's.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from schemas.errors import ConfigError
from schemas.pipeline_config import PackConfig, PipelineConfig
from schemas.training_config import ModelConfig, TrainConfig
from trainer.adaptations import adaptations
from trainer.support import RULES

Verdict = Literal["works", "adapted", "refused"]


def _choices(section: Any, field: str) -> tuple[Any, ...]:
    return get_args(section.model_fields[field].annotation)


METHODS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in _choices(TrainConfig, "method")},
    "freeze": {"method": "freeze", "freeze": {"last_layers": 1}},
    "expand": {"method": "expand", "expand": {"new_layers": 1}},
    "dora": {"method": "lora", "lora": {"dora": True}},
    "pissa": {"method": "lora", "lora": {"init": "pissa"}},
    "olora": {"method": "lora", "lora": {"init": "olora"}},
    "eva": {"method": "lora", "lora": {"init": "eva"}},
    "loftq": {"method": "lora", "lora": {"init": "loftq"}},
}
"""A name for each method, and its settings in the section train."""

AXES: dict[str, tuple[Any, ...]] = {
    "strategy": _choices(TrainConfig, "strategy"),
    "method": tuple(METHODS),
    "base": _choices(TrainConfig, "base"),
    "dtype": tuple(name for name in _choices(ModelConfig, "dtype") if name != "auto"),
    "packing": _choices(PackConfig, "mode"),
    "checkpointing": (False, True),
    "compile": (False, True),
}
"""Each combination of these has an answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`reasons` are ids: of rules where it is refused, of adaptations where it is adapted."""

    settings: Mapping[str, Any]
    verdict: Verdict
    reasons: tuple[str, ...] = ()


def answers(**chosen: Sequence[Any]) -> Iterator[Answer]:
    """One for each combination, or for those of the chosen values. Raises ConfigError for an unknown value."""
    for axis, values in chosen.items():
        if odd := [value for value in values if value not in AXES[axis]]:
            raise ConfigError(
                f"{axis} {odd[0]!r} is unknown; expected one of {', '.join(map(str, AXES[axis]))}"
            )
    kept = [chosen.get(axis) or values for axis, values in AXES.items()]
    for combination in itertools.product(*kept):
        yield answer(dict(zip(AXES, combination, strict=True)))


def answer(settings: Mapping[str, Any]) -> Answer:
    """What the tables say about one combination, whatever this machine has installed."""
    config = config_of(settings)
    refused = tuple(rule.id for rule in RULES if not rule.of_machine and rule.find(config, {}) is not None)
    if refused:
        return Answer(settings, "refused", refused)
    adapted = tuple(adaptation.id for adaptation, _ in adaptations(config, {}))
    return Answer(settings, "adapted" if adapted else "works", adapted)


def config_of(settings: Mapping[str, Any]) -> PipelineConfig:
    """A config that asks for them and has defaults elsewhere. The model's folder need not exist."""
    return PipelineConfig.model_validate(
        {
            "run_root": "/nowhere/run",
            "sources": [{"name": "any", "path": "any.json"}],
            "model": {"path": "/nowhere/model", **model_settings(settings)},
            "pack": {"mode": settings["packing"]},
            "train": train_settings(settings),
        }
    )


def model_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of them that stands in the section model."""
    return {"dtype": settings["dtype"]}


def train_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of them that stands in the section train."""
    return {
        **METHODS[settings["method"]],
        "strategy": settings["strategy"],
        "base": settings["base"],
        "gradient_checkpointing": settings["checkpointing"],
        "compile": settings["compile"],
    }


def axes_that_matter(found: Sequence[Answer]) -> list[str]:
    """Those on which some answer hangs: changing it alone changes an answer."""
    by_settings = {tuple(one.settings.values()): (one.verdict, one.reasons) for one in found}
    names = list(found[0].settings) if found else []

    def matters(place: int) -> bool:
        groups: dict[tuple[Any, ...], set[Any]] = {}
        for values, said in by_settings.items():
            groups.setdefault(values[:place] + values[place + 1 :], set()).add(said)
        return any(len(said) > 1 for said in groups.values())

    return [name for place, name in enumerate(names) if matters(place)]
