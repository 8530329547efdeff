"""Rows for new tokens, model.new_tokens: added to embedding and head, begun as the mean of the others, and trained.

With full tuning they are rows as all others. With LoRA only they are trained of their matrices, as PEFT's trainable
token indices: the adapter holds their rows alone, and lies over a base whose embedding was made as large.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import PreTrainedModel

NEW_TOKEN_IDS = "new_token_ids"
"""Attribute of a model: the rows that are to be trained."""


@torch.no_grad()
def add_rows(model: PreTrainedModel, ids: Sequence[int], *, num_known: int) -> None:
    """Make room for ids up to the largest one, and let those that are not of the first `num_known` begin as the mean
    of these.
    """
    num_rows = len(model.get_input_embeddings().get_parameter("weight"))
    num_wanted = max(num_rows, *(number + 1 for number in ids))
    if num_wanted > num_rows:
        model.resize_token_embeddings(num_wanted, mean_resizing=False)
    fresh = sorted({number for number in ids if number >= num_known} | {*range(num_rows, num_wanted)})
    for weight in _weights_by_token(model):
        # Rows that no token has are often 0, so they don't count.
        weight[fresh] = weight[: min(num_known, num_rows)].float().mean(dim=0).to(weight.dtype)
    vars(model)[NEW_TOKEN_IDS] = sorted(ids)


def _weights_by_token(model: PreTrainedModel) -> list[torch.Tensor]:
    """Embedding, head and its bias; one matrix once."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    parameters = [embedding.weight, *(head.parameters() if head is not None else ())]
    return list(dict.fromkeys(parameters))


def trained_rows(model: PreTrainedModel, whole_modules: Sequence[str]) -> dict[str, list[int]] | None:
    """PEFT's trainable_token_indices: by module, but for those that are trained whole."""
    ids: list[int] | None = vars(model).get(NEW_TOKEN_IDS)
    if not ids:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is None or head.weight is embedding.weight
    wanted = [embedding] if is_tied else [embedding, head]
    names = {module: name for name, module in model.named_modules()}
    found = [names[module] for module in wanted if not names[module].endswith(tuple(whole_modules) or "/")]
    return {name.rpartition(".")[2]: ids for name in found} or None


def compute_rows_apart(model: torch.nn.Module) -> None:
    """PEFT copies the whole matrix in each pass to put the new rows into it; here they are looked up beside it."""
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            is_head = isinstance(layer.base_layer, torch.nn.Linear)
            layer.forward = functools.partial(_head if is_head else _embedding, layer)  # type: ignore[method-assign]


def _rows(layer: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    name = layer.active_adapters[0]
    ids = torch.tensor(layer.token_indices[name], device=like.device)
    return ids, layer.trainable_tokens_delta[name]


def _is_plain(layer: Any) -> bool:
    return layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1


def _embedding(layer: Any, tokens: torch.Tensor) -> torch.Tensor:
    if _is_plain(layer):
        return layer.forward_adapters(tokens, layer.active_adapters)
    ids, rows = _rows(layer, tokens)
    output = layer.base_layer(tokens)
    places = torch.searchsorted(ids, tokens).clamp_(max=len(ids) - 1)
    own = F.embedding(places, rows.to(output.dtype))
    scale = layer._get_embed_scale()
    own = own if scale is None else own * scale.to(output.dtype)
    return torch.where((ids[places] == tokens)[..., None], own, output)


def _head(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    if _is_plain(layer):
        return layer.forward_adapters(hidden, layer.active_adapters)
    ids, rows = _rows(layer, hidden)
    own = F.linear(
        hidden, rows.to(hidden.dtype), None if layer.base_layer.bias is None else layer.base_layer.bias[ids]
    )
    return layer.base_layer(hidden).index_copy(-1, ids, own)
