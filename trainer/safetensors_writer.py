"""Model folders written tensor by tensor: sharded safetensors of which one tensor at a time is in memory.

write_sharded(folder, shapes, tensor_of, dtype=...)    the shapes are known before the first number is
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pipelines.storage import write_json
from schemas.errors import TrainingError
from trainer.model_files import WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from trainer.weights import DTYPES

MAX_SHARD_BYTES = 5 * 10**9
HEADER_ALIGNMENT = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Shapes = Mapping[str, tuple[int, ...]]


def write_sharded(
    folder: Path,
    shapes: Shapes,
    tensor_of: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """All tensors in the order of `shapes`, cast to `dtype`; with an index where there are several files.

    Raises TrainingError for a tensor of another shape, or one that is not finite.
    """
    shards = _shards(shapes, dtype.itemsize, max_shard_bytes)
    names = [_file_name(number, len(shards)) for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header({tensor: shapes[tensor] for tensor in shard}, dtype))
            for tensor in shard:
                _write(file, tensor, tensor_of(tensor), shapes[tensor], dtype)
    if len(shards) > 1:
        num_bytes = dtype.itemsize * sum(map(math.prod, shapes.values()))
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        write_json(folder / WEIGHTS_INDEX_NAME, index)


def _shards(shapes: Shapes, item_bytes: int, max_shard_bytes: int) -> list[list[str]]:
    """As many in a row as fit; a tensor that is larger alone has a file of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        num_bytes = item_bytes * math.prod(shape)
        if shards[-1] and filled + num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
    return shards


def _file_name(number: int, count: int) -> str:
    """As transformers names them."""
    return WEIGHTS_NAME if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _header(shapes: Shapes, dtype: torch.dtype) -> bytes:
    """Length of the JSON, the JSON, spaces up to the next multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    first = 0
    for name, shape in shapes.items():
        end = first + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [first, end]}
        first = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write(
    file: BinaryIO, name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise TrainingError(
            f"{name} is {tuple(tensor.shape)}, expected {tuple(shape)}; not saved, report this"
        )
    cast = tensor.detach().to("cpu", dtype).contiguous()
    if not bool(cast.isfinite().all()):
        raise TrainingError(f"{name} is not finite as {dtype}; not saved: export as float32 or bfloat16")
    numbers: Any = cast.view(torch.uint8).flatten() if cast.dim() else cast.view(1).view(torch.uint8)
    file.write(memoryview(numbers.numpy()))
