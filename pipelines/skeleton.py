"""The text that a chat template writes around the texts of a chat.

The template is rendered with a marker in place of each text and of each tool call's name. What stands between the
markers is the template's own, with the rest of tools and calls in it; control strings in those are replaced by
private characters of the same length first, so that every control token in it is one that the template wrote.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pipelines.chat_fields import GivenChat, GivenTurn, Kind, template_messages
from pipelines.disarm import disarmed
from pipelines.templates import ChatTemplate, render_given

# Around each marker stands white space, so that the skeleton shows what the template trims. Seven line breaks:
# more than any template writes before a content, so those that are left of ours can be counted.
_LEFT, _RIGHT = "\n" * 7 + " \t", "\t " + "\n" * 7
MARKER = re.compile(
    r"(?P<left>\n{7} \t| \t|)qz(?P<kind>content|reasoning|input|call)(?P<message>\d{7})n(?P<call>\d{3})zq"
    r"(?P<right>\t \n{7}|\t |)"
)
_TRIM = {"": None, " \t": "\n", "\t ": "\n", _LEFT: "", _RIGHT: ""}
"""White space of ours that is left -> what the template strips: None all white space, else these characters."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one text goes: part `kind` of a message; `call` counts its tool calls."""

    message: int
    kind: Kind
    call: int
    strip_left: str | None
    strip_right: str | None


@dataclass(frozen=True, slots=True)
class TurnPlace:
    """The slots [first, end) of one message, and how far its turn reaches around them.

    `lead` counts the characters before the first slot that the assistant has to write, -1 where that can't be told.
    Behind the last slot the rest of the turn ends at `closing_start`, and its end token at `closing_end`; both are 0
    where there is none.
    """

    message: int
    first: int
    end: int
    is_answer: bool
    lead: int = 0
    closing_start: int = 0
    closing_end: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Skeleton:
    """segments[0] slots[0] segments[1] ... slots[-1] segments[-1].

    Control token c stands in segment `control_segments[c]` at the characters `control_places[c]` of it.
    `num_left_out` counts the reasoning that the template left out of earlier turns.
    """

    segments: tuple[str, ...]
    slots: tuple[Slot, ...]
    turns: tuple[TurnPlace, ...]
    control_segments: np.ndarray
    control_places: np.ndarray
    control_tokens: tuple[str, ...]
    problem: str
    num_left_out: int


AsItIs = frozenset[int]
"""Messages whose content is given to the template as it is: blank ones, and those that it quotes."""

Inline = tuple[tuple[int, str, str], ...]
"""Messages whose content holds its reasoning: number, what stands before it, what stands between it and the text."""


def skeleton_of(
    template: ChatTemplate, chat: GivenChat, as_it_is: AsItIs = frozenset(), inline: Inline = ()
) -> Skeleton:
    """The skeleton of a chat. Raises one of TEMPLATE_ERRORS."""
    # Long chats have a sequence of roles of their own: keeping their skeletons would only fill the memory.
    if as_it_is or inline or len(chat.turns) > 32 or chat.has_data:
        return _build(template, chat, as_it_is, inline)
    return _kept(template, tuple((turn.role, tuple(turn.texts)) for turn in chat.turns))


@lru_cache(maxsize=1024)
def _kept(template: ChatTemplate, shape: tuple[tuple[str, tuple[Kind, ...]], ...]) -> Skeleton:
    turns = [GivenTurn(role, dict.fromkeys(kinds, "")) for role, kinds in shape]
    return _build(template, GivenChat(turns), frozenset(), ())


def marked_text(
    template: ChatTemplate,
    chat: GivenChat,
    as_it_is: AsItIs = frozenset(),
    *,
    add_generation_prompt: bool = False,
) -> str:
    """What the template writes with markers in place of the texts. Raises one of TEMPLATE_ERRORS."""
    marked = _marked(chat, as_it_is, {})
    messages = template_messages(template, marked)
    return render_given(template, messages, marked.tools, add_generation_prompt=add_generation_prompt)


def _build(template: ChatTemplate, chat: GivenChat, as_it_is: AsItIs, inline: Inline) -> Skeleton:
    frames = {message: (before, between) for message, before, between in inline}
    marked, restored = disarmed(template, _marked(chat, as_it_is, frames), as_it_is)
    text = render_given(template, template_messages(template, marked), marked.tools)
    markers = list(MARKER.finditer(text))
    ends = [0, *(marker.end() for marker in markers)]
    starts = [*(marker.start() for marker in markers), len(text)]
    segments = tuple(text[end:start] for end, start in zip(ends, starts, strict=True))
    controls = [[*template.control_pattern.finditer(segment)] for segment in segments]
    slots = tuple(_slot(marker) for marker in markers)
    turns = tuple(_turns(template, chat, slots, segments, controls))
    places = [(number, *found.span()) for number, line in enumerate(controls) for found in line]
    table = np.array(places, np.int64).reshape(-1, 3)
    return Skeleton(
        tuple(map(restored, segments)),
        slots,
        turns,
        table[:, 0],
        table[:, 1:],
        tuple(found.group() for line in controls for found in line),
        *_problem(chat, slots, turns, as_it_is, frames),
    )


# Markers ----------------------------------------------------------------------------------------------------


def _marked(chat: GivenChat, as_it_is: AsItIs, frames: Mapping[int, tuple[str, str]]) -> GivenChat:
    turns = []
    for number, turn in enumerate(chat.turns):
        texts: dict[Kind, str] = {kind: _marker(kind, number) for kind in turn.texts}
        if number in as_it_is:
            texts["content"] = turn.texts["content"]
        elif number in frames:
            before, between = frames[number]
            texts["content"] = f"{before}{_marker('reasoning', number)}{between}{texts['content']}"
        calls = [_named(call, f"qzcall{number:07d}n{place:03d}zq") for place, call in enumerate(turn.calls)]
        turns.append(GivenTurn(turn.role, texts, calls, turn.beside))
    return GivenChat(turns, chat.tools)


def _marker(kind: Kind, message: int) -> str:
    return f"{_LEFT}qz{kind}{message:07d}n000zq{_RIGHT}"


def _named(call: dict[str, Any], name: str) -> dict[str, Any]:
    return {**call, "function": {**call["function"], "name": name}}


def _slot(marker: re.Match[str]) -> Slot:
    kind: Any = marker["kind"]
    if kind == "call":  # a name is written as it is; white space around it is the template's
        return Slot(int(marker["message"]), kind, int(marker["call"]), "", "")
    return Slot(int(marker["message"]), kind, 0, _TRIM[marker["left"]], _TRIM[marker["right"]])


def _problem(
    chat: GivenChat,
    slots: Sequence[Slot],
    turns: Sequence[TurnPlace],
    as_it_is: AsItIs,
    frames: Mapping[int, Any],
) -> tuple[str, int]:
    """What keeps a skeleton from proving anything, and how often reasoning was left out."""
    written: dict[tuple[int, Kind, int], int] = {}
    for slot in slots:
        place = (slot.message, slot.kind, slot.call)
        written[place] = written.get(place, 0) + 1
    num_left_out = 0
    for turn_place in turns:
        if turn_place.lead < 0:
            return (
                f"message {turn_place.message} (assistant) begins where the template's own text can't be told",
                0,
            )
    for number, turn in enumerate(chat.turns):
        about = f"message {number} ({turn.role})"
        kinds: list[tuple[Kind, int]] = [(kind, 0) for kind in turn.texts]
        kinds += [("reasoning", 0)] if number in frames else []
        for kind, call in [*kinds, *(("call", place) for place in range(len(turn.calls)))]:
            times = written.get((number, kind, call), 0)
            if times > 1 and turn.role == "assistant":
                return f"{about} is written {times} times", 0
            if times == 0 and kind == "reasoning":
                num_left_out += 1
            elif times == 0 and not (kind == "content" and number in as_it_is):
                return f"{about} is left out{'' if kind == 'content' else f': its {kind}'}", 0
        if turn.role == "assistant" and sum(place.message == number for place in turns) > 1:
            return f"{about} is written in places apart", 0
        if turn.calls and not any(place.message == number and place.closing_end for place in turns):
            return f"{about} has a tool call without an end token behind it", 0
    return "", num_left_out


# Turns ------------------------------------------------------------------------------------------------------


def _turns(
    template: ChatTemplate,
    chat: GivenChat,
    slots: Sequence[Slot],
    segments: Sequence[str],
    controls: Sequence[Sequence[re.Match[str]]],
) -> list[TurnPlace]:
    """Runs of slots of one message. A message whose texts stand apart has several; those of answers are refused."""
    turns: list[TurnPlace] = []
    first = 0
    for number, slot in enumerate(slots):
        if number + 1 < len(slots) and slots[number + 1].message == slot.message:
            continue
        after, matches = segments[number + 1], controls[number + 1]
        is_answer = chat.turns[slot.message].role == "assistant"
        closing = (
            _after_calls(template, matches) if slot.kind == "call" else _after_text(template, after, matches)
        )
        lead = _lead(template, segments[first], slots[first].kind) if is_answer else 0
        turns.append(TurnPlace(slot.message, first, number + 1, is_answer, lead, *closing))
        first = number + 1
    return turns


def _lead(template: ChatTemplate, before: str, kind: Kind) -> int:
    """Characters before a turn's first slot that are no part of the generation prompt, -1 where it is not known."""
    if template.prompt.strip() and (place := before.rfind(template.prompt)) >= 0:
        return len(before) - place - len(template.prompt)
    lead = template.lead if kind == "content" else template.other_leads.get(kind, "\0")
    if before.endswith(lead):
        return len(lead)
    return 0 if kind == "content" else -1


def _after_text(template: ChatTemplate, after: str, controls: Sequence[re.Match[str]]) -> tuple[int, int]:
    """An end token with only white space before it, or what the template wrote behind the last answer of a chat."""
    if controls and controls[0].group() in template.end_tokens and not after[: controls[0].start()].strip():
        return 0, controls[0].end()
    closing = next((text for text in template.closings if after.startswith(text)), "")
    return 0, len(closing)


def _after_calls(template: ChatTemplate, controls: Sequence[re.Match[str]]) -> tuple[int, int]:
    """The first end token behind a tool call: what stands before it is the rest of the call."""
    found = next((match for match in controls if match.group() in template.end_tokens), None)
    return found.span() if found else (0, 0)
