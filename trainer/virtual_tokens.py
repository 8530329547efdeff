"""Padded rows through a model: with the virtual tokens that an adapter puts before each of them.

Padding stands behind a document, where causal attention does not look: no mask is needed. Virtual tokens take the
first positions and the document goes on after them, as in PEFT's own forward pass, which generation uses.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.attention import unwrapped

PREPENDED_TYPES = ("PROMPT_TUNING", "P_TUNING")
"""PEFT's names of adapters whose virtual tokens are embeddings before those of the row."""


def padded_hidden_states(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """What the LM head would see, row after row: `input_ids` [D, L] -> [D x L, hidden size].

    `model` uses plain attention.
    """
    before = num_prepended_tokens(model)
    hidden: torch.Tensor = (
        unwrapped(model).base_model(**_inputs(model, input_ids), use_cache=False).last_hidden_state
    )
    return hidden[:, before:].flatten(0, 1)


def needs_padded_rows(model: torch.nn.Module) -> bool:
    """Whether an adapter gives tokens to each row: packed, the first document alone would have them."""
    return _settings(model) is not None


def num_prepended_tokens(model: torch.nn.Module) -> int:
    """Tokens that stand before the row's own in every layer's input."""
    settings = _settings(model)
    is_so = settings is not None and settings.peft_type in PREPENDED_TYPES
    return int(settings.num_virtual_tokens) if is_so else 0


def num_virtual_positions(model: torch.nn.Module) -> int:
    """Positions that virtual tokens take before the first token of a row."""
    settings = _settings(model)
    return int(settings.num_virtual_tokens) if settings is not None and settings.is_prompt_learning else 0


@contextmanager
def generated_positions() -> Iterator[None]:
    """PEFT says that it leaves out the positions that transformers' generate() hands it, and counts them itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)
        yield


def _inputs(model: torch.nn.Module, input_ids: torch.Tensor) -> dict[str, Any]:
    settings = _settings(model)
    if settings is None or not settings.is_prompt_learning:
        return {"input_ids": input_ids}
    prompt: Any = model.get_prompt(len(input_ids))  # type: ignore[operator]
    if settings.peft_type == "PREFIX_TUNING":
        return {"input_ids": input_ids, "past_key_values": prompt}
    embedded = unwrapped(model).get_input_embeddings()(input_ids)
    return {"inputs_embeds": torch.cat([prompt.to(embedded.dtype), embedded], dim=1)}


def _settings(model: torch.nn.Module) -> Any:
    """Of the active adapter, where it works by virtual tokens."""
    settings: Any = getattr(model, "active_peft_config", None)
    has_tokens = settings is not None and (settings.is_prompt_learning or settings.is_adaption_prompt)
    return settings if has_tokens else None
