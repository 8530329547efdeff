"""A model to answer with, by name: the one in service, the newest training's, the base, or one in a folder.

load_for_generation(config, "promoted")    also "current", "none", or a folder
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from schemas.errors import InputError, RefusedError
from schemas.evaluation import TrainedModel
from schemas.pipeline_config import PipelineConfig
from trainer.attention import unwrapped, use_plain_attention
from trainer.model import (
    as_saved,
    load_adapter,
    load_base_model,
    load_tokenizer,
    needed_model,
    resolve_device,
)
from trainer.model_files import base_digest, model_digest
from trainer.service import check_trained_model, find_candidate, find_promoted
from trainer.start_adapter import CONFIG_NAME, TENSORS_NAME, adapter_digest, check_base_of

Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to answer. `description` names it for people."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    description: str

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    @contextmanager
    def without_adapter(self) -> Iterator[torch.nn.Module]:
        """The base model under the adapter, as long as the block lasts."""
        model: Any = self.model
        with model.disable_adapter():
            yield unwrapped(model)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was named: None is the base model. `digest` says which weights they are."""

    folder: Path | None
    description: str
    digest: str

    @property
    def is_adapter(self) -> bool:
        return self.folder is not None and (self.folder / CONFIG_NAME).is_file()


def load_for_generation(
    config: PipelineConfig, adapter: str | Path = "promoted", *, device: Device = "auto"
) -> LoadedModel:
    """The model in service ("promoted"), the newest training ("current"), the base ("none"), or a folder.

    A folder holds an adapter, a whole model, or a training with one of them. Raises InputError when there is
    nothing of that name or it belongs to another base model, IntegrityError when its files were changed.
    """
    return load_choice(config, choose(config, adapter), device=device)


def load_choice(config: PipelineConfig, choice: Choice, *, device: Device = "auto") -> LoadedModel:
    """What `choose` found, with plain attention."""
    model = load_with_adapter(config, choice.folder, device=answering_device(config, device))
    use_plain_attention(model)
    return LoadedModel(model.eval(), load_tokenizer(config), choice.description)


def load_with_adapter(
    config: PipelineConfig, folder: Path | None, *, device: torch.device | None = None
) -> torch.nn.Module:
    """The base model, the base with the adapter in `folder`, or the whole model in `folder`; packed attention.

    All in the form of train.base: a card that trains an 8-bit base may not hold more.
    """
    settings, base = needed_model(config), config.train.base
    if folder is None:
        return load_base_model(settings, base=base, device=device)
    if (folder / CONFIG_NAME).is_file():
        return load_adapter(load_base_model(settings, base=base, device=device), folder)
    return load_base_model(as_saved(settings, folder), base=base, device=device)


def answering_device(config: PipelineConfig, device: Device) -> torch.device:
    """auto: model.device, and Apple's GPU where that leaves a choice and there is no other. Raises RefusedError."""
    settings = needed_model(config)
    has_mps = torch.backends.mps.is_available()
    if device == "mps" or (device == "auto" == settings.device and has_mps):
        if not has_mps:
            raise RefusedError("--device is mps but torch sees no GPU of Apple's; use auto or cpu")
        if config.train.base != "plain":
            raise RefusedError(
                f"train.base is {config.train.base} on mps, where nobody has shown bitsandbytes to be right: use "
                "--base plain, or --device cpu"
            )
        return torch.device("mps")
    return resolve_device(settings if device == "auto" else settings.model_copy(update={"device": device}))


# Names ------------------------------------------------------------------------------------------------------


def choose(config: PipelineConfig, adapter: str | Path) -> Choice:
    """Raises as load_for_generation; loads nothing."""
    if adapter == "none":
        settings = needed_model(config)
        return Choice(None, f"base model {settings.path}", base_digest(settings))
    if adapter not in ("promoted", "current"):
        return _named_folder(config, Path(adapter))
    trained = find_promoted(config.run_root) if adapter == "promoted" else find_candidate(config.run_root)
    if trained is None:
        raise InputError(
            f"no model is in service in {config.run_root}: run `sft-pipeline promote`, or take the newest "
            "training with --adapter current, or the base model with --adapter none"
        )
    check_base(config, trained)
    folder = check_trained_model(config.run_root, trained)
    return Choice(folder, f"{adapter} {trained.kind} {trained.path}", trained.digest)


def check_base(config: PipelineConfig, trained: TrainedModel) -> None:
    """Raises InputError when an adapter was trained on another base model than the config names."""
    settings = needed_model(config)
    found = base_digest(settings)
    if trained.kind == "adapter" and found != trained.base_digest:
        raise InputError(
            f"{trained.path} was trained on another base model (digest {trained.base_digest[:12]}) than "
            f"{settings.path} ({found[:12]}): set model.path to that one, or use a new run_root"
        )


def _named_folder(config: PipelineConfig, folder: Path) -> Choice:
    for place in (folder, folder / "adapter", folder / "model"):
        if (place / CONFIG_NAME).is_file() and (place / TENSORS_NAME).is_file():
            check_base_of(place, base_digest(needed_model(config)))
            return Choice(place, str(folder), adapter_digest(place))
        if (place / "config.json").is_file():
            return Choice(place, str(folder), model_digest(place))
    raise InputError(
        f"{folder} holds neither an adapter ({CONFIG_NAME} and {TENSORS_NAME}) nor a model (config.json); "
        "give such a folder, or promoted, current or none"
    )
