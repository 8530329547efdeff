"""`sft-pipeline export`: a folder to hand on, with tokenizer, template, generation settings and a model card.

    adapter    what was trained, beside its base
    merged     base and adapter as one model; checked against the two before it counts
    model      a model that was trained whole

From the model in service, the newest training, a folder, or a checkpoint of any strategy.
"""

import gc
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.storage import write_bytes, write_json
from schemas.errors import ConfigError, InputError
from schemas.evaluation import Evaluation
from schemas.pipeline_config import PipelineConfig
from schemas.run import EVALUATION_NAME
from schemas.training_result import TRAINING_RESULT_NAME, TrainingResult
from trainer.answer import end_token_ids
from trainer.consolidate import consolidate
from trainer.data_summary import CARD_NAME, card_front_matter, summarise
from trainer.dtypes import DTYPES, resolve_dtype
from trainer.folders import built_aside
from trainer.harness import read_scores
from trainer.load_trained import Choice, Device, answering_device, choose
from trainer.merge_check import LIMITS, Difference, check_difference, merge_difference
from trainer.merging import check_can_merge, write_merged
from trainer.metrics import report
from trainer.model import load_tokenizer, needed_model
from trainer.model_card import CardFacts, card_text
from trainer.safetensors_writer import MAX_SHARD_BYTES
from trainer.service import read_evaluation, read_training
from trainer.start_adapter import adapter_settings
from trainer.support import model_folder

Form = Literal["adapter", "merged", "model"]
GENERATION_CONFIG_NAME = "generation_config.json"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """How a merged model is written and checked. `dtype` None: what training computed in."""

    dtype: str | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    max_difference: float | None = None
    check: bool = True
    device: Device = "auto"


def export(
    config: PipelineConfig,
    out: Path,
    *,
    form: Form | None = None,
    adapter: str = "promoted",
    checkpoint: str | None = None,
    merge: MergeSettings | None = None,
) -> Path:
    """Writes `out`, whole or not at all. Without a form: what training left.

    Raises InputError where `out` is there or nothing of that name is, ConfigError for a form that does not fit,
    RefusedError for an adapter that can't be merged, LimitError when the merged model is another one.
    """
    if out.exists():
        raise InputError(f"{out} is there already; name a folder that is not")
    if checkpoint is None:
        choice = choose(config, adapter)
        with built_aside(out) as folder:
            _write(config, choice, folder, out.name, form, merge or MergeSettings())
        return out
    with built_aside(out) as folder:
        whole = consolidate(config, checkpoint=checkpoint, out=folder / ".checkpoint")
        choice = choose(config, str(whole))
        _write(config, choice, folder, out.name, form, merge or MergeSettings())
        shutil.rmtree(whole)
    return out


def _write(
    config: PipelineConfig, choice: Choice, folder: Path, name: str, form: Form | None, merge: MergeSettings
) -> None:
    if choice.folder is None:
        raise ConfigError(
            "--adapter none is the base model, which nothing was done to: there is nothing to export"
        )
    form = _fitting(form, choice)
    training = _training_of(config, choice.folder)
    difference = None
    if form == "merged":
        check_can_merge(choice.folder)
        difference = _write_merged(config, choice.folder, folder, training, merge)
    else:
        _copy(choice.folder, folder)
    if form != "adapter":
        _write_generation_config(config, folder)
    load_tokenizer(config).save_pretrained(folder)
    facts = _facts(config, choice.folder, folder, name, form, training, difference)
    write_bytes(folder / CARD_NAME, card_text(facts).encode())


def _fitting(form: Form | None, choice: Choice) -> Form:
    natural: Form = "adapter" if choice.is_adapter else "model"
    if form is None or form == natural or (form == "merged" and choice.is_adapter):
        return form or natural
    alternative = "adapter or merged" if choice.is_adapter else "model"
    raise ConfigError(f"--form {form} does not fit {choice.description}; use {alternative}")


def _training_of(config: PipelineConfig, folder: Path) -> TrainingResult | None:
    """The record of the training that a folder is the output of; of a checkpoint, of its own training."""
    record = folder.parent / TRAINING_RESULT_NAME
    return read_training(record.parent) if record.is_file() else None


def _copy(source: Path, out: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != CARD_NAME:
            shutil.copyfile(path, out / path.name)


def _write_generation_config(config: PipelineConfig, folder: Path) -> None:
    """The base's own settings, and all end tokens: the template's may be none of those that the base stops at."""
    settings, tokenizer = needed_model(config), load_tokenizer(config)
    path = model_folder(settings.path, settings.revision) / GENERATION_CONFIG_NAME
    own: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    own["eos_token_id"] = end_token_ids(tokenizer, own.get("eos_token_id"))
    for name in ("bos_token_id", "pad_token_id"):
        if own.get(name) is None and getattr(tokenizer, name) is not None:
            own[name] = getattr(tokenizer, name)
    write_json(folder / GENERATION_CONFIG_NAME, own)


# Merging ----------------------------------------------------------------------------------------------------


def _write_merged(
    config: PipelineConfig, adapter: Path, folder: Path, training: TrainingResult | None, merge: MergeSettings
) -> Difference | None:
    device = answering_device(config, merge.device)
    trained_dtype = DTYPES[training.dtype] if training else resolve_dtype(needed_model(config), device)
    dtype = DTYPES[merge.dtype] if merge.dtype is not None else trained_dtype
    write_merged(
        config,
        adapter,
        folder,
        dtype=dtype,
        trained_dtype=trained_dtype,
        max_shard_bytes=merge.max_shard_bytes,
    )
    gc.collect()
    if not merge.check:
        report("the merged model was not compared with base and adapter: --no-check")
        return None
    found = merge_difference(config, adapter, folder, device=device, dtype=dtype)
    report(f"merged: {found.line()}")
    limit = merge.max_difference if merge.max_difference is not None else LIMITS[config.train.base]
    check_difference(found, limit)
    return found


# The card ---------------------------------------------------------------------------------------------------


def _facts(
    config: PipelineConfig,
    source: Path,
    folder: Path,
    name: str,
    form: Form,
    training: TrainingResult | None,
    difference: Difference | None,
) -> CardFacts:
    settings = needed_model(config)
    base = model_folder(settings.path, settings.revision)
    return CardFacts(
        name=name,
        form=form,
        method=_method(config, source, training),
        base=settings.path,
        base_id=_hub_name(settings.path, base),
        license=_license(base),
        dtype=_dtype(folder, training),
        training=training,
        evaluation=_evaluation(config, training),
        data=summarise(config, training) if training is not None else None,
        difference=difference,
        harness=read_scores(source.parent),
    )


def _method(config: PipelineConfig, source: Path, training: TrainingResult | None) -> str:
    if training is not None:
        return training.method
    is_adapter = (source / "adapter_config.json").is_file()
    return str(adapter_settings(source).get("peft_type")).lower() if is_adapter else config.train.method


def _dtype(folder: Path, training: TrainingResult | None) -> str | None:
    path = folder / "config.json"
    if path.is_file():
        found = json.loads(path.read_bytes()).get("dtype")
        return str(found) if found else None
    return training.dtype if training is not None else None


def _hub_name(name: str, folder: Path) -> str | None:
    """As the config names it, or as the local cache has filed the folder; None for a folder of one's own."""
    if not Path(name).is_dir():
        return name
    filed = [part for part in folder.absolute().parts if part.startswith("models--")]
    return "/".join(filed[-1].split("--")[1:]) if filed else None


def _license(base: Path) -> dict[str, str]:
    """As the base model's own card says it."""
    found = card_front_matter(base)
    names = ("license", "license_name", "license_link")
    return {name: found[name] for name in names if isinstance(found.get(name), str)}


def _evaluation(config: PipelineConfig, training: TrainingResult | None) -> Evaluation | None:
    """The report in the run root, if it is about this training."""
    if training is None or not (config.run_root / EVALUATION_NAME).exists():
        return None
    found = read_evaluation(config.run_root)
    return found if found.candidate.training_key == training.key else None


# The command ------------------------------------------------------------------------------------------------


def run_export(config: PipelineConfig, out: Path, **settings: Any) -> None:
    """Prints the folder."""
    print(export(config, out, **settings))
