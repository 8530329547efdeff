"""People talking with people: {"messages": [{"sender": "a", "text": "..."}, ...]}, also grouped by turn.

No side is an assistant. `assistant_side` of a source names the one that becomes it: "first" or "second" by who
spoke first, or a speaker's own name. Without it such chats are dropped.
"""

from typing import Any

from pipelines.formats.turns import listed, read_text
from schemas.conversation import Drop, Message
from schemas.source_config import SourceConfig

_LIST_KEYS = ("messages", "dialogue", "dialog", "turns", "utterances", "conversation", "conversations", "log")
_SPEAKER_KEYS = ("sender", "speaker", "author", "name", "user", "user_id", "from")
_TEXT_KEYS = ("text", "utterance", "content", "message", "value")


def matches(record: dict[str, Any]) -> bool:
    """Whether the first turn of some list has a speaker and a text, and no role."""
    return _turns(record) is not None


def read(record: dict[str, Any], source: SourceConfig) -> list[Message] | Drop:
    """The chat with the chosen side as the assistant; messages of one speaker in a row are one turn."""
    spoken = _spoken(_turns(record) or [])
    if isinstance(spoken, Drop):
        return spoken
    speakers = list(dict.fromkeys(speaker for speaker, _ in spoken))
    assistant = _assistant(speakers, source.assistant_side)
    if isinstance(assistant, Drop):
        return assistant
    return [
        Message("assistant" if speaker == assistant else "user", text, {"name": speaker} if speaker else {})
        for speaker, text in _joined(spoken)
    ]


def _turns(record: dict[str, Any]) -> list[Any] | None:
    for key in _LIST_KEYS:
        if key not in record:  # asked of every record, so the usual case comes first
            continue
        turns = _flat(listed(record[key]) or [])
        if turns and isinstance(turns[0], dict) and _is_spoken(turns[0]):
            return turns
    return None


def _flat(turns: list[Any]) -> list[Any]:
    """Messages grouped in lists by turn are taken out of them."""
    if not turns or not all(isinstance(turn, list) for turn in turns):
        return turns
    return [message for turn in turns for message in turn]


def _is_spoken(turn: dict[str, Any]) -> bool:
    if "role" in turn or ("from" in turn and "value" in turn):
        return False
    return _first(turn, _SPEAKER_KEYS) is not None and _first(turn, _TEXT_KEYS) is not None


def _first(turn: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in turn), None)


def _spoken(turns: list[Any]) -> list[tuple[str, str]] | Drop:
    spoken = []
    for turn in turns:
        if not isinstance(turn, dict):
            return Drop("bad_value", f"a turn is {type(turn).__name__}, expected an object")
        speaker = turn.get(_first(turn, _SPEAKER_KEYS) or "")
        text = read_text(turn.get(_first(turn, _TEXT_KEYS) or ""))
        if isinstance(text, Drop):
            return text
        if not isinstance(speaker, (str, int)) or isinstance(speaker, bool):
            return Drop("unknown_role", f"a speaker is {type(speaker).__name__} {speaker!r:.100}")
        spoken.append((str(speaker), text))
    return spoken


def _assistant(speakers: list[str], wanted: str) -> str | Drop:
    places = {"first": 0, "second": 1}
    if not wanted:
        return Drop(
            "no_assistant_side", f"{len(speakers)} people talk; sources[].assistant_side names none of them"
        )
    if wanted in places and places[wanted] < len(speakers):
        return speakers[places[wanted]]
    if wanted in speakers:
        return wanted
    return Drop(
        "no_assistant_side", f"assistant_side is {wanted!r}, speakers are {', '.join(speakers)[:200]}"
    )


def _joined(spoken: list[tuple[str, str]]) -> list[tuple[str, str]]:
    joined: list[tuple[str, list[str]]] = []
    for speaker, text in spoken:
        if joined and joined[-1][0] == speaker:
            joined[-1][1].append(text)
        else:
            joined.append((speaker, [text]))
    return [(speaker, "\n".join(texts)) for speaker, texts in joined]
