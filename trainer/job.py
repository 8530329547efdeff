"""What a training will do, decided before a model is loaded: inputs, key, folder, every step."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pipelines import storage
from schemas.errors import IntegrityError, RefusedError, TrainingError
from schemas.pipeline_config import PipelineConfig
from schemas.run import CHECKPOINTS_FOLDER, MANIFEST_NAME, STAGE_FOLDERS
from schemas.training_config import ModelConfig
from schemas.training_result import CURRENT_TRAINING_NAME, TRAINING_RESULT_NAME, TrainingResult
from trainer.data import Plan, check_plan, read_plan
from trainer.dtypes import resolve_dtype
from trainer.metrics import report
from trainer.model import needed_model, resolve_device
from trainer.model_files import base_digest
from trainer.ranks import ALONE, Ranks
from trainer.service import TRAINING_CURE
from trainer.setting_rules import FLOAT16_STRATEGIES
from trainer.shard_reader import ShardReader
from trainer.start_adapter import adapter_digest, adapter_folder, check_base_of
from trainer.steps import Step, plan_steps
from trainer.support import check_supported
from trainer.virtual_rules import is_unpacked, tokens_of_a_bin

TRAINER_VERSION = 2
"""Rises when equal inputs would give other weights: finished and unfinished trainings then count as others."""

SETTINGS_OUTSIDE_KEY = frozenset(
    {
        "checkpoint_every_steps",
        "keep_checkpoints",
        "evaluate_every_steps",
        "max_nonfinite_steps",
        "max_spike_steps",
        "bins_per_micro_step",
        "attention",
        "compile",
        "compile_cache",
        "mlp_tokens_at_once",
        "offload_checkpoints",
        "rank_timeout_seconds",
        "trackers",
        "shard_base",
        "strategy",
        "offload",
        "num_processes",
    }
)
"""They shape no weight, the last three but for rounding, so they may change between two runs of one training."""

SETTINGS_ALWAYS_IN_KEY = frozenset(
    {
        "method",
        "base",
        "epochs",
        "max_steps",
        "max_tokens",
        "bins_per_step",
        "learning_rate",
        "schedule",
        "warmup_steps",
        "warmup_share",
        "min_learning_rate_share",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "gradient_checkpointing",
        "kernels",
        "deterministic",
        "seed",
        "keep_best",
        "best_metric",
        "early_stopping_evaluations",
        "evaluate_every_steps",
        "max_loss_spike",
        "max_grad_spike",
    }
)
LORA_SETTINGS_ALWAYS_IN_KEY = frozenset({"rank", "alpha", "dropout", "targets", "modules_to_save"})
"""Settings that came later count where they are not at their default: older trainings keep their keys."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Everything that is fixed. `steps` are all steps of the run; `plans` has one entry an epoch."""

    config: PipelineConfig
    model: ModelConfig
    device: torch.device
    dtype: torch.dtype
    inputs: dict[str, str]
    settings: dict[str, Any]
    key: str
    folder: Path
    reader: ShardReader
    plans: tuple[Plan, ...]
    steps: tuple[Step, ...]
    validation: tuple[ShardReader, Plan] | None
    ranks: Ranks = ALONE

    @property
    def num_tokens(self) -> int:
        return sum(step.num_tokens for step in self.steps)

    @property
    def padded_tokens_per_bin(self) -> int | None:
        """The budget of padded rows; None where documents are packed."""
        return tokens_of_a_bin(self.config) if is_unpacked(self.config.train) else None


def plan_job(config: PipelineConfig, ranks: Ranks = ALONE) -> Job:
    """Check everything that can be checked without the model's weights.

    Raises RefusedError, InputError, IntegrityError, and TrainingError when there is nothing to train on.
    """
    check_supported(config)
    model = needed_model(config)
    device = resolve_device(model)
    dtype = _dtype(config, model, device)
    inputs = _input_digests(config, model)
    settings = _settings(config)
    key = _key(inputs, settings, device, dtype)
    reader = ShardReader(config.run_root / STAGE_FOLDERS["split"], "train")
    check_plan(config.run_root)
    plans = tuple(read_plan(config.run_root, "train", epoch) for epoch in range(config.train.epochs))
    reader.check_files()
    return Job(
        config=config,
        model=model,
        device=device,
        dtype=dtype,
        inputs=inputs,
        settings=settings,
        key=key,
        folder=config.run_root / CHECKPOINTS_FOLDER / key,
        reader=reader,
        plans=plans,
        steps=_steps(config, reader, plans),
        validation=_needed_validation(config),
        ranks=ranks,
    )


def read_result(job: Job) -> TrainingResult | None:
    """The result of the same training, when it is finished and its files are what was written."""
    path = job.folder / TRAINING_RESULT_NAME
    if not path.exists():
        return None
    try:
        result = TrainingResult.model_validate(storage.read_record(path, cure=TRAINING_CURE))
    except ValidationError as error:
        raise IntegrityError(
            f"{path} is not a training result of this version ({error.error_count()} wrong fields); {TRAINING_CURE}"
        ) from error
    for entry in result.files:
        storage.check_file(job.folder, entry, cure=f"delete {path} and run `sft-pipeline train`")
    return result


def mark_current(job: Job) -> None:
    """Name this training as the newest finished one: what evaluate and promote take."""
    path = job.config.run_root / CHECKPOINTS_FOLDER / CURRENT_TRAINING_NAME
    line = f"{job.key}\n".encode()
    if not path.exists() or path.read_bytes() != line:
        storage.write_bytes(path, line)


def facts(job: Job) -> dict[str, Any]:
    """What must be equal for a checkpoint to be ours."""
    dtype = str(job.dtype).removeprefix("torch.")
    return {"key": job.key, "num_steps": len(job.steps), "seed": job.config.train.seed, "dtype": dtype}


def tell(job: Job, message: str) -> None:
    """A line for people, once for all ranks."""
    if job.ranks.is_first:
        report(message)


def _steps(config: PipelineConfig, reader: ShardReader, plans: tuple[Plan, ...]) -> tuple[Step, ...]:
    train = config.train
    steps = plan_steps(
        plans,
        bins_per_step=train.bins_per_step,
        max_steps=train.max_steps,
        max_tokens=train.max_tokens,
    )
    if not steps:
        raise TrainingError(
            f"no step to train: {reader.num_rows} examples in {sum(plan.num_bins for plan in plans)} bins, "
            f"train.max_tokens {train.max_tokens}; raise train.max_tokens or add data"
        )
    if not any(step.weight_sum > 0 for step in steps):
        raise TrainingError(
            f"none of the {sum(step.num_tokens for step in steps)} tokens is trained; check split.train_on"
        )
    return tuple(steps)


def _needed_validation(config: PipelineConfig) -> tuple[ShardReader, Plan] | None:
    found, train = _validation(config), config.train
    if found is None and (train.keep_best or train.early_stopping_evaluations):
        raise RefusedError(
            f"train.keep_best is {train.keep_best}, train.early_stopping_evaluations "
            f"{train.early_stopping_evaluations}, and the validation side is empty: raise holdout.validation, or "
            "switch both off"
        )
    return found


def _validation(config: PipelineConfig) -> tuple[ShardReader, Plan] | None:
    folder = config.run_root / STAGE_FOLDERS["split"]
    manifest = storage.check_manifest(folder, stage="split")
    if not any(entry.path == "validation/state.json" for entry in manifest.files):
        return None
    reader = ShardReader(folder, "validation")
    if reader.num_rows == 0:
        return None
    reader.check_files()
    return reader, read_plan(config.run_root, "validation", 0)


def _dtype(config: PipelineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    dtype = resolve_dtype(model, device)
    if dtype == torch.float16 and config.train.strategy not in FLOAT16_STRATEGIES:
        return torch.float32  # auto, on an older card; asked for by name it is refused by now
    return dtype


def _input_digests(config: PipelineConfig, model: ModelConfig) -> dict[str, str]:
    manifests = {stage: config.run_root / STAGE_FOLDERS[stage] for stage in ("split", "pack")}
    for stage, folder in manifests.items():
        storage.check_manifest(folder, stage=stage)
    digests = {folder.name: storage.file_sha256(folder / MANIFEST_NAME) for folder in manifests.values()}
    digests["model"] = base_digest(model)
    digests |= _changes_of_the_model(model)
    if model.adapter is not None:
        folder = adapter_folder(model)
        check_base_of(folder, digests["model"])
        digests[f"adapter_{model.adapter_use}"] = adapter_digest(folder)
    return digests


def _changes_of_the_model(model: ModelConfig) -> dict[str, str]:
    """What the section model makes of the files; nothing where it takes them as they are."""
    changed = model.model_dump(
        mode="json", include={"init", "rope_scaling", "new_tokens"}, exclude_defaults=True
    )
    return {f"model_{name}": json.dumps(value, sort_keys=True) for name, value in changed.items()}


def _settings(config: PipelineConfig) -> dict[str, Any]:
    train, outside = config.train, set(SETTINGS_OUTSIDE_KEY)
    if train.keep_best or train.early_stopping_evaluations:
        outside.remove("evaluate_every_steps")  # it decides which weights are the best ones
    else:
        outside.add("best_metric")
    always = train.model_dump(mode="json", include=set(SETTINGS_ALWAYS_IN_KEY) - outside)
    lora = train.lora.model_dump(mode="json", include=set(LORA_SETTINGS_ALWAYS_IN_KEY))
    changed = train.model_dump(mode="json", exclude=outside, exclude_defaults=True)
    return always | changed | {"lora": lora | changed.get("lora", {})}


def _key(inputs: dict[str, str], settings: dict[str, Any], device: torch.device, dtype: torch.dtype) -> str:
    facts = [TRAINER_VERSION, inputs, settings, device.type, str(dtype)]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
