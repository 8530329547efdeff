"""Records of any other shape, by the field paths that the source's `fields` name.

A path is keys joined by dots, numbers count in lists: `data.turns`, `answers.0.text`. Keys may hold dots.
"""

from typing import Any

from pipelines.formats.turns import ROLE_NAMES, listed, read_text, with_system
from schemas.conversation import ROLES, Drop, Message
from schemas.source_config import FieldPaths, SourceConfig

_ABSENT = object()


def matches(record: dict[str, Any]) -> bool:
    """Never unasked."""
    return True


def read(record: dict[str, Any], source: SourceConfig) -> list[Message] | Drop:
    """The chat by its paths."""
    paths = source.fields
    assert paths is not None, "SourceConfig asks for fields beside format: custom"
    found = _turns(record, paths) if paths.messages else _round(record, paths)
    if isinstance(found, Drop) or not paths.system:
        return found
    system = read_text(_optional(record, paths.system))
    return system if isinstance(system, Drop) else with_system(system, found)


def named(record: dict[str, Any], paths: FieldPaths) -> dict[str, Any]:
    """Id, date and model of the record under the names that every record may have them."""
    wanted = {"id": paths.id, "date": paths.date, "model": paths.model}
    values = {key: value_at(record, path) for key, path in wanted.items() if path}
    return {key: value for key, value in values.items() if value is not _ABSENT}


def value_at(value: Any, path: str) -> Any:
    """What a path leads to."""
    steps = path.split(".")
    while steps:
        if isinstance(value, dict):
            # The longest key first: keys may hold dots themselves.
            num_steps = next((n for n in range(len(steps), 0, -1) if ".".join(steps[:n]) in value), 0)
            if not num_steps:
                return _ABSENT
            value, steps = value[".".join(steps[:num_steps])], steps[num_steps:]
        elif isinstance(value, list) and steps[0].isdecimal() and int(steps[0]) < len(value):
            value, steps = value[int(steps[0])], steps[1:]
        else:
            return _ABSENT
    return value


def _optional(value: Any, path: str) -> Any:
    found = value_at(value, path)
    return None if found is _ABSENT else found


def _turns(record: dict[str, Any], paths: FieldPaths) -> list[Message] | Drop:
    turns = listed(value_at(record, paths.messages))
    if turns is None:
        return Drop("missing_field", f"fields.messages: no list at {paths.messages!r}")
    messages = []
    for turn in turns:
        name, text = value_at(turn, paths.role), read_text(_optional(turn, paths.content))
        role = paths.roles.get(str(name), ROLE_NAMES.get(str(name).strip().lower()))
        if isinstance(text, Drop):
            return text
        if name is _ABSENT or role not in ROLES:
            shown = "absent" if name is _ABSENT else repr(name)[:100]
            return Drop("unknown_role", f"fields.role: {paths.role!r} is {shown}")
        messages.append(Message(role, text))
    return messages


def _round(record: dict[str, Any], paths: FieldPaths) -> list[Message] | Drop:
    asked = [value for path in paths.prompt if (value := value_at(record, path)) not in (_ABSENT, None, "")]
    answer = value_at(record, paths.answer)
    if not asked or answer is _ABSENT:
        missing = ", ".join(paths.prompt) if not asked else paths.answer
        return Drop(
            "missing_field", f"nothing at {missing!r}; keys: {', '.join(map(repr, list(record)[:10]))[:300]}"
        )
    texts = [read_text(value) for value in (*asked, answer)]
    for text in texts:
        if isinstance(text, Drop):
            return text
    *questions, said = map(str, texts)
    return [Message("user", "\n\n".join(questions)), Message("assistant", said)]
