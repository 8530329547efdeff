"""LoRA through PEFT: the base is frozen, small matrices beside its linear layers are trained.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pipelines import storage
from schemas.errors import ConfigError, InputError
from schemas.training_config import ModelConfig, TrainConfig
from trainer.dora import begin_at_own_length, compute_in_float32
from trainer.dtypes import is_scale_vector
from trainer.lora_targets import check_targets, targets_for_peft
from trainer.model import outdated_names_allowed
from trainer.new_tokens import compute_rows_apart, trained_rows
from trainer.start_adapter import adapter_folder, adapter_settings, adapter_tensors, combined
from trainer.weights import check_weights, whole_shape

OUTPUT_FOLDER = "adapter"
ADAPTER_NAME = "default"


def check(model: PreTrainedModel, train: TrainConfig) -> None:
    check_targets(model, train.lora)


def apply(model: PreTrainedModel, train: TrainConfig) -> PeftModel:
    """Wrap the model. Adapters get the base's dtype: PEFT's default, fp32, makes it copy every activation to
    fp32 (10.8 k in place of 15.9 k tokens/s, 8 B shape, H100); their fp32 masters stand in the optimiser.

    Raises ConfigError when a target matches nothing.
    """
    check_targets(model, train.lora)
    return apply_with_ranks(model, train, {})


def apply_with_ranks(model: PreTrainedModel, train: TrainConfig, ranks: Mapping[str, int]) -> PeftModel:
    """The same with another rank, or none, for some layers; by what their matrices are scaled stays the same."""
    lora = train.lora
    _check_whole_modules(model, lora.modules_to_save)
    power = 0.5 if lora.rslora else 1.0
    ranks = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    left_out = [name for name, rank in ranks.items() if rank == 0]
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT says int and takes any number
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=targets_for_peft(model, lora.targets),
        exclude_modules=left_out or None,
        rank_pattern={name: rank for name, rank in ranks.items() if rank},
        alpha_pattern={n: lora.alpha * (rank / lora.rank) ** power for n, rank in ranks.items() if rank},
        modules_to_save=list(lora.modules_to_save) or None,  # PEFT adds to it what is tied
        ensure_weight_tying=_trains_tied_weights(model, lora.modules_to_save),
        trainable_token_indices=trained_rows(model, lora.modules_to_save),
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
        exclude_modules=found.get("exclude_modules"),
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
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:  # beside 8-bit layers PEFT knows no dtype and takes fp32
            dtype = torch.float32 if is_scale_vector(name) else model.dtype
            parameter.data = parameter.data.to(dtype)
    compute_in_float32(wrapped)
    begin_at_own_length(wrapped)
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
    short = name.replace(f".modules_to_save.{ADAPTER_NAME}", "").replace(f".{ADAPTER_NAME}", "")
    return short.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def _aliases(model: PeftModel) -> dict[str, str]:
    """Further names of trained parameters -> the first name, where a matrix stands in two places."""
    first: dict[torch.nn.Parameter, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and first.setdefault(parameter, name) != name:
            found[name] = first[parameter]
    return found


# Modules that are trained whole -----------------------------------------------------------------------------


def _check_whole_modules(model: PreTrainedModel, names: list[str]) -> None:
    for name, module in model.named_modules():
        if not name.endswith(tuple(names)):
            continue
        if not all(parameter.is_floating_point() for parameter in module.parameters()):
            wanted = next(end for end in names if name.endswith(end))
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
