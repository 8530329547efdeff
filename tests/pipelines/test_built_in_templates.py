"""Named chat templates: written as the published ones, proved with every family, ended by a real end token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.built_in_templates import template_for
from pipelines.encode import ChatEncoder, Encoded, build_encoder, encode, trained_tokens
from pipelines.probes import check_encoder, check_template
from pipelines.render import Rendered, render
from pipelines.tokenizer_files import load_tokenizer, tokenizer_versions
from schemas.config_file import load_config
from schemas.conversation import Message
from schemas.errors import ConfigError, RefusedError
from schemas.pipeline_config import BUILT_IN_TEMPLATES, PipelineConfig
from tests.pipelines.tiny_tokenizers import EOS, FAMILIES, tiny_tokenizer

SYSTEM = Message("system", " Be brief. ")
ROUNDS = [
    Message("user", " Hello? \n"),
    Message("assistant", "Hi!\n"),
    Message("user", "Bye."),
    Message("assistant", '"So long."'),
]


def encoder_of(name: str, family: str = "byte_level_bpe") -> ChatEncoder:
    tokenizer = tiny_tokenizer(family)
    tokenizer.chat_template = template_for(name, tokenizer)
    return build_encoder(tokenizer)


def text_of(name: str, chat: Sequence[Message]) -> str:
    rendered = render(encoder_of(name).template, chat)
    assert isinstance(rendered, Rendered), rendered
    return rendered.text


TEXTS = {
    "chatml": "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
    "<|im_start|>assistant\nHi!<|im_end|>\n",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHello?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>",
    "mistral": "<s>[INST] Be brief.\n\nHello? [/INST] Hi!</s>",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\n Hello?<end_of_turn>\n<start_of_turn>model\nHi!<end_of_turn>\n",
    "phi": "<|system|>\nBe brief.<|end|>\n<|user|>\nHello?<|end|>\n<|assistant|>\nHi!<|end|>\n",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHello?</s>\n<|assistant|>\nHi!</s>\n",
    "vicuna-v1.1": "<s>Be brief. USER: Hello? ASSISTANT: Hi!</s>",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nHello?\n\n### Response:\nHi!</s>\n\n",
    "plain": "<s>Be brief.\n\nHello?\n\nHi!</s>\n\n",
}


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
def test_each_writes_its_form(name: str) -> None:
    assert text_of(name, [SYSTEM, *ROUNDS[:2]]) == TEXTS[name]


def test_vicuna_writes_its_own_system_prompt_where_there_is_none() -> None:
    assert text_of("vicuna-v1.1", ROUNDS) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hello? ASSISTANT: Hi!</s>USER: Bye. "
        'ASSISTANT: "So long."</s>'
    )


def test_alpaca_writes_the_prompt_without_an_input() -> None:
    assert text_of("alpaca", ROUNDS[:2]) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nHello?\n\n### Response:\nHi!</s>\n\n"
    )


PUBLISHED = {
    "alpaca": ("alpaca", [SYSTEM]),
    "chatml": ("chatml", []),
    "chatml and a system prompt": ("chatml", [SYSTEM]),
    "gemma": ("gemma-it", []),
    "gemma and a system prompt": ("gemma-it", [SYSTEM]),
    "llama-3": ("llama-3-instruct", []),
    "llama-3 and a system prompt": ("llama-3-instruct", [SYSTEM]),
    "mistral": ("mistral-instruct", []),
    "phi": ("phi-3", []),
    "phi and a system prompt": ("phi-3", [SYSTEM]),
    "zephyr": ("zephyr", []),
    "zephyr and a system prompt": ("zephyr", [SYSTEM]),
}
"""What the published files write, too. Mistral's file puts the system prompt before [INST] and Vicuna's writes line
breaks, other than the programs these models were made with."""


@pytest.mark.real_data
@pytest.mark.parametrize("case", PUBLISHED)
def test_the_published_templates_write_the_same(case: str, real_data: Path) -> None:
    name, start = case.split(" ")[0], PUBLISHED[case][1]
    source = (real_data / "chat_templates" / f"{PUBLISHED[case][0]}.jinja").read_text()
    tokenizer = tiny_tokenizer("byte_level_bpe", source)
    for rounds in (ROUNDS, ROUNDS[:2]):
        chat: Any = [{"role": m.role, "content": m.content} for m in [*start, *rounds]]
        published = tokenizer.apply_chat_template(chat, tokenize=False)
        # Gemma's own template begins with <bos>, the published file leaves it to the tokenizer.
        own = text_of(name, [*start, *rounds])
        assert own.removeprefix("<s>" if name == "gemma" else "") == published


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
def test_each_is_proved_with_every_family(name: str, family: str) -> None:
    encoder = encoder_of(name, family)
    check_template(encoder.template)
    check_encoder(encoder, max_straddle_share=0.001)


# End tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
def test_an_end_token_that_the_tokenizer_lacks_is_its_eos_token(name: str) -> None:
    state = tiny_tokenizer("byte_level_bpe").backend_tokenizer.to_str()
    for token in ("im_end", "eot_id", "end"):
        state = state.replace(f"<|{token}|>", f"<|other_{token}|>")
    from tokenizers import Tokenizer

    from tests.pipelines.tiny_tokenizers import wrapped

    tokenizer = wrapped(Tokenizer.from_str(state.replace("<end_of_turn>", "<other_end>")))
    tokenizer.chat_template = template_for(name, tokenizer)
    encoder = build_encoder(tokenizer)
    rendered = render(encoder.template, ROUNDS)
    assert isinstance(rendered, Rendered)
    encoded = encode(encoder, rendered)
    assert isinstance(encoded, Encoded)
    tokens = trained_tokens(encoded, rendered.spans)
    last = encoded.ids[tokens.ends - 1].tolist()
    assert last == [tokenizer.convert_tokens_to_ids(EOS)] * 2


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
def test_without_any_end_token_it_is_refused(name: str) -> None:
    tokenizer = tiny_tokenizer("byte_level_bpe")
    tokenizer.eos_token = None
    has_own = name in ("chatml", "gemma", "llama-3", "phi")
    if has_own:
        assert "end_of_turn = '" in template_for(name, tokenizer)
    else:
        with pytest.raises(RefusedError, match="needs a token that ends answers, and the tokenizer has no"):
            template_for(name, tokenizer)


def test_a_tokenizer_with_neither_end_token_nor_eos_is_refused() -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer("byte_level_bpe").backend_tokenizer, unk_token="<unk>"
    )
    with pytest.raises(RefusedError, match="ends answers"):
        template_for("vicuna-v1.1", bare)


def test_chatml_does_not_write_a_bos_token_that_opens_turns() -> None:
    """As SmolLM2's tokenizer, whose bos_token is <|im_start|>."""
    tokenizer = tiny_tokenizer("byte_level_bpe")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = template_for("chatml", tokenizer)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False)
    assert text == "<|im_start|>user\nq<|im_end|>\n"


# In a config --------------------------------------------------------------------------------------------------


def test_a_config_names_one_and_it_is_no_path(tmp_path: Path) -> None:
    tiny_tokenizer("byte_level_bpe").save_pretrained(tmp_path / "base")
    file = tmp_path / "config.yaml"
    file.write_text(
        "run_root: run\nsources: [{name: s, path: x.json}]\nmodel: {path: ./base}\n"
        "split: {chat_template: vicuna-v1.1}\n"
    )
    config = load_config(file)
    assert config.split.chat_template == "vicuna-v1.1"
    assert "USER: " in load_tokenizer(config).get_chat_template()
    assert len(tokenizer_versions(config)["chat_template"]) == 64


def test_a_name_that_is_none_is_told_with_those_that_are(tmp_path: Path) -> None:
    tiny_tokenizer("byte_level_bpe").save_pretrained(tmp_path / "base")
    config = PipelineConfig.model_validate(
        {
            "run_root": str(tmp_path),
            "sources": [{"name": "s", "path": "x.json"}],
            "model": {"path": str(tmp_path / "base")},
            "split": {"chat_template": "vicuna"},
        }
    )
    with pytest.raises(
        ConfigError, match=r"give a Jinja file or one of alpaca, chatml, .*vicuna-v1\.1, zephyr"
    ):
        load_tokenizer(config)
