"""One process over all visible cards: decoder layers lie on them in order, and hidden states go from card to card.

For models that fit no single card, and to debug: no process waits for another one. One card computes at a time, so
it is no faster than one. All but the decoder layers lies on the first card, where batches come and the loss is
computed.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from schemas.training_config import BaseForm, TrainConfig
from trainer.attention import unwrapped
from trainer.decoder_layers import decoder_layers
from trainer.memory import QUANTISED_BYTES, is_linear
from trainer.ranks import Ranks


def place(model: torch.nn.Module, device: torch.device, ranks: Ranks, train: TrainConfig) -> torch.nn.Module:
    """Let each decoder layer compute where its weights were loaded."""
    _, layers = decoder_layers(model)
    devices = [next(layer.parameters()).device for layer in layers]
    first = _indexed(device)
    for layer, here, after in zip(layers, devices, [*devices[1:], first], strict=True):
        leaves_for = first if after == first and here != first else None
        layer.forward = functools.partial(_forward_on, layer.forward, here, leaves_for)  # type: ignore[method-assign]
    return model.train()


def lay_out(model: torch.nn.Module, device: torch.device, base: BaseForm) -> dict[str, torch.device]:
    return device_map(model, visible_devices(device), base=base)


def visible_devices(device: torch.device) -> list[torch.device]:
    if device.type != "cuda":
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def device_map(
    model: torch.nn.Module, devices: Sequence[torch.device], *, base: BaseForm = "plain"
) -> dict[str, torch.device]:
    """Where the weights of which module go; `model` may be without memory."""
    prefix, layers = decoder_layers(model)
    sizes = [_num_bytes(layer, base) for layer in layers]
    rest = _num_bytes(model, base) - sum(sizes)
    numbers = cut(sizes, rest, len(devices))
    places = {f"{prefix}.{layer}": devices[number] for layer, number in enumerate(numbers)}
    return dict.fromkeys(_beside(unwrapped(model), prefix), devices[0]) | places


def _beside(model: torch.nn.Module, path: str) -> Iterator[str]:
    """The largest modules, and parameters, that hold nothing of the one at `path`."""
    parts = path.split(".")
    for depth, part in enumerate(parts):
        parent = model.get_submodule(".".join(parts[:depth]))
        names = [name for name, _ in parent.named_children() if name != part]
        names += [name for name, _ in parent.named_parameters(recurse=False)]
        yield from (".".join([*parts[:depth], name]) for name in names)


def cut(sizes: Sequence[int], rest: int, num_devices: int) -> list[int]:
    """Device of each layer, rising, so that the fullest one holds as little as it can; the first holds `rest` too."""
    low, high = max(sizes, default=0), rest + sum(sizes)
    while low < high:
        limit = (low + high) // 2
        if _filled(sizes, rest, limit)[-1] < num_devices:
            high = limit
        else:
            low = limit + 1
    return _filled(sizes, rest, low)


def _filled(sizes: Sequence[int], rest: int, limit: int) -> list[int]:
    numbers, number, held = [], 0, rest
    for size in sizes:
        if held + size > limit:
            number, held = number + 1, 0
        held += size
        numbers.append(number)
    return numbers


def _num_bytes(module: torch.nn.Module, base: BaseForm) -> int:
    def of_one(name: str, parameter: torch.Tensor) -> float:
        quantised = QUANTISED_BYTES.get(base) if is_linear(name, tuple(parameter.shape)) else None
        return parameter.element_size() if quantised is None else quantised

    return int(sum(p.numel() * of_one(name, p) for name, p in module.named_parameters()))


# Moving -----------------------------------------------------------------------------------------------------


def _forward_on(
    forward: Callable[..., Any],
    device: torch.device,
    leaves_for: torch.device | None,
    *inputs: Any,
    **options: Any,
) -> Any:
    """The layer's own forward, its inputs brought to it: hidden states, rotations, borders of documents."""
    with _current(device):
        output = forward(*_moved(inputs, device), **_moved(options, device))
    return output if leaves_for is None else _moved(output, leaves_for)


def _moved(values: Any, device: torch.device) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), values)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    # Triton starts its kernels on the current device, wherever the tensors are.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
