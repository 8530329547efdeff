"""What is trained and with which weight: roles, messages, reasoning, calls, prompts; in spans, counts and loss."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.built_in_templates import template_for
from pipelines.encode import ChatEncoder, build_encoder
from pipelines.parse import record_meta
from pipelines.pieces import Example
from pipelines.split import COUNTS, SplitResult, split_chat
from schemas.conversation import Conversation, Drop, Message
from schemas.pipeline_config import SplitConfig
from tests.pipelines.model_templates import MARKED
from tests.pipelines.tiny_tokenizers import EOS, TEMPLATES, tiny_tokenizer


@cache
def encoder_of(source: str, family: str = "byte_level_bpe") -> ChatEncoder:
    tokenizer = tiny_tokenizer(family)
    tokenizer.chat_template = (
        template_for(source, tokenizer) if source == "alpaca" else TEMPLATES.get(source, source)
    )
    return build_encoder(tokenizer)


def row_of(messages: list[Message], **meta: Any) -> Conversation:
    return Conversation("row", "s/f", 0, messages, meta)


def split(messages: list[Message], source: str = "chatml", meta: Any = None, **config: Any) -> SplitResult:
    result = split_chat(encoder_of(source), SplitConfig(**config), row_of(messages, **(meta or {})))
    assert isinstance(result, SplitResult), result
    assert set(result.counts) <= set(COUNTS)
    return result


def trained(example: Example, source: str = "chatml") -> list[tuple[str, float]]:
    """Trained texts and their weights, in order."""
    decode = encoder_of(source).tokenizer.decode
    return [
        (decode(example.input_ids[start:end], clean_up_tokenization_spaces=False), float(weight))
        for start, end, weight in zip(
            example.span_starts, example.span_ends, example.span_weights, strict=True
        )
    ]


def said(role: Any, text: str, **extras: Any) -> Message:
    return Message(role, text, extras)


CHAT = [said("system", "Be brief."), said("user", "Hello?"), said("assistant", "Hi!"), said("user", "Bye.")]
CHAT += [said("assistant", "So long.")]
END = "<|im_end|>"

ROLES = {
    "assistant": ([f"Hi!{END}", f"So long.{END}"]),
    "last": ([f"So long.{END}"]),
    "user": ([f"Hello?{END}", f"Bye.{END}"]),
    "system": ([f"Be brief.{END}"]),
}


@pytest.mark.parametrize("role", ROLES)
def test_the_turns_of_a_role_are_trained_with_their_end_tokens(role: str) -> None:
    (example,) = split(CHAT, train_on=role).examples
    assert trained(example) == [(text, 1.0) for text in ROLES[role]]
    assert example.num_trained_bytes == sum(len(text) - len(END) for text in ROLES[role])


def test_several_roles_are_trained_together() -> None:
    (example,) = split(CHAT, train_on=["user", "assistant"]).examples
    assert [text for text, _ in trained(example)] == [
        f"Hello?{END}",
        f"Hi!{END}",
        f"Bye.{END}",
        f"So long.{END}",
    ]


def test_last_is_no_role_among_others() -> None:
    with pytest.raises(ValidationError, match="last stands alone"):
        SplitConfig(train_on=["last", "user"])


def test_a_message_has_a_weight_of_its_own() -> None:
    chat = [said("user", "q"), said("assistant", "a", weight=0.25), said("user", "q"), said("assistant", "b")]
    result = split([*chat, said("user", "q"), said("assistant", "c", train=False)])
    (example,) = result.examples
    assert trained(example) == [(f"a{END}", 0.25), (f"b{END}", 1.0)]
    assert result.counts["weighted_tokens"] == 2


@pytest.mark.parametrize("weight", [-1, -0.5, float("nan"), float("inf")])
def test_a_weight_that_is_none_drops_the_chat(weight: float) -> None:
    chat = [said("user", "q"), said("assistant", "a", weight=weight)]
    result = split_chat(encoder_of("chatml"), SplitConfig(), row_of(chat))
    assert isinstance(result, Drop)
    assert result.reason == "bad_weight"


def test_a_prompt_weight_trains_the_texts_and_not_what_the_template_writes() -> None:
    """Alpaca-LoRA's train_on_inputs, without its template tokens."""
    (example,) = split(CHAT, prompt_weight=1).examples
    assert trained(example) == [
        ("Be brief.", 1.0),
        ("Hello?", 1.0),
        (f"Hi!{END}", 1.0),
        ("Bye.", 1.0),
        (f"So long.{END}", 1.0),
    ]
    assert example.num_trained_bytes == sum(len(message.content) for message in CHAT)


def test_weights_of_messages_and_of_prompts_multiply() -> None:
    chat = [said("user", "q", weight=0.5), said("assistant", "a"), said("user", "r", train=False)]
    (example,) = split([*chat, said("assistant", "b", weight=3)], prompt_weight=0.5).examples
    assert trained(example) == [("q", 0.25), (f"a{END}", 1.0), (f"b{END}", 3.0)]


def test_a_prompt_is_trained_with_the_blank_that_its_first_token_holds() -> None:
    chat = [said("user", "Hello world"), said("assistant", "Hi")]
    result = split(chat, "vicuna", prompt_weight=0.5)
    assert trained(result.examples[0], "vicuna") == [(" Hello world", 0.5), (f" Hi{EOS}", 1.0)]
    assert "straddling_prompt_tokens" not in result.counts


def test_touching_spans_of_other_weights_stay_apart() -> None:
    source = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    chat = [said("user", "q1."), said("assistant", "a"), said("user", "q2"), said("assistant", "b", weight=2)]
    (example,) = split(chat, source, prompt_weight=0.5).examples
    assert [weight for _, weight in trained(example, source)] == [0.5, 1.0, 0.5, 2.0]
    assert example.span_ends[:-1].tolist() == example.span_starts[1:].tolist()


# Parts of a turn --------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}
FULL = said("assistant", "Let me see.", reasoning_content="hm", tool_calls=[CALL])
ASKED = said("user", "q")
WRITTEN_CALL = '\n<tool_call>{"name": "weather", "arguments": {}}</tool_call>'

PARTS: dict[str, tuple[dict[str, bool], list[str]]] = {
    "all": ({}, ["<think>hm</think>\nLet me see." + WRITTEN_CALL + END]),
    "no reasoning": ({"train_reasoning": False}, ["Let me see." + WRITTEN_CALL + END]),
    "no calls": ({"train_tool_calls": False}, ["<think>hm</think>\nLet me see.", END]),
    "neither": ({"train_reasoning": False, "train_tool_calls": False}, ["Let me see.", END]),
}


@pytest.mark.parametrize(("config", "expected"), PARTS.values(), ids=PARTS)
def test_reasoning_and_calls_can_be_read_without_being_trained(
    config: dict[str, bool], expected: list[str]
) -> None:
    result = split([ASKED, FULL], MARKED, **config)
    assert [text for text, _ in trained(result.examples[0], MARKED)] == expected
    assert result.counts["trained_spans"] == 1


def test_reasoning_inside_of_a_text_is_reasoning() -> None:
    chat = [ASKED, said("assistant", "<think>hm\n\nwell</think>\n\na")]
    assert [text for text, _ in trained(split(chat, train_reasoning=False).examples[0])] == [f"a{END}"]
    assert len(trained(split(chat).examples[0])[0][0]) > 20


def test_a_turn_that_only_calls_is_not_trained_without_calls() -> None:
    chat = [ASKED, said("assistant", "", tool_calls=[CALL]), said("tool", "x"), said("assistant", "b")]
    source = MARKED.replace(
        "{{- message.content }}", "{%- if message.content %}{{- message.content }}{%- endif %}"
    )
    result = split(chat, source, train_tool_calls=False)
    assert [text for text, _ in trained(result.examples[0], source)] == [f"b{END}"]
    assert result.counts["answers_of_other_parts"] == 1


def test_texts_that_the_template_quotes_are_read_and_counted() -> None:
    source = MARKED.replace(
        "+ message.content +", "+ (message.content | tojson if message.role == 'tool' else message.content) +"
    )
    chat = [ASKED, said("assistant", "", tool_calls=[CALL]), said("tool", 'say "x"'), said("assistant", "b")]
    result = split(chat, source, prompt_weight=1)
    assert next(text for text, _ in trained(result.examples[0], source)) == "q"
    assert '"say \\"x\\""' in encoder_of(source).tokenizer.decode(result.examples[0].input_ids)
    assert result.counts["prompts_not_located"] == 1


# System prompts ---------------------------------------------------------------------------------------------

REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATES["chatml"]
)


def test_a_system_prompt_that_the_template_refuses_moves_into_the_first_question() -> None:
    result = split_chat(encoder_of(REFUSES), SplitConfig(), row_of(CHAT))
    assert isinstance(result, Drop)
    assert result.reason == "template_refuses"
    moved = split(CHAT, REFUSES, system="merge_into_user")
    assert moved.counts["system_turns_moved"] == 1
    text = encoder_of(REFUSES).tokenizer.decode(moved.examples[0].input_ids)
    assert text.startswith(f"<|im_start|>user\nBe brief.\n\nHello?{END}")
    dropped = split(CHAT, REFUSES, system="drop")
    assert dropped.counts["system_turns_dropped"] == 1
    assert "brief" not in encoder_of(REFUSES).tokenizer.decode(dropped.examples[0].input_ids)


@pytest.mark.parametrize("system", ["merge_into_user", "drop"])
def test_pieces_keep_the_numbers_of_the_rows_messages(system: Any) -> None:
    chat = [CHAT[0]] + [said(("user", "assistant")[n % 2], f"text {n} " * 4) for n in range(8)]
    result = split(chat, REFUSES, system=system, max_tokens=90)
    borders = [(e.first_message, e.end_message) for e in result.examples]
    assert [0, *(end for _, end in borders)] == [*(first for first, _ in borders), 9]
    texts = [encoder_of(REFUSES).tokenizer.decode(e.input_ids) for e in result.examples]
    assert all(("Be brief." in text) == (system == "merge_into_user") for text in texts)
    answers = [text for e in result.examples for text, _ in trained(e, REFUSES)]
    assert answers == [f"{m.content}{END}" for m in chat if m.role == "assistant"]


# Alpaca -----------------------------------------------------------------------------------------------------


def test_an_alpaca_record_with_an_input_gets_the_prompt_with_an_input() -> None:
    record = {"instruction": "Add them.", "input": "2 and 3", "output": "5"}
    chat = [said("user", "Add them.\n\n2 and 3"), said("assistant", "5")]
    result = split(chat, "alpaca", meta=record_meta(record))
    text = encoder_of("alpaca").tokenizer.decode(result.examples[0].input_ids)
    assert text == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd them.\n\n### Input:\n"
        "2 and 3\n\n### Response:\n5</s>\n\n"
    )
    assert trained(result.examples[0], "alpaca") == [(f"5{EOS}", 1.0)]


@pytest.mark.parametrize("chars", [500, 7 + 2 + 9, "7", None])
def test_an_input_that_is_no_longer_there_is_not_told_apart(chars: Any) -> None:
    chat = [said("user", "Add them.\n\n2 and 3"), said("assistant", "5")]
    result = split(chat, "alpaca", meta={"input_chars": chars})
    text = encoder_of("alpaca").tokenizer.decode(result.examples[0].input_ids)
    assert "### Input:" not in text
    assert "### Instruction:\nAdd them.\n\n2 and 3\n\n" in text


def test_other_templates_get_instruction_and_input_as_one_text() -> None:
    chat = [said("user", "Add them.\n\n2 and 3"), said("assistant", "5")]
    result = split(chat, meta={"input_chars": 7})
    assert "Add them.\n\n2 and 3" in encoder_of("chatml").tokenizer.decode(result.examples[0].input_ids)


# The property -----------------------------------------------------------------------------------------------

weights = st.sampled_from([None, 0, 0.5, 1, 2])
texts = st.text("abü,", min_size=1, max_size=8)


@st.composite
def weighted_chats(draw: st.DrawFn) -> list[Message]:
    chat = [said("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        for role in ("user", "assistant"):
            weight = draw(weights)
            chat.append(said(role, draw(texts), **({} if weight is None else {"weight": weight})))
    return chat


@settings(max_examples=100)
@given(
    chat=weighted_chats(),
    roles=st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, unique=True),
    prompt_weight=st.sampled_from([0, 0.1, 1]),
)
def test_each_token_has_the_weight_of_its_message(
    chat: list[Message], roles: list[Any], prompt_weight: float
) -> None:
    encoder = encoder_of("chatml")
    config = SplitConfig(train_on=roles, prompt_weight=prompt_weight)
    result = split_chat(encoder, config, row_of(chat))
    if isinstance(result, Drop):
        assert not any(message.role in roles and message.extras.get("weight", 1) for message in chat)
        return
    (example,) = result.examples
    found = np.zeros(len(example.input_ids), np.float32)
    for start, end, weight in zip(example.span_starts, example.span_ends, example.span_weights, strict=True):
        assert not found[start:end].any(), "no token twice"
        found[start:end] = weight
    expected: list[float] = []
    for message in chat:
        own = message.extras.get("weight", 1)
        content = len(encoder.backend.encode(message.content).ids)
        weight, end_weight = (own, own) if message.role in roles else (own * prompt_weight, 0)
        head = len(encoder.backend.encode(f"<|im_start|>{message.role}\n").ids)
        expected += [0] * head + [weight] * content + [end_weight, 0]
    assert found.tolist() == np.array(expected, np.float32).tolist()
