"""Stage 3, filter: puts roles in order, then drops a chat for the first rule that it breaks.

Every kept chat carries its languages in meta["language"]. Rules are functions in `RULES`, run in this order; the
language comes last, as it costs the most.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

from pipelines.rules import languages, length, repetition, turns
from schemas.conversation import Conversation, Drop
from schemas.pipeline_config import FilterConfig, PipelineConfig

STAGE_VERSION = 1

RULES: dict[str, Callable[[Conversation, FilterConfig], Drop | None]] = {
    "too_many_turns": length.too_many_turns,
    "too_short": length.too_short,
    "too_long": length.too_long,
    "digit_repetition": repetition.digit_repetition,
    "broken_numbering": repetition.broken_numbering,
}


def prepare(config: PipelineConfig) -> Callable[[Conversation], Conversation | Drop]:
    """The row step; loads the language model once for this process.

    Drops: empty, wrong_role_order, those of RULES, language_not_kept, language_skipped.
    """
    detector = languages.load_detector()
    settings = config.filter

    def step(conversation: Conversation) -> Conversation | Drop:
        return judge(conversation, settings, detector=detector)

    return step


def versions(config: PipelineConfig) -> dict[str, str]:
    """What else shapes the bytes: the language models."""
    return {
        "lid.176.ftz": languages.model_sha256(),
        "fasttext-predict": version("fasttext-predict"),
        "langdetect": version("langdetect"),
    }


def judge(
    conversation: Conversation, settings: FilterConfig, *, detector: languages.Detector
) -> Conversation | Drop:
    """A copy of the chat in order and with its languages, or the one reason why it is dropped."""
    if (drop := turns.empty_drop(conversation, settings)) is not None:
        return drop
    ordered = turns.in_order(conversation, settings)
    if isinstance(ordered, Drop):
        return ordered
    for rule in RULES.values():
        if (drop := rule(ordered, settings)) is not None:
            return drop
    spoken = [message.content for message in ordered.messages if message.role in ("user", "assistant")]
    judged = replace(ordered, meta={**ordered.meta, "language": detector.of_chat(spoken)})
    return languages.language_drop(judged, settings) or judged
