"""Rendered chats as token ids: one encoding of the whole text, whose offsets say which tokens are trained.

A chat that holds no control string is encoded as the tokenizer encodes it. In any other chat each control token
that the template wrote is given an alias, a string of private characters and of the same length, and the text is
encoded by a twin of the tokenizer that knows only the aliases: `<|im_end|>` typed by a user is then text like any
other, and everything else (prefix spaces, stripping, normalisation between control tokens) is as it always was.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pipelines.fast_encoding import FastBackend, fast_backend
from pipelines.habits import compile_template
from pipelines.render import Rendered, TrainedSpan
from pipelines.templates import ChatTemplate
from pipelines.tokenizer_files import copied, is_only_vocabulary, load_tokenizer, num_embeddings
from pipelines.twin import free_plane, twin_of
from schemas.conversation import Drop, utf8
from schemas.pipeline_config import PipelineConfig


@dataclass(frozen=True, slots=True, eq=False)
class ChatEncoder:
    """A tokenizer and its template, ready to encode.

    `tokenizer` is the transformers object; `backend` is a copy of what it runs, without the post-processor,
    which would trim offsets. `is_control` is bool [ids]. `num_embeddings` is how many ids the model knows, None
    where that is not known. `tokenised` counts the bytes that were given to the tokenizer. `fast` gives the same as
    `backend` for texts on which that was proved, and `uses_fast` says so.
    """

    tokenizer: Any
    backend: Tokenizer
    fast: FastBackend | None
    template: ChatTemplate
    control_ids: Mapping[str, int]
    is_control: np.ndarray
    unknown_id: int | None
    num_embeddings: int | None = None
    uses_fast: bool = False
    tokenised: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """int32 arrays [tokens]: ids, and the characters [start, end) of the rendered text that each stands for.

    Tokens that share a character of several bytes all have the whole character. A control token that strips
    the white space around it has its own characters only.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class TokenSpans:
    """Trained tokens [start, end), int32 [spans], ascending, with their weights, float32; empty ones are left out.

    They touch only where weights differ. A token that also stands for characters outside its span is not trained:
    `straddling` has their number for each span that was asked for.
    """

    starts: np.ndarray
    ends: np.ndarray
    weights: np.ndarray
    straddling: tuple[int, ...]

    @property
    def num_straddled_spans(self) -> int:
        return sum(1 for number in self.straddling if number)

    @property
    def num_straddling_tokens(self) -> int:
        return sum(self.straddling)


def load_encoder(config: PipelineConfig) -> ChatEncoder:
    """Load tokenizer and template. Raises ConfigError, InputError, RefusedError."""
    return encoder_of(load_tokenizer(config), config)


def encoder_of(tokenizer: Any, config: PipelineConfig) -> ChatEncoder:
    """An encoder that knows how many ids the model has. New tokens get their rows before it is trained."""
    number = num_embeddings(config)
    if number is not None and config.model is not None and config.model.new_tokens:
        number = max(number, len(tokenizer))
    return replace(build_encoder(tokenizer), num_embeddings=number)


def build_encoder(tokenizer: Any) -> ChatEncoder:
    """An encoder of a loaded tokenizer that has a chat template."""
    backend = copied(tokenizer.backend_tokenizer)
    control_ids = _control_ids(backend)
    # One more than there are ids: the last stands for what is no token, see _encode_aliased.
    is_control = np.zeros(max(backend.get_vocab(with_added_tokens=True).values()) + 2, np.bool_)
    is_control[list(control_ids.values())] = True
    template = compile_template(
        tokenizer.get_chat_template(),
        special_tokens=tokenizer.special_tokens_map,
        control_tokens=list(control_ids),
    )
    # A unigram model knows its unknown token by number only, which Python is not shown.
    unknown = getattr(backend.model, "unk_token", None)
    unknown_id = tokenizer.unk_token_id if unknown is None else backend.token_to_id(unknown)
    fast = None if backend.encode_special_tokens else fast_backend(backend)
    return ChatEncoder(tokenizer, backend, fast, template, control_ids, is_control, unknown_id)


def proved_on(encoder: ChatEncoder, texts: Iterable[str]) -> ChatEncoder:
    """The encoder as it may encode texts like these: by `fast` if that gives the same for them, else without."""
    num_equal = 0
    for text in texts if encoder.fast else ():
        fast = _run_fast(encoder, text)
        if fast is None:
            continue
        slow = _run(encoder.backend, text)
        if isinstance(slow, Drop) or not _same(fast, slow):
            return replace(encoder, uses_fast=False)
        num_equal += 1 if text else 0
    return replace(encoder, uses_fast=num_equal > 0)


def encode(encoder: ChatEncoder, rendered: Rendered) -> Encoded | Drop:
    """Ids of a rendered chat. Without control strings in it: those of the tokenizer's `apply_chat_template`.

    Drops: `not_unicode` (lone surrogates), `tokenizer_fails`, `id_without_embedding`, and two that no real text
    reaches: `reserved_characters`, `control_string_stays`.
    """
    encoded = _encoded(encoder, rendered)
    if isinstance(encoded, Drop) or encoder.num_embeddings is None or not len(encoded.ids):
        return encoded
    if (largest := int(encoded.ids.max())) >= encoder.num_embeddings:
        token = encoder.backend.id_to_token(largest)
        about = f"the token {token!r} has the id {largest}, the model knows {encoder.num_embeddings} ids"
        return Drop("id_without_embedding", about)
    return encoded


def _encoded(encoder: ChatEncoder, rendered: Rendered) -> Encoded | Drop:
    expected = np.array([encoder.control_ids[token] for token in rendered.control_tokens], np.int32)
    # Only to spare the first way where it can't lead there: normalisers make control strings of others, too.
    written = sum(1 for _ in encoder.template.control_pattern.finditer(rendered.text))
    if written == len(expected):
        encoder.tokenised["bytes"] += len(utf8(rendered.text))
        fast = _run_fast(encoder, rendered.text) if encoder.uses_fast else None
        plain = fast or _run(encoder.backend, rendered.text)
        if isinstance(plain, Drop):
            return plain
        encoded = _proved(encoder, plain, rendered, expected)
        if encoded is not None and not _spells_unknown(encoder, encoded, rendered):
            return encoded
    return _encode_aliased(encoder, rendered, expected)


def trained_tokens(encoded: Encoded, spans: Sequence[TrainedSpan]) -> TokenSpans:
    """Tokens that stand for characters of the spans and no others. Spans ascend and do not overlap."""
    # int32 as the offsets are: searchsorted copies the whole array when the types differ.
    borders = np.array([(span.start, span.end) for span in spans], np.int32).reshape(-1, 2)
    firsts = np.searchsorted(encoded.starts, borders[:, 0], side="left").tolist()
    ends = np.searchsorted(encoded.starts, borders[:, 1], side="left").tolist()
    tokens: list[tuple[int, int, float]] = []
    straddling = []
    for first, end, span in zip(firsts, ends, spans, strict=True):
        start_char, end_char, weight = span.start, span.end, span.weight
        num_straddling = int(first > 0 and encoded.ends[first - 1] > start_char)
        while end > first and encoded.ends[end - 1] > end_char:
            end -= 1
            num_straddling += 1
        straddling.append(num_straddling)
        first = max(first, 1)  # nothing stands before token 0 that could predict it
        if tokens and tokens[-1][1:] == (first, weight) and end > first:
            tokens[-1] = (tokens[-1][0], end, weight)  # a template that writes nothing between two answers
        elif end > first:
            tokens.append((first, end, weight))
    table = np.array([pair[:2] for pair in tokens], np.int32).reshape(-1, 2)
    weights = np.array([weight for *_, weight in tokens], np.float32)
    return TokenSpans(table[:, 0], table[:, 1], weights, tuple(straddling))


# Control strings --------------------------------------------------------------------------------------------


def _control_ids(backend: Tokenizer) -> dict[str, int]:
    """The added tokens that user text must not reach.

    All but those that are only vocabulary: not special, and made of letters, digits and white space (runs of
    blanks in GPT-NeoX and Gemma, words that somebody added). They can't be taken for a border of turns.
    """
    added = backend.get_added_tokens_decoder()
    return {
        token.content: token_id
        for token_id, token in sorted(added.items())
        if token.special or not is_only_vocabulary(token.content)
    }


def _with_own_places(
    encoder: ChatEncoder, encoded: Encoded, rendered: Rendered, expected: np.ndarray
) -> Encoded | None:
    """The encoding with control tokens at their own characters, or None if others are there than expected."""
    found = np.flatnonzero(encoder.is_control[encoded.ids])
    places = rendered.control_spans
    if len(found) != len(expected) or not np.array_equal(encoded.ids[found], expected):
        return None
    if np.any(encoded.starts[found] > places[:, 0]) or np.any(encoded.ends[found] < places[:, 1]):
        return None
    starts, ends = encoded.starts.copy(), encoded.ends.copy()
    starts[found], ends[found] = places[:, 0], places[:, 1]
    return Encoded(encoded.ids, starts, ends)


def _proved(
    encoder: ChatEncoder, encoded: Encoded, rendered: Rendered, expected: np.ndarray
) -> Encoded | None:
    """As _with_own_places. Unknown characters may stand anywhere, other control ids may not."""
    unknown = encoded.ids == encoder.unknown_id
    if encoder.unknown_id is None or encoder.unknown_id in expected or not unknown.any():
        return _with_own_places(encoder, encoded, rendered, expected)
    # An id above the vocabulary hides them.
    hidden = np.where(unknown, np.int32(len(encoder.is_control) - 1), encoded.ids).astype(np.int32)
    placed = _with_own_places(encoder, replace(encoded, ids=hidden), rendered, expected)
    return None if placed is None else replace(placed, ids=encoded.ids)


def _spells_unknown(encoder: ChatEncoder, encoded: Encoded, rendered: Rendered) -> bool:
    """Whether the unknown token stands where a text spells its name, if only in wide or capital letters."""
    if encoder.unknown_id is None:
        return False
    name = str(encoder.backend.id_to_token(encoder.unknown_id)).casefold()
    found = np.flatnonzero(encoded.ids == encoder.unknown_id)
    return any(
        name in unicodedata.normalize("NFKC", rendered.text[encoded.starts[n] : encoded.ends[n]]).casefold()
        for n in found
    )


def _encode_aliased(encoder: ChatEncoder, rendered: Rendered, expected: np.ndarray) -> Encoded | Drop:
    text, plane = rendered.text, free_plane(rendered.text, len(encoder.control_ids))
    if plane is None:
        return Drop("reserved_characters", "private characters of planes 15 and 16 beside a control string")
    twin = twin_of(encoder, plane)
    pieces: list[str] = []
    position = 0
    for token, (start, end) in zip(rendered.control_tokens, rendered.control_spans.tolist(), strict=True):
        pieces += (text[position:start], twin.aliases[token])
        position = end
    encoder.tokenised["bytes"] += len(utf8(text))
    aliased = _run(twin.backend, "".join([*pieces, text[position:]]))
    if isinstance(aliased, Drop):
        return aliased
    found = Encoded(twin.ids[aliased.ids], aliased.starts, aliased.ends)
    encoded = _proved(encoder, found, rendered, expected)
    if encoded is None:
        return Drop("control_string_stays", "a control id stands where the template wrote none")
    return encoded


# The tokenizers library -------------------------------------------------------------------------------------


def _same(one: Encoded, other: Encoded) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("ids", "starts", "ends"))


def _run_fast(encoder: ChatEncoder, text: str) -> Encoded | None:
    columns = encoder.fast.encode(text) if encoder.fast else None
    return Encoded(*columns) if columns else None


def _run(backend: Tokenizer, text: str) -> Encoded | Drop:
    try:
        encoding = backend.encode(text, add_special_tokens=False)
    except TypeError:  # what the library says to a str that it can't turn into UTF-8
        return Drop("not_unicode", "a lone surrogate in the text")
    except BaseException as error:
        # A regular expression that gives up panics in Rust: a BaseException that `except Exception` misses.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        return Drop("tokenizer_fails", f"{type(error).__name__}: {error}"[:300])
    ids = np.array(encoding.ids, np.int32)
    offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(ids))
    starts, ends = offsets[0::2].copy(), offsets[1::2].copy()
    if np.any(starts[1:] < starts[:-1]):
        return Drop("tokenizer_fails", "offsets that do not ascend")
    return Encoded(ids, starts, ends)
