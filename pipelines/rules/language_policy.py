"""What the languages of a chat mean for it: kept, freed of some rounds, or dropped."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipelines.rules.chinese import chinese_script
from pipelines.rules.language_votes import UNKNOWN, ChatLanguages
from pipelines.rules.languages import Detector
from pipelines.rules.prose import prose_of
from pipelines.rules.turns import rounds_of, with_repair
from schemas.conversation import Conversation, Drop, Message
from schemas.pipeline_config import FilterConfig


def with_languages(
    conversation: Conversation, settings: FilterConfig, *, detector: Detector
) -> Conversation | Drop:
    """The chat with its languages in meta, less the rounds that the settings cut, or the reason why it is dropped.

    Drops: mixed_languages, foreign_round, and those of `language_drop`.
    """
    judged, languages = _judged(conversation, detector)
    if settings.mixed_chats == "keep" and settings.foreign_rounds == "keep":
        return language_drop(judged, settings) or judged
    outcome: Conversation | Drop = judged
    if len(languages.shares) > 1 and settings.mixed_chats != "keep":
        outcome = _unmixed(judged, languages, settings, detector=detector)
    if isinstance(outcome, Drop) or (drop := language_drop(outcome, settings)) is not None:
        return outcome if isinstance(outcome, Drop) else drop or outcome
    if settings.foreign_rounds == "keep":
        return outcome
    return _without_foreign(outcome, settings, detector=detector)


def language_drop(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """language_not_kept, language_skipped, by the main language of `meta["language"]`.

    A main language below `min_language_share` of the letters is no better than none: such a chat, like one of
    unknown language, is dropped when languages to keep are named, and kept when only languages to skip are.
    """
    code, share = conversation.meta["language"][0]
    name = conversation.meta.get("chinese", code) if code == "zh" else code
    names = {code, name} if share >= settings.min_language_share else {UNKNOWN}
    if settings.keep_languages and not names & set(settings.keep_languages):
        return Drop(
            "language_not_kept", f"{name} ({share:.0%} of the letters), not in {settings.keep_languages}"
        )
    if names & set(settings.skip_languages):
        return Drop("language_skipped", f"{name} ({share:.0%} of the letters)")
    return None


def _judged(conversation: Conversation, detector: Detector) -> tuple[Conversation, ChatLanguages]:
    spoken = _spoken(conversation.messages)
    languages = detector.judge([message.content for message in spoken])
    meta = {key: value for key, value in conversation.meta.items() if key != "chinese"}
    meta["language"] = languages.shares
    if any(code == "zh" for code, _ in languages.shares):
        script = chinese_script("".join(prose_of(message.content) for message in spoken))
        meta |= {"chinese": script} if script != "zh" else {}
    return replace(conversation, meta=meta), languages


def _unmixed(
    conversation: Conversation, languages: ChatLanguages, settings: FilterConfig, *, detector: Detector
) -> Conversation | Drop:
    found = ", ".join(f"{code} {share:.0%}" for code, share in languages.shares)
    if settings.mixed_chats == "drop":
        return Drop("mixed_languages", found)
    main = languages.shares[0][0]
    kept = _cut(conversation, languages.turns, lambda code, text: code == main)
    if kept is None:
        return Drop("mixed_languages", f"{found}: no round is in {main} alone")
    return _judged(kept, detector)[0]


def _without_foreign(
    conversation: Conversation, settings: FilterConfig, *, detector: Detector
) -> Conversation | Drop:
    turns = detector.judge([message.content for message in _spoken(conversation.messages)]).turns

    def wanted(code: str, text: str) -> bool:
        script = chinese_script(text) if code == "zh" else code
        # A turn that doesn't show its script is taken to be in that of the chat.
        names = {code, conversation.meta.get("chinese", code) if script == "zh" else script}
        kept = not settings.keep_languages or bool(names & set(settings.keep_languages))
        return kept and not names & set(settings.skip_languages)

    kept = _cut(conversation, turns, wanted)
    if kept is conversation:
        return conversation
    if kept is None or settings.foreign_rounds == "drop":
        return Drop("foreign_round", f"turns are in {', '.join(dict.fromkeys(turns))}")
    return _judged(kept, detector)[0]


def _cut(
    conversation: Conversation, turns: Sequence[str], wanted: Callable[[str, str], bool]
) -> Conversation | None:
    """The chat of the rounds whose turns are all wanted; itself if all are, None if none is left."""
    prefix, rounds = rounds_of(conversation.messages)
    codes = iter(turns)
    # sum, not any: every turn of a round takes its code, also behind the first that is not wanted.
    kept = [part for part in rounds if not sum(not wanted(next(codes), m.content) for m in _spoken(part))]
    if len(kept) == len(rounds):
        return conversation
    if not kept:
        return None
    messages = [*prefix, *(message for part in kept for message in part)]
    shorter = replace(conversation, messages=messages)
    return with_repair(shorter, "rounds_cut_by_language", len(rounds) - len(kept))


def _spoken(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message.role in ("user", "assistant")]
