"""One device holds everything."""

import torch


def place(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model on that device, in training mode."""
    return model.to(device).train()
