"""The weights in a model's safetensors files, read in parts: a rank that keeps a part of a tensor reads that part.

Nothing is mapped into memory and no tensor is read twice: of a model that is cut over the ranks of a machine, each
byte is read once there. A model to be filled this way is built without memory behind its weights.
"""

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from schemas.errors import InputError, TrainingError
from schemas.training_config import BaseForm, ModelConfig
from trainer import nf4
from trainer.attention import use_packed_attention
from trainer.model import read_config
from trainer.model_files import check_model_folder, weight_files
from trainer.stand_ins import change_parameters, stand_in

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By safetensors' names."""
MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: its numbers in row-major order from byte `offset` of `path` on."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource(Protocol):
    """Numbers of a model's weights, by their names in its files, in parts."""

    def read(self, name: str, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of the flattened tensor, on the CPU."""


class WeightFiles:
    """The tensors in a model folder, by their names in its files. Close it, or use it in a `with`."""

    def __init__(self, folder: Path) -> None:
        self.tensors: Mapping[str, StoredTensor] = {
            name: stored for path in weight_files(folder) for name, stored in _stored(path).items()
        }
        self.num_bytes_read = 0
        self._files: dict[Path, int] = {}

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def read(self, name: str, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of the flattened tensor, in the dtype of the file, on the CPU."""
        stored = self.tensors[name]
        buffer = torch.empty((end - start) * stored.dtype.itemsize, dtype=torch.uint8)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy's stubs: it is one
        position = stored.offset + start * stored.dtype.itemsize
        while view:
            count = os.preadv(self._file(stored.path), [view], position)
            if count == 0:
                raise InputError(
                    f"{stored.path} ends at byte {position}, inside {name}; download the model again"
                )
            view, position = view[count:], position + count
        self.num_bytes_read += buffer.numel()
        return buffer.view(stored.dtype)

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]


# Weights in memory ------------------------------------------------------------------------------------------


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape over all ranks. A DTensor says it itself; DeepSpeed leaves an empty tensor and says it aside."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def check_weights(found: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises TrainingError unless these are all weights that are to be saved, whole and finite."""
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if odd := sorted(shapes.items() ^ expected.items()):
        raise TrainingError(
            f"the weights to save are incomplete: first odd tensor {odd[0]}; not saved, report this"
        )
    for name, tensor in found.items():
        if tensor.numel() == 0 or not bool(tensor.isfinite().all()):
            raise TrainingError(f"weight {name} {shapes[name]} is empty or not finite; not saved")


# Models without memory behind their weights -----------------------------------------------------------------


def model_without_weights(
    model_config: ModelConfig, *, base: BaseForm = "plain", dtype: torch.dtype
) -> PreTrainedModel | None:
    """The model as load_base_model gives it, but with stand-ins for its weights.

    None where its files can't be read tensor by tensor: transformers puts some families' weights together while it
    loads them, and keeps some in another dtype.
    """
    folder = check_model_folder(model_config)
    config = read_config(model_config)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    if model_config.init == "files" and not _is_filled_by(model, folder):
        return None
    if base == "nf4":
        nf4.replace_linear_layers(model)
    change_parameters(model, stand_in)
    use_packed_attention(model)
    return model.eval()


def _is_filled_by(model: PreTrainedModel, folder: Path) -> bool:
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return False
    with WeightFiles(folder) as files:
        found = {name: stored.shape for name, stored in files.tensors.items()}
    return all(found.get(name) == tuple(parameter.shape) for name, parameter in model.named_parameters())


_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.)")


def name_in_files(name: str) -> str:
    """Of a parameter that PEFT may have wrapped."""
    return _WRAPPERS.sub("", name.removeprefix("base_model.model."))


# Headers ----------------------------------------------------------------------------------------------------


def _stored(path: Path) -> dict[str, StoredTensor]:
    try:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(header_bytes, MAX_HEADER_BYTES)))
        header.pop("__metadata__", None)
        found = {
            name: StoredTensor(
                path,
                8 + header_bytes + entry["data_offsets"][0],
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
            )
            for name, entry in header.items()
        }
        ends = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no readable safetensors file ({error}); download the model again"
        ) from None
    for name, stored in found.items():
        if ends[name] != math.prod(stored.shape) * stored.dtype.itemsize:
            raise InputError(
                f"{path}: {name} has {ends[name]} bytes, expected {stored.shape} of {stored.dtype}"
            )
    return found
