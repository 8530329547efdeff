"""gigatoken gives what tokenizers gives, wherever the encoder uses it; where it does not, it is not used."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.encode import ChatEncoder, build_encoder, proved_on
from pipelines.fast_encoding import fast_backend
from pipelines.split import RowSplitter, SplitResult
from schemas.conversation import Conversation, Message
from schemas.pipeline_config import SplitConfig
from tests.pipelines.tiny_tokenizers import FAMILIES, TEMPLATES, tiny_tokenizer

pytest.importorskip("gigatoken", reason="the extra 'fast' is not installed")

TEXTS = [
    "Hello world, how are you?",
    "def add(a, b):\n    return a + b\n",
    "你好，世界 🙂 élève\u0301",
    "a \x00 b",
    "",
]


def encoder_of(family: str) -> ChatEncoder:
    return build_encoder(tiny_tokenizer(family, TEMPLATES["chatml"]))


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


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(
        st.text() | st.sampled_from([*TEXTS, "<|im_end|>", "<think> x", "\ud800"]), min_size=2, max_size=6
    )
)
def test_the_same_examples_with_and_without_it(family: str, texts: list[str]) -> None:
    row, encoder = row_of(*texts), encoder_of(family)
    config = SplitConfig(max_tokens=60)
    proved = RowSplitter(encoder, config).proved_on([row])
    assert columns(proved(row)) == columns(RowSplitter(encoder, config)(row))


@pytest.mark.parametrize(
    ("family", "expected"), [("byte_level_bpe", True), ("metaspace_bpe", False), ("unigram", False)]
)
def test_it_is_used_for_tokenizers_that_write_every_byte_once(family: str, expected: bool) -> None:
    assert proved_on(encoder_of(family), TEXTS).uses_fast is expected


def test_an_encoder_that_was_not_proved_does_not_use_it() -> None:
    assert not encoder_of("byte_level_bpe").uses_fast
    assert not proved_on(encoder_of("byte_level_bpe"), []).uses_fast


@pytest.mark.parametrize("spoiled", ["merges", "ids"])
def test_another_tokenizer_than_ours_is_found_out(spoiled: str) -> None:
    encoder = encoder_of("byte_level_bpe")
    state = json.loads(encoder.backend.to_str())
    if spoiled == "merges":
        state["model"]["merges"] = state["model"]["merges"][:40]
    else:
        vocabulary = state["model"]["vocab"]
        vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    foreign = replace(encoder, fast=fast_backend(json.dumps(state)))
    assert foreign.fast is not None
    assert not proved_on(foreign, TEXTS).uses_fast


@given(text=st.text())
def test_its_places_are_those_of_the_tokens_characters(text: str) -> None:
    encoder = encoder_of("byte_level_bpe")
    assert encoder.fast is not None
    found = encoder.fast.encode(text)
    encoding = encoder.backend.encode(text, add_special_tokens=False)
    assert found is not None
    ids, starts, ends = found
    assert ids.tolist() == encoding.ids
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == encoding.offsets
    assert ids.dtype == starts.dtype == ends.dtype == np.int32
