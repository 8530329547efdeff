"""Tokenizers, templates and chats that are broken: a clear refusal or a drop with its reason, never a wrong label."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from pipelines.encode import ChatEncoder, build_encoder, encode
from pipelines.render import Rendered, render
from pipelines.split import SplitResult, preflight, prepare, split_chat
from schemas.conversation import Conversation, Drop, Message, Role
from schemas.errors import RefusedError
from schemas.pipeline_config import PipelineConfig, SplitConfig
from tests.pipelines.model_templates import HERMES, MARKED
from tests.pipelines.tiny_tokenizers import (
    BOS,
    CONTROL_TOKENS,
    EOS,
    FAMILIES,
    PLAIN_ADDED_TOKENS,
    TEMPLATES,
    tiny_tokenizer,
)


@cache
def encoder_of(family: str, source: str) -> ChatEncoder:
    return build_encoder(tiny_tokenizer(family, TEMPLATES.get(source, source)))


def row_of(*messages: Message, **meta: Any) -> Conversation:
    return Conversation("row", "s/f", 0, list(messages), meta)


ASKED = Message("user", "q")
ANSWERED = Message("assistant", "a")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "\ud800"}}}

DROPS: dict[str, tuple[Conversation, str, str]] = {
    "only system turns": (
        row_of(Message("system", "s"), Message("system", "t")),
        "chatml",
        "nothing_to_train",
    ),
    "no messages": (row_of(), "chatml", "nothing_to_train"),
    "only questions": (row_of(ASKED, ASKED), "chatml", "nothing_to_train"),
    "only an answer": (row_of(ANSWERED), "mistral", "template_refuses"),
    "a lone surrogate in a question": (row_of(Message("user", "\udfff"), ANSWERED), "chatml", "not_unicode"),
    "a lone surrogate in an answer": (
        row_of(ASKED, Message("assistant", "a\ud800")),
        "chatml",
        "not_unicode",
    ),
    "a lone surrogate in reasoning": (
        row_of(ASKED, Message("assistant", "a", {"reasoning_content": "\ud800"})),
        MARKED,
        "not_unicode",
    ),
    "a lone surrogate in a call": (
        row_of(ASKED, Message("assistant", "", {"tool_calls": [CALL]})),
        MARKED,
        "not_unicode",
    ),
    "an empty answer that the template leaves out": (
        row_of(ASKED, Message("assistant", "")),
        "vicuna",
        "nothing_to_train",
    ),
    "a template that divides by zero": (row_of(ASKED, ANSWERED), "{{ 1 // 0 }}", "template_refuses"),
    "a template that reads what is not there": (
        row_of(ASKED, ANSWERED),
        "{{ messages[7].content }}",
        "template_refuses",
    ),
    "a template that calls itself": (
        row_of(ASKED, ANSWERED),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "template_refuses",
    ),
}


@pytest.mark.parametrize(("row", "source", "reason"), DROPS.values(), ids=DROPS)
def test_a_broken_chat_is_a_drop_with_its_reason(row: Conversation, source: str, reason: str) -> None:
    result = split_chat(encoder_of("byte_level_bpe", source), SplitConfig(), row)
    assert isinstance(result, Drop)
    assert result.reason == reason


def test_an_empty_answer_trains_its_end_token_alone() -> None:
    encoder = encoder_of("byte_level_bpe", "chatml")
    result = split_chat(encoder, SplitConfig(), row_of(ASKED, Message("assistant", "")))
    assert isinstance(result, SplitResult)
    (example,) = result.examples
    assert example.num_trained_tokens == 1
    assert encoder.backend.id_to_token(example.input_ids[example.span_starts[0]]) == "<|im_end|>"
    assert example.num_trained_bytes == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\x00" * 50], ids=["alone", "between", "many"])
def test_nul_is_a_character_like_any_other(family: str, text: str) -> None:
    encoder = encoder_of(family, "chatml")
    result = split_chat(
        encoder, SplitConfig(), row_of(Message("user", text), Message("assistant", f"x{text}y"))
    )
    assert isinstance(result, SplitResult)
    (example,) = result.examples
    (start,), (end,) = example.span_starts, example.span_ends
    if family == "byte_level_bpe":
        assert encoder.tokenizer.decode(example.input_ids[start:end]) == f"x{text}y<|im_end|>"
    assert encoder.backend.id_to_token(example.input_ids[end - 1]) == "<|im_end|>"


# Control strings --------------------------------------------------------------------------------------------

ALL_CONTROLS = (BOS, EOS, "<unk>", *CONTROL_TOKENS, *PLAIN_ADDED_TOKENS)


@pytest.mark.parametrize("family", ["byte_level_bpe", "metaspace_bpe", "unigram"])
@pytest.mark.parametrize(
    "place", ["system", "user", "assistant", "tool", "reasoning", "call", "name", "tools"]
)
def test_control_strings_are_text_wherever_they_stand(family: str, place: str) -> None:
    """Each control id stands as often as in the same chat with another text of the same kind."""
    encoder = encoder_of(family, HERMES)
    for control in ALL_CONTROLS:
        found, expected = (
            control_ids(encoder, *chat_with(place, text)) for text in (f"x {control} y", "x z y")
        )
        assert found == expected, control


def chat_with(place: str, text: str) -> tuple[list[Message], Any]:
    def at(role: str, other: str) -> str:
        return text if role == place else other

    arguments = {"city": at("call", "Lima"), at("call", "unit"): 1}
    call = {"id": "abcdefghi", "function": {"name": at("name", "weather"), "arguments": arguments}}
    extras = {"tool_calls": [call], "reasoning_content": at("reasoning", "hm")}
    roles: list[Role] = ["system", "user"]
    chat = [Message(role, at(role, "word")) for role in roles]
    chat += [Message("assistant", at("assistant", "I look."), extras), Message("tool", at("tool", "sunny"))]
    tool = {
        "type": "function",
        "function": {"name": "weather", "description": at("tools", "It"), "parameters": {}},
    }
    return [*chat, Message("assistant", "Done.")], [tool]


def control_ids(encoder: ChatEncoder, chat: list[Message], tools: Any) -> list[int]:
    rendered = render(encoder.template, chat, tools)
    assert isinstance(rendered, Rendered), rendered
    encoded = encode(encoder, rendered)
    assert not isinstance(encoded, Drop), encoded
    ids = encoded.ids[encoder.is_control[encoded.ids]]
    return [int(token) for token in ids if token != encoder.unknown_id]


# Tokenizers -------------------------------------------------------------------------------------------------


def saved(folder: Path, tokenizer: Any, vocab_size: int | None = None) -> PipelineConfig:
    tokenizer.save_pretrained(folder / "model")
    if vocab_size is not None:
        (folder / "model" / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return PipelineConfig.model_validate(
        {
            "run_root": str(folder / "run"),
            "sources": [{"name": "s", "path": "x.json"}],
            "model": {"path": str(folder / "model")},
        }
    )


def bare_tokenizer(**special: str) -> Any:
    backend = Tokenizer.from_str(tiny_tokenizer("byte_level_bpe").backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATES["chatml"], **special)


def test_a_tokenizer_without_pad_eos_bos_and_unk_is_enough_for_a_template_that_writes_none(
    tmp_path: Path,
) -> None:
    config = saved(tmp_path, bare_tokenizer())
    preflight(config)
    result = prepare(config)(row_of(ASKED, ANSWERED))
    assert isinstance(result, SplitResult)
    assert result.examples[0].num_trained_tokens == 2


def test_a_template_that_needs_the_eos_token_of_a_tokenizer_without_one_is_refused(tmp_path: Path) -> None:
    tokenizer = bare_tokenizer()
    tokenizer.chat_template = TEMPLATES["chatml"].replace("'<|im_end|>'", "eos_token")
    with pytest.raises(RefusedError, match="'eos_token' is undefined"):
        preflight(saved(tmp_path, tokenizer))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    )
    with pytest.raises(RefusedError, match="never writes an end token"):
        preflight(saved(tmp_path, tokenizer))


def test_a_template_whose_tokens_the_model_has_no_embeddings_for_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("byte_level_bpe", TEMPLATES["chatml"])
    preflight(saved(tmp_path, tokenizer, vocab_size=len(tokenizer)))
    first_control = tokenizer.convert_tokens_to_ids("<|im_start|>")
    with pytest.raises(RefusedError, match=rf"the model knows {first_control} ids"):
        preflight(saved(tmp_path, tokenizer, vocab_size=first_control))


def test_a_chat_with_an_id_over_the_embeddings_is_dropped(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("byte_level_bpe", TEMPLATES["chatml"])
    tokenizer.backend_tokenizer.add_tokens(["covid19"])
    config = saved(tmp_path, tokenizer, vocab_size=len(tokenizer) - 1)
    preflight(config)
    step = prepare(config)
    assert isinstance(step(row_of(ASKED, ANSWERED)), SplitResult)
    result = step(row_of(Message("user", "covid19"), ANSWERED))
    assert isinstance(result, Drop)
    assert result.reason == "id_without_embedding"
    assert "'covid19'" in result.detail


@pytest.mark.slow
def test_a_template_that_loops_only_where_there_are_tools_is_refused_before_work(tmp_path: Path) -> None:
    tokenizer = bare_tokenizer()
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = "{% if tools %}" + loops + "{% endif %}" + TEMPLATES["chatml"]
    with pytest.raises(RefusedError, match="used up its"):
        preflight(saved(tmp_path, tokenizer))


def test_an_unproved_template_is_refused_with_the_smallest_chat(tmp_path: Path) -> None:
    tokenizer = bare_tokenizer()
    tokenizer.chat_template = TEMPLATES["chatml"].replace("message['content']", "message['content'] | upper")
    smallest = r'\[\["user", "What is the capital\?"\], \["assistant", "Paris is the capital\."\]\]'
    with pytest.raises(RefusedError, match=smallest):
        preflight(saved(tmp_path, tokenizer))


def test_trained_ids_are_int32_and_in_the_vocabulary() -> None:
    encoder = encoder_of("byte_level_bpe", "chatml")
    result = split_chat(encoder, SplitConfig(), row_of(ASKED, ANSWERED))
    assert isinstance(result, SplitResult)
    assert result.examples[0].input_ids.dtype == np.int32
    assert result.examples[0].input_ids.max() < len(encoder.tokenizer)
