"""A model folder with drawn weights: tensor by tensor on the GPU where there is one, so no whole model is held.

Speed, memory and the loss of the first step can be measured so; what a model would learn can not.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.bench.shapes import Shape

FILE_BYTES = 4 * 2**30
"""A file is written once it holds this much; so much memory is needed beside one tensor."""

Tensors = dict[str, torch.Tensor]


def write_model(shape: Shape, folder: Path, *, device: torch.device, seed: int = 0) -> None:
    """config.json and safetensors in bfloat16: matrices normal as at the start of pretraining, norms one, biases zero."""
    config = AutoConfig.for_model(shape.model_type, **shape.settings, tie_word_embeddings=False)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.config.architectures = [type(model).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    torch.manual_seed(seed)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_files(shapes, config.initializer_range, device)):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _files(shapes: dict[str, tuple[int, ...]], std: float, device: torch.device) -> Iterator[Tensors]:
    tensors: Tensors = {}
    num_bytes = 0
    for name, shape in shapes.items():
        tensors[name] = _drawn(name, shape, std, device)
        num_bytes += tensors[name].nbytes
        if num_bytes >= FILE_BYTES:
            yield tensors
            tensors, num_bytes = {}, 0
    if tensors:
        yield tensors


def _drawn(name: str, shape: tuple[int, ...], std: float, device: torch.device) -> torch.Tensor:
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith(".bias") else 1.0, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=std).cpu()
