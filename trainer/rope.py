"""Rotary positions stretched over a longer range: model.rope_scaling, written into a model's config.

Light: no torch. Sources: Chen et al., Extending Context Window of Large Language Models via Positional Interpolation
(2023), linear; Peng et al., YaRN (2023); Llama Team, The Llama 3 Herd of Models (2024). dynamic is linear's cousin
that changes the base of the angles with the length of what is read.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from schemas.errors import RefusedError
from schemas.training_config import RopeScalingConfig

LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""As in Llama 3.1: angles that turn less than once over the old range are stretched, above four times they stay."""


def scale_rope(config: Any, scaling: RopeScalingConfig) -> None:
    """Change the config of a language model in place. Layers of a sliding window see no far positions: they stay.

    Raises RefusedError for a model without rotary positions.
    """
    text = config.get_text_config()
    if not getattr(text, "rope_parameters", None):
        raise RefusedError(
            f"model.rope_scaling is {scaling.type}, model type {text.model_type!r} has no rotary positions; leave it out"
        )
    positions = text.max_position_embeddings
    chosen: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type in ("yarn", "llama3"):
        chosen["original_max_position_embeddings"] = positions
    if scaling.type == "llama3":
        chosen |= LLAMA3_BANDS
    entries = text.rope_parameters
    nested = {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
    if nested:
        text.rope_parameters = entries | {"full_attention": nested["full_attention"] | chosen}
    else:
        text.rope_parameters = entries | chosen
    if scaling.type != "dynamic":  # it tells by this number where the old range ends
        text.max_position_embeddings = scaled_positions(positions, scaling)


def scaled_positions(positions: int, scaling: RopeScalingConfig | None) -> int:
    return positions if scaling is None else int(positions * scaling.factor)


def rope_types(architecture: Mapping[str, Any]) -> Iterator[str]:
    """Of a model's config.json, older or newer; nothing for what is not scaled."""
    found = architecture.get("rope_parameters") or architecture.get("rope_scaling") or {}
    entries = [entry for entry in found.values() if isinstance(entry, dict)] or [found]
    for entry in entries:
        name = entry.get("rope_type") or entry.get("type") or "default"
        if name != "default":
            yield str(name)
