"""An adapter added into its base: sums in fp32, rounded once, one layer after the other, so that little is in memory.

What is added to is the base as training saw it: where train.base is nf4 or int8, the numbers that its bits stand for.
The adapter learned beside those; merged into the original weights it would be another model. Each layer is merged by
PEFT itself, so whatever PEFT can merge can be exported.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel

from schemas.errors import RefusedError, TrainingError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import BaseForm
from trainer import nf4
from trainer.attention import unwrapped
from trainer.model import load_adapter, load_base_model, needed_model
from trainer.safetensors_writer import MAX_SHARD_BYTES, write_sharded
from trainer.stand_ins import stand_in
from trainer.start_adapter import TENSORS_NAME, adapter_settings
from trainer.support import model_folder
from trainer.weights import WeightFiles, model_without_weights, name_in_files

VIRTUAL_TOKENS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE")


def check_can_merge(folder: Path) -> None:
    """Raises RefusedError for adapters that are no change of weights."""
    kind = adapter_settings(folder).get("peft_type")
    if kind in VIRTUAL_TOKENS:
        reason = "its virtual tokens stand before each prompt and in no weight"
    elif kind == "ADAPTION_PROMPT":
        reason = "its gated attention to learned tokens is a computation of its own"
    else:
        return
    raise RefusedError(f"{folder} is a {kind} adapter and can't be merged: {reason}; export it as an adapter")


def write_merged(
    config: PipelineConfig,
    folder: Path,
    out: Path,
    *,
    dtype: torch.dtype,
    trained_dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """config.json and the weights of base and adapter as one model. `trained_dtype` is what training computed in.

    Raises RefusedError for an adapter that is no change of weights.
    """
    check_can_merge(folder)
    settings = needed_model(config)
    is_changed = bool(settings.new_tokens) or settings.init == "random"  # such weights stand in no file
    base = None if is_changed else model_without_weights(settings, dtype=torch.float32)
    if base is None or _is_more_than_layers(folder, base):
        _write_whole(config, folder, out, dtype, trained_dtype, max_shard_bytes)
        return
    names = [name for name, _ in base.named_parameters(remove_duplicate=False)]
    tied = _aliases(base)
    forms = {f"{path}.weight": config.train.base for path in _quantised_layers(base, config.train.base)}
    with WeightFiles(_base_folder(config)) as files:

        def read(name: str) -> torch.Tensor:
            stored = files.tensors[tied.get(name, name)]
            weight = files.read(tied.get(name, name), 0, math.prod(stored.shape)).view(stored.shape)
            return as_trained(weight, forms.get(name, "plain"), trained_dtype)

        layers = _Layers(load_adapter(base, folder), read)
        apart = [alias for alias, first in tied.items() if not layers.are_equal(alias, first)]
        shapes = {name: layers.shape(name) for name in names if name not in tied or name in apart}
        write_sharded(out, shapes, layers.merged, dtype=dtype, max_shard_bytes=max_shard_bytes)
    _write_config(base, out, dtype, is_tied=bool(tied) and not apart)


def as_trained(weight: torch.Tensor, form: BaseForm, dtype: torch.dtype) -> torch.Tensor:
    """fp32: the numbers that training computed with, where this weight was held in that form."""
    if form == "nf4":
        quantised = nf4.quantise(weight.to(dtype))
        shape = (weight.shape[0], weight.shape[1])
        return nf4.unpacked(quantised["packed"], quantised["absmax"], shape, dtype).float()
    if form == "int8":
        from bitsandbytes import functional

        rows, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return functional.int8_vectorwise_dequant(rows, scales).float()
    return weight.to(dtype).float()


@dataclass(slots=True)
class _Layers:
    """The layers of an adapted model of stand-ins, each with numbers only while it is looked at."""

    model: PeftModel
    read: Callable[[str], torch.Tensor]
    path: str = ""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight in the merged model."""
        path, _, leaf = name.rpartition(".")
        module = self._module(path)
        trained = _trained_whole(module)
        if trained is None and isinstance(module, BaseTunerLayer):
            trained = module.get_base_layer()
        return tuple(getattr(module if trained is None else trained, leaf).shape)

    def merged(self, name: str) -> torch.Tensor:
        """The weight of base and adapter."""
        path, _, leaf = name.rpartition(".")
        module = self._module(path)
        if (trained := _trained_whole(module)) is not None:
            weight: torch.Tensor = getattr(trained, leaf)
            return weight
        if not isinstance(module, BaseTunerLayer):
            return self.read(name)
        if self.path != path:  # a layer's bias follows its weight
            self.path, self.tensors = path, _merged_layer(module, path, self.read)
        return self.tensors[leaf]

    def are_equal(self, alias: str, first: str) -> bool:
        """Whether two names of one weight in the base still are one once the adapter is in it."""
        modules = [self._module(name.rpartition(".")[0]) for name in (alias, first)]
        if not any(isinstance(module, BaseTunerLayer) or _trained_whole(module) for module in modules):
            return True
        return torch.equal(self.merged(alias), self.merged(first))

    def _module(self, path: str) -> torch.nn.Module:
        return unwrapped(self.model).get_submodule(path)


def _trained_whole(module: torch.nn.Module) -> torch.nn.Module | None:
    """What stands in the place of a module that was trained whole."""
    return module.modules_to_save["default"] if isinstance(module, ModulesToSaveWrapper) else None


def _merged_layer(
    layer: BaseTunerLayer, path: str, read: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Its own parameters, read, changed by all adapters around them, and let go of."""
    chain: list[Any] = [layer]
    while isinstance(chain[-1].base_layer, BaseTunerLayer):
        chain.append(chain[-1].base_layer)
    own = dict(chain[-1].base_layer.named_parameters(recurse=False))
    for leaf, parameter in own.items():
        parameter.data = read(f"{path}.{leaf}")
    try:
        for adapter in reversed(chain):
            adapter.merge(safe_merge=True)
    except ValueError as error:
        raise TrainingError(f"{path} can't be merged: {' '.join(str(error).split())}") from error
    merged = {leaf: parameter.data for leaf, parameter in own.items()}
    for parameter in own.values():
        parameter.data = stand_in(parameter)
    return merged


def _is_more_than_layers(folder: Path, base: PreTrainedModel) -> bool:
    """Whether the adapter trains rows of an embedding, or its file holds weights of the base, as PEFT keeps embeddings
    beside what it trained.
    """
    settings = adapter_settings(folder)
    if settings.get("trainable_token_indices"):
        return True
    saved = tuple(settings.get("modules_to_save") or ())
    known = dict(base.named_parameters(remove_duplicate=False))
    with safe_open(folder / TENSORS_NAME, framework="pt") as file:
        names = [name for name in file.keys() if ".base_layer." in name or name_in_files(name) in known]  # noqa: SIM118
    return any(not (saved and name.rpartition(".")[0].endswith(saved)) for name in names)


def _aliases(model: PreTrainedModel) -> dict[str, str]:
    """Further names of shared parameters -> the first one."""
    first: dict[torch.nn.Parameter, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in names if first.setdefault(p, name) != name}


def _quantised_layers(model: PreTrainedModel, form: BaseForm) -> list[str]:
    """What bitsandbytes holds in few bits: linear layers but for the head."""
    if form == "plain":
        return []
    layers = [path for path, layer in model.named_modules() if type(layer) is torch.nn.Linear]
    return [path for path in layers if nf4.is_quantised(model, path)]


def _base_folder(config: PipelineConfig) -> Path:
    settings = needed_model(config)
    return model_folder(settings.path, settings.revision)


def _write_config(model: PreTrainedModel, out: Path, dtype: torch.dtype, *, is_tied: bool) -> None:
    settings: Any = model.config
    settings.architectures = [type(model).__name__]
    settings.dtype = dtype
    settings.tie_word_embeddings = is_tied
    settings.save_pretrained(out)


# Models whose files can't be read in parts ------------------------------------------------------------------


def _write_whole(
    config: PipelineConfig,
    folder: Path,
    out: Path,
    dtype: torch.dtype,
    trained_dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """All in memory, in fp32: families whose weights transformers puts together while it loads, and quantised folders."""
    settings, form = needed_model(config), config.train.base
    is_quantised = b'"quantization_config"' in (_base_folder(config) / "config.json").read_bytes()
    base = load_base_model(
        settings,
        base=form if is_quantised else "plain",
        device=torch.device("cpu"),
        dtype=trained_dtype if is_quantised else torch.float32,
    )
    quantised = set() if is_quantised else set(_quantised_layers(base, form))
    for path, layer in list(base.named_modules()):
        if type(layer) is torch.nn.Linear:
            held: BaseForm = form if path in quantised else "plain"
            layer.weight.data = as_trained(layer.weight.data, held, trained_dtype)
        elif isinstance(layer, torch.nn.Linear):
            base.set_submodule(path, _unquantised(layer))
    if is_quantised:  # how its files were read is no way to write them
        vars(base).pop("_weight_conversions", None)
    was_tied = _untie(base)
    merged: Any = load_adapter(base.float(), folder).float()
    merged = merged.merge_and_unload(safe_merge=True)
    if was_tied:
        _tie_if_equal(merged)
    merged.generation_config = GenerationConfig()
    merged.to(dtype).save_pretrained(out, max_shard_size=max_shard_bytes)


def _untie(model: PreTrainedModel) -> bool:
    """Else what an adapter adds to the embedding would be added to the head as well. Returns whether they were tied."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return True


def _tie_if_equal(model: PreTrainedModel) -> None:
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        model.config.tie_word_embeddings = True


def _unquantised(layer: Any) -> torch.nn.Linear:
    """The same layer with the numbers that its bits stand for."""
    if isinstance(layer, nf4.NF4Linear):
        weight = layer.weight.float()
    else:
        from bitsandbytes import functional

        weight = functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB).float()
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
    plain.weight.data = weight
    if layer.bias is not None:
        plain.bias.data = layer.bias.data.float()
    return plain
