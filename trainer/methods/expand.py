"""Added layers: copies of some layers are set behind them, write nothing at first, and are all that is trained.

The first step so begins with the base model's own losses. What is saved is an ordinary model of more layers. Source:
Wu et al., LLaMA Pro: Progressive LLaMA with Block Expansion (2024).
"""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from schemas.errors import ConfigError, RefusedError
from schemas.training_config import TrainConfig
from trainer.decoder_layers import decoder_layers
from trainer.layer_names import copied_layers
from trainer.methods import full

OUTPUT_FOLDER = full.OUTPUT_FOLDER
NEEDS_WEIGHTS = True
save = full.save
saved_names = full.saved_names

LISTS_OF_LAYERS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""In a model's config, with an entry for each layer."""
WRITERS = (
    # Families that normalise what a block has computed before they add it.
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("self_attn.o_proj", "mlp.down_proj"),
)
"""The last modules of a layer's two blocks: with these at 0 a layer adds nothing. The first pair that is there."""


def apply(model: PreTrainedModel, train: TrainConfig) -> PreTrainedModel:
    """Raises ConfigError for more new layers than there are, RefusedError for a family that this can't be done to."""
    _, layers = decoder_layers(model)
    if train.expand.new_layers > len(layers):
        raise ConfigError(
            f"train.expand.new_layers is {train.expand.new_layers}, the model has {len(layers)} layers; set "
            f"{len(layers)} or fewer"
        )
    model.requires_grad_(False)
    copied = copied_layers(len(layers), train.expand.new_layers)
    for number in reversed(copied):
        layers.insert(number + 1, _silent_copy(layers[number], model))
    for number, layer in enumerate(layers):
        _set_number(layer, number)
    _extend_config(model.config.get_text_config(), copied)
    _check_built_alike(model, layers)
    return model


def _silent_copy(layer: torch.nn.Module, model: PreTrainedModel) -> torch.nn.Module:
    # The config stays one for all layers: what is switched in it later, as attention is, holds for the new ones too.
    configs = (model.config, model.config.get_text_config())
    new = copy.deepcopy(layer, {id(config): config for config in configs}).requires_grad_(True)
    for name in _writers(new):
        _silence(new.get_submodule(name))
    return new


def _writers(layer: torch.nn.Module) -> tuple[str, str]:
    names = {name for name, _ in layer.named_modules()}
    for pair in WRITERS:
        if names.issuperset(pair):
            return pair
    raise RefusedError(
        f"{type(layer).__name__} has none of {', '.join(' and '.join(pair) for pair in WRITERS)}, one of which ends "
        "its blocks in the families that method expand knows; use method lora or freeze"
    )


@torch.no_grad()
def _silence(module: torch.nn.Module) -> None:
    """Make it give 0 whatever comes in: a linear layer, or a norm that multiplies by its weight or by 1 + weight."""
    for parameter in module.parameters():
        parameter.zero_()
    weight = module.get_parameter("weight")
    if bool(module(torch.ones(1, weight.shape[-1], dtype=weight.dtype, device=weight.device)).any()):
        weight.fill_(-1)


def _set_number(layer: torch.nn.Module, number: int) -> None:
    """Caches go by it."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            vars(module)["layer_idx"] = number


def _extend_config(config: Any, copied: list[int]) -> None:
    for name in LISTS_OF_LAYERS:
        entries = getattr(config, name, None)
        if isinstance(entries, list) and len(entries) == config.num_hidden_layers:
            setattr(config, name, [e for n, e in enumerate(entries) for _ in range(1 + (n in copied))])
    config.num_hidden_layers += len(copied)


def _check_built_alike(model: PreTrainedModel, layers: torch.nn.ModuleList) -> None:
    """What is saved will be built from its config: each layer as it is here.

    Some families say with every how manieth layer what is special about it: there a copy would be built as another.
    """
    with torch.device("meta"):
        built = decoder_layers(AutoModelForCausalLM.from_config(model.config))[1]
    for number, (ours, theirs) in enumerate(zip(layers, built, strict=True)):
        if odd := sorted(_facts(ours).items() ^ _facts(theirs).items(), key=str):
            raise RefusedError(
                f"{type(model).__name__} builds layer {number} by its number, otherwise than the layer that method "
                f"expand copied ({odd[0]}); use method lora or freeze"
            )


def _facts(layer: torch.nn.Module) -> dict[str, Any]:
    """Kinds, shapes and plain settings of a layer's modules."""
    found: dict[str, Any] = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    for path, module in layer.named_modules():
        found[f"{path} is"] = type(module).__name__
        for name, value in vars(module).items():
            is_setting = isinstance(value, (str, bool, int, float)) and not name.startswith("_")
            if is_setting and name not in _OF_NO_ACCOUNT:
                found[f"{path}.{name}"] = value
    return found


_OF_NO_ACCOUNT = frozenset({"training", "gradient_checkpointing"})
"""They are switched, and belong to no kind of layer."""
