"""The judge of masks knows where the answers stand, and tells the ways to train the wrong tokens apart."""

import numpy as np
import pytest

from benchmarks.masks import PLANTED, Turns, fastchat, judged, ours, to_train, vicuna_text
from tests.pipelines.tiny_tokenizers import BOS, EOS, tiny_tokenizer, wrapped

CHAT: Turns = [("user", "Hello?"), ("assistant", "I am fine."), ("user", "x"), ("assistant", "def add(a, b)")]


def llama_like() -> object:
    """A tokenizer that writes BOS before every text, as FastChat's routine relies on."""
    from tokenizers import processors

    backend = tiny_tokenizer("metaspace_bpe").backend_tokenizer
    bos = (BOS, backend.token_to_id(BOS))
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return wrapped(backend)


def test_the_wanted_tokens_are_the_answers_and_their_end_tokens() -> None:
    tokenizer = llama_like()
    ids, wanted = to_train(tokenizer, vicuna_text(CHAT, EOS))
    assert tokenizer.decode(ids[wanted]).replace(" ", "") == f"Iamfine.{EOS}defadd(a,b){EOS}"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("trained", "wanted", "limit", "expected"),
    [
        ("0110", "0110", 9, "right"),
        ("0000", "0110", 9, "ignored"),
        ("0011", "0110", 9, "wrong tokens trained"),
        ("0111", "0110", 9, "wrong tokens trained"),
        ("01", "0110", 2, "right, answers cut off"),
        ("00", "0011", 2, "no answer before the limit"),
    ],
)
def test_what_became_of_a_sample(trained: str, wanted: str, limit: int, expected: str) -> None:
    masks = (np.array([digit == "1" for digit in digits]) for digits in (trained, wanted))
    assert judged(*masks, limit=limit) == expected


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (CHAT[:2], {"right"}),
        ([("user", "x"), ("assistant", "It says: ASSISTANT: hello")], {"ignored"}),
    ],
)
def test_the_routine_trains_a_plain_round_and_ignores_what_looks_like_its_separators(
    turns: Turns, expected: set[str]
) -> None:
    tokenizer, text = llama_like(), vicuna_text(turns, EOS)
    assert {fastchat(tokenizer, text, legacy=legacy, limit=999) for legacy in (True, False)} == expected


@pytest.mark.parametrize("name", PLANTED)
def test_this_program_trains_exactly_the_answers_of_every_planted_chat(name: str) -> None:
    turns: Turns = [*zip(("user", "assistant"), PLANTED[name], strict=True), *CHAT]
    assert ours(turns, llama_like(), 2048) == "right"
