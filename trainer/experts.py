"""How a model's config says that it has experts. Light: no torch.

Families have no name in common for the number of them, and a new family's is added here for all who ask.
"""

from collections.abc import Mapping
from typing import Any

NUM_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def has_experts(architecture: Mapping[str, Any]) -> bool:
    """By what config.json holds. Layers of experts lie in the files under other names than in the model."""
    return any(architecture.get(name) for name in NUM_EXPERTS_NAMES)
