"""What of a chat is trained and with which weight, and how its turns are arranged for the template (section split)."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.chat_fields import INPUT_EXTRA, reasoning_of
from pipelines.render import INLINE_REASONING, Part, Rendered, TrainedSpan
from pipelines.templates import ChatTemplate
from schemas.conversation import REASONING_EXTRAS, Conversation, Drop, Message
from schemas.pipeline_config import SplitConfig


@dataclass(frozen=True, slots=True)
class Weights:
    """Weight by message: of those whose role is trained, and of the others where a prompt has a weight of its own."""

    trained: Mapping[int, float]
    prompt: Mapping[int, float]


def message_weights(config: SplitConfig, messages: Sequence[Message]) -> Weights | Drop:
    """Drops: `nothing_to_train`, `bad_weight` (negative or not finite)."""
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    wanted = [number for number, message in enumerate(messages) if message.role in config.train_on]
    wanted = answers[-1:] if "last" in config.train_on else wanted
    if not wanted:
        expected = (
            "assistant" if set(config.train_on) <= {"assistant", "last"} else " or ".join(config.train_on)
        )
        return Drop("nothing_to_train", f"no {expected} message")
    weights = [_own_weight(message) for message in messages]
    for number, weight in enumerate(weights):
        if weight < 0 or not math.isfinite(weight):
            return Drop("bad_weight", f"message {number} has the weight {weight}, expected 0 or more")
    trained = {number: weights[number] for number in wanted if weights[number] > 0}
    if not trained:
        return Drop("nothing_to_train", f"{len(wanted)} answers, all of weight 0")
    others = set(range(len(messages))) - set(wanted) if config.prompt_weight else set()
    prompt = {n: weights[n] * config.prompt_weight for n in sorted(others) if weights[n] > 0}
    return Weights(trained, prompt)


def _own_weight(message: Message) -> float:
    """As OpenAI's and other formats mark answers that are context only; answers that paths of a tree share, too."""
    found = [message.extras.get(key) for key in ("weight", "loss_weight")]
    weight = next((float(value) for value in found if isinstance(value, (int, float))), 1.0)
    train = message.extras.get("train")
    return 0.0 if isinstance(train, (int, float)) and not train else weight


# Before the template ----------------------------------------------------------------------------------------


def prepared_messages(
    template: ChatTemplate, config: SplitConfig, row: Conversation, counts: Counter[str]
) -> list[Message]:
    """The messages of a row as the settings want them, as many as the row has; adds to `counts`."""
    messages = row.messages
    if config.reasoning == "drop":
        messages = [_without_reasoning(message, counts) for message in messages]
    if template.reads_input and (num_chars := row.meta.get("input_chars")):
        messages = _with_input(messages, num_chars)
    return messages


def _without_reasoning(message: Message, counts: Counter[str]) -> Message:
    if message.role != "assistant":
        return message
    inline = INLINE_REASONING.fullmatch(message.content) if "</think>" in message.content else None
    if inline is None and not reasoning_of(message):
        return message
    counts["reasoning_dropped"] += 1
    content = message.content if inline is None else inline["content"].lstrip()
    extras = {key: value for key, value in message.extras.items() if key not in REASONING_EXTRAS}
    return Message(message.role, content, extras)


def _with_input(messages: list[Message], num_chars: Any) -> list[Message]:
    """Give the input of an Alpaca record a place of its own, where it still ends the last question."""
    place = max((n for n, message in enumerate(messages) if message.role == "user"), default=None)
    if place is None or not isinstance(num_chars, int):
        return messages
    content = messages[place].content
    border = len(content) - num_chars
    if border < 3 or content[border - 2 : border] != "\n\n":
        return messages  # the text was changed since it was read
    extras = {**messages[place].extras, INPUT_EXTRA: content[border:]}
    asked = Message("user", content[: border - 2], extras)
    return [*messages[:place], asked, *messages[place + 1 :]]


def arranged(
    config: SplitConfig, messages: Sequence[Message], numbers: Sequence[int]
) -> tuple[list[Message], list[int]]:
    """The chosen messages for the template, and the number in the row of each."""
    chosen = [messages[number] for number in numbers]
    if config.system == "keep":
        return chosen, list(numbers)
    result: list[Message] = []
    kept: list[int] = []
    waiting: list[str] = []
    for number, message in zip(numbers, chosen, strict=True):
        if message.role == "system":
            waiting.append(message.content)
            continue
        if waiting and message.role == "user" and config.system == "merge_into_user":
            message = replace(message, content="\n\n".join([*waiting, message.content]))
            waiting = []
        result.append(message)
        kept.append(number)
    return result, kept


# After the template -----------------------------------------------------------------------------------------


def trained_spans(
    rendered: Rendered, numbers: Sequence[int], weights: Weights, config: SplitConfig, *, first: int
) -> tuple[list[TrainedSpan], list[TrainedSpan]]:
    """Answers and prompts to train, weighted, without the messages before `first`; numbers are those of the row."""
    wanted = {place: number for place, number in enumerate(numbers) if number >= first}
    answers = [
        part if (weight := weights.trained[wanted[span.message_index]]) == 1 else replace(part, weight=weight)
        for span in rendered.spans
        if wanted.get(span.message_index) in weights.trained
        for part in _chosen_parts(span, rendered.text, config)
    ]
    prompts: list[TrainedSpan] = []
    located = {span.message_index for span in rendered.spans}
    for place, number in wanted.items():
        if number in weights.trained and place not in located:
            prompts += _said(rendered, place, weights.trained[number], with_end=True)
        elif number in weights.prompt:
            prompts += _said(rendered, place, weights.prompt[number], with_end=False)
    return answers, sorted(prompts, key=lambda span: span.start)


def _said(rendered: Rendered, place: int, weight: float, *, with_end: bool) -> Iterator[TrainedSpan]:
    """The text of a message that is no answer, with the blank before it: most tokens hold both."""
    if (span := rendered.message_spans[place]) is None:
        return
    start, closing_start = span
    end = rendered.message_ends[place] if with_end and rendered.message_ends else None
    before = start - (1 if rendered.text[start - 1 : start] == " " else 0)
    yield TrainedSpan(before, end or closing_start, place, end is not None, (), start, closing_start, weight)


def _chosen_parts(span: TrainedSpan, text: str, config: SplitConfig) -> Iterator[TrainedSpan]:
    """The parts of an answer that are trained, put together where they touch, with the end token."""
    if config.train_reasoning and config.train_tool_calls:
        yield span
        return
    all_parts = list(_split_inline(span, text))
    parts = [part for part in all_parts if _is_chosen(part, config)]
    if len(parts) < len(all_parts) and not any(start < end for _, start, end in parts):
        return  # an end token alone would teach to say nothing
    ranges = [(start, end) for _, start, end in parts] + [(span.closing_start, span.end)]
    start, end = ranges[0]
    for next_start, next_end in ranges[1:]:
        if next_start > end:
            yield replace(span, start=start, end=end)
            start = next_start
        end = next_end
    yield replace(span, start=start, end=end)


def _is_chosen(part: Part, config: SplitConfig) -> bool:
    kind = part[0]
    return {"reasoning": config.train_reasoning, "call": config.train_tool_calls}.get(kind, True)


_INLINE = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


def _split_inline(span: TrainedSpan, text: str) -> Iterator[Part]:
    """Reasoning that stands in the answer's text between its marks is reasoning as well."""
    for kind, start, end in span.parts:
        found = _INLINE.match(text, start, end) if kind == "content" else None
        if found is not None:
            yield "reasoning", start, found.end()
            start = found.end()
        if start < end or found is None:
            yield kind, start, end
