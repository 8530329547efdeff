"""A chat as the text that its chat template writes, with the place of every trained character proved.

The Jinja template is the only source of what is written. A chat is rendered twice: once with a marker in place of
each text, which shows the template's own text around them (pipelines.skeleton, kept per sequence of roles), and once
as it is. The second must be the skeleton with the texts put in, character by character; then it is known which
characters are an assistant's and which control tokens the template itself wrote. Otherwise the chat is dropped,
never guessed.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.chat_fields import GivenChat, Kind, given_chat, template_messages, tool_names
from pipelines.skeleton import Inline, Skeleton, Slot, TurnPlace, skeleton_of
from pipelines.templates import TEMPLATE_ERRORS, ChatTemplate, render_given
from schemas.conversation import Drop, Message

Part = tuple[Kind, int, int]
"""Characters [start, end) of a turn that are its reasoning, its text or its tool calls, template marks included."""


@dataclass(frozen=True, slots=True)
class TrainedSpan:
    """Characters [start, end) of the rendered text that an assistant turn trains: what it says and its end token.

    The turn is all that the template writes behind the generation prompt. `start` lies before the content where the
    template writes more than that prompt ("ASSISTANT:" is the prompt, " Hello" the answer; `<think>` before
    reasoning). `has_end` is false where the template wrote no end token after this turn.
    `parts` follow each other from `start` to `closing_start`, where the end token begins; `text_start` is the first
    character that stands in the chat itself. A policy gives a `weight`.
    """

    start: int
    end: int
    message_index: int
    has_end: bool
    parts: tuple[Part, ...] = ()
    text_start: int = 0
    closing_start: int = 0
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """One rendered chat.

    `spans` has one entry for each located assistant message, in the order of the text.
    `control_spans` is int64 [n, 2]: where the template itself wrote the control tokens `control_tokens`.
    `message_spans` has the place of each message's content, None where the content is blank and not located;
    `message_ends` where its end token ends, None where the template writes none directly after it.
    `num_reasoning_left_out` counts the turns whose reasoning the template left out.
    """

    text: str
    spans: tuple[TrainedSpan, ...]
    control_spans: np.ndarray
    control_tokens: tuple[str, ...]
    message_spans: tuple[tuple[int, int] | None, ...]
    message_ends: tuple[int | None, ...] = ()
    num_reasoning_left_out: int = 0


def render(template: ChatTemplate, messages: Sequence[Message], tools: Any = None) -> Rendered | Drop:
    """Render a chat and prove its spans. `tools` are those of the row, in any form that sources have.

    Drops: `template_refuses` (the template raised), `content_beside_text` (it would leave out tools, tool calls or
    reasoning), `template_changes_text` (texts altered by more than trimming white space, left out, or an answer
    written twice).
    """
    try:
        chat = given_chat(template, messages, tools)
        if isinstance(chat, Drop):
            return chat
        text = render_given(template, template_messages(template, chat), chat.tools)
        if chat.tools and (missing := [name for name in tool_names(chat.tools) if name not in text]):
            return Drop("content_beside_text", f"the template leaves out the tool {missing[0]!r:.100}")
        return _proved(template, chat, text)
    except TEMPLATE_ERRORS as error:
        return Drop("template_refuses", f"{type(error).__name__}: {error}"[:300])


def _proved(template: ChatTemplate, chat: GivenChat, text: str) -> Rendered | Drop:
    result = _put_in(skeleton_of(template, chat), text, _texts(chat), len(chat.turns))
    # Some templates write an empty turn in another way: try again with such contents as they are.
    contents = [turn.texts["content"] for turn in chat.turns]
    for is_blank in (_is_empty, _is_white_space):
        blanks = frozenset(number for number, content in enumerate(contents) if is_blank(content))
        if isinstance(result, Drop) and blanks:
            result = _put_in(skeleton_of(template, chat, blanks), text, _texts(chat), len(chat.turns))
    # Some quote what tools returned: their text is then no text of its own, but data of the template's.
    quoted = frozenset(
        number
        for number, turn in enumerate(chat.turns)
        if turn.role == "tool" and any(form in text for form in _quoted(turn.texts["content"]))
    )
    if isinstance(result, Drop) and quoted:
        blanks = frozenset(number for number, content in enumerate(contents) if not content.strip())
        result = _put_in(skeleton_of(template, chat, blanks | quoted), text, _texts(chat), len(chat.turns))
    # And some know reasoning inside of a text by its marks, and move it or leave it out.
    if isinstance(result, Drop) and (inline := dict(_inline_reasoning(chat))):
        frames: Inline = tuple(
            (number, found["before"], found["between"]) for number, found in inline.items()
        )
        blanks = frozenset(number for number, content in enumerate(contents) if not content.strip())
        result = _put_in(
            skeleton_of(template, chat, blanks, frames), text, _texts(chat, inline), len(chat.turns)
        )
    return result


def _quoted(content: str) -> tuple[str, ...]:
    return (json.dumps(content, ensure_ascii=False), json.dumps(content)) if content.strip() else ()


def _is_empty(content: str) -> bool:
    return not content


def _is_white_space(content: str) -> bool:
    return not content.strip()


INLINE_REASONING = re.compile(
    r"(?P<before>\s*<think>|)(?P<reasoning>(?:(?!</?think>).)*)(?P<between></think>)(?P<content>(?:(?!</?think>).)*)",
    re.DOTALL,
)
"""An answer that begins with its reasoning, as models write it; some prompts end with the opening mark."""


def _inline_reasoning(chat: GivenChat) -> Iterator[tuple[int, re.Match[str]]]:
    for number, turn in enumerate(chat.turns):
        if turn.role == "assistant" and "</think>" in turn.texts["content"]:
            found = INLINE_REASONING.fullmatch(turn.texts["content"])
            if found is not None and "reasoning" not in turn.texts:
                yield number, found


# Putting texts in -------------------------------------------------------------------------------------------

Texts = Callable[[Slot], str]


def _texts(chat: GivenChat, inline: dict[int, re.Match[str]] | None = None) -> Texts:
    def text_of(slot: Slot) -> str:
        turn = chat.turns[slot.message]
        if slot.kind == "call":
            return str(turn.calls[slot.call]["function"]["name"])
        if inline and slot.message in inline and slot.kind in ("reasoning", "content"):
            return inline[slot.message][slot.kind]
        return turn.texts[slot.kind]

    return text_of


def _put_in(skeleton: Skeleton, text: str, text_of: Texts, num_messages: int) -> Rendered | Drop:
    """Put the texts into the skeleton; the result must be the text that the template wrote."""
    if skeleton.problem:
        return Drop("template_changes_text", skeleton.problem)
    pieces = [skeleton.segments[0]]
    for slot, segment in zip(skeleton.slots, skeleton.segments[1:], strict=True):
        pieces += (_stripped(text_of(slot), slot), segment)
    expected = "".join(pieces)
    if expected != text:
        return Drop("template_changes_text", _first_difference(text, expected))
    borders = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    listed = borders.tolist()
    places = list(zip(listed[1:-1:2], listed[2:-1:2], strict=True))
    message_spans: list[tuple[int, int] | None] = [None] * num_messages
    message_ends: list[int | None] = [None] * num_messages
    for turn in reversed(skeleton.turns):
        if (
            span := _content_place(skeleton.slots[turn.first : turn.end], places[turn.first : turn.end])
        ) is not None:
            message_spans[turn.message] = span
            closing = places[turn.end - 1][1] + turn.closing_end
            message_ends[turn.message] = closing if turn.closing_end else None
    return Rendered(
        text=text,
        spans=tuple(_span(turn, skeleton.slots, places) for turn in skeleton.turns if turn.is_answer),
        control_spans=skeleton.control_places + borders[0:-1:2][skeleton.control_segments][:, None],
        control_tokens=skeleton.control_tokens,
        message_spans=tuple(message_spans),
        message_ends=tuple(message_ends),
        num_reasoning_left_out=skeleton.num_left_out,
    )


def _content_place(slots: Sequence[Slot], places: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Where a message's text stands, with an input behind it; the first time where it is written twice."""
    starts = [place[0] for slot, place in zip(slots, places, strict=True) if slot.kind == "content"]
    if not starts:
        return None
    ends = [place[1] for slot, place in zip(slots, places, strict=True) if slot.kind == "input"]
    first_end = next(place[1] for slot, place in zip(slots, places, strict=True) if slot.kind == "content")
    return starts[0], ends[0] if ends else first_end


def _span(turn: TurnPlace, slots: Sequence[Slot], places: Sequence[tuple[int, int]]) -> TrainedSpan:
    first, last = places[turn.first], places[turn.end - 1]
    start, closing_start = first[0] - turn.lead, last[1] + turn.closing_start
    end = last[1] + turn.closing_end if turn.closing_end else closing_start
    if turn.end == turn.first + 1:
        parts: tuple[Part, ...] = ((slots[turn.first].kind, start, closing_start),)
    else:
        parts = tuple(
            _parts(slots[turn.first : turn.end], places[turn.first : turn.end], start, closing_start)
        )
    return TrainedSpan(start, end, turn.message, turn.closing_end > 0, parts, first[0], closing_start)


def _parts(slots: Sequence[Slot], places: Sequence[tuple[int, int]], start: int, end: int) -> Iterator[Part]:
    """Marks behind reasoning belong to the reasoning, all others to what follows them."""
    pairs = zip(slots, slots[1:], places, places[1:], strict=False)
    for slot, following, place, next_place in pairs:
        if slot.kind != following.kind:
            border = next_place[0] if slot.kind == "reasoning" else place[1]
            yield slot.kind, start, border
            start = border
    yield slots[-1].kind, start, end


def _stripped(content: str, slot: Slot) -> str:
    if slot.strip_left != "":
        content = content.lstrip(slot.strip_left)
    if slot.strip_right != "":
        content = content.rstrip(slot.strip_right)
    return content


def _first_difference(text: str, expected: str) -> str:
    pairs = enumerate(zip(text, expected, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(text), len(expected)))
    start = max(0, place - 20)
    return f"at character {place} it wrote {text[start : place + 20]!r}, not {expected[start : place + 20]!r}"
