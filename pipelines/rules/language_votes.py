"""From votes of pieces to the languages of a chat: each piece is decided in the light of all the others."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

UNKNOWN = "und"
MIN_SHARE = 0.1
"""Reported are languages with this share of the letters, and those with MIN_TURN_SHARE of the turns: a Chinese
question may have an English answer a hundred times as long."""
MIN_TURN_SHARE = 0.25
MIN_SECOND_SCORE = 0.55
"""And a second language must be likely by itself, on average over its pieces."""
STRAY_SHARE = 0.03
"""How likely a language is that the rest of the chat does not show: added to each language's share of the chat."""

Scores = dict[str, float]
"""Language -> how likely, adding up to 1."""


@dataclass(slots=True)
class Piece:
    """A stretch of one turn in one language: its letters and what it may be."""

    turn: int
    letters: float
    scores: Scores


@dataclass(frozen=True, slots=True)
class ChatLanguages:
    """`shares`: [[code, share of letters], ...], largest first. `turns`: the main language of each turn."""

    shares: list[list[Any]]
    turns: list[str]


def decide(pieces: Sequence[Piece], letters: Sequence[int]) -> ChatLanguages:
    """Each piece takes the language that is likeliest in this chat; turns without a vote go with the one before.

    `pieces` is not empty; `letters` has those of each turn.
    """
    codes = _codes(pieces)
    if len(set(codes)) == 1:
        return ChatLanguages([[codes[0], 1.0]], codes[:1] * len(letters))
    turns = _turn_languages(pieces, codes, len(letters))
    judged = {piece.turn for piece in pieces}
    votes = _votes(pieces, codes)
    for turn, code in enumerate(turns):
        if turn not in judged:
            votes[code] += letters[turn]
    spoken = Counter(turns[turn] for turn in judged)
    return ChatLanguages(_reported(votes, spoken, _doubtful(votes, pieces, codes)), turns)


def likeliest(scores: Mapping[str, float]) -> str:
    """The code with the highest score; of equal ones the first."""
    return max(scores, key=scores.__getitem__) if scores else UNKNOWN


def _codes(pieces: Sequence[Piece]) -> list[str]:
    """Score times the language's share of the chat, which the scores alone give at first; two rounds are enough."""
    codes = [likeliest(piece.scores) for piece in pieces]
    if len(set(codes)) == 1:
        return codes
    votes: defaultdict[str, float] = defaultdict(float)
    for piece in pieces:
        for code, score in piece.scores.items():
            votes[code] += piece.letters * score
    for _ in range(2):
        total = sum(votes.values()) or 1.0
        codes = [
            likeliest({code: s * (votes[code] / total + STRAY_SHARE) for code, s in piece.scores.items()})
            for piece in pieces
        ]
        votes = _votes(pieces, codes)
    return codes


def _votes(pieces: Sequence[Piece], codes: Sequence[str]) -> defaultdict[str, float]:
    votes: defaultdict[str, float] = defaultdict(float)
    for piece, code in zip(pieces, codes, strict=True):
        votes[code] += piece.letters
    return votes


def _turn_languages(pieces: Sequence[Piece], codes: Sequence[str], num_turns: int) -> list[str]:
    """Turns without a vote take the language of the turn before them, those at the begin that of the first judged."""
    votes: dict[int, defaultdict[str, float]] = {}
    for piece, code in zip(pieces, codes, strict=True):
        votes.setdefault(piece.turn, defaultdict(float))[code] += piece.letters
    current = likeliest(votes[min(votes)])
    turns = []
    for turn in range(num_turns):
        current = likeliest(votes[turn]) if turn in votes else current
        turns.append(current)
    return turns


def _doubtful(votes: Mapping[str, float], pieces: Sequence[Piece], codes: Sequence[str]) -> set[str]:
    """Languages that their pieces show less clearly than MIN_SECOND_SCORE, on average by letters."""
    if len(votes) == 1:
        return set()
    likely: defaultdict[str, float] = defaultdict(float)
    for piece, code in zip(pieces, codes, strict=True):
        likely[code] += piece.letters * piece.scores[code]
    own = _votes(pieces, codes)
    return {code for code in votes if likely[code] < MIN_SECOND_SCORE * own[code]}


def _reported(votes: Mapping[str, float], spoken: Mapping[str, int], doubtful: set[str]) -> list[list[Any]]:
    """The largest, and what is neither small nor doubtful. `spoken`: in how many turns each is the main language."""
    total, num_turns = sum(votes.values()) or 1.0, sum(spoken.values())
    first, *others = sorted(votes, key=lambda code: (-votes[code], code))
    large = {code for code in others if votes[code] >= MIN_SHARE * total}
    often = {code for code in others if spoken.get(code, 0) >= MIN_TURN_SHARE * num_turns}
    reported = [first, *(code for code in others if code in (large | often) - doubtful)]
    return [[code, round(votes[code] / total, 4)] for code in reported]
