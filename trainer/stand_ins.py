"""Stand-ins: tensors with the shape, dtype and device of a weight, and no memory behind them.

A model of stand-ins goes through all that is done to a model before it computes; what keeps its weights in parts
reads each part when it knows which.
"""

from collections.abc import Callable

import torch


def stand_in(parameter: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU of that shape whose numbers all lie in one place: it takes no memory.

    It has a device and a dtype, so that PEFT draws its fresh matrices on the CPU and keeps them.
    """
    return torch.empty((), dtype=parameter.dtype).expand(parameter.shape)


def is_stand_in(tensor: torch.Tensor) -> bool:
    return tensor.dim() > 0 and tensor.device.type == "cpu" and not any(tensor.stride())


def change_parameters(
    model: torch.nn.Module, change: Callable[[torch.nn.Parameter], torch.Tensor | None]
) -> None:
    """Put change(parameter) in the place of each parameter that it is not None for. Shared ones stay shared."""
    changed: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in changed:
                tensor = change(parameter)
                changed[parameter] = (
                    torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                    if tensor is not None
                    else parameter
                )
            setattr(module, name, changed[parameter])
