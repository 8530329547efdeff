"""Pieces of a chat, each an example of its own: the whole chat, or runs of rounds that fit into split.max_tokens.

A round begins with a user's turn after an answer, and ends with the last answer before the next such turn. Each
piece is rendered and proved as a chat of its own, with the chat's system message repeated.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pipelines.encode import ChatEncoder, Encoded, trained_tokens
from pipelines.render import Rendered, render
from pipelines.segments import KnownGaps, encode_again, learn
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
    """A row on its way to examples; `trained_messages` are the numbers of the answers to train."""

    encoder: ChatEncoder
    config: SplitConfig
    row: Conversation
    trained_messages: frozenset[int]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Messages [first, end) of the row, rendered after `num_repeated` system messages of its beginning."""

    first: int
    end: int
    num_repeated: int
    num_rounds: int
    rendered: Rendered
    encoded: Encoded

    def message_of_row(self, message_of_piece: int) -> int:
        """The number in the row of a rendered message."""
        return message_of_piece - self.num_repeated + self.first


def render_piece(
    chat: Chat,
    first: int,
    end: int,
    *,
    encode_with: Callable[[Rendered], Encoded | Drop],
    num_rounds: int = 0,
) -> Piece | Drop:
    """Messages [first, end) as a chat of their own."""
    messages = chat.row.messages
    num_repeated = _num_leading_system(messages) if first > 0 and chat.config.repeat_system else 0
    rendered = render(chat.encoder.template, [*messages[:num_repeated], *messages[first:end]])
    if isinstance(rendered, Drop):
        return rendered
    encoded = encode_with(rendered)
    return (
        encoded
        if isinstance(encoded, Drop)
        else Piece(first, end, num_repeated, num_rounds, rendered, encoded)
    )


def build_example(chat: Chat, piece: Piece, *, number: int, counts: Counter[str]) -> Example | None:
    """The example of a piece, None where no token is trained; adds to `counts`."""
    spans = tuple(
        span
        for span in piece.rendered.spans
        if piece.message_of_row(span.message_index) in chat.trained_messages
    )
    tokens = trained_tokens(piece.encoded, spans)
    num_wanted = sum(1 for message in chat.trained_messages if piece.first <= message < piece.end)
    counts["trained_spans"] += len(spans)
    counts["straddled_spans"] += tokens.num_straddled_spans
    counts["straddling_tokens"] += tokens.num_straddling_tokens
    counts["turns_without_end_token"] += sum(1 for span in spans if not span.has_end)
    counts["blank_answers_not_located"] += num_wanted - len(spans)
    if not len(tokens.starts):
        return None
    places = [piece.rendered.message_spans[span.message_index] for span in spans]
    languages = chat.row.meta.get("language") or [["und", 1.0]]
    return Example(
        input_ids=piece.encoded.ids,
        span_starts=tokens.starts,
        span_ends=tokens.ends,
        span_weights=np.ones(len(tokens.starts), np.float32),
        num_tokens=len(piece.encoded.ids),
        num_trained_tokens=int(np.sum(tokens.ends - tokens.starts)),
        num_trained_bytes=sum(len(utf8(piece.rendered.text[slice(*place)])) for place in places if place),
        row_id=chat.row.row_id,
        piece=number,
        first_message=piece.first,
        end_message=piece.end,
        source=chat.row.source,
        language=str(languages[0][0]),
    )


# Rounds -----------------------------------------------------------------------------------------------------


def chat_rounds(messages: list[Message]) -> list[tuple[int, int]]:
    """Rounds as [first, end) of the messages; the system messages at the beginning stand in the first."""
    starts = [0]
    for number in range(_num_leading_system(messages) + 1, len(messages)):
        asks = messages[number].role in ("system", "user")
        if asks and messages[number - 1].role in ("assistant", "tool"):
            starts.append(number)
    return list(zip(starts, [*starts[1:], len(messages)], strict=True))


def all_rounds(chat: Chat, whole: Piece, counts: Counter[str]) -> list[Piece] | Drop:
    """Cut greedily from the first round on, as many rounds in a piece as fit; too long rounds are left out."""
    cutter = _cutter(chat, whole)
    pieces: list[Piece] = []
    first = 0
    while first < len(cutter.rounds):
        piece = _longest_from(cutter, first)
        if isinstance(piece, Drop):
            return piece
        if piece is None:
            counts["rounds_overlong"] += 1
            first += 1
        else:
            pieces.append(piece)
            first += piece.num_rounds
    return pieces


def last_context(chat: Chat, whole: Piece, counts: Counter[str]) -> list[Piece] | Drop:
    """The round of the last answer, after as many of the rounds before it as fit."""
    cutter = _cutter(chat, whole)
    answer = max(chat.trained_messages)
    end = 1 + next(n for n, (first, end) in enumerate(cutter.rounds) if first <= answer < end)
    counts["rounds_untrained"] += len(cutter.rounds) - end
    piece = _longest_to(cutter, end)
    if isinstance(piece, Drop):
        return piece
    counts["rounds_before_context"] += end - (piece.num_rounds if piece else 1)
    counts["rounds_overlong"] += 0 if piece else 1
    return [piece] if piece else []


@dataclass(slots=True, eq=False)
class _Cutter:
    """`costs` are the tokens of each round in the whole chat; `extra` is what a later piece was found to have
    beyond its rounds' costs: the repeated system message, or one that the template writes by itself."""

    chat: Chat
    rounds: list[tuple[int, int]]
    costs: list[int]
    gaps: KnownGaps
    extra: int = field(default=0)


def _cutter(chat: Chat, whole: Piece) -> _Cutter:
    gaps = KnownGaps(chat.encoder)
    learn(gaps, whole.rendered, whole.encoded)
    rounds = chat_rounds(chat.row.messages)
    return _Cutter(chat, rounds, _round_costs(whole, rounds), gaps)


def _round_costs(whole: Piece, rounds: list[tuple[int, int]]) -> list[int]:
    """Tokens of each round in the whole chat: the first with the system message, about right for the others."""
    answers = {span.message_index: span.end for span in whole.rendered.spans}
    chars: list[int] = []
    for _, end in rounds:
        place = whole.rendered.message_spans[end - 1]
        before = chars[-1] if chars else 0
        chars.append(answers.get(end - 1, place[1] if place else before))
    chars[-1] = len(whole.rendered.text)
    tokens = np.searchsorted(whole.encoded.starts, np.array([0, *chars], np.int32), side="left")
    return [max(0, int(cost)) for cost in np.diff(tokens)]  # a template may write messages in another order


NEAR_TOKENS = 16
"""Costs are about right: a round that would pass the limit by less is measured before it is left to another piece."""


def _longest_from(cutter: _Cutter, first: int) -> Piece | Drop | None:
    """The longest piece that begins with a round; None where that round alone is too long."""
    end = too_far = len(cutter.rounds) + 1
    found: Piece | None = None
    while found is None and end > first + 1:
        end = min(end - 1, first + _num_that_fit(cutter.costs[first : end - 1], _limit(cutter, first)))
        piece = _measured(cutter, first, end)
        if isinstance(piece, Drop):
            return piece
        found, too_far = (piece, too_far) if _fits(cutter, piece) else (None, end)
    while found is not None and end + 1 < too_far and _near(cutter, found, cutter.costs[end]):
        longer = _measured(cutter, first, end + 1)
        if isinstance(longer, Drop) or not _fits(cutter, longer):
            break
        found, end = longer, end + 1
    return found


def _longest_to(cutter: _Cutter, end: int) -> Piece | Drop | None:
    """The longest piece that ends before round `end`; None where the round before it is too long alone."""
    first = too_far = -1
    found: Piece | None = None
    while found is None and first < end - 1:
        backwards = cutter.costs[first + 1 : end][::-1]
        first = max(first + 1, end - _num_that_fit(backwards, _limit(cutter, first + 1)))
        piece = _measured(cutter, first, end)
        if isinstance(piece, Drop):
            return piece
        found, too_far = (piece, too_far) if _fits(cutter, piece) else (None, first)
    while found is not None and first - 1 > too_far and _near(cutter, found, cutter.costs[first - 1]):
        longer = _measured(cutter, first - 1, end)
        if isinstance(longer, Drop) or not _fits(cutter, longer):
            break
        found, first = longer, first - 1
    return found


def _near(cutter: _Cutter, piece: Piece, cost: int) -> bool:
    return len(piece.encoded.ids) + cost <= cutter.chat.config.max_tokens + NEAR_TOKENS


def _measured(cutter: _Cutter, first: int, end: int) -> Piece | Drop:
    messages = (cutter.rounds[first][0], cutter.rounds[end - 1][1])
    encode_with = partial(encode_again, cutter.gaps)
    piece = render_piece(cutter.chat, *messages, encode_with=encode_with, num_rounds=end - first)
    if first > 0 and isinstance(piece, Piece):
        cutter.extra = len(piece.encoded.ids) - sum(cutter.costs[first:end])
    return piece


def _limit(cutter: _Cutter, first: int) -> int:
    return cutter.chat.config.max_tokens - (cutter.extra if first > 0 else 0)


def _fits(cutter: _Cutter, piece: Piece) -> bool:
    return len(piece.encoded.ids) <= cutter.chat.config.max_tokens


def _num_that_fit(costs: list[int], limit: int) -> int:
    """How many of the first costs add up to at most `limit`; at least one."""
    totals = np.cumsum(costs)
    return max(1, int(np.searchsorted(totals, limit, side="right")))


def _num_leading_system(messages: list[Message]) -> int:
    return next((n for n, message in enumerate(messages) if message.role != "system"), len(messages))
