"""Which decoder layers can be computed as one, and taking them over in place.

Modules, parameters and their names stay; a layer's forward is replaced, and what the replacement can't do (caches,
masks, another attention than the packed one, several rows) goes to the layer's own.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface

from trainer.attention import PACKED_ATTENTION, PACKED_BY_DOCUMENT
from trainer.fast.layer import FastLayer, Heads, Manner, Norm, Row, run_layer
from trainer.fast.pointwise import Activation
from trainer.fast.products import Group, Member, build, can_group, member_of
from trainer.strategies.pipeline import decoder_layers

BORDER_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Family(NamedTuple):
    """Where the parts of a decoder layer are, by their names in it."""

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    before_mlp: str = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None
    has_head_norms: bool = False
    has_offset_norms: bool = False


LLAMA = Family()
FAMILIES: dict[str, Family] = {
    "LlamaDecoderLayer": LLAMA,
    "MistralDecoderLayer": LLAMA,
    "Qwen2DecoderLayer": LLAMA,
    "Qwen3DecoderLayer": Family(has_head_norms=True),
    "Phi3DecoderLayer": Family(qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "Gemma3DecoderLayer": Family(
        before_mlp="pre_feedforward_layernorm",
        after_attention="post_attention_layernorm",
        after_mlp="post_feedforward_layernorm",
        has_head_norms=True,
        has_offset_norms=True,
    ),
}
"""By the name of transformers' class. A family is added here once its gradients are compared."""


@dataclass(slots=True, eq=False)
class Taken:
    """Layers of a model that are computed as one."""

    num_layers: int
    manner: Manner
    layers: dict[int, torch.nn.Module] = field(default_factory=dict)
    """By their places in the model."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why others are not."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In here the layers compute their own way."""
        own = {number: vars(layer).pop("forward") for number, layer in self.layers.items()}
        try:
            yield
        finally:
            for number, forward in own.items():
                self.layers[number].forward = forward  # type: ignore[method-assign]

    def __str__(self) -> str:
        words = f"{len(self.layers)} of {self.num_layers} decoder layers computed as one"
        if self.reasons:
            reason, count = self.reasons.most_common(1)[0]
            words += f"; {count} are not: {reason}"
        return words


def take_over(model: torch.nn.Module, manner: Manner) -> Taken:
    """Take over the layers that can be. The model is on its device; its weights move into groups, layer by layer."""
    _, layers = decoder_layers(model)
    taken = Taken(len(layers), manner)
    first: FastLayer | None = None
    for number, layer in enumerate(layers):
        parts = parts_of(layer)
        if isinstance(parts, str):
            taken.reasons[parts] += 1
            continue
        fast = _fast_layer(number, layer, parts)
        if first is None:
            first = fast
        else:
            first.also_refreshed.extend(fast.groups)
        taken.layers[number] = layer
        layer.gradient_checkpointing = False  # type: ignore[assignment]  # `manner` says what is kept
        layer.forward = functools.partial(_forward, layer, fast, manner)  # type: ignore[method-assign]
        _release_copies(layer)
    return taken


def give_back(taken: Taken, *, checkpointing: bool) -> None:
    """Let the layers compute their own way again; their weights stay where they are."""
    for layer in taken.layers.values():
        vars(layer).pop("forward", None)
        layer.gradient_checkpointing = checkpointing  # type: ignore[assignment]


def _release_copies(layer: torch.nn.Module) -> None:
    # The pieces that a weight has left are smaller than what the next one needs: kept, they would be lost.
    if next(layer.parameters()).is_cuda:
        torch.cuda.empty_cache()


def _forward(
    layer: torch.nn.Module,
    fast: FastLayer,
    manner: Manner,
    hidden_states: torch.Tensor,
    *others: Any,
    **options: Any,
) -> Any:
    row = _row(layer, fast, hidden_states, others, options)
    if row is None:
        return type(layer).forward(layer, hidden_states, *others, **options)
    # The gradient of hidden_states[0] would be zeros with a copy in them.
    return run_layer(fast, manner, hidden_states.squeeze(0), row)[None]


def _row(
    layer: torch.nn.Module,
    fast: FastLayer,
    hidden: torch.Tensor,
    others: tuple[Any, ...],
    options: dict[str, Any],
) -> Row | None:
    """None for what the layer has to do its own way."""
    name = fast.attention.config._attn_implementation  # type: ignore[union-attr]
    asked = [options.get(key) for key in ("attention_mask", "past_key_values", "output_attentions")]
    positions = options.get("position_embeddings")
    if (
        others
        or name not in (PACKED_ATTENTION, PACKED_BY_DOCUMENT)
        or any(value is not None and value is not False for value in asked)
        or positions is None
        or options.get("cu_seq_lens_q") is None
        or len(hidden) != 1
        or positions[0].shape[-1] != fast.heads.size
        or not _adapters_are_on(layer)
    ):
        return None
    borders = {key: options[key] for key in BORDER_NAMES if key in options}
    return Row(positions[0][0], positions[1][0], AttentionInterface()[name], borders)


def _adapters_are_on(layer: torch.nn.Module) -> bool:
    return not any(getattr(part, "disable_adapters", False) for part in layer.modules())


# Parts of a layer -------------------------------------------------------------------------------------------

Parts = dict[str, list[Member]]


def parts_of(layer: torch.nn.Module) -> Parts | str:
    """The members of each group, or why the layer can't be taken over."""
    family = FAMILIES.get(type(layer).__name__)
    if family is None:
        return f"{type(layer).__name__} is no family that is written out"
    problem = _problem(layer)
    if problem is not None:
        return problem
    places = {
        "qkv": (layer.self_attn, family.qkv),
        "o": (layer.self_attn, ("o_proj",)),
        "gate_up": (layer.mlp, family.gate_up),
        "down": (layer.mlp, ("down_proj",)),
    }
    parts: Parts = {}
    for group, (parent, names) in places.items():
        members = [member_of(getattr(parent, name)) for name in names]
        known = [member for member in members if member is not None]
        if len(known) < len(members) or not can_group(known):
            return "adapters with dropout, DoRA, a bias or another dtype, weights of other forms, or trained ones"
        parts[group] = known
    if not any(member.adapter for members in parts.values() for member in members):
        return "it has no adapter"
    return parts


def _problem(layer: Any) -> str | None:
    config = layer.self_attn.config
    if _activation(config) is None:
        return "another activation"
    if getattr(config, "attention_dropout", 0.0) or getattr(config, "resid_pdrop", 0.0):
        return "dropout"
    if getattr(layer.self_attn, "attn_logit_softcapping", None) is not None:
        return "capped attention"
    if not getattr(layer.self_attn, "is_causal", True):
        return "attention that is not causal"
    own = [p for name, p in layer.named_parameters() if ".lora_" not in name]
    return "its own weights are trained" if any(weight.requires_grad for weight in own) else None


def _activation(config: Any) -> Activation | None:
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return ACTIVATIONS.get(str(name))


def _fast_layer(number: int, layer: Any, parts: Parts) -> FastLayer:
    family, attention = FAMILIES[type(layer).__name__], layer.self_attn
    config = attention.config
    activation = _activation(config)
    assert activation is not None, "asked in parts_of"
    groups: dict[str, Group] = {name: build(members) for name, members in parts.items()}
    norm: Callable[[str | None], Norm | None] = functools.partial(_norm, layer, family)
    before_attention, before_mlp = norm("input_layernorm"), norm(family.before_mlp)
    assert before_attention is not None
    assert before_mlp is not None
    return FastLayer(
        number=number,
        attention=attention,
        heads=Heads(config.num_attention_heads, config.num_key_value_heads, attention.head_dim),
        scaling=attention.scaling,
        window=_window(attention),
        activation=activation,
        qkv=groups["qkv"],
        o=groups["o"],
        gate_up=groups["gate_up"],
        down=groups["down"],
        before_attention=before_attention,
        before_mlp=before_mlp,
        after_attention=norm(family.after_attention),
        after_mlp=norm(family.after_mlp),
        of_queries=_norm(attention, family, "q_norm") if family.has_head_norms else None,
        of_keys=_norm(attention, family, "k_norm") if family.has_head_norms else None,
    )


def _norm(parent: Any, family: Family, name: str | None) -> Norm | None:
    if name is None:
        return None
    module = getattr(parent, name)
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module.weight.detach(), float(eps), family.has_offset_norms)


def _window(attention: Any) -> int | None:
    """As the family's own attention says it: on itself, or in the config where all layers are alike."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    if type(attention).__name__ in ("MistralAttention", "Phi3Attention"):
        return getattr(attention.config, "sliding_window", None)
    return None
