"""The fast ways give what tokenizers gives, wherever the encoder uses them; where they do not, they are not used."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from pipelines.encode import ChatEncoder, build_encoder, proved_on
from pipelines.fast_encoding import FastBackend, by_gigatoken, by_words
from pipelines.split import RowSplitter, SplitResult
from schemas.conversation import Conversation, Message
from schemas.pipeline_config import SplitConfig
from tests.pipelines.tiny_tokenizers import FAMILIES, TEMPLATES, byte_level_bpe, tiny_tokenizer, wrapped

WAYS: dict[str, Callable[[Tokenizer], FastBackend | None]] = {"gigatoken": by_gigatoken, "words": by_words}
TEXTS = [
    "Hello world, how are you?",
    "def add(a, b):\n    return a + b\n",
    "你好，世界 🙂 élève\u0301",
    "a \x00 b",
    "",
    "½ 12 ²",
]
LLAMA_3_PATTERN = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)

pytest.importorskip("gigatoken", reason="the extra 'fast' is not installed")


def _cut_by(*steps: Any) -> Tokenizer:
    tokenizer = byte_level_bpe()
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=not steps or steps[-1] == "digits"
    )
    before = [pre_tokenizers.Digits(individual_digits=True) if step == "digits" else step for step in steps]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    return tokenizer


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


KINDS: dict[str, Callable[[], Tokenizer]] = {
    **FAMILIES,
    "as SmolLM2": lambda: _cut_by("digits"),
    "as Llama 3": lambda: _cut_by(_split(LLAMA_3_PATTERN)),
    "as DeepSeek": lambda: _cut_by(
        _split("\\p{N}{1,3}"), _split("[\u4e00-\u9fff]+"), _split(LLAMA_3_PATTERN)
    ),
}


@cache
def encoder_of(kind: str, way: str) -> ChatEncoder:
    encoder = build_encoder(wrapped(KINDS[kind](), TEMPLATES["chatml"]))
    return replace(encoder, fast=WAYS[way](encoder.backend))


def row_of(*texts: str) -> Conversation:
    messages = [Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]
    return Conversation(row_id="0" * 32, source="s/f", record=0, messages=messages, meta={})


def columns(result: object) -> object:
    if not isinstance(result, SplitResult):
        return result
    return [
        [getattr(example, name).tolist() for name in ("input_ids", "span_starts", "span_ends")]
        for example in result.examples
    ]


SAID = st.text() | st.sampled_from([*TEXTS, "<|im_end|>", "<think> x", "\ud800"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(SAID, min_size=2, max_size=6))
def test_the_same_examples_as_without_it(kind: str, way: str, texts: list[str]) -> None:
    row, encoder = row_of(*texts), encoder_of(kind, way)
    config = SplitConfig(max_tokens=60)
    proved = RowSplitter(encoder, config).proved_on([row])
    assert columns(proved(row)) == columns(RowSplitter(encoder, config)(row))


@pytest.mark.parametrize("kind", ["byte_level_bpe", "as SmolLM2", "as Llama 3", "as DeepSeek"])
@given(text=st.text())
def test_words_are_placed_as_tokenizers_places_them(kind: str, text: str) -> None:
    encoder = encoder_of(kind, "words")
    assert encoder.fast is not None
    found = encoder.fast.encode(text)
    encoding = encoder.backend.encode(text, add_special_tokens=False)
    assert found is not None
    ids, starts, ends = found
    assert ids.tolist() == encoding.ids
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == encoding.offsets
    assert ids.dtype == starts.dtype == ends.dtype == np.int32


@pytest.mark.parametrize(
    ("kind", "way", "expected"),
    [
        ("byte_level_bpe", "gigatoken", True),
        ("as Llama 3", "gigatoken", True),
        ("byte_level_bpe", "words", True),
        ("as SmolLM2", "words", True),
        ("metaspace_bpe", "gigatoken", False),
        ("metaspace_bpe", "words", False),
        ("unigram", "words", False),
    ],
)
def test_it_is_used_for_tokenizers_that_write_every_byte_once(kind: str, way: str, expected: bool) -> None:
    assert proved_on(encoder_of(kind, way), TEXTS).uses_fast is expected


def test_an_encoder_that_was_not_proved_does_not_use_it() -> None:
    encoder = build_encoder(tiny_tokenizer("byte_level_bpe", TEMPLATES["chatml"]))
    assert encoder.fast is not None
    assert not encoder.uses_fast
    assert not proved_on(encoder, []).uses_fast


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spoiled", ["merges", "ids"])
def test_another_tokenizer_than_ours_is_found_out(way: str, spoiled: str) -> None:
    encoder = encoder_of("byte_level_bpe", way)
    state = json.loads(encoder.backend.to_str())
    if spoiled == "merges":
        state["model"]["merges"] = state["model"]["merges"][:40]
    else:
        vocabulary = state["model"]["vocab"]
        vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    foreign = replace(encoder, fast=WAYS[way](Tokenizer.from_str(json.dumps(state))))
    assert foreign.fast is not None
    assert not proved_on(foreign, TEXTS).uses_fast


def _normalizing() -> Tokenizer:
    tokenizer = byte_level_bpe()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _with_greedy_token() -> Tokenizer:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True)])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [_normalizing, _with_greedy_token, lambda: _cut_by(pre_tokenizers.Split("a", behavior="removed"))],
)
def test_words_are_not_tried_where_a_tokenizer_does_more_than_cut(tokenizer: Callable[[], Tokenizer]) -> None:
    assert by_words(tokenizer()) is None
