"""Tools, calls and reasoning: written as transformers writes them, trained as far as they are written, never lost."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.encode import ChatEncoder, Encoded, build_encoder, encode, trained_tokens
from pipelines.render import Rendered, render
from pipelines.split import SplitResult, split_chat
from schemas.conversation import Conversation, Drop, Message
from schemas.errors import RefusedError
from schemas.pipeline_config import SplitConfig
from tests.pipelines.model_templates import CHANNELS, DEEPSEEK, HERMES, LLAMA, MARKED, MISTRAL, TOOL_TEMPLATES
from tests.pipelines.tiny_tokenizers import EOS, TEMPLATES, tiny_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says how it is. <|im_end|>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}


@cache
def encoder_of(source: str, family: str = "byte_level_bpe") -> ChatEncoder:
    return build_encoder(tiny_tokenizer(family, source))


def rendered_chat(source: str, chat: list[Message], tools: Any = None) -> Rendered:
    rendered = render(encoder_of(source).template, chat, tools)
    assert isinstance(rendered, Rendered), rendered
    return rendered


def trained_texts(rendered: Rendered) -> list[str]:
    return [rendered.text[span.start : span.end] for span in rendered.spans]


def asked(text: str = "q") -> Message:
    return Message("user", text)


def calling(*calls: Any, text: str = "", **extras: Any) -> Message:
    return Message("assistant", text, {"tool_calls": list(calls) or [CALL], **extras})


def returned(text: str = "sunny") -> Message:
    return Message("tool", text, {"tool_call_id": "abcdefghi", "name": "weather"})


def thinking(text: str, reasoning: str, key: str = "reasoning_content") -> Message:
    return Message("assistant", text, {key: reasoning})


# Whole turns ------------------------------------------------------------------------------------------------

WITH_CALL = [asked(), calling(), returned(), Message("assistant", "It is sunny.")]
CALLS = {
    "hermes": (
        HERMES,
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nIt is sunny.<|im_end|>",
    ),
    "llama": (
        LLAMA,
        '{"name": "weather", "parameters": {"city": "Lima"}}<|eot_id|>',
        "It is sunny.<|eot_id|>",
    ),
    "mistral": (
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {{"city": "Lima"}}, "id": "abcdefghi"}}]{EOS}',
        f" It is sunny.{EOS}",
    ),
    "deepseek": (
        DEEPSEEK,
        f'<tool_call>function\nweather\n```json\n{{"city": "Lima"}}\n```{EOS}',
        f"It is sunny.{EOS}",
    ),
    "marked": (
        MARKED,
        '\n<tool_call>{"name": "weather", "arguments": {"city": "Lima"}}</tool_call><|im_end|>',
        "It is sunny.<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_trained_as_the_template_writes_it_with_its_end_token(name: str) -> None:
    source, *expected = CALLS[name]
    assert trained_texts(rendered_chat(source, WITH_CALL)) == expected


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}]},
        {"tool_calls": [{"name": "weather", "arguments": {"city": "Lima"}}]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"name": "weather", "arguments": '{"city": "Lima"}'}},
    ],
    ids=["object", "arguments as text", "bare", "all as text", "function_call"],
)
def test_calls_are_read_in_every_form_that_sources_have(call: dict[str, Any]) -> None:
    rendered = rendered_chat(HERMES, [asked(), Message("assistant", "", call)])
    assert '{"name": "weather", "arguments": {"city": "Lima"}}' in trained_texts(rendered)[0]


def test_tools_as_a_text_are_tools() -> None:
    rendered = rendered_chat(HERMES, [asked(), Message("assistant", "a")], json.dumps(TOOLS))
    assert "<tools>\n" + json.dumps(TOOLS[0]) in rendered.text


THOUGHT = [asked(), thinking("a", "hm"), asked("q2"), thinking("b", "so")]
REASONING = {
    "dropped before the last question": (
        HERMES,
        THOUGHT,
        ["a<|im_end|>", "<think>\nso\n</think>\n\nb<|im_end|>"],
        1,
    ),
    "in a text, moved": (
        HERMES,
        [
            asked(),
            Message("assistant", "<think>hm</think>a"),
            asked(),
            Message("assistant", "<think>\nso\n</think>b"),
        ],
        ["a<|im_end|>", "<think>\nso\n</think>\n\nb<|im_end|>"],
        1,
    ),
    "in a text, left out": (
        DEEPSEEK,
        [
            asked(),
            Message("assistant", "<think>hm</think>a"),
            asked(),
            Message("assistant", "<think>\nso\n</think>b"),
        ],
        [f"a{EOS}", f"b{EOS}"],
        2,
    ),
    "in a text, kept": (
        TEMPLATES["chatml"],
        [asked(), Message("assistant", "<think>hm</think>a")],
        ["<think>hm</think>a<|im_end|>"],
        0,
    ),
    "kept everywhere": (
        MARKED,
        THOUGHT,
        ["<think>hm</think>\na<|im_end|>", "<think>so</think>\nb<|im_end|>"],
        0,
    ),
    "a message of its own": (
        CHANNELS,
        [asked(), thinking("a", "hm", "reasoning")],
        [
            "<|user|>analysis<|end_of_role|>hm<|end|><|start_of_role|>assistant<|user|>final<|end_of_role|>a<|end|>",
        ],
        0,
    ),
}


@pytest.mark.parametrize(("source", "chat", "expected", "num_left_out"), REASONING.values(), ids=REASONING)
def test_reasoning_is_trained_where_the_template_writes_it_and_counted_where_not(
    source: str, chat: list[Message], expected: list[str], num_left_out: int
) -> None:
    rendered = rendered_chat(source, chat)
    assert trained_texts(rendered) == expected
    assert rendered.num_reasoning_left_out == num_left_out


def test_reasoning_text_and_calls_of_one_turn_are_told_apart() -> None:
    chat = [asked(), calling(CALL, CALL, text="Let me see.", reasoning_content="hm")]
    (span,) = rendered_chat(HERMES, chat).spans
    text = rendered_chat(HERMES, chat).text
    written = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call>'
    assert [(kind, text[start:end]) for kind, start, end in span.parts] == [
        ("reasoning", "<think>\nhm\n</think>\n\n"),
        ("content", "Let me see."),
        ("call", written * 2),
    ]
    assert text[span.closing_start : span.end] == "<|im_end|>"


OTHER_END = (
    "{%- set ns = namespace(name='') %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' and m.tool_calls %}{%- set call = m.tool_calls[0].function %}"
    "{%- set ns.name = call.name %}{{- '<|user|>assistant to=' + call.name + '<|system|>' + call.arguments | tojson }}"
    "{{- '<|eom_id|>' }}{%- elif m.role == 'assistant' %}"
    "{{- '<|user|>assistant<|system|>' + m.content + ('<|end_of_turn|>' if loop.last else '<|end|>') }}"
    "{%- elif m.role == 'tool' %}{{- '<|user|>' + ns.name + ' to=assistant<|system|>' + m.content + '<|end|>' }}"
    "{%- else %}{{- '<|user|>' + m.role + '<|system|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|user|>assistant' }}{%- endif %}"
)


def test_answers_end_with_one_token_inside_a_chat_another_at_its_end_and_a_third_behind_calls() -> None:
    """As gpt-oss, which also writes the function's name again where its result stands."""
    tokenizer = tiny_tokenizer("byte_level_bpe", OTHER_END)
    tokenizer.backend_tokenizer.add_special_tokens(["<|eom_id|>"])
    rendered = render(build_encoder(tokenizer).template, [*WITH_CALL, asked(), Message("assistant", "b")])
    assert isinstance(rendered, Rendered), rendered
    assert trained_texts(rendered) == [
        ' to=weather<|system|>{"city": "Lima"}<|eom_id|>',
        "<|system|>It is sunny.<|end|>",
        "<|system|>b<|end_of_turn|>",
    ]


# Nothing is left out without a word ---------------------------------------------------------------------------

LEFT_OUT = {
    "tools": (
        TEMPLATES["chatml"],
        [asked(), Message("assistant", "a")],
        TOOLS,
        "leaves out the chat's 1 tools",
    ),
    "calls": (
        TEMPLATES["chatml"],
        [asked(), calling()],
        None,
        "message 1: the template leaves out its tool calls",
    ),
    "reasoning": (
        TEMPLATES["chatml"],
        [asked(), thinking("a", "hm")],
        None,
        "message 1: the template leaves out its reasoning (split.reasoning: drop",
    ),
    "a call without a name": (
        HERMES,
        [asked(), calling({"function": {}})],
        None,
        "expected a function with a name",
    ),
    "tools that are none": (
        HERMES,
        [asked(), Message("assistant", "a")],
        "a hammer",
        "expected a list of objects",
    ),
    "calls of a template that does not end them": (
        HERMES.replace("{%- endfor %}{{- '<|im_end|>\\n' }}", "{%- endfor %}"),
        [asked(), calling()],
        None,
        "does not end a turn behind them",
    ),
}


@pytest.mark.parametrize(("source", "chat", "tools", "detail"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_the_template_would_leave_out_drops_the_chat(
    source: str, chat: list[Message], tools: Any, detail: str
) -> None:
    result = render(encoder_of(source).template, chat, tools)
    assert isinstance(result, Drop)
    assert result.reason == "content_beside_text"
    assert detail in result.detail


CHANGED = {
    "text beside a call": (LLAMA, [asked(), calling(text="Let me see.")], "template_changes_text"),
    "two calls": (LLAMA, [asked(), calling(CALL, CALL)], "template_refuses"),
    "an id that is too short": (MISTRAL, [asked(), calling({**CALL, "id": "x"})], "template_refuses"),
    "a name that JSON escapes": (
        MARKED,
        [asked(), calling({"function": {"name": 'a"b', "arguments": {}}})],
        "template_changes_text",
    ),
}


@pytest.mark.parametrize(("source", "chat", "reason"), CHANGED.values(), ids=CHANGED)
def test_calls_that_can_not_be_proved_drop_the_chat(source: str, chat: list[Message], reason: str) -> None:
    result = render(encoder_of(source).template, chat)
    assert isinstance(result, Drop)
    assert result.reason == reason


# The outside judge ------------------------------------------------------------------------------------------

words = st.sampled_from(
    [
        "a",
        "Hello world",
        "<|im_end|>",
        "</s>x",
        "{}",
        '"',
        "\\n",
        "é\n",
        "<tool_call>",
        "<think>",
        "ASSISTANT:",
        "qz",
    ]
)
texts = st.lists(words, min_size=1, max_size=3).map(" ".join)
values = st.recursive(
    texts | st.integers() | st.booleans() | st.none(), lambda inner: st.lists(inner, max_size=2)
)
arguments = st.dictionaries(texts, values, max_size=3)


@st.composite
def tool_chats(draw: st.DrawFn) -> tuple[list[Message], list[Any]]:
    chat: list[Message] = []
    for _ in range(draw(st.integers(1, 2))):
        chat.append(Message("user", draw(texts)))
        if draw(st.booleans()):
            name = draw(st.sampled_from(["weather", "add_2", "<|im_end|>"]))
            call = {**CALL, "function": {"name": name, "arguments": draw(arguments)}}
            reasoning = {"reasoning_content": draw(texts)} if draw(st.booleans()) else {}
            chat += [calling(call, text=draw(st.just("") | texts), **reasoning), returned(draw(texts))]
        extras = {"reasoning_content": draw(texts)} if draw(st.booleans()) else {}
        chat.append(Message("assistant", draw(texts), extras))
    tool = {"type": "function", "function": {"name": "weather", "description": draw(texts), "parameters": {}}}
    return chat, draw(st.just([]) | st.just([tool]))


def as_given(chat: list[Message]) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content, **message.extras} for message in chat]


@pytest.mark.parametrize("family", ["byte_level_bpe", "metaspace_bpe", "unigram"])
@settings(max_examples=60)
@given(case=tool_chats())
def test_ids_and_text_are_transformers_own_and_control_ids_the_templates(
    family: str, case: tuple[list[Message], list[Any]]
) -> None:
    chat, tools = case
    encoder = encoder_of(HERMES, family)
    rendered = render(encoder.template, chat, tools)
    own = encoder.tokenizer.apply_chat_template(as_given(chat), tools=tools or None, tokenize=False)
    if isinstance(rendered, Drop):
        assert rendered.reason == "template_changes_text", rendered
        assert any("think>" in text for message in chat for text in (message.content, *message.extras))
        return
    assert rendered.text == own
    encoded = encode(encoder, rendered)
    assert isinstance(encoded, Encoded), encoded
    found = np.flatnonzero(encoder.is_control[encoded.ids])
    places = list(zip(encoded.starts[found].tolist(), encoded.ends[found].tolist(), strict=True))
    unknown = [
        place for place in places if encoder.unknown_id is not None and place not in control_places(rendered)
    ]
    assert sorted(set(places) - set(unknown)) == sorted(control_places(rendered))
    data = json.dumps([as_given(chat), tools], ensure_ascii=False)
    if not any(token in data for token in encoder.control_ids):
        own_ids = encoder.tokenizer(own, add_special_tokens=False)["input_ids"]
        assert encoded.ids.tolist() == own_ids


def control_places(rendered: Rendered) -> list[tuple[int, int]]:
    return [tuple(place) for place in rendered.control_spans.tolist()]


@settings(max_examples=60)
@given(case=tool_chats())
def test_control_strings_in_calls_do_not_move_what_the_template_wrote(
    case: tuple[list[Message], list[Any]],
) -> None:
    """The same chat without control strings has control tokens of the same number and kinds."""
    chat, _ = case

    def harmless(value: Any) -> Any:
        return json.loads(
            json.dumps(value)
            .replace("<|im_end|>", "(xim_endx)")
            .replace("</s>", "(/s)")
            .replace("<tool_call>", "(tool_call)")
            .replace("<think>", "(think)")
        )

    plain = [Message(m.role, harmless(m.content), harmless(m.extras)) for m in chat]
    rendered, expected = (render(encoder_of(MARKED).template, messages) for messages in (chat, plain))
    assert isinstance(expected, Rendered), expected
    assert isinstance(rendered, Rendered), rendered
    assert rendered.control_tokens == expected.control_tokens
    assert rendered.control_spans.tolist() == expected.control_spans.tolist()
    assert [(s.start, s.end, s.parts) for s in rendered.spans] == [
        (s.start, s.end, s.parts) for s in expected.spans
    ]


@pytest.mark.parametrize("family", ["byte_level_bpe", "metaspace_bpe"])
@settings(max_examples=60)
@given(case=tool_chats())
def test_trained_tokens_are_transformers_mask_where_the_template_marks_answers(
    family: str, case: tuple[list[Message], list[Any]]
) -> None:
    chat, _ = case
    if any(token in json.dumps(as_given(chat)) for token in encoder_of(MARKED, family).control_ids):
        return
    encoder = encoder_of(MARKED, family)
    rendered = render(encoder.template, chat)
    assert isinstance(rendered, Rendered), rendered
    encoded = encode(encoder, rendered)
    assert isinstance(encoded, Encoded)
    own = encoder.tokenizer.apply_chat_template(
        as_given(chat), return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    tokens = trained_tokens(encoded, rendered.spans)
    mask = np.zeros(len(encoded.ids), int)
    for start, end in zip(tokens.starts, tokens.ends, strict=True):
        mask[start:end] = 1
    assert encoded.ids.tolist() == own["input_ids"]
    borders = {border for span in rendered.spans for border in (span.start, span.end)}
    expected = [
        int(trained and not any(start < border < end for border in borders))
        for trained, start, end in zip(own["assistant_masks"], encoded.starts, encoded.ends, strict=True)
    ]
    assert mask.tolist() == expected


# As a row ---------------------------------------------------------------------------------------------------


def row_of(chat: list[Message], tools: Any = None) -> Conversation:
    return Conversation("row", "s/f", 0, chat, {} if tools is None else {"tools": tools})


def test_a_rows_tools_reach_the_template_and_left_out_reasoning_is_counted() -> None:
    encoder = encoder_of(HERMES)
    result = split_chat(encoder, SplitConfig(), row_of([*THOUGHT], TOOLS))
    assert isinstance(result, SplitResult)
    assert "Says how it is." in encoder.tokenizer.decode(result.examples[0].input_ids)
    assert result.counts["reasoning_left_out"] == 1
    dropped = split_chat(encoder_of(TEMPLATES["chatml"]), SplitConfig(), row_of([*THOUGHT]))
    assert isinstance(dropped, Drop)
    assert dropped.reason == "content_beside_text"


@pytest.mark.parametrize("inline", [False, True])
def test_reasoning_can_be_taken_out_of_the_data(inline: bool) -> None:
    chat = [asked(), Message("assistant", "<think>hm</think>\n\na") if inline else thinking("a", "hm")]
    encoder = encoder_of(TEMPLATES["chatml"])
    result = split_chat(encoder, SplitConfig(reasoning="drop"), row_of(chat))
    assert isinstance(result, SplitResult)
    assert result.counts["reasoning_dropped"] == 1
    (example,) = result.examples
    (start,), (end,) = example.span_starts, example.span_ends
    assert encoder.tokenizer.decode(example.input_ids[start:end]) == "a<|im_end|>"


@pytest.mark.real_data
def test_the_published_template_with_tools_is_followed(real_data: Path) -> None:
    source = (real_data / "chat_templates" / "qwen2.5-instruct.jinja").read_text()
    rendered = rendered_chat(source, WITH_CALL, TOOLS)
    own = tiny_tokenizer("byte_level_bpe", source)
    assert rendered.text == own.apply_chat_template(as_given(WITH_CALL), tools=TOOLS, tokenize=False)
    assert trained_texts(rendered)[0] == (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>'
    )


def test_every_template_here_passes_the_check_before_work() -> None:
    from pipelines.probes import check_encoder, check_template

    for name, source in TOOL_TEMPLATES.items():
        # Mistral's writes a system prompt only before a question that ends the chat.
        config = SplitConfig(system="merge_into_user" if name == "mistral" else "keep")
        encoder = encoder_of(source)
        check_template(encoder.template, config)
        check_encoder(encoder, max_straddle_share=0.001, config=config)
    with pytest.raises(RefusedError, match=r"left out; set split\.system to merge_into_user or drop, or"):
        check_template(encoder_of(MISTRAL).template)
