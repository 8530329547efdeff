"""A model of drawn weights, of which no file is read: model.init random.

To see whether a training fits and how fast it is before a model is downloaded. A weight's numbers hang on its name and
their places alone, so every strategy draws the same, each process just its part.
"""

import zlib

import torch
from transformers import PreTrainedModel

from trainer import nf4
from trainer.nf4 import NF4Linear
from trainer.stand_ins import change_parameters, is_stand_in

DEVIATION = 0.02
NUM_DRAWN = 1_048_573
"""Drawn once and repeated: a prime, so that no two rows of a matrix are the same for as many rows."""


class RandomWeights:
    """Stands in the place of trainer.weights.WeightFiles: norms are 1, biases 0, the rest is drawn."""

    def __init__(self) -> None:
        self._drawn = torch.randn(NUM_DRAWN, generator=torch.Generator().manual_seed(0)) * DEVIATION

    def __enter__(self) -> "RandomWeights":
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to close."""

    def read(self, name: str, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of the flattened weight, float32, on the CPU."""
        if name.endswith(".bias"):
            return torch.zeros(end - start)
        if "norm" in name:
            return torch.ones(end - start)
        first = (zlib.crc32(name.encode()) + start) % NUM_DRAWN
        num_repeats = -(-(first + end - start) // NUM_DRAWN)
        return self._drawn.repeat(num_repeats)[first : first + end - start]


@torch.no_grad()
def fill_randomly(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model of stand-ins its numbers on one device, weight by weight."""
    weights = RandomWeights()
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            _fill_in_4_bits(module, f"{name}.weight", weights, device)
    names = {parameter: name for name, parameter in model.named_parameters()}

    def drawn(parameter: torch.nn.Parameter) -> torch.Tensor | None:
        if not is_stand_in(parameter):
            return None
        numbers = weights.read(names[parameter], 0, parameter.numel())
        return numbers.view(parameter.shape).to(device, dtype)

    change_parameters(model, drawn)
    for buffer in model.buffers():
        buffer.data = buffer.to(device)


def _fill_in_4_bits(layer: NF4Linear, name: str, weights: RandomWeights, device: torch.device) -> None:
    def read(start: int, end: int) -> torch.Tensor:
        return weights.read(name, start, end).to(device, layer.dtype)

    num_bytes = layer.packed.numel() * layer.packed.itemsize
    packed, absmax = nf4.quantised_part(read, layer.shape, (0, num_bytes), (0, layer.absmax.numel()))
    layer.packed = torch.nn.Parameter(
        packed.view(layer.packed.dtype).view(layer.packed.shape), requires_grad=False
    )
    layer.absmax = torch.nn.Parameter(absmax, requires_grad=False)
