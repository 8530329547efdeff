"""What training holds in memory, told from the headers of the model's files: no torch, and no weight is read.

Two figures a process. The floor is what must be there at once whatever the data: weights, masters, moments,
gradients. The likely peak adds activations and the head's logits, reckoned from shapes for a dense decoder; it is
a guide, not a promise.
"""

import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from schemas.pipeline_config import PipelineConfig
from schemas.training_config import FreezeConfig, TrainConfig
from trainer.layer_names import copied_layers, is_in_last, layer_number, matches, num_layers
from trainer.tensor_headers import UNREADABLE, read_header, unreadable, weight_paths
from trainer.virtual_rules import VIRTUAL_TOKEN_METHODS
from trainer.virtual_sizes import num_virtual_weights

QUANTISED_BYTES = {"int8": 1, "int8_rows": 1, "nf4": 1 / 2 + 4 / 64}
"""A weight of a linear layer; nf4 has a float32 scale for each 64."""
METHODS_IN_PLACE = ("full", "freeze")
"""They train weights of the model itself; others add some."""
WHOLE_MODEL_METHODS = (*METHODS_IN_PLACE, "expand")
"""What they leave is a model, not an adapter."""
MASTER_BYTES, MOMENTS_BYTES, GRADIENT_BYTES = 4, 8, 4
STATE_BYTES = {"adamw": MOMENTS_BYTES, "adamw_bf16": 6, "lion": 4, "schedule_free": 8}
"""What optimisers keep beside a weight and its master, whatever its shape; of others it hangs on that."""
AVERAGE_BYTES = 4
BITSANDBYTES_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit")
BLOCK_SIZE_OF_8_BITS, FEWEST_NUMBERS_IN_8_BITS = 256, 4096
LOGITS_BYTES = 512 * 2**20
"""trainer/loss.py computes the head in chunks: this is the most that a chunk and its gradient take."""
CUDA_CONTEXT_BYTES = 600 * 2**20

_QUANTISATION = re.compile(r"\.weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+)|\.SCB|\.weight_format")
"""What bitsandbytes writes beside a weight that it has quantised; the state holds the weight's own shape."""
_STATE = ".quant_state.bitsandbytes__"
_NOT_LINEAR = re.compile(r"embed|lm_head|\bwte\b|\bwpe\b|norm|rotary")
IA3_KEYS_AND_VALUES = ("k_proj", "v_proj", "qkv_proj")
IA3_LAST_OF_MLP = ("down_proj",)
"""What method ia3 scales where the config names nothing, by the last parts of names."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes in one process."""

    weights: int
    states: int
    """fp32 masters, moments and gradients of what is trained; under ZeRO a share of them."""
    activations: int

    @property
    def floor(self) -> int:
        """Below this, training can't begin."""
        return self.weights + self.states

    @property
    def likely(self) -> int:
        """With the activations of one micro-step."""
        return self.floor + self.activations


def memory_need(
    config: PipelineConfig,
    shapes: Shapes,
    architecture: Mapping[str, Any],
    *,
    bytes_per_weight: int,
    num_processes: int = 1,
) -> MemoryNeed:
    """`bytes_per_weight` is that of the dtype that computes, in which a quantised base has all but linear layers."""
    train = config.train
    num_trained = num_trained_weights(shapes, train)
    linear_bytes = QUANTISED_BYTES.get(train.base, bytes_per_weight)
    weights = sum(
        math.ceil(math.prod(shape) * (linear_bytes if is_linear(name, shape) else bytes_per_weight))
        for name, shape in shapes.items()
    )
    in_place = num_trained * bytes_per_weight if train.method in METHODS_IN_PLACE else 0
    if train.strategy == "fsdp2":
        weights = _weights_under_fsdp2(train, weights - in_place, num_processes)
    else:
        weights += num_trained * bytes_per_weight - in_place
    if train.strategy == "zero3":
        weights = math.ceil(weights / num_processes)
    states = num_trained * _state_bytes(train, shapes, bytes_per_weight, num_processes)
    return MemoryNeed(weights, round(states), _activation_bytes(config, architecture, bytes_per_weight))


def _weights_under_fsdp2(train: TrainConfig, weights: int, num_processes: int) -> int:
    """Of frozen ones; trained ones are their masters. By default the frozen ones are cut where they would not fit."""
    if train.offload == "all":
        return 0
    return weights if train.shard_base == "never" else math.ceil(weights / num_processes)


def on_gpu(need: MemoryNeed, train: TrainConfig) -> MemoryNeed:
    """Without what train.offload leaves to the CPU's memory. Of fsdp2 the need is a device's already."""
    if train.strategy == "fsdp2":
        return need
    return replace(
        need,
        weights=0 if train.offload == "all" else need.weights,
        states=need.states if train.offload == "none" else 0,
    )


def _state_bytes(train: TrainConfig, shapes: Shapes, bytes_per_weight: int, num_processes: int) -> float:
    """Of one trained weight in one process. The master of an fp32 weight is the weight itself."""
    has_master = bytes_per_weight < MASTER_BYTES or train.optimizer == "schedule_free"
    master = MASTER_BYTES if has_master and train.optimizer != "adamw_bf16" else 0
    optimizer = optimizer_bytes_per_weight(train, shapes) + master
    if train.strategy == "fsdp2":
        kept = {"none": MASTER_BYTES + MOMENTS_BYTES, "optimizer": MASTER_BYTES, "all": 0}[train.offload]
        return (kept + GRADIENT_BYTES) / num_processes
    if train.strategy == "zero1":
        return optimizer / num_processes + GRADIENT_BYTES
    if train.strategy in ("zero2", "zero3"):
        return (optimizer + GRADIENT_BYTES) / num_processes
    return optimizer + GRADIENT_BYTES


def checkpoint_bytes_per_weight(train: TrainConfig, shapes: Shapes) -> float:
    weight = 2 if train.optimizer == "adamw_bf16" else MASTER_BYTES
    return weight + optimizer_bytes_per_weight(train, shapes)


def optimizer_bytes_per_weight(train: TrainConfig, shapes: Shapes) -> float:
    """Beside a weight and its master, its average counted; where it hangs on shapes, on average over the model's."""
    average = AVERAGE_BYTES if train.ema_decay else 0
    if train.optimizer in STATE_BYTES:
        return STATE_BYTES[train.optimizer] + average
    in_all = sum(_optimizer_bytes(train, name, shape) for name, shape in shapes.items())
    return in_all / max(_num_weights(shapes, shapes), 1) + average


def _optimizer_bytes(train: TrainConfig, name: str, shape: tuple[int, ...]) -> int:
    size = math.prod(shape)
    if train.optimizer in BITSANDBYTES_OPTIMIZERS and is_in_8_bits(name, size):
        return 2 * size + 2 * 4 * math.ceil(size / BLOCK_SIZE_OF_8_BITS)
    if train.optimizer == "muon" and is_linear(name, shape):
        return 4 * size
    if train.optimizer in ("galore", "apollo") and is_projected(name, shape, train):
        projection = min(shape) * train.low_rank.rank if train.optimizer == "galore" else 1
        return 4 * (projection + 2 * train.low_rank.rank * max(shape))
    return MOMENTS_BYTES * size


def num_trained_weights(shapes: Shapes, train: TrainConfig) -> int:
    """Of LoRA: rank x (in + out) of each linear layer that it wraps, with DoRA a magnitude an output."""
    if train.method == "full":
        return _num_weights(shapes, shapes)
    if train.method == "freeze":
        return _num_weights(shapes, _chosen(shapes, train.freeze))
    if train.method == "expand":
        return _num_in_new_layers(shapes, train.expand.new_layers)
    if train.method in VIRTUAL_TOKEN_METHODS:
        return num_virtual_weights(shapes, train)
    if train.method == "ia3":
        return _num_ia3_weights(shapes, train)
    whole = _in_whole_modules(shapes, train.lora.modules_to_save)
    return _num_weights(shapes, whole) + sum(
        train.lora.rank * sum(shape) + train.lora.dora * shape[0]
        for name, shape in shapes.items()
        if is_linear(name, shape) and _is_target(name.removesuffix(".weight"), train.lora.targets)
    )


def _num_ia3_weights(shapes: Shapes, train: TrainConfig) -> int:
    outputs = train.ia3.targets or list(IA3_KEYS_AND_VALUES)
    inputs = train.ia3.feedforward_targets or list(IA3_LAST_OF_MLP)
    sizes = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if is_linear(name, shape)}
    return sum(shape[0] for name, shape in sizes.items() if _is_target(name, outputs)) + sum(
        shape[1] for name, shape in sizes.items() if _is_target(name, inputs)
    )


def num_saved_weights(shapes: Shapes, train: TrainConfig) -> int:
    """Of the adapter, or of the whole model."""
    num_trained = num_trained_weights(shapes, train)
    if train.method not in WHOLE_MODEL_METHODS:
        return num_trained
    return _num_weights(shapes, shapes) + (num_trained if train.method == "expand" else 0)


def _chosen(shapes: Shapes, freeze: FreezeConfig) -> set[str]:
    count = num_layers(shapes)
    modules = ["lm_head"] * freeze.head + ["embed_tokens"] * freeze.embeddings
    return _in_whole_modules(shapes, modules) | {
        name
        for name in shapes
        if is_in_last(name, freeze.last_layers, num_layers=count) or matches(name, freeze.parameters)
    }


def _num_in_new_layers(shapes: Shapes, new_layers: int) -> int:
    copied = copied_layers(num_layers(shapes), new_layers)
    return _num_weights(shapes, [name for name in shapes if layer_number(name) in copied])


def _in_whole_modules(shapes: Shapes, names: Sequence[str]) -> set[str]:
    """A head that is in no file is the embedding itself."""
    has_head = any(name.removesuffix(".weight").endswith("lm_head") for name in shapes)
    ends = tuple("embed_tokens" if name == "lm_head" and not has_head else name for name in names)
    return {name for name in shapes if ends and name.rpartition(".")[0].endswith(ends)}


def _num_weights(shapes: Shapes, names: Collection[str]) -> int:
    return sum(math.prod(shapes[name]) for name in names)


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer; embeddings and the head are none here."""
    return len(shape) == 2 and name.endswith(".weight") and _NOT_LINEAR.search(name) is None


def is_in_8_bits(name: str, size: int) -> bool:
    """Whether an 8-bit optimiser keeps a weight's moments so."""
    return size >= FEWEST_NUMBERS_IN_8_BITS and "embed" not in name


def is_projected(name: str, shape: tuple[int, ...], train: TrainConfig) -> bool:
    """Whether galore and apollo keep moments of a projection of it."""
    return is_linear(name, shape) and min(shape) > train.low_rank.rank


def free_machine_bytes() -> int:
    """Memory that a new process can have on this machine without moving others out."""
    numbers = Path("/proc/meminfo")
    for line in numbers.read_text().splitlines() if numbers.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors in a model folder. Raises InputError where there are no safetensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_paths(folder):
        shapes |= shapes_in(path)
    return shapes


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The same of one file."""
    try:
        with path.open("rb") as file:
            header, data_start = read_header(file)
            packed = dict(_packed_shapes(file, header, data_start))
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        return {name: packed.get(name, shapes[name]) for name in shapes if not _QUANTISATION.search(name)}
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def _packed_shapes(
    file: BinaryIO, header: Mapping[str, Any], data_start: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of 4-bit weights, which stand in the file as a column of bytes."""
    for name, entry in header.items():
        if _STATE in name:
            begin, end = entry["data_offsets"]
            file.seek(data_start + begin)
            yield name.partition(_STATE)[0], tuple(json.loads(file.read(end - begin))["shape"])


def _is_target(name: str, targets: str | list[str]) -> bool:
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _activation_bytes(config: PipelineConfig, architecture: Mapping[str, Any], bytes_per_weight: int) -> int:
    """What one micro-step keeps for its backward pass; 0 where the model's config.json does not say its shape."""
    numbers = [architecture.get(name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")]
    if not all(isinstance(number, int) for number in numbers):
        return 0
    hidden, inner, layers = (int(number or 0) for number in numbers)
    heads = int(architecture.get("num_attention_heads") or 1)
    key_heads = int(architecture.get("num_key_value_heads") or heads)
    num_tokens = config.train.bins_per_micro_step * (config.pack.capacity or config.split.max_tokens)
    # Two norms in fp32 (8 bytes each), queries, keys, values, attention's output, inputs of the linear layers,
    # and four tensors of the MLP.
    kept = 4 * hidden + 2 * hidden * key_heads // heads + 4 * inner
    per_layer = 16 * hidden + bytes_per_weight * kept
    if config.train.gradient_checkpointing == "full":
        per_token = layers * bytes_per_weight * hidden + per_layer
    else:
        per_token = layers * per_layer
    return num_tokens * per_token + LOGITS_BYTES
