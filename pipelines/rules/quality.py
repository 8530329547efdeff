"""A score of the chat by somebody else's judgement: a Python function or a fastText model."""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.rules.prose import prose_of
from schemas.conversation import Conversation, Drop
from schemas.errors import ConfigError, InputError
from schemas.pipeline_config import FilterConfig, names_function

Score = Callable[[Conversation], float]


def with_quality(conversation: Conversation, settings: FilterConfig, *, score: Score) -> Conversation | Drop:
    """The chat with its score in meta, or Drop `low_quality`."""
    value = score(conversation)
    if not isinstance(value, int | float) or value != value:
        raise ConfigError(
            f"filter.quality {settings.quality} gave {value!r} for row {conversation.row_id}, expected a number"
        )
    if value < settings.min_quality:
        return Drop("low_quality", f"{value:.4f}, lower than {settings.min_quality}")
    return replace(conversation, meta={**conversation.meta, "quality": round(float(value), 4)})


def load_score(settings: FilterConfig) -> Score:
    """The function, or the model as one. Raises ConfigError, InputError."""
    if names_function(settings.quality):
        return _load_function(settings.quality)
    model = _load_model(settings.quality)
    # fasttext-predict can't list its labels; without a threshold it gives all of them for any text.
    known = sorted(model.predict("a", k=-1, threshold=-1.0)[0])
    if settings.quality_label not in known:
        raise ConfigError(
            f"filter.quality_label {settings.quality_label!r} is no label of {settings.quality}; it has "
            f"{', '.join(known[:10])}"
        )

    def score(conversation: Conversation) -> float:
        text = " ".join(prose_of(message.content) for message in conversation.messages).replace("\n", " ")
        labels, probabilities = model.predict(text, k=-1)
        return float(dict(zip(labels, probabilities, strict=True)).get(settings.quality_label, 0.0))

    return score


def quality_version(settings: FilterConfig) -> str:
    """Digest of the model's file or of the function's module: another one scores again."""
    if names_function(settings.quality):
        path = Path(inspect.getsourcefile(_load_function(settings.quality)) or "")
    else:
        path = _model_path(settings.quality)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=2)
def _load_function(quality: str) -> Score:
    module, _, name = quality.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"filter.quality {quality!r} can't be imported ({error}); expected package.module:function, installed "
            "beside this program or in PYTHONPATH"
        ) from error
    if not inspect.isfunction(function):
        raise ConfigError(f"filter.quality {quality!r} is no function but {type(function).__name__}")
    return function  # type: ignore[no-any-return]


@lru_cache(maxsize=2)
def _load_model(quality: str) -> Any:
    import fasttext

    path = _model_path(quality)
    try:
        return fasttext.load_model(str(path))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} is no fastText model ({error}); train one and save it as .bin or .ftz"
        ) from error


def _model_path(quality: str) -> Path:
    path = Path(quality)
    if not path.is_file():
        raise InputError(
            f"filter.quality: {path} is not there; expected a fastText model file, or package.module:function"
        )
    return path
