"""Where the decoder layers of a model stand."""

import torch

from trainer.attention import unwrapped


def decoder_layers(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """The list of layers that holds the most weights, and its name in the model without a PEFT wrapper."""
    lists = [(n, m) for n, m in unwrapped(model).named_modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))
