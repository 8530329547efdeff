"""Rules that look into the headers of the model's and the adapter's files: names and shapes, and no weight is loaded.

What does not fit is refused here, before the first stage, in place of an hour later with the weights in memory.
Light: no torch.
"""

import difflib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.hub_cache import model_folder
from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import ModelConfig
from trainer.experts import has_experts
from trainer.memory import Shapes, is_linear, read_shapes, shapes_in
from trainer.model_files import check_model_folder, model_digest
from trainer.rules import Rule
from trainer.start_adapter import TENSORS_NAME, adapter_folder, check_base_of
from trainer.tensor_headers import same_bytes

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
FOREIGN_TENSORS = {"qweight": "GPTQ or AWQ", "weight_packed": "compressed-tensors", "codebooks": "AQLM"}
"""What other quantisers leave in the place of a weight, by the end of its name."""


def _odd_tensors(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if architecture.get("quantization_config") is not None:
        return None  # config.json says it, and another rule reads that
    for name in _shapes(config):
        if kind := FOREIGN_TENSORS.get(name.rpartition(".")[2]):
            return f"the model's files hold {name}, as {kind} leaves it"
    return None


def _other_vocabulary(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    said = architecture.get("vocab_size")
    for name, shape in _shapes(config).items():
        if name.endswith(EMBEDDING) and isinstance(said, int) and shape[0] != said:
            return f"config.json says vocab_size {said}, {name} has {shape[0]} rows"
    return None


def _no_head(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    names = list(_shapes(config))
    has_embedding, has_head = (any(name.endswith(end) for name in names) for end in (EMBEDDING, HEAD))
    if architecture.get("tie_word_embeddings") is not False or has_head or not has_embedding:
        return None
    return f"config.json says tie_word_embeddings false, and no file holds {HEAD}"


def _two_heads(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    """Tied by the config, and two different matrices in the files."""
    if config.model is None or architecture.get("tie_word_embeddings") is not True:
        return None
    names = {end: [n for n in _shapes(config) if n.endswith(end)] for end in (EMBEDDING, HEAD)}
    if not all(len(found) == 1 for found in names.values()):
        return None
    (embedding,), (head,) = names.values()
    if same_bytes(model_folder(config.model.path, config.model.revision), embedding, head):
        return None
    return f"config.json says tie_word_embeddings true, and {head} is another matrix than {embedding}"


# LoRA ---------------------------------------------------------------------------------------------------------


def _no_such_target(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    targets, names = config.train.lora.targets, [*_linear_layers(config), "lm_head"]
    if len(names) == 1 or targets == "all-linear" or not _is_fresh_lora(config) or has_experts(architecture):
        return None
    for pattern in [targets] if isinstance(targets, str) else targets:
        if not any(_is_meant(name, pattern, is_pattern=isinstance(targets, str)) for name in names):
            return f"train.lora.targets names {pattern!r}; {_nearest(pattern, names)}"
    return None


def _rank_above_matrix(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    rank, targets = config.train.lora.rank, config.train.lora.targets
    if not _is_fresh_lora(config):
        return None
    patterns = targets if isinstance(targets, list) else [targets]
    for name, shape in _linear_layers(config).items():
        is_target = targets == "all-linear" or any(
            _is_meant(name, pattern, is_pattern=isinstance(targets, str)) for pattern in patterns
        )
        if is_target and rank > min(shape):
            return f"train.lora.rank is {rank}, {name} is {shape[0]} x {shape[1]}"
    return None


def _is_fresh_lora(config: PipelineConfig) -> bool:
    """Whether train.lora says what is trained: an adapter that is continued has its own shape."""
    model = config.model
    continued = model is not None and model.adapter is not None and model.adapter_use == "continue"
    return config.train.method == "lora" and not continued


def _linear_layers(config: PipelineConfig) -> Shapes:
    return {
        name.removesuffix(".weight"): shape
        for name, shape in _shapes(config).items()
        if is_linear(name, shape)
    }


def _is_meant(name: str, target: str, *, is_pattern: bool) -> bool:
    """PEFT's own reading: a string is a pattern for the whole name, names in a list match its last parts."""
    if is_pattern:
        return _is_regex(target) and any(re.fullmatch(target, whole) for whole in _whole_names(name))
    return name == target or name.endswith(f".{target}")


def _is_regex(target: str) -> bool:
    try:
        re.compile(target)
    except re.error:
        return False
    return True


def _whole_names(name: str) -> Iterator[str]:
    """Files of models for text and pictures put a part in front of `model`."""
    yield name
    parts = name.split(".")
    if "model" in parts[1:]:
        yield ".".join(parts[parts.index("model", 1) :])


def _nearest(target: str, names: list[str]) -> str:
    known = sorted({name.rpartition(".")[2] for name in names})
    last_word = re.findall(r"\w+", target)[-1:] or [target]
    close = difflib.get_close_matches(last_word[0], known, n=3, cutoff=0.5)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known)}"


# An adapter to start from -------------------------------------------------------------------------------------


def _adapter_of_another_base(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    folder = _readable_adapter(config.model)
    if folder is None or config.model is None or not _shapes(config):
        return None
    if (folder.parent / "training.json").is_file():
        try:
            check_base_of(folder, model_digest(check_model_folder(config.model)))
        except InputError as error:
            return str(error).rpartition("; ")[0]
    return None


def _adapter_that_does_not_fit(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    folder, shapes = _readable_adapter(config.model), _shapes(config)
    if folder is None or not shapes or has_experts(architecture):
        return None
    adapter = shapes_in(folder / TENSORS_NAME)
    for name, (_, num_in) in _pairs(adapter, "lora_A"):
        num_out = adapter.get(name.replace("lora_A", "lora_B"), (0,))[0]
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        found = [shape for known, shape in shapes.items() if _is_same_layer(known, layer)]
        if layer.rpartition(".")[2] != "lm_head" and (num_out, num_in) not in found:
            theirs = f"{found[0][0]} x {found[0][1]}" if found else "no such layer"
            return f"{folder} changes {layer} as {num_out} x {num_in}, the model has {theirs}"
    return None


def _is_same_layer(name: str, layer: str) -> bool:
    """By what follows the list of layers: files and adapters put other parts in front of it."""
    return f".{name}".endswith(f".{layer[layer.rfind('layers.') :] if 'layers.' in layer else layer}.weight")


def _pairs(adapter: Shapes, kind: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, shape) for name, shape in adapter.items() if f".{kind}.weight" in name and len(shape) == 2]


def _readable_adapter(model: ModelConfig | None) -> Path | None:
    """The adapter's folder; None where there is none, which another rule says."""
    if model is None or model.adapter is None:
        return None
    try:
        return adapter_folder(model)
    except InputError:
        return None


# Shapes -------------------------------------------------------------------------------------------------------


def _shapes(config: PipelineConfig) -> Shapes:
    """Of all tensors in the model's files; {} where they can't be read, which loading them says."""
    if config.model is None:
        return {}
    try:
        folder = model_folder(config.model.path, config.model.revision)
        return _shapes_of(
            folder, tuple(sorted((p, os.stat(p).st_mtime_ns) for p in folder.glob("*.safetensors")))
        )
    except (InputError, OSError):
        return {}


@lru_cache(maxsize=4)
def _shapes_of(folder: Path, state: tuple[tuple[Path, int], ...]) -> Shapes:
    """Read once for all rules; `state` makes another key of a folder that has changed."""
    return read_shapes(folder)


WEIGHT_RULES = (
    Rule(
        "quantised-tensors",
        _odd_tensors,
        "of quantised weights only bitsandbytes' int8 and nf4 are read",
        "use the model's unquantised weights; train.base int8 or nf4 quantises them as they are read",
    ),
    Rule(
        "vocabulary",
        _other_vocabulary,
        "a matrix of another size can't be filled from the files",
        "download the model again, config.json with it",
    ),
    Rule(
        "head",
        _no_head,
        "the head would be random numbers",
        "download the model whole, or set tie_word_embeddings to true in config.json where head and embedding are one",
    ),
    Rule(
        "two-heads",
        _two_heads,
        "one of the two would be left out without a word",
        "set tie_word_embeddings to false in config.json, which keeps both, or take the head out of the files",
    ),
    Rule(
        "lora-targets",
        _no_such_target,
        "it matches no linear layer of the model",
        "name layers that it has, or set train.lora.targets to all-linear",
    ),
    Rule(
        "lora-rank",
        _rank_above_matrix,
        "two matrices of that rank hold more numbers than the one beside which they stand can use",
        "set train.lora.rank to the smaller side or less, leave that layer out of train.lora.targets, or set "
        "train.method to full",
    ),
    Rule(
        "adapter-base",
        _adapter_of_another_base,
        "it says nothing about this one",
        "name the base that it was trained over as model.path, or another adapter",
    ),
    Rule(
        "adapter-shapes",
        _adapter_that_does_not_fit,
        "it is of another model",
        "name its base as model.path, or another adapter",
    ),
)
