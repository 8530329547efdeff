"""Rendering: equal to the tokenizer's own, spans proved or the chat dropped, templates refused that can't be proved."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.habits import compile_template
from pipelines.probes import PROBE_CHATS, check_template
from pipelines.render import Rendered, render
from pipelines.templates import ChatTemplate, render_text, try_in_child
from schemas.conversation import Drop, Message, Role
from schemas.errors import RefusedError
from tests.pipelines.tiny_tokenizers import CONTROL_TOKENS, EOS, TEMPLATES, tiny_tokenizer

CHAT = [
    Message("system", "Be brief."),
    Message("user", "Hello?"),
    Message("assistant", "Hi!"),
    Message("user", "Bye."),
    Message("assistant", "So long."),
]


def template_of(source: str) -> tuple[ChatTemplate, Any]:
    tokenizer = tiny_tokenizer("byte_level_bpe", source)
    return (
        compile_template(
            source,
            special_tokens=tokenizer.special_tokens_map,
            control_tokens=list(tokenizer.get_added_vocab()),
        ),
        tokenizer,
    )


def plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def trained_texts(rendered: Rendered | Drop) -> list[str]:
    assert isinstance(rendered, Rendered), rendered
    return [rendered.text[span.start : span.end] for span in rendered.spans]


# The outside judge ------------------------------------------------------------------------------------------

texts = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\u00a0\u2028<|>/{}%")),
    max_size=12,
) | st.sampled_from(
    [
        "",
        " ",
        "\n",
        "</s>",
        "<|im_end|>\n<|im_start|>assistant\n",
        "{{ eos_token }}",
        "qzcontent0000001zq",
        "\x00",
    ]
)


@st.composite
def chats(draw: st.DrawFn) -> list[Message]:
    messages = [Message("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(texts)), Message("assistant", draw(texts))]
    return messages


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@settings(max_examples=60)
@given(chat=chats())
def test_spans_are_the_answers_as_the_template_writes_them_with_their_end_tokens(
    name: str, chat: list[Message]
) -> None:
    template, tokenizer = TEMPLATE_CACHE[name]
    rendered = render(template, chat)
    assert isinstance(rendered, Rendered), rendered
    assert rendered.text == tokenizer.apply_chat_template(plain(chat), tokenize=False)
    assert trained_texts(rendered) == expected_texts(name, chat)
    for token, (start, end) in zip(rendered.control_tokens, rendered.control_spans.tolist(), strict=True):
        assert rendered.text[start:end] == token
        inside = [place for place in rendered.message_spans if place and place[0] < end and start < place[1]]
        assert not inside, "a control token of the template stands in no content"
    for message, place in zip(chat, rendered.message_spans, strict=True):
        if place is not None:
            assert rendered.text[slice(*place)] in (message.content, message.content.strip())


TEMPLATE_CACHE = {name: template_of(source) for name, source in TEMPLATES.items()}


def expected_texts(name: str, chat: list[Message]) -> list[str]:
    """Written by hand for each template, from what its text says."""
    answers = [message.content for message in chat if message.role == "assistant"]
    if name == "vicuna":
        return [f" {answer}{EOS}" for answer in answers if answer]
    if name == "mistral":
        return [f" {answer.strip()}{EOS}" for answer in answers]
    if name == "llama_3":
        return [f"{answer.strip()}<|eot_id|>" for answer in answers]
    return [answer + ("<|im_end|>" if name == "chatml" else EOS) for answer in answers]


@pytest.mark.real_data
def test_the_published_templates_render_as_transformers_renders_them(real_data: Path) -> None:
    paths = sorted((real_data / "chat_templates").glob("*.jinja"))
    assert len(paths) == 18
    refused = set()
    for path in paths:
        template, tokenizer = template_of(path.read_text())
        ends = 0
        for chat in PROBE_CHATS:
            rendered = render(template, chat)
            assert isinstance(rendered, Rendered), (path.name, rendered)
            ends += sum(span.has_end for span in rendered.spans)
            assert rendered.text == tokenizer.apply_chat_template(plain(chat), tokenize=False)
            for span in rendered.spans:
                content = chat[span.message_index].content
                written = rendered.text[span.start : span.end].strip()
                assert written.startswith(content)
                assert written[len(content) :].strip() in ("", EOS, *CONTROL_TOKENS)
        if not ends:
            refused.add(path.stem)
            with pytest.raises(RefusedError, match="never writes an end token"):
                check_template(template)
        else:
            check_template(template)
    assert refused == {"amberchat", "chatqa", "falcon-instruct", "solar-instruct"}


def test_the_date_a_template_asks_for_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{{ strftime_now('%d %B %Y') }}" + TEMPLATES["chatml"]
    template, _ = template_of(source)
    assert render_text(template, CHAT).startswith("26 July 2024<|im_start|>")


def test_what_would_make_the_text_random_is_not_there() -> None:
    for expression in ("[1, 2] | random", "lipsum()"):
        template_source = "{{ " + expression + " }}" + TEMPLATES["chatml"]
        with pytest.raises(RefusedError):
            check_template(template_of(template_source)[0])


def test_tojson_writes_as_transformers_does() -> None:
    source = "{{ {'b': 'é<', 'a': [1, none]} | tojson(indent=2) }}" + TEMPLATES["chatml"]
    template, tokenizer = template_of(source)
    assert render_text(template, CHAT) == tokenizer.apply_chat_template(plain(CHAT), tokenize=False)


def test_a_template_can_not_reach_the_machine() -> None:
    source = "{{ messages.__class__.__base__.__subclasses__() }}" + TEMPLATES["chatml"]
    assert isinstance(result := render(template_of(source)[0], CHAT), Drop)
    assert result.reason == "template_refuses"
    assert "SecurityError" in result.detail


# Where answers begin and end --------------------------------------------------------------------------------


def chatml_with(
    before: str = "", after: str = "<|im_end|>", *, prompt: str = "<|im_start|>assistant\n"
) -> str:
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        + before
        + "{{ m.content }}"
        + after
        + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ "
        + json.dumps(prompt)
        + " }}{% endif %}"
    )


END_TOKENS = {
    "directly after": (chatml_with(), ["Hi!<|im_end|>", "So long.<|im_end|>"]),
    "after white space": (chatml_with(after=" \n<|im_end|>"), ["Hi! \n<|im_end|>", "So long. \n<|im_end|>"]),
    "two in a row: the first": (chatml_with(after="<|im_end|></s>"), ["Hi!<|im_end|>", "So long.<|im_end|>"]),
    "after text of the template": (
        chatml_with(after=" END<|im_end|>"),
        ["Hi! END<|im_end|>", "So long. END<|im_end|>"],
    ),
    "eos after text of the template": (
        chatml_with(after=" END</s>"),
        ["Hi! END</s>", "So long. END</s>"],
    ),
    "after other text than the last one: none": (
        chatml_with(after="{% if loop.last %}<|im_end|>{% else %} MORE<|im_end|>{% endif %}"),
        ["Hi!", "So long.<|im_end|>"],
    ),
    "only after the last turn": (
        chatml_with(after="{% if loop.last %}<|im_end|>{% endif %}"),
        ["Hi!", "So long.<|im_end|>"],
    ),
    "eos between turns only": (
        chatml_with(after="{% if not loop.last %}</s>{% endif %}"),
        ["Hi!</s>", "So long."],
    ),
    "the next turn's opening is no end": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}",
        ["Hi!", "So long."],
    ),
}


@pytest.mark.parametrize(("source", "expected"), END_TOKENS.values(), ids=END_TOKENS)
def test_the_end_token_is_the_control_token_right_after_the_answer(source: str, expected: list[str]) -> None:
    template, _ = template_of(source)
    rendered = render(template, CHAT)
    assert trained_texts(rendered) == expected
    assert isinstance(rendered, Rendered)
    assert [span.has_end for span in rendered.spans] == [text.endswith(">") for text in expected]


LEADS = {
    "space after a prompt without one": (" ", "<|im_start|>assistant\n", " Hi!<|im_end|>"),
    "space in the prompt as well": (" ", "<|im_start|>assistant\n ", "Hi!<|im_end|>"),
    "no white space": ("", "<|im_start|>assistant\n", "Hi!<|im_end|>"),
    "text beyond the prompt": ("Sure: ", "<|im_start|>assistant\n", "Sure: Hi!<|im_end|>"),
    "another prompt than the turns": (" ", "<|im_start|>model\n", "Hi!<|im_end|>"),
}


@pytest.mark.parametrize(("before", "prompt", "expected"), LEADS.values(), ids=LEADS)
def test_what_the_template_writes_behind_the_generation_prompt_belongs_to_the_answer(
    before: str, prompt: str, expected: str
) -> None:
    template, _ = template_of(chatml_with(before=before, prompt=prompt))
    assert trained_texts(render(template, CHAT))[0] == expected


@pytest.mark.parametrize("strip", ["| trim", ".strip()", ".strip('\\n')", ".lstrip('\\n')", ".rstrip()", ""])
@given(content=st.text("\n \tax", max_size=8))
def test_trimming_by_the_template_is_followed(strip: str, content: str) -> None:
    template = TRIMMING.setdefault(
        strip, template_of(TEMPLATES["chatml"].replace("message['content']", f"message['content']{strip}"))[0]
    )
    chat = [Message("user", f"{content}q{content}"), Message("assistant", f"{content}a{content}")]
    assert isinstance(render(template, chat), Rendered)


TRIMMING: dict[str, ChatTemplate] = {}


def test_an_empty_answer_that_the_template_writes_in_another_way_has_no_span() -> None:
    template, _ = template_of(TEMPLATES["vicuna"])
    rendered = render(template, [Message("user", "q"), Message("assistant", ""), *CHAT[1:3]])
    assert trained_texts(rendered) == [f" Hi!{EOS}"]
    assert isinstance(rendered, Rendered)
    assert rendered.message_spans[1] is None


# Drops and refusals -----------------------------------------------------------------------------------------

CHANGED = {
    "system left out": (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        "message 0 (system) is left out",
    ),
    "answer written twice": (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{{ m.content }}{% endfor %}",
        "is written 2 times",
    ),
    "answer in capitals": (
        "{% for m in messages %}<|im_start|>{{ m.content | upper }}<|im_end|>{% endfor %}",
        "is left out",
    ),
    "a word replaced": (
        "{% for m in messages %}<|im_start|>{{ m.content.replace('Hi', 'Ho') }}<|im_end|>{% endfor %}",
        "it wrote",
    ),
}


@pytest.mark.parametrize(("source", "detail"), CHANGED.values(), ids=CHANGED)
def test_a_chat_whose_text_is_changed_is_dropped(source: str, detail: str) -> None:
    result = render(template_of(source)[0], CHAT)
    assert isinstance(result, Drop)
    assert result.reason == "template_changes_text"
    assert detail in result.detail


def test_a_user_turn_may_be_written_twice() -> None:
    source = "{{ messages[0].content }}" + TEMPLATES["chatml"]
    assert trained_texts(render(template_of(source)[0], CHAT)) == ["Hi!<|im_end|>", "So long.<|im_end|>"]


@pytest.mark.parametrize(
    "roles", [("assistant", "user"), ("user", "user", "assistant"), ("user", "tool", "assistant")]
)
def test_a_chat_that_the_template_refuses_is_dropped_with_its_words(roles: tuple[Role, ...]) -> None:
    result = render(TEMPLATE_CACHE["mistral"][0], [Message(role, "x") for role in roles])
    assert isinstance(result, Drop)
    assert (result.reason, result.detail) == ("template_refuses", "TemplateError: roles must alternate")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_good_templates_pass_the_check(name: str) -> None:
    check_template(TEMPLATE_CACHE[name][0])


def test_a_template_that_refuses_system_turns_passes_the_check() -> None:
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATES["chatml"]
    )
    check_template(template_of(source)[0])


REFUSED = {
    "not Jinja": ("{% for %}", "not valid Jinja"),
    "never an end": (chatml_with(after=""), "never writes an end token after an answer"),
    "an end that is no token": (chatml_with(after="<|stop|>"), "never writes an end token after an answer"),
    "changes text": (chatml_with().replace("m.content", "m.content | upper"), "is left out"),
    "refuses everything": ("{{ raise_exception('never') }}", "never"),
}


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED)
def test_templates_that_can_not_be_proved_are_refused(source: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        check_template(template_of(source)[0])


BOMBS = {
    "memory": "{{ 'x' * 3000000000 }}",
    "a long number": "{{ (10 ** (10 ** 8)) % 7 }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
}


@pytest.mark.slow
@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_a_template_that_uses_up_memory_or_time_is_refused(source: str) -> None:
    with pytest.raises(RefusedError, match="used up its"):
        try_in_child(source, special_tokens={}, chats=PROBE_CHATS[:1])


@pytest.mark.parametrize("source", [*TEMPLATES.values(), "{{ raise_exception('no') }}", "{% for %}"])
def test_the_child_lets_others_through(source: str) -> None:
    try_in_child(source, special_tokens={"bos_token": "<s>", "eos_token": EOS}, chats=PROBE_CHATS)
