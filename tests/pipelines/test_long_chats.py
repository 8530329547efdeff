"""Long chats: pieces with rounds of context, rounds cut inside; no piece too long, none lost, each token trained once."""

from collections import defaultdict
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cut import chat_rounds
from pipelines.encode import ChatEncoder, Encoded, build_encoder, encode, trained_tokens
from pipelines.pieces import Example
from pipelines.render import Rendered, render
from pipelines.split import COUNTS, SplitResult, split_chat
from pipelines.windows import windows
from schemas.conversation import Conversation, Drop, Message
from schemas.pipeline_config import SplitConfig
from tests.pipelines.tiny_tokenizers import FAMILIES, TEMPLATES, tiny_tokenizer

KINDS = [(family, template) for family in sorted(FAMILIES) for template in sorted(TEMPLATES)]
END = "<|im_end|>"


@cache
def encoder_of(family: str, template: str) -> ChatEncoder:
    return build_encoder(tiny_tokenizer(family, TEMPLATES[template]))


def row_of(messages: list[Message]) -> Conversation:
    return Conversation("row", "s/f", 0, messages)


words = st.text("abc ü你\n<.", min_size=1, max_size=30).filter(lambda text: bool(text.strip()))


@st.composite
def long_chats(draw: st.DrawFn) -> list[Message]:
    messages = [Message("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 7))):
        question = draw(words) * draw(st.sampled_from([1, 1, 1, 5]))
        answer = draw(words) * draw(st.sampled_from([1, 1, 1, 8]))
        messages += [Message("user", question), Message("assistant", answer)]
    return messages


def rendered_and_encoded(encoder: ChatEncoder, messages: list[Message]) -> tuple[Rendered, Encoded]:
    rendered = render(encoder.template, messages)
    assert isinstance(rendered, Rendered), rendered
    encoded = encode(encoder, rendered)
    assert isinstance(encoded, Encoded), encoded
    return rendered, encoded


def trained_ids(example: Example) -> list[int]:
    spans = zip(example.span_starts, example.span_ends, strict=True)
    return [int(token) for start, end in spans for token in example.input_ids[start:end]]


@pytest.mark.parametrize(("family", "template"), KINDS)
@settings(max_examples=25)
@given(
    messages=long_chats(),
    max_tokens=st.integers(9, 150),
    overlap_rounds=st.integers(0, 3),
    cut=st.booleans(),
    repeat_system=st.booleans(),
)
def test_no_piece_is_too_long_none_is_lost_and_each_token_is_trained_once(
    family: str,
    template: str,
    messages: list[Message],
    max_tokens: int,
    overlap_rounds: int,
    cut: bool,
    repeat_system: bool,
) -> None:
    encoder = encoder_of(family, template)
    config = SplitConfig(
        max_tokens=max_tokens,
        overlap_rounds=overlap_rounds,
        overlong_round="cut" if cut else "drop",
        repeat_system=repeat_system,
    )
    result = split_chat(encoder, config, row_of(messages))
    rounds = chat_rounds(messages)
    alone = {one: piece_of(encoder, messages, *one, repeat_system) for one in rounds}
    too_long = {one for one, (_, encoded) in alone.items() if len(encoded.ids) > max_tokens}
    if isinstance(result, Drop):
        assert (result.reason, cut, too_long) == ("overlong", False, set(rounds))
        return
    assert set(result.counts) <= set(COUNTS)
    assert all(example.num_tokens <= max_tokens for example in result.examples)
    assert [example.piece for example in result.examples] == list(range(len(result.examples)))
    ends = [example.end_message for example in result.examples]
    assert ends == sorted(ends), "in the order of the chat"
    if len(rounds) == 1 and not too_long:
        return
    check_trained_once(encoder, messages, result, rounds, too_long, cut, repeat_system)
    counts = defaultdict(int, result.counts)
    parts = ("rounds_kept", "rounds_overlong", "rounds_untrained")
    assert counts["rounds"] == sum(counts[part] for part in parts)
    assert counts["rounds_overlong"] == (0 if cut or not counts["chats_cut"] else len(too_long))
    assert counts["rounds_cut"] == (len(too_long) if cut and counts["chats_cut"] else 0)


def piece_of(
    encoder: ChatEncoder, messages: list[Message], first: int, end: int, repeat_system: bool
) -> tuple[Rendered, Encoded]:
    repeated = [m for m in messages[:1] if m.role == "system"] if first > 0 and repeat_system else []
    return rendered_and_encoded(encoder, [*repeated, *messages[first:end]])


def check_trained_once(
    encoder: ChatEncoder,
    messages: list[Message],
    result: SplitResult,
    rounds: list[tuple[int, int]],
    too_long: set[tuple[int, int]],
    cut: bool,
    repeat_system: bool,
) -> None:
    """Message by message: the trained ids of all pieces, one after the other, are those of the whole turn."""
    if not result.counts.get("chats_cut"):
        return
    done = 0
    waiting = list(result.examples)
    while waiting:
        example = waiting.pop(0)
        one = (example.first_message, example.end_message)
        if one in too_long:
            assert cut
            found = trained_ids(example)
            while waiting and (waiting[0].first_message, waiting[0].end_message) == one:
                found += trained_ids(waiting.pop(0))
            rendered, encoded = piece_of(encoder, messages, *one, repeat_system)
            tokens = trained_tokens(encoded, rendered.spans)
            expected = [encoded.ids[a:b] for a, b in zip(tokens.starts, tokens.ends, strict=True)]
        else:
            rendered, encoded = piece_of(encoder, messages, *one, repeat_system)
            assert example.input_ids.tolist() == encoded.ids.tolist(), (
                "a piece is what its messages are as a chat"
            )
            # Context comes first: what is trained is the answers from where the piece before ended.
            num_messages = len(rendered.message_spans) - (one[1] - one[0])
            spans = [span for span in rendered.spans if span.message_index - num_messages + one[0] >= done]
            tokens = trained_tokens(encoded, spans)
            found = trained_ids(example)
            expected = [encoded.ids[a:b] for a, b in zip(tokens.starts, tokens.ends, strict=True)]
        assert found == [int(token) for ids in expected for token in ids]
        skipped = [r for r in rounds if done <= r[0] and r[1] <= one[1] and r[0] >= done and r[1] <= one[0]]
        assert all(r in too_long and not cut for r in skipped if r[0] >= done), (
            "only overlong rounds are left out"
        )
        done = one[1]
    last_kept = [r for r in rounds if cut or r not in too_long][-1]
    assert done == last_kept[1]


# Overlap ----------------------------------------------------------------------------------------------------


def numbered_chat(num_rounds: int, text: str = "") -> list[Message]:
    chat = [Message("system", "Be brief.")]
    for number in range(num_rounds):
        chat += [Message("user", f"question {number}{text}"), Message("assistant", f"answer {number}{text}")]
    return chat


@pytest.mark.parametrize("num_context", [0, 1, 2])
def test_later_pieces_begin_with_rounds_that_are_only_read(num_context: int) -> None:
    encoder = encoder_of("byte_level_bpe", "chatml")
    config = SplitConfig(max_tokens=100, overlap_rounds=num_context)
    result = split_chat(encoder, config, row_of(numbered_chat(12)))
    assert isinstance(result, SplitResult)
    assert len(result.examples) > 2
    for before, example in pairwise(result.examples):
        assert before.end_message - example.first_message == 2 * num_context
        text = encoder.tokenizer.decode(example.input_ids)
        assert text.startswith("<|im_start|>system\nBe brief.")
        assert text.count("question") == (example.end_message - example.first_message) // 2
    answers = [encoder.tokenizer.decode(trained_ids(example)) for example in result.examples]
    assert "".join(answers) == "".join(f"answer {number}{END}" for number in range(12))


# Rounds cut inside ------------------------------------------------------------------------------------------

PARAGRAPHS = [f"Paragraph {number} says this and that, and more of it." for number in range(30)]


def test_an_overlong_answer_is_cut_at_paragraphs_and_only_its_last_piece_has_an_end_token() -> None:
    encoder = encoder_of("byte_level_bpe", "chatml")
    chat = [Message("user", "Tell me."), Message("assistant", "\n\n".join(PARAGRAPHS))]
    result = split_chat(encoder, SplitConfig(max_tokens=200, overlong_round="cut"), row_of(chat))
    assert isinstance(result, SplitResult)
    decode = encoder.tokenizer.decode
    texts = [decode(trained_ids(example)) for example in result.examples]
    assert len(texts) > 3
    assert "".join(texts) == chat[1].content + END
    assert all(text.startswith("Paragraph") for text in texts), "cut before a paragraph"
    assert [END in text for text in texts] == [False] * (len(texts) - 1) + [True]
    assert (
        result.counts["turns_without_end_token"] == 0 if "turns_without_end_token" in result.counts else True
    )
    assert (result.counts["rounds_cut"], result.counts["windows"]) == (1, len(texts))
    assert sum(example.num_trained_bytes for example in result.examples) == len(chat[1].content)


@pytest.mark.parametrize(
    ("text", "border"),
    [("line of words\n" * 60, "line"), ("A sentence of words. " * 40, "A"), ("words " * 200, "words")],
    ids=["lines", "sentences", "words"],
)
def test_without_paragraphs_it_is_cut_at_the_next_best_border(text: str, border: str) -> None:
    encoder = encoder_of("byte_level_bpe", "chatml")
    chat = [Message("user", "q"), Message("assistant", text.strip())]
    result = split_chat(encoder, SplitConfig(max_tokens=100, overlong_round="cut"), row_of(chat))
    assert isinstance(result, SplitResult)
    texts = [encoder.tokenizer.decode(trained_ids(example)) for example in result.examples]
    assert all(part.lstrip().startswith(border) for part in texts)
    assert "".join(texts) == chat[1].content + END


def test_pieces_of_a_long_question_without_anything_to_train_are_left_out_and_counted() -> None:
    encoder = encoder_of("byte_level_bpe", "chatml")
    chat = [Message("user", "words " * 300), Message("assistant", "Yes.")]
    result = split_chat(encoder, SplitConfig(max_tokens=100, overlong_round="cut"), row_of(chat))
    assert isinstance(result, SplitResult)
    (example,) = result.examples
    assert encoder.tokenizer.decode(trained_ids(example)) == f"Yes.{END}"
    assert result.counts["windows_untrained"] == result.counts["windows"] - 1 > 2


def test_the_last_answer_alone_is_cut_where_it_is_too_long() -> None:
    encoder = encoder_of("byte_level_bpe", "chatml")
    chat = [*numbered_chat(3), Message("user", "q"), Message("assistant", "\n\n".join(PARAGRAPHS))]
    config = SplitConfig(max_tokens=200, overlong_round="cut", train_on="last")  # type: ignore[arg-type]
    result = split_chat(encoder, config, row_of(chat))
    assert isinstance(result, SplitResult)
    texts = [encoder.tokenizer.decode(trained_ids(example)) for example in result.examples]
    assert "".join(texts) == chat[-1].content + END


@settings(max_examples=200)
@given(
    text=st.text("ab .\n你👍", min_size=1, max_size=200),
    max_tokens=st.integers(9, 40),
    family=st.sampled_from(sorted(FAMILIES)),
)
def test_windows_cover_all_tokens_once_and_each_trained_token_has_one_before_it(
    text: str, max_tokens: int, family: str
) -> None:
    _, encoded = rendered_and_encoded(encoder_of(family, "chatml"), [Message("user", text)])
    found = windows(encoded, text, max_tokens=max_tokens)
    assert found[0].start == found[0].trained_from == 0
    assert found[-1].end == len(encoded.ids)
    for before, window in pairwise(found):
        assert window.trained_from == before.end
        assert window.start < window.trained_from < window.end
    assert all(window.end - window.start <= max_tokens for window in found)


# Work -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap_rounds", [0, 2])
@pytest.mark.parametrize(("family", "template"), KINDS)
def test_hardly_more_is_tokenised_than_is_rendered(family: str, template: str, overlap_rounds: int) -> None:
    encoder = encoder_of(family, template)
    config = SplitConfig(max_tokens=400, overlap_rounds=overlap_rounds)
    result = split_chat(encoder, config, row_of(numbered_chat(200, " and more")))
    assert isinstance(result, SplitResult)
    assert len(result.examples) > 8
    assert result.counts["tokenised_bytes"] <= 1.3 * result.counts["rendered_bytes"]


def test_a_turn_of_200_000_tokens_is_dropped_or_cut() -> None:
    encoder = encoder_of("byte_level_bpe", "chatml")
    chat: list[Any] = [Message("user", "q"), Message("assistant", "Words and words. " * 30_000)]
    assert isinstance(dropped := split_chat(encoder, SplitConfig(), row_of(chat)), Drop)
    assert dropped.reason == "overlong"
    result = split_chat(encoder, SplitConfig(overlong_round="cut"), row_of(chat))
    assert isinstance(result, SplitResult)
    num_trained = sum(example.num_trained_tokens for example in result.examples)
    assert num_trained > 200_000
    ids = np.concatenate([trained_ids(example) for example in result.examples])
    assert encoder.tokenizer.decode(ids) == chat[1].content + END
