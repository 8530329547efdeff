"""LoRA through PEFT: the base is frozen, small matrices beside its linear layers are trained.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021).
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pipelines import storage
from schemas.errors import ConfigError, InputError
from schemas.training_config import ModelConfig, TrainConfig
from trainer.model import outdated_names_allowed
from trainer.new_tokens import compute_rows_apart, trained_rows
from trainer.start_adapter import adapter_folder, adapter_settings, adapter_tensors, combined
from trainer.weights import check_weights, whole_shape

OUTPUT_FOLDER = "adapter"
ADAPTER_NAME = "default"


def apply(model: PreTrainedModel, train: TrainConfig) -> PeftModel:
    """Wrap the model. Adapters get the base's dtype: PEFT's default, fp32, makes it copy every activation to
    fp32 (10.8 k in place of 15.9 k tokens/s, 8 B shape, H100); their fp32 masters stand in the optimiser.

    Raises ConfigError when a target matches nothing.
    """
    _check_targets(model, train.lora.targets)
    _check_saved_modules(model, train.lora.modules_to_save)
    settings = LoraConfig(
        r=train.lora.rank,
        lora_alpha=train.lora.alpha,  # type: ignore[arg-type]  # PEFT says int and takes any number
        lora_dropout=train.lora.dropout,
        target_modules=train.lora.targets,
        modules_to_save=list(train.lora.modules_to_save) or None,  # PEFT adds to it what is tied
        ensure_weight_tying=_trains_tied_weights(model, train.lora.modules_to_save),
        trainable_token_indices=trained_rows(model, train.lora.modules_to_save),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(train.seed)
    return _wrapped(model, settings)


def apply_existing(model: PreTrainedModel, train: TrainConfig, folder: Path) -> PeftModel:
    """Wrap the model as the adapter in `folder` does, and take over its weights; dropout is train.lora's.

    Raises InputError when they do not fit the model.
    """
    found = adapter_settings(folder)
    saved = list(found.get("modules_to_save") or [])
    settings = LoraConfig(
        r=found["r"],
        lora_alpha=found["lora_alpha"],
        lora_dropout=train.lora.dropout,
        target_modules=found["target_modules"],
        rank_pattern=found.get("rank_pattern") or {},
        alpha_pattern=found.get("alpha_pattern") or {},
        use_rslora=bool(found.get("use_rslora")),
        modules_to_save=saved or None,
        ensure_weight_tying=_trains_tied_weights(model, saved),
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = _wrapped(model, settings)
    except ValueError as error:
        raise InputError(f"{folder} does not fit the model: {' '.join(str(error).split())}") from error
    _take_over(wrapped, folder)
    return wrapped


@torch.no_grad()
def _take_over(model: PeftModel, folder: Path) -> None:
    tensors = adapter_tensors(folder)
    trained = {_saved_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    aliases = {_saved_name(alias) for alias in _aliases(model)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in aliases}
    if odd := sorted(shapes.items() ^ {name: tuple(p.shape) for name, p in trained.items()}.items()):
        raise InputError(
            f"{folder} does not fit the model: first odd tensor {odd[0]}; it is of another model"
        )
    for name, parameter in trained.items():
        parameter.copy_(tensors[name])


def _wrapped(model: PreTrainedModel, settings: LoraConfig) -> PeftModel:
    with outdated_names_allowed():
        wrapped = get_peft_model(model, settings, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
    assert isinstance(wrapped, PeftModel)
    compute_rows_apart(wrapped)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:  # beside 8-bit layers PEFT knows no dtype and takes fp32
            parameter.data = parameter.data.to(model.dtype)
    return wrapped


def saved_names(model: PeftModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def save(
    model: PeftModel, folder: Path, model_config: ModelConfig, weights: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """adapter_config.json and adapter_model.safetensors. Raises TrainingError when a tensor is empty or odd.

    Sharded strategies have left empty tensors in this place in several trainers, without an error.
    """
    trained = dict(weights)
    # What is tied is one parameter and two tensors in the file: whoever loads it needs to know of no tie.
    trained |= {alias: trained[name].clone() for alias, name in _aliases(model).items()}
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in get_peft_model_state_dict(
            model, state_dict=trained, save_embedding_layers=False
        ).items()
    }
    check_weights(tensors, _expected_shapes(model))
    settings = adapter_config(model, model_config)
    if model_config.adapter is not None and model_config.adapter_use == "merge":
        tensors, settings = combined(tensors, settings, adapter_folder(model_config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    storage.write_json(folder / "adapter_config.json", settings)


def adapter_config(model: PeftModel, model_config: ModelConfig) -> dict[str, Any]:
    # PEFT writes its sets in the order of the process's hash seed: equal work would give unequal bytes.
    settings = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in model.peft_config[ADAPTER_NAME].to_dict().items()
    }
    return settings | {
        "base_model_name_or_path": model_config.path,
        "revision": model_config.revision,
        "inference_mode": True,
    }


def _expected_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    # Rows of new tokens that head and embedding share stand in the file once: PEFT ties them itself.
    tied_rows = {alias for alias in _aliases(model) if ".token_adapter." in alias}
    return {
        _saved_name(name): whole_shape(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and name not in tied_rows
    }


def _saved_name(name: str) -> str:
    """The name of a trained parameter in the file."""
    return name.replace(f".modules_to_save.{ADAPTER_NAME}", "").replace(f".{ADAPTER_NAME}", "")


def _aliases(model: PeftModel) -> dict[str, str]:
    """Further names of trained parameters -> the first name, where a matrix stands in two places."""
    first: dict[torch.nn.Parameter, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and first.setdefault(parameter, name) != name:
            found[name] = first[parameter]
    return found


# Modules that are trained whole -----------------------------------------------------------------------------


def _check_saved_modules(model: PreTrainedModel, names: list[str]) -> None:
    modules = {name: module for name, module in model.named_modules() if name}
    for wanted in names:
        # PEFT's own reading, and it says nothing where none matches.
        found = {name: module for name, module in modules.items() if name.endswith(wanted)}
        if not found:
            raise ConfigError(
                f"train.lora.modules_to_save: {wanted!r} is the end of no module's name; "
                f"{_nearest(wanted, list(modules))}"
            )
        for name, module in found.items():
            if not all(parameter.is_floating_point() for parameter in module.parameters()):
                raise ConfigError(
                    f"train.lora.modules_to_save: {name} is quantised and has no gradient; leave {wanted!r} out, "
                    "or set train.base to plain"
                )


def _trains_tied_weights(model: PreTrainedModel, names: list[str]) -> bool:
    """Whether head and embedding are one matrix that is to be trained: PEFT would copy one of them, and untie them."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    tied = [name for name, module in model.named_modules() if module is head or module is embedding]
    return any(name.endswith(wanted) for name in tied for wanted in names)


# Targets ----------------------------------------------------------------------------------------------------


def _check_targets(model: PreTrainedModel, targets: str | list[str]) -> None:
    if targets == "all-linear":
        return
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    patterns = [targets] if isinstance(targets, str) else targets
    for pattern in patterns:
        if not any(_matches(name, pattern, is_pattern=isinstance(targets, str)) for name in names):
            raise ConfigError(
                f"train.lora.targets: {pattern!r} matches no linear layer; {_nearest(pattern, names)}"
            )


def _matches(name: str, target: str, *, is_pattern: bool) -> bool:
    # PEFT's own reading: a string is a pattern for the whole name, names in a list match its last parts.
    if is_pattern:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")


def _nearest(target: str, names: list[str]) -> str:
    known = sorted({name.rpartition(".")[2] for name in names})
    close = difflib.get_close_matches(target, known, n=3, cutoff=0.4)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known)}"
