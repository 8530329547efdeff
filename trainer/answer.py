"""Answers of a loaded model: prompts of token ids in, texts out; one at a time or side by side, with a KV cache.

    answer(model, tokenizer, messages, sampling)         one assistant turn, streamed where asked
    answer_prompts(model, tokenizer, prompts, ...)       several, padded on the left: each as if it were alone

A model's own generation_config.json does not steer here (it may ask for sampling or repetition penalties): greedy
is greedy; only its end tokens count. Draws hang on a prompt's own seed, never on what stands beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from schemas.conversation import blake2b_128
from schemas.errors import ConfigError, InputError
from trainer.attention import unwrapped
from trainer.prompts import Messages, chat_encoder, encode_prompt
from trainer.virtual_tokens import generated_positions, num_virtual_positions

Write: TypeAlias = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the likeliest each time, and `seed` has no part."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    """Draw from the likeliest so many; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest that have this share of the probability together."""
    seed: int = 0
    num_beams: int = 1
    """Beam search over so many; 1: none."""

    def __post_init__(self) -> None:
        if not (self.max_new_tokens > 0 and self.temperature >= 0 and self.top_k >= 0 and self.num_beams > 0):
            raise ConfigError(f"{self}: expected numbers above 0, of temperature and top_k from 0 on")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, expected above 0 and up to 1")
        if self.num_beams > 1 and self.temperature > 0:
            raise ConfigError(
                "beams are for temperature 0: they look for the likeliest answer, and draw nothing"
            )


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer; `is_finished` once the model itself ended it, false where it was cut off."""

    text: str
    num_tokens: int
    is_finished: bool


def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    sampling: Sampling,
    *,
    on_text: Write | None = None,
) -> str:
    """The assistant's next turn. `model` uses plain attention; `on_text` gets the text while it is made.

    Raises InputError when the template refuses the messages or the prompt fills the model's context.
    """
    prompts = [encode_prompt(tokenizer, messages)]
    answered = answer_prompts(model, tokenizer, prompts, sampling, seeds=[sampling.seed], on_text=on_text)
    return answered[0].text


def answer_prompts(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seeds: Sequence[int],
    on_text: Write | None = None,
) -> list[Answered]:
    """Answers to prompts of token ids, in their order, all with the room that the longest leaves.

    Raises InputError when that one fills the model's context.
    """
    num_prompt = max(map(len, prompts))
    num_new = room(model, sampling, num_prompt)
    stops = stop_token_ids(model, tokenizer)
    inputs, mask = _padded_left(prompts, _pad_id(tokenizer, stops), unwrapped(model).device)
    with torch.inference_mode(), _own_settings_aside(model), generated_positions():
        generated: Any = model.generate(  # type: ignore[operator]
            input_ids=inputs,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=num_new,
                eos_token_id=stops or None,
                pad_token_id=_pad_id(tokenizer, stops),
                num_beams=sampling.num_beams,
                do_sample=False,
                use_cache=True,
            ),
            logits_processor=_draws(sampling, seeds, num_prompt, num_new, inputs.device),
            streamer=PieceStreamer(tokenizer, on_text) if on_text is not None else None,
        )
    return [_answered(tokenizer, ids, stops) for ids in generated[:, num_prompt:].tolist()]


def room(model: torch.nn.Module, sampling: Sampling, num_prompt: int) -> int:
    """How long an answer to so many tokens may become. Raises InputError when there is no room for one."""
    limit = getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)
    num_prompt += num_virtual_positions(model)
    left = sampling.max_new_tokens if limit is None else min(sampling.max_new_tokens, limit - num_prompt)
    if left < 1:
        raise InputError(f"the prompt has {num_prompt} tokens and the model reads {limit}: shorten it")
    return left


def can_be_padded(model: torch.nn.Module) -> bool:
    """Whether padding on the left leaves an answer what it is alone.

    Virtual tokens stand before the padding, so that the distance between them and the prompt would grow with it.
    """
    settings: Any = getattr(model, "active_peft_config", None)
    return settings is None or not (settings.is_prompt_learning or settings.is_adaption_prompt)


def stop_token_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End tokens of a loaded model."""
    return end_token_ids(tokenizer, getattr(unwrapped(model).generation_config, "eos_token_id", None))


def end_token_ids(tokenizer: PreTrainedTokenizerBase, configured: int | list[int] | None) -> list[int]:
    """The tokenizer's, those of a generation_config.json, and those the template writes after an answer."""
    encoder = chat_encoder(tokenizer)
    written = [encoder.control_ids.get(token) for token in encoder.template.end_tokens]
    several = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in (tokenizer.eos_token_id, *several, *written) if token is not None})


def seed_of(seed: int, number: int) -> int:
    """The seed of one prompt of many."""
    return int(blake2b_128(f"{seed}:{number}".encode())[:15], 16)


# Inputs and outputs -----------------------------------------------------------------------------------------


def _pad_id(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> int:
    pad_id = tokenizer.pad_token_id
    return int(pad_id) if pad_id is not None else next(iter(stops), 0)


def _padded_left(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [prompts, longest]: ids, and 1 where there are any. Answers begin in the same column."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _answered(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Sequence[int]) -> Answered:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    said = ids if end is None else ids[: end + 1]
    text = str(tokenizer.decode(said, **_DECODING))
    # Templates like "ASSISTANT: answer" train the blank with the answer; it is no part of what was said.
    return Answered(
        text.removeprefix(chat_encoder(tokenizer).template.lead), len(said), is_finished=end is not None
    )


_DECODING: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


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


class PieceStreamer(TextStreamer):
    """Hands each finished piece of text to a function in place of stdout, without the template's lead."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, **_DECODING)
        self._write = write
        self._lead = chat_encoder(tokenizer).template.lead
        self._held = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._held += text
        if len(self._held) >= len(self._lead) or stream_end:
            self._write(self._held.removeprefix(self._lead))
            self._held, self._lead = "", ""


# Draws ------------------------------------------------------------------------------------------------------


def _draws(
    sampling: Sampling, seeds: Sequence[int], num_prompt: int, num_new: int, device: torch.device
) -> LogitsProcessorList:
    """Nothing for temperature 0. Else the library's own warpers, and a draw in place of its likeliest token."""
    if sampling.temperature == 0:
        return LogitsProcessorList()
    steps: list[LogitsProcessor] = [_Draw(sampling, seeds, num_prompt, num_new, device)]
    return LogitsProcessorList(steps)


class _Draw(LogitsProcessor):
    """Leaves one token a row: the one that the row's own number falls on, by its probability."""

    def __init__(
        self, sampling: Sampling, seeds: Sequence[int], num_prompt: int, num_new: int, device: torch.device
    ) -> None:
        self._temperature = sampling.temperature
        self._warpers: list[Any] = []
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        draws = [torch.rand(num_new, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self._numbers = torch.stack(draws).to(device)
        self._num_prompt = num_prompt
        # Sums over a large vocabulary; Apple's GPUs have no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        warped = scores.float() / self._temperature
        for warp in self._warpers:
            warped = warp(input_ids, warped)
        sums = warped.softmax(dim=-1, dtype=self._dtype).cumsum(dim=-1)
        numbers = self._numbers[:, input_ids.shape[1] - self._num_prompt, None].to(self._dtype)
        chosen = torch.searchsorted(sums, numbers * sums[:, -1:], right=True)
        chosen = chosen.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)
