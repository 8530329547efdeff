"""Training that starts from an existing LoRA adapter: model.adapter and model.adapter_use.

    continue    its own weights are trained on, with its rank and targets
    merge       it is added into the base, and a fresh adapter is trained over that; what is saved is both of them as
                one adapter over the unmerged base, so that whoever loads it needs nothing but the base

Light but for the functions that take tensors. Which adapters can be taken stands in `adapter_problem`.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import InputError
from schemas.training_config import LoraConfig, ModelConfig

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
ODD_SETTINGS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
"""Variants of LoRA, and parts of a model that it leaves out. Set in an adapter's config, it is not plain LoRA."""
UNMERGEABLE_SETTINGS = ("alpha_pattern", "modules_to_save", "rank_pattern")


def adapter_folder(model: ModelConfig) -> Path:
    """The folder of model.adapter, or of the adapter in a training's folder. Raises InputError."""
    assert model.adapter is not None
    for folder in (Path(model.adapter), Path(model.adapter) / "adapter"):
        if (folder / CONFIG_NAME).is_file() and (folder / TENSORS_NAME).is_file():
            return folder
    raise InputError(
        f"model.adapter {model.adapter} is no adapter: expected {CONFIG_NAME} and {TENSORS_NAME} in it, as PEFT "
        "writes them; a .bin file is a pickle and is not read"
    )


def adapter_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises InputError."""
    path = folder / CONFIG_NAME
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read ({error}); save the adapter again") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path} is no JSON object; save the adapter again")
    return settings


def adapter_problem(settings: Mapping[str, Any], *, use: str) -> str | None:
    """Why training can't start from an adapter with such a config; None: it can."""
    if settings.get("peft_type") != "LORA":
        return f"it is a {settings.get('peft_type')!r}"
    odd = [name for name in ODD_SETTINGS if settings.get(name)]
    if use == "merge":
        odd += [name for name in UNMERGEABLE_SETTINGS if settings.get(name)]
    if settings.get("bias", "none") != "none":
        odd.append("bias")
    return f"it has {odd[0]} {settings[odd[0]]!r}" if odd else None


def contradiction(settings: Mapping[str, Any], lora: LoraConfig) -> str | None:
    """What train.lora says otherwise than the adapter. A setting that has its default says nothing."""
    defaults = LoraConfig()
    theirs = {
        "rank": settings.get("r"),
        "alpha": settings.get("lora_alpha"),
        "targets": settings.get("target_modules"),
        "modules_to_save": settings.get("modules_to_save") or [],
        "rslora": bool(settings.get("use_rslora")),
        "dora": bool(settings.get("use_dora")),
    }
    for name, found in theirs.items():
        ours = getattr(lora, name)
        if ours != getattr(defaults, name) and _as_set(ours) != _as_set(found):
            return f"train.lora.{name} is {ours!r}, the adapter's {found!r}"
    return None


def adapter_digest(folder: Path) -> str:
    """32 hex digits over its config and its weights."""
    from pipelines.storage import file_sha256

    files = "".join(file_sha256(folder / name) for name in (CONFIG_NAME, TENSORS_NAME))
    return hashlib.blake2b(files.encode(), digest_size=16).hexdigest()


def check_base_of(folder: Path, base_digest: str) -> None:
    """Raises InputError for an adapter of ours that was trained over another base; of others nothing is known."""
    record = folder.parent / "training.json"
    if not record.is_file():
        return
    found = json.loads(record.read_bytes()).get("inputs", {}).get("model")
    if found is not None and found != base_digest:
        raise InputError(
            f"{folder} was trained over another base model (digest {found[:12]}) than model.path ({base_digest[:12]}); "
            "name that base, or another adapter"
        )


def _as_set(value: Any) -> Any:
    return set(value) if isinstance(value, (list, tuple)) else value


# Tensors ----------------------------------------------------------------------------------------------------

Tensors = dict[str, "torch.Tensor"]
PREFIX = "base_model.model."


def adapter_tensors(folder: Path) -> Tensors:
    """As they stand in the file."""
    from safetensors.torch import load_file

    return load_file(folder / TENSORS_NAME)


def take_off_adapter(model: "PeftModel") -> None:
    """Leave the base as it was. PEFT alone leaves modules that were trained whole in their places."""
    from peft.utils.other import ModulesToSaveWrapper

    settings = model.active_peft_config
    if settings.is_prompt_learning:
        return  # it stands before the base, not in it
    if settings.is_adaption_prompt:
        model.base_model.delete_adapter(model.active_adapter)
        return

    for module in list(model.modules()):
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([])
    model.unload()  # type: ignore[operator]


def merge_into(model: "torch.nn.Module", folder: Path) -> None:
    """Add the adapter to the weights that it stands beside, in fp32 and rounded once."""
    import torch

    tensors, scaling = adapter_tensors(folder), _scaling(adapter_settings(folder))
    with torch.no_grad():
        for name in _modules(tensors):
            try:
                weight = model.get_submodule(name).weight
            except AttributeError:
                raise InputError(
                    f"{folder} changes {name}, which the model has not: it is of another model"
                ) from None
            assert isinstance(weight, torch.Tensor)
            down, up = (tensors[key].to(weight.device).float() for key in _keys(name))
            if weight.shape != (up.shape[0], down.shape[1]):
                raise InputError(
                    f"{folder} changes {name} as {(up.shape[0], down.shape[1])}, the model has "
                    f"{tuple(weight.shape)}: it is of another model"
                )
            weight.copy_((weight.float() + scaling * (up @ down)).to(weight.dtype))


def combined(
    new: Tensors, new_settings: dict[str, Any], folder: Path, *, factor: float = 1.0
) -> tuple[Tensors, dict[str, Any]]:
    """The adapter that was merged and the one that was trained over it, as one: [A1; A2] and [s1 B1, s2 B2].

    What one of the two leaves alone is 0 in its half. Tensors of modules_to_save pass through. With factor -1 the
    one in the folder is taken away from the new one.
    """
    old, old_settings = adapter_tensors(folder), adapter_settings(folder)
    rank = int(old_settings["r"]) + int(new_settings["r"])
    modules = sorted({*_modules(old), *_modules(new)})
    tensors = {key: tensor for key, tensor in new.items() if ".lora_" not in key}
    for name in modules:
        tensors |= _stacked(name, [(old, old_settings, factor), (new, new_settings, 1.0)])
    settings = new_settings | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "target_modules": _targets(old_settings, new_settings, modules),
    }
    return tensors, settings


def _stacked(name: str, halves: list[tuple[Tensors, dict[str, Any], float]]) -> Tensors:
    import torch

    down_key, up_key = _keys(name)
    like = next(tensors for tensors, _, _ in reversed(halves) if down_key in tensors)
    downs, ups = [], []
    for tensors, settings, factor in halves:
        if down_key in tensors:
            downs.append(tensors[down_key].float())
            ups.append(tensors[up_key].float() * (factor * _scaling(settings)))
        else:
            downs.append(torch.zeros(int(settings["r"]), like[down_key].shape[1]))
            ups.append(torch.zeros(like[up_key].shape[0], int(settings["r"])))
    dtype = halves[-1][0].get(down_key, like[down_key]).dtype
    return {down_key: torch.cat(downs).to(dtype), up_key: torch.cat(ups, dim=1).to(dtype)}


def _targets(old: dict[str, Any], new: dict[str, Any], modules: list[str]) -> Any:
    """Short names where both have the same; else every module by its whole name."""
    both = [settings["target_modules"] for settings in (old, new)]
    if all(isinstance(targets, list) for targets in both) and set(both[0]) == set(both[1]):
        return sorted(both[1])
    return modules


def _scaling(settings: Mapping[str, Any]) -> float:
    rank = settings["r"]
    return float(settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank))


def _modules(tensors: Tensors) -> list[str]:
    end = ".lora_A.weight"
    return sorted(key.removeprefix(PREFIX).removesuffix(end) for key in tensors if key.endswith(end))


def _keys(module: str) -> tuple[str, str]:
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"
