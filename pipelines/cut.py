"""Pieces of a chat, each an example of its own: the whole chat, or runs of rounds that fit into split.max_tokens.

A round begins with a user's turn after an answer, and ends with the last answer before the next such turn. Each
piece is rendered and proved as a chat of its own, with the chat's system message repeated.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from pipelines.pieces import Chat, Piece, num_leading_system, render_piece
from pipelines.segments import KnownGaps, encode_again, learn
from pipelines.windows import windows
from schemas.conversation import Drop, Message

# Rounds -----------------------------------------------------------------------------------------------------


def chat_rounds(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Rounds as [first, end) of the messages; the system messages at the beginning stand in the first."""
    starts = [0]
    for number in range(num_leading_system(messages) + 1, len(messages)):
        asks = messages[number].role in ("system", "user")
        if asks and messages[number - 1].role in ("assistant", "tool"):
            starts.append(number)
    return list(zip(starts, [*starts[1:], len(messages)], strict=True))


def all_rounds(chat: Chat, whole: Piece, counts: Counter[str]) -> list[Piece] | Drop:
    """Cut greedily from the first round on, as many rounds in a piece as fit; too long rounds are cut or left out."""
    cutter = _cutter(chat, whole)
    pieces: list[Piece] = []
    first = 0
    while first < len(cutter.rounds):
        piece = _after_overlap(cutter, first)
        if piece is None and chat.config.overlong_round == "cut":
            piece = _in_windows(cutter, first, counts)
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
    answer = max(chat.weights.trained)
    end = 1 + next(n for n, (first, end) in enumerate(cutter.rounds) if first <= answer < end)
    counts["rounds_untrained"] += len(cutter.rounds) - end
    piece = _longest_to(cutter, end)
    if piece is None and chat.config.overlong_round == "cut":
        piece = _in_windows(cutter, end - 1, counts)
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
    rounds = chat_rounds(chat.messages)
    return _Cutter(chat, rounds, _round_costs(whole, rounds), gaps)


def _round_costs(whole: Piece, rounds: list[tuple[int, int]]) -> list[int]:
    """Tokens of each round in the whole chat: the first with the system message, about right for the others."""
    places = zip(whole.numbers, whole.rendered.message_spans, strict=True)
    ends = {number: place[1] for number, place in places if place is not None}
    ends |= {whole.numbers[span.message_index]: span.end for span in whole.rendered.spans}
    chars: list[int] = []
    for _, end in rounds:
        chars.append(ends.get(end - 1, chars[-1] if chars else 0))
    chars[-1] = len(whole.rendered.text)
    tokens = np.searchsorted(whole.encoded.starts, np.array([0, *chars], np.int32), side="left")
    return [max(0, int(cost)) for cost in np.diff(tokens)]  # a template may write messages in another order


NEAR_TOKENS = 16
"""Costs are about right: a round that would pass the limit by less is measured before it is left to another piece."""


def _after_overlap(cutter: _Cutter, first: int) -> Piece | Drop | None:
    """The longest piece from a round on, after as many rounds of context as asked for, fewer where these don't fit."""
    for num_context in range(min(first, cutter.chat.config.overlap_rounds), 0, -1):
        start = first - num_context
        if sum(cutter.costs[start : first + 1]) > _limit(cutter, start) + NEAR_TOKENS:
            continue
        piece = _longest_from(cutter, first, num_context)
        if piece is not None:
            return piece
    return _longest_from(cutter, first)


def _in_windows(cutter: _Cutter, first: int, counts: Counter[str]) -> Piece | Drop:
    """A round that is too long alone, cut inside."""
    piece = _measured(cutter, first, first + 1)
    if isinstance(piece, Drop):
        return piece
    found = windows(piece.encoded, piece.rendered.text, max_tokens=cutter.chat.config.max_tokens)
    counts["rounds_cut"] += 1
    counts["windows"] += len(found)
    return replace(piece, windows=found)


def _longest_from(cutter: _Cutter, first: int, num_context: int = 0) -> Piece | Drop | None:
    """The longest piece that begins with a round, after rounds of context; None where that round alone is too long."""
    end = too_far = len(cutter.rounds) + 1
    found: Piece | None = None
    while found is None and end > first + 1:
        limit = _limit(cutter, first - num_context) - sum(cutter.costs[first - num_context : first])
        end = min(end - 1, first + _num_that_fit(cutter.costs[first : end - 1], limit))
        piece = _measured(cutter, first, end, num_context)
        if isinstance(piece, Drop):
            return piece
        found, too_far = (piece, too_far) if _fits(cutter, piece) else (None, end)
    while found is not None and end + 1 < too_far and _near(cutter, found, cutter.costs[end]):
        longer = _measured(cutter, first, end + 1, num_context)
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


def _measured(cutter: _Cutter, first: int, end: int, num_context: int = 0) -> Piece | Drop:
    start = first - num_context
    piece = render_piece(
        cutter.chat,
        cutter.rounds[start][0],
        cutter.rounds[end - 1][1],
        encode_with=partial(encode_again, cutter.gaps),
        trained_from=cutter.rounds[first][0],
        num_rounds=end - first,
    )
    if start > 0 and isinstance(piece, Piece):
        cutter.extra = len(piece.encoded.ids) - sum(cutter.costs[start:end])
    return piece


def _limit(cutter: _Cutter, first: int) -> int:
    return cutter.chat.config.max_tokens - (cutter.extra if first > 0 else 0)


def _fits(cutter: _Cutter, piece: Piece) -> bool:
    return len(piece.encoded.ids) <= cutter.chat.config.max_tokens


def _num_that_fit(costs: list[int], limit: int) -> int:
    """How many of the first costs add up to at most `limit`; at least one."""
    totals = np.cumsum(costs)
    return max(1, int(np.searchsorted(totals, limit, side="right")))
