"""A chat as the text that its chat template writes, with the place of every trained character proved.

The Jinja template is the only source of what is written. A chat is rendered twice: once with a marker in place of
each content, which shows the template's own text around the contents (the skeleton, kept per sequence of roles),
and once as it is. The second must be the skeleton with the contents put in, character by character; then it is
known which characters are an assistant's and which control tokens the template itself wrote. Otherwise the chat
is dropped, never guessed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from pipelines.templates import TEMPLATE_ERRORS, ChatTemplate, compile_bare, render_text
from schemas.conversation import Drop, Message


@dataclass(frozen=True, slots=True)
class TrainedSpan:
    """Characters [start, end) of the rendered text that an assistant turn trains: its text and its end token.

    `start` lies before the content where the template writes white space that is no part of the generation
    prompt ("ASSISTANT:" is the prompt, " Hello" the answer). `has_end` is false where the template wrote no end
    token after this turn.
    """

    start: int
    end: int
    message_index: int
    has_end: bool


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """One rendered chat.

    `spans` has one entry for each located assistant message, in the order of the text.
    `control_spans` is int64 [n, 2]: where the template itself wrote the control tokens `control_tokens`.
    `message_spans` has the place of each message's content, None where the content is blank and not located.
    """

    text: str
    spans: tuple[TrainedSpan, ...]
    control_spans: np.ndarray
    control_tokens: tuple[str, ...]
    message_spans: tuple[tuple[int, int] | None, ...]


def render(template: ChatTemplate, messages: Sequence[Message]) -> Rendered | Drop:
    """Render a chat and prove its spans.

    Drops: `template_refuses` (the template raised), `template_changes_text` (contents altered by more than
    trimming white space, left out, or an answer written twice).
    """
    try:
        text = render_text(template, messages)
        contents = [message.content for message in messages]
        roles = tuple(message.role for message in messages)
        result = _put_in(_skeleton(template, roles, ()), text, contents)
        # Some templates write an empty turn in another way: try again with such contents as they are.
        for is_blank in (_is_empty, _is_white_space):
            blanks = tuple((number, content) for number, content in enumerate(contents) if is_blank(content))
            if isinstance(result, Drop) and blanks:
                result = _put_in(_skeleton(template, roles, blanks), text, contents)
        return result
    except TEMPLATE_ERRORS as error:
        return Drop("template_refuses", f"{type(error).__name__}: {error}"[:300])


def compile_template(
    source: str, *, special_tokens: Mapping[str, Any], control_tokens: Sequence[str]
) -> ChatTemplate:
    """Compile, and learn from a plain chat how answers begin and end. Raises RefusedError for a broken template.

    `special_tokens` is the tokenizer's `special_tokens_map`; `control_tokens` are the strings that the tokenizer
    turns into one control id each.
    """
    bare = compile_bare(source, special_tokens=special_tokens, control_tokens=control_tokens)
    eos = {str(special_tokens["eos_token"])} if "eos_token" in special_tokens else set()
    return replace(bare, end_tokens=frozenset(eos | _closing_tokens(bare)), lead=_lead(bare))


# What a plain chat teaches ----------------------------------------------------------------------------------

PLAIN_CHAT = (
    Message("user", "What is the capital?"),
    Message("assistant", "Paris is the capital."),
    Message("user", "And of Peru?"),
    Message("assistant", "Lima."),
)


def _closing_tokens(template: ChatTemplate) -> set[str]:
    """Control tokens right after an answer that ends the chat: no later turn can have opened with them."""
    found = set()
    for roles in (("user", "assistant"), ("system", "user", "assistant")):
        try:
            tail = _skeleton(template, roles, ()).segments[-1]
        except TEMPLATE_ERRORS:
            continue
        if token := template.control_pattern.match(tail.lstrip()):
            found.add(token.group())
    return found


def _lead(template: ChatTemplate) -> str:
    """White space between the generation prompt and the content, where it is the same in all turns."""
    leads = set()
    for turn in (1, 3):
        rendered = render(template, PLAIN_CHAT[: turn + 1])
        if isinstance(rendered, Drop) or (place := rendered.message_spans[turn]) is None:
            return ""
        try:
            prompt = render_text(template, PLAIN_CHAT[:turn], add_generation_prompt=True)
        except TEMPLATE_ERRORS:
            return ""
        between = rendered.text[len(prompt) : place[0]]
        leads.add(between if rendered.text.startswith(prompt) and between.isspace() else "")
    return leads.pop() if len(leads) == 1 else ""


# The skeleton: what the template writes around contents -----------------------------------------------------

# Around each marker stands white space, so that the skeleton shows what the template trims. Seven line breaks:
# more than any template writes before a content, so those that are left of ours can be counted.
_LEFT, _RIGHT = "\n" * 7 + " \t", "\t " + "\n" * 7
_MARKER = re.compile(r"(?P<left>\n{7} \t| \t|)qzcontent(?P<message>\d{7})zq(?P<right>\t \n{7}|\t |)")
_TRIM = {"": None, " \t": "\n", "\t ": "\n", _LEFT: "", _RIGHT: ""}
"""White space of ours that is left -> what the template strips: None all white space, else these characters."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one content goes. `lead` and `end` count the characters around it that are trained with it."""

    message: int
    strip_left: str | None
    strip_right: str | None
    is_answer: bool = False
    lead: int = 0
    end: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Skeleton:
    """segments[0] slots[0] segments[1] ... slots[-1] segments[-1].

    Control token c stands in segment `control_segments[c]` at the characters `control_places[c]` of it.
    """

    segments: tuple[str, ...]
    slots: tuple[_Slot, ...]
    control_segments: np.ndarray
    control_places: np.ndarray
    control_tokens: tuple[str, ...]
    problem: str


def _skeleton(
    template: ChatTemplate, roles: tuple[str, ...], blanks: tuple[tuple[int, str], ...]
) -> _Skeleton:
    # Long chats have a sequence of roles of their own: keeping their skeletons would only fill the memory.
    if blanks or len(roles) > 32:
        return _build_skeleton(template, roles, blanks)
    return _kept_skeleton(template, roles)


@lru_cache(maxsize=1024)
def _kept_skeleton(template: ChatTemplate, roles: tuple[str, ...]) -> _Skeleton:
    return _build_skeleton(template, roles, ())


def _build_skeleton(
    template: ChatTemplate, roles: tuple[str, ...], blanks: tuple[tuple[int, str], ...]
) -> _Skeleton:
    as_they_are = dict(blanks)
    text = render_text(
        template,
        [
            Message(role, as_they_are.get(i, f"{_LEFT}qzcontent{i:07d}zq{_RIGHT}"))  # type: ignore[arg-type]
            for i, role in enumerate(roles)
        ],
    )
    markers = list(_MARKER.finditer(text))
    ends = [0, *(marker.end() for marker in markers)]
    starts = [*(marker.start() for marker in markers), len(text)]
    segments = tuple(text[end:start] for end, start in zip(ends, starts, strict=True))
    controls = [[*template.control_pattern.finditer(segment)] for segment in segments]
    slots = tuple(
        _slot(template, marker, roles, before=segments[number], after=controls[number + 1])
        for number, marker in enumerate(markers)
    )
    places = [(number, *found.span()) for number, line in enumerate(controls) for found in line]
    table = np.array(places, np.int64).reshape(-1, 3)
    return _Skeleton(
        segments,
        slots,
        table[:, 0],
        table[:, 1:],
        tuple(found.group() for line in controls for found in line),
        _problem(roles, slots, set(as_they_are)),
    )


def _slot(
    template: ChatTemplate,
    marker: re.Match[str],
    roles: tuple[str, ...],
    *,
    before: str,
    after: list[re.Match[str]],
) -> _Slot:
    message = int(marker["message"])
    slot = _Slot(message, _TRIM[marker["left"]], _TRIM[marker["right"]])
    if roles[message] != "assistant":
        return slot
    lead = len(template.lead) if before.endswith(template.lead) else 0
    return replace(slot, is_answer=True, lead=lead, end=_end_length(template, after))


def _end_length(template: ChatTemplate, after: list[re.Match[str]]) -> int:
    """Characters up to and with the end token: the first control token, if only white space stands before it."""
    if not after or after[0].group() not in template.end_tokens:
        return 0
    only_space = after[0].string[: after[0].start()].strip() == ""
    return after[0].end() if only_space else 0


def _problem(roles: tuple[str, ...], slots: tuple[_Slot, ...], blanks: set[int]) -> str:
    written = [slot.message for slot in slots]
    for message, role in enumerate(roles):
        times = written.count(message)
        if times == 0 and message not in blanks:
            return f"message {message} ({role}) is left out"
        if times > 1 and role == "assistant":
            return f"message {message} ({role}) is written {times} times"
    return ""


def _is_empty(content: str) -> bool:
    return not content


def _is_white_space(content: str) -> bool:
    return not content.strip()


# Putting contents in ----------------------------------------------------------------------------------------


def _put_in(skeleton: _Skeleton, text: str, contents: list[str]) -> Rendered | Drop:
    """Put the contents into the skeleton; the result must be the text that the template wrote."""
    if skeleton.problem:
        return Drop("template_changes_text", skeleton.problem)
    written = [_stripped(contents[slot.message], slot) for slot in skeleton.slots]
    pieces = [skeleton.segments[0]]
    for content, segment in zip(written, skeleton.segments[1:], strict=True):
        pieces += (content, segment)
    expected = "".join(pieces)
    if expected != text:
        return Drop("template_changes_text", _first_difference(text, expected))
    borders = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    places = [(int(start), int(end)) for start, end in zip(borders[1:-1:2], borders[2:-1:2], strict=True)]
    message_spans: list[tuple[int, int] | None] = [None] * len(contents)
    for slot, place in zip(reversed(skeleton.slots), reversed(places), strict=True):
        message_spans[slot.message] = place
    return Rendered(
        text=text,
        spans=tuple(
            TrainedSpan(start - slot.lead, end + slot.end, slot.message, slot.end > 0)
            for slot, (start, end) in zip(skeleton.slots, places, strict=True)
            if slot.is_answer
        ),
        control_spans=skeleton.control_places + borders[0:-1:2][skeleton.control_segments][:, None],
        control_tokens=skeleton.control_tokens,
        message_spans=tuple(message_spans),
    )


def _stripped(content: str, slot: _Slot) -> str:
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
