"""A piece of a chat as training examples: some of its messages, rendered and encoded as a chat of their own."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.encode import ChatEncoder, Encoded, TokenSpans, trained_tokens
from pipelines.policy import Weights, arranged, trained_spans
from pipelines.render import Rendered, TrainedSpan, render
from pipelines.windows import Window, clipped
from schemas.conversation import Conversation, Drop, Message, utf8
from schemas.pipeline_config import SplitConfig


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row of schemas.dataset.SHARD; the arrays are int32, weights float32."""

    input_ids: np.ndarray
    span_starts: np.ndarray
    span_ends: np.ndarray
    span_weights: np.ndarray
    num_tokens: int
    num_trained_tokens: int
    num_trained_bytes: int
    row_id: str
    piece: int
    first_message: int
    end_message: int
    source: str
    language: str


@dataclass(frozen=True, slots=True, eq=False)
class Chat:
    """A row on its way to examples; `messages` are the row's as the settings want them, with the same numbers."""

    encoder: ChatEncoder
    config: SplitConfig
    row: Conversation
    messages: Sequence[Message]
    weights: Weights


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Messages [first, end) of the row, rendered after the system messages of its beginning.

    `numbers` has the number in the row of each rendered message. Those before `trained_from` are context that
    another piece trains. A piece that is too long as a whole has several `windows`, else one.
    """

    first: int
    end: int
    trained_from: int
    numbers: Sequence[int]
    num_rounds: int
    rendered: Rendered
    encoded: Encoded
    windows: Sequence[Window] = ()


def render_piece(
    chat: Chat,
    first: int,
    end: int,
    *,
    encode_with: Callable[[Rendered], Encoded | Drop],
    trained_from: int | None = None,
    num_rounds: int = 0,
) -> Piece | Drop:
    """Messages [first, end) as a chat of their own."""
    num_repeated = num_leading_system(chat.messages) if first > 0 and chat.config.repeat_system else 0
    numbers = [*range(num_repeated), *range(first, end)]
    messages, numbers = arranged(chat.config, chat.messages, numbers)
    rendered = render(chat.encoder.template, messages, chat.row.meta.get("tools"))
    if isinstance(rendered, Drop):
        return rendered
    encoded = encode_with(rendered)
    if isinstance(encoded, Drop):
        return encoded
    start = first if trained_from is None else trained_from
    return Piece(first, end, start, numbers, num_rounds, rendered, encoded)


def num_leading_system(messages: Sequence[Message]) -> int:
    """How many system messages a chat begins with."""
    return next((n for n, message in enumerate(messages) if message.role != "system"), len(messages))


def build_examples(chat: Chat, piece: Piece, *, number: int, counts: Counter[str]) -> list[Example]:
    """The examples of a piece, none where no token is trained; adds to `counts`."""
    answers, prompts = trained_spans(
        piece.rendered, piece.numbers, chat.weights, chat.config, first=piece.trained_from
    )
    spans = sorted([*answers, *prompts], key=lambda span: span.start)
    tokens = trained_tokens(piece.encoded, spans)
    _count(chat, piece, answers, dict(zip(map(id, spans), tokens.straddling, strict=True)), counts)
    counts["prompts_not_located"] += _num_prompts(chat, piece) - len(prompts)
    examples: list[Example] = []
    for window in piece.windows or [Window(0, 0, len(piece.encoded.ids))]:
        example = _example(chat, piece, window, tokens, spans, number + len(examples))
        if example is not None:
            examples.append(example)
        elif piece.windows:
            counts["windows_untrained"] += 1
    return examples


def _example(
    chat: Chat, piece: Piece, window: Window, tokens: TokenSpans, spans: Sequence[TrainedSpan], number: int
) -> Example | None:
    starts, ends, kept = clipped(tokens.starts, tokens.ends, window)
    if not len(starts):
        return None
    languages = chat.row.meta.get("language") or [["und", 1.0]]
    return Example(
        input_ids=piece.encoded.ids[window.start : window.end],
        span_starts=starts,
        span_ends=ends,
        span_weights=tokens.weights[kept],
        num_tokens=window.end - window.start,
        num_trained_tokens=int(np.sum(ends - starts)),
        num_trained_bytes=_num_bytes(piece, window, spans),
        row_id=chat.row.row_id,
        piece=number,
        first_message=piece.first,
        end_message=piece.end,
        source=chat.row.source,
        language=str(languages[0][0]),
    )


def _num_bytes(piece: Piece, window: Window, spans: Sequence[TrainedSpan]) -> int:
    """UTF-8 bytes of what the chat itself says in the trained part of a window: no end tokens."""
    text, encoded = piece.rendered.text, piece.encoded
    low = int(encoded.starts[window.trained_from]) if window.trained_from else 0
    high = int(encoded.starts[window.end]) if window.end < len(encoded.ids) else len(text)
    places = [
        (max(span.start, span.text_start, low), min(span.end, span.closing_start, high)) for span in spans
    ]
    return sum(len(utf8(text[start:end])) for start, end in places if start < end)


def _num_prompts(chat: Chat, piece: Piece) -> int:
    """How many messages of a piece are trained that are no answers."""
    if not chat.weights.prompt and chat.config.train_on in (["assistant"], ["last"]):
        return 0
    wanted = [n for n in piece.numbers if n >= piece.trained_from]
    trained = [n for n in wanted if n in chat.weights.trained and chat.messages[n].role != "assistant"]
    return len(trained) + sum(1 for n in wanted if n in chat.weights.prompt)


def _count(
    chat: Chat,
    piece: Piece,
    answers: Sequence[TrainedSpan],
    straddling: Mapping[Any, int],
    counts: Counter[str],
) -> None:
    turns = {span.message_index: span for span in answers}
    straddled = {span.message_index for span in answers if straddling[id(span)]}
    of_answers = sum(straddling[id(span)] for span in answers)
    roles = [message.role for message in chat.messages]
    num_wanted = sum(
        1 for n in chat.weights.trained if piece.trained_from <= n < piece.end and roles[n] == "assistant"
    )
    counts["trained_spans"] += len(turns)
    counts["straddled_spans"] += len(straddled)
    counts["straddling_tokens"] += of_answers
    counts["straddling_prompt_tokens"] += sum(straddling.values()) - of_answers
    counts["turns_without_end_token"] += sum(1 for span in turns.values() if not span.has_end)
    located = {piece.numbers[span.message_index] for span in piece.rendered.spans}
    num_located = sum(1 for n in chat.weights.trained if n >= piece.trained_from and n in located)
    counts["blank_answers_not_located"] += num_wanted - num_located
    counts["answers_of_other_parts"] += num_located - len(turns)
