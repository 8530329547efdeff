"""Chats by the model that answered in them."""

from fnmatch import fnmatchcase

from schemas.conversation import Conversation, Drop
from schemas.pipeline_config import FilterConfig


def model_drop(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`model_not_kept`, `model_skipped`, by the names that the record or its answers give; "" where they give none.

    A chat stays if all its models are kept and none is skipped.
    """
    if not settings.keep_models and not settings.skip_models:
        return None
    for name in model_names(conversation):
        if settings.keep_models and not _matches(name, settings.keep_models):
            return Drop("model_not_kept", f"{name!r}, not in {settings.keep_models}")
        if _matches(name, settings.skip_models):
            return Drop("model_skipped", f"{name!r}")
    return None


def model_names(conversation: Conversation) -> list[str]:
    """The names in the extras of the answers, else that of the record, else "" alone."""
    named = [message.extras.get("model") for message in conversation.messages if message.role == "assistant"]
    names = sorted({name for name in named if isinstance(name, str) and name})
    return names or [str(conversation.meta.get("model") or "")]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name.casefold(), pattern.casefold()) for pattern in patterns)
