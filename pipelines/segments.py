"""Encoding the pieces of a chat out of the encoding of the whole chat.

Tokenizers treat the text between two control tokens as a text of its own. A piece of a chat that was cut at turn
boundaries has mostly the same texts between the same control tokens, so their ids are taken over; only what is
new (a turn that now stands first, say) is encoded.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from pipelines.encode import ChatEncoder, Encoded, encode
from pipelines.render import Rendered
from schemas.conversation import Drop

Gap = tuple[str | None, str, str | None]
"""Control token on the left, text, control token on the right; None is the beginning or end of the text."""

Key = tuple[int | None, str, int | None]
"""A gap with the kinds of its neighbours in place of them.

The neighbours belong to it: they may strip white space, and some tokenizers treat the first text differently. Which
of the tokens of a kind stands there makes no difference: the text of a gap is encoded alone."""


@dataclass(slots=True)
class KnownGaps:
    """Encodings of the gaps of one chat, places counted from the beginning of the gap."""

    encoder: ChatEncoder
    known: dict[Key, Encoded] = field(default_factory=dict)
    num_encoded_chars: int = 0


def learn(gaps: KnownGaps, rendered: Rendered, encoded: Encoded) -> None:
    """Keep the encoding of every gap of a chat."""
    tokens = _control_indices(rendered, encoded)
    firsts, ends = [0, *(tokens + 1).tolist()], [*tokens.tolist(), len(encoded.ids)]
    for gap, place, first, end in zip(_gaps(rendered), _places(rendered), firsts, ends, strict=True):
        inside = slice(first, end)
        gaps.known[_key(gaps.encoder, gap)] = Encoded(
            encoded.ids[inside], encoded.starts[inside] - place, encoded.ends[inside] - place
        )


def encode_again(gaps: KnownGaps, rendered: Rendered) -> Encoded | Drop:
    """As pipelines.encode.encode, taking over what is known."""
    control_ids = gaps.encoder.control_ids
    pieces: list[Encoded] = []
    for gap, place in zip(_gaps(rendered), _places(rendered), strict=True):
        key = _key(gaps.encoder, gap)
        known = gaps.known.get(key)
        if known is None:
            new = _encode_gap(gaps, gap)
            if isinstance(new, Drop):
                return new
            known = gaps.known[key] = new
        pieces.append(Encoded(known.ids, known.starts + place, known.ends + place))
        if (token := gap[2]) is not None:
            end = place + len(gap[1])
            pieces.append(
                Encoded(*(np.array([n], np.int32) for n in (control_ids[token], end, end + len(token))))
            )
    return Encoded(
        *(np.concatenate([getattr(piece, name) for piece in pieces]) for name in Encoded.__slots__)
    )


def _encode_gap(gaps: KnownGaps, gap: Gap) -> Encoded | Drop:
    left, text, right = gap
    before, after = left or "", right or ""
    whole = f"{before}{text}{after}"
    spans = ([(0, len(before))] if left else []) + ([(len(whole) - len(after), len(whole))] if right else [])
    rendered = Rendered(
        whole,
        (),
        np.array(spans, np.int64).reshape(-1, 2),
        tuple(token for token in (left, right) if token),
        (),
    )
    gaps.num_encoded_chars += len(text)
    encoded = encode(gaps.encoder, rendered)
    if isinstance(encoded, Drop):
        return encoded
    inside = slice(1 if left else 0, len(encoded.ids) - (1 if right else 0))
    place = len(before)
    return replace(
        encoded,
        ids=encoded.ids[inside],
        starts=encoded.starts[inside] - place,
        ends=encoded.ends[inside] - place,
    )


def _key(encoder: ChatEncoder, gap: Gap) -> Key:
    kinds = _kinds(encoder)
    left, text, right = gap
    return None if left is None else kinds[left], text, None if right is None else kinds[right]


@lru_cache(maxsize=4)
def _kinds(encoder: ChatEncoder) -> dict[str, int]:
    """Control tokens that treat their surroundings alike have one number."""
    added = encoder.backend.get_added_tokens_decoder().values()
    flags = {
        token.content: (token.lstrip, token.rstrip, token.single_word, token.normalized) for token in added
    }
    numbers = {flag: number for number, flag in enumerate(sorted(set(flags.values())))}
    return {content: numbers[flag] for content, flag in flags.items()}


def _control_indices(rendered: Rendered, encoded: Encoded) -> np.ndarray:
    places = rendered.control_spans[:, 0].astype(np.int32)
    return np.searchsorted(encoded.starts, places, side="left")


def _gaps(rendered: Rendered) -> list[Gap]:
    tokens = [None, *rendered.control_tokens, None]
    ends = [*rendered.control_spans[:, 0].tolist(), len(rendered.text)]
    return [
        (left, rendered.text[start:end], right)
        for left, start, end, right in zip(tokens[:-1], _places(rendered), ends, tokens[1:], strict=True)
    ]


def _places(rendered: Rendered) -> list[int]:
    """Where each gap begins."""
    return [0, *rendered.control_spans[:, 1].tolist()]
