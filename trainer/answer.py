"""A trained model's answer to a chat: loaded for generation, prompted by training's template, decoded to text.

    load_for_generation(config, "promoted")    the model in service; also "current", "none", or a folder
    answer(model, tokenizer, messages, ...)    one assistant turn, greedy unless a temperature is given

A model's own generation_config.json does not steer here (it may ask for sampling or repetition penalties): greedy
is greedy; only its end tokens count. What a user typed is text, as in training: `<|im_end|>` in a question is not
the end of the turn.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from pipelines.encode import ChatEncoder, build_encoder, encode
from pipelines.render import Rendered, render
from pipelines.templates import TEMPLATE_ERRORS, render_text
from schemas.conversation import Drop, Message
from schemas.errors import InputError
from schemas.evaluation import TrainedModel
from schemas.pipeline_config import PipelineConfig
from trainer.attention import unwrapped, use_plain_attention
from trainer.model import (
    base_digest,
    load_adapter,
    load_base_model,
    load_tokenizer,
    needed_model,
)
from trainer.service import check_trained_model, find_candidate, find_promoted

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Write: TypeAlias = Callable[[str], object]

# Models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to answer. `description` names it for people."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    description: str

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "disable_adapter")


def load_for_generation(config: PipelineConfig, adapter: str | Path = "promoted") -> LoadedModel:
    """The model in service ("promoted"), the newest training ("current"), the base ("none"), or a folder.

    A folder holds an adapter, a whole model, or a training with one of them. Raises InputError when there is
    nothing of that name or it belongs to another base model, IntegrityError when its files were changed.
    """
    folder, description = _chosen_folder(config, adapter)
    model = load_with_adapter(config, folder)
    use_plain_attention(model)
    return LoadedModel(model.eval(), load_tokenizer(config), description)


def load_with_adapter(config: PipelineConfig, folder: Path | None) -> torch.nn.Module:
    """The base model, the base with the adapter in `folder`, or the whole model in `folder`; packed attention.

    All in the form of train.base: a card that trains an 8-bit base may not hold more.
    """
    settings, base = needed_model(config), config.train.base
    if folder is None:
        return load_base_model(settings, base=base)
    if (folder / "adapter_config.json").is_file():
        return load_adapter(load_base_model(settings, base=base), folder)
    # What the settings change in the base stands in its own config and weights.
    own = {"path": str(folder), "revision": None, "init": "files", "rope_scaling": None, "new_tokens": []}
    whole = settings.model_copy(update=own)
    return load_base_model(whole, base=base)


def check_base(config: PipelineConfig, trained: TrainedModel) -> None:
    """Raises InputError when an adapter was trained on another base model than the config names."""
    settings = needed_model(config)
    found = base_digest(settings)
    if trained.kind == "adapter" and found != trained.base_digest:
        raise InputError(
            f"{trained.path} was trained on another base model (digest {trained.base_digest[:12]}) than "
            f"{settings.path} ({found[:12]}): set model.path to that one, or use a new run_root"
        )


def _chosen_folder(config: PipelineConfig, adapter: str | Path) -> tuple[Path | None, str]:
    if adapter == "none":
        return None, f"base model {needed_model(config).path}"
    if adapter not in ("promoted", "current"):
        return _named_folder(Path(adapter)), str(adapter)
    trained = find_promoted(config.run_root) if adapter == "promoted" else find_candidate(config.run_root)
    if trained is None:
        raise InputError(
            f"no model is in service in {config.run_root}: run `sft-pipeline promote`, or take the newest "
            "training with --adapter current, or the base model with --adapter none"
        )
    check_base(config, trained)
    return check_trained_model(config.run_root, trained), f"{adapter} {trained.kind} {trained.path}"


def _named_folder(folder: Path) -> Path:
    for place in (folder, folder / "adapter", folder / "model"):
        if (place / "adapter_config.json").is_file() or (place / "config.json").is_file():
            return place
    raise InputError(
        f"{folder} holds neither an adapter (adapter_config.json) nor a model (config.json); "
        "give such a folder, or promoted, current or none"
    )


# One answer -------------------------------------------------------------------------------------------------


def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Write | None = None,
) -> str:
    """The assistant's next turn. Temperature 0 takes the likeliest token each time, and `seed` has no part.

    `model` uses plain attention. `on_text` gets the text piece by piece while it is made. Raises InputError
    when the template refuses the messages or the prompt fills the model's context.
    """
    prompt_ids = encode_prompt(tokenizer, messages)
    settings = _generation_settings(model, tokenizer, max_new_tokens, temperature, num_prompt=len(prompt_ids))
    device = unwrapped(model).device
    inputs = torch.tensor([prompt_ids], device=device)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(),
        _own_settings_aside(model),
    ):
        torch.manual_seed(seed)
        generated: Any = model.generate(  # type: ignore[operator]
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=settings,
            streamer=_Streamer(tokenizer, on_text) if on_text is not None else None,
        )
    text = _decoded(tokenizer, generated[0, len(prompt_ids) :].tolist())
    # Templates like "ASSISTANT: answer" train the blank with the answer; it is no part of what was said.
    return text.removeprefix(_encoder(tokenizer, tokenizer.get_chat_template()).template.lead)


def _generation_settings(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    *,
    num_prompt: int,
) -> GenerationConfig:
    limit = getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - num_prompt)
    if room < 1:
        raise InputError(f"the prompt has {num_prompt} tokens and the model reads {limit}: shorten it")
    stop_ids = stop_token_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=room,
        eos_token_id=stop_ids or None,
        pad_token_id=pad_id if pad_id is not None else next(iter(stop_ids), 0),
        use_cache=True,
        **sampling,
    )


def stop_token_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End tokens: the tokenizer's, generation_config.json's, and those the template writes after an answer."""
    encoder = _encoder(tokenizer, tokenizer.get_chat_template())
    written = [encoder.control_ids.get(token) for token in encoder.template.end_tokens]
    configured = getattr(unwrapped(model).generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in (tokenizer.eos_token_id, *several, *written) if token is not None})


@contextmanager
def _own_settings_aside(model: torch.nn.Module) -> Iterator[None]:
    """generate() fills whatever a call leaves unset from the model's own generation config."""
    causal_lm = unwrapped(model)
    own = causal_lm.generation_config
    causal_lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        causal_lm.generation_config = own


# Text and tokens --------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of a chat up to where the assistant begins to speak.

    Equal to the tokenizer's own apply_chat_template, unless a message holds a control string: that stays text.
    """
    try:
        encoder = _encoder(tokenizer, tokenizer.get_chat_template())
        chat = [Message(message["role"], message["content"]) for message in messages]
        text = render_text(encoder.template, chat, add_generation_prompt=True)
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"character {error.start} of the prompt is no Unicode: {error.reason}") from None
    except TEMPLATE_ERRORS as error:
        raise InputError(f"the chat template refuses these messages: {_one_line(error)}") from error
    if not any(encoder.template.control_pattern.search(message.content) for message in chat):
        return list(encoder.backend.encode(text, add_special_tokens=False).ids)
    rendered = _with_generation_prompt(encoder, render(encoder.template, chat), text)
    encoded = encode(encoder, rendered) if isinstance(rendered, Rendered) else rendered
    if isinstance(encoded, Drop):
        raise InputError(f"these messages hold control strings: {encoded.reason}: {encoded.detail}")
    return [int(token) for token in encoded.ids]


def _with_generation_prompt(encoder: ChatEncoder, chat: Rendered | Drop, text: str) -> Rendered | Drop:
    """The proved rendering of the chat, and behind it what the template wrote for the answer to come."""
    if isinstance(chat, Drop):
        return chat
    if not text.startswith(chat.text):
        return Drop(
            "template_changes_text", "with the generation prompt the chat itself is written otherwise"
        )
    found = list(encoder.template.control_pattern.finditer(text, len(chat.text)))
    places = np.array([match.span() for match in found], np.int64).reshape(-1, 2)
    return Rendered(
        text=text,
        spans=chat.spans,
        control_spans=np.concatenate([chat.control_spans, places]),
        control_tokens=(*chat.control_tokens, *(match.group() for match in found)),
        message_spans=chat.message_spans,
    )


@lru_cache(maxsize=4)
def _encoder(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> ChatEncoder:
    """Built once per tokenizer and template: it compiles the template and learns how its answers end."""
    return build_encoder(tokenizer)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, **_DECODING))


_DECODING: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


class _Streamer(TextStreamer):
    """Hands each finished piece of text to a function in place of stdout."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, **_DECODING)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text that is safe on a terminal: escape sequences and direction marks could hide or rewrite lines."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
