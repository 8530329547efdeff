"""`sft-pipeline harness`: a trained model under the tasks of lm-evaluation-harness (extra `lm-eval`), offline.

Tasks are YAML files in a folder of the user's, with data beside them, or the library's own where their data is in the
local cache already. A task's YAML may name Python functions of its own: run only those that you would run as code.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipelines.storage import read_record, write_record
from schemas.errors import ConfigError, InputError
from schemas.pipeline_config import PipelineConfig
from schemas.run import FORMAT_VERSION
from trainer.load_trained import Choice, Device, choose, load_choice
from trainer.model_card import HarnessScore
from trainer.prompts import printable

SCORES_NAME = "harness.json"
"""Beside a training's output: the newest scores of each task."""


@dataclass(frozen=True, slots=True)
class HarnessSettings:
    """What the library is asked. `task_folder` None: its own tasks."""

    task_folder: Path | None = None
    limit: int | None = None
    """So many examples of each task; None: all."""
    num_fewshot: int | None = None
    batch_size: int = 8
    use_chat_template: bool = True
    seed: int = 0


def run_harness(
    config: PipelineConfig,
    tasks: Sequence[str],
    settings: HarnessSettings,
    *,
    adapter: str = "promoted",
    device: Device = "auto",
) -> list[HarnessScore]:
    """Prints the scores and keeps them beside the training, for its model card.

    Raises ConfigError where the library or a task is missing.
    """
    _check_installed()
    choice = choose(config, adapter)
    manager = _task_manager(tasks, settings)
    scores = list(_scores(_evaluated(config, choice, tasks, settings, manager, device)))
    for score in scores:
        error = "" if score.stderr is None else f" +- {score.stderr:.4f}"
        examples = "" if score.num_examples is None else f"  ({score.num_examples} examples)"
        print(f"{printable(score.task)}  {score.metric}  {score.value:.4f}{error}{examples}")
    if (path := _scores_path(choice)) is not None:
        _keep(path, scores, settings)
        print(path)
    return scores


def read_scores(training_folder: Path) -> tuple[HarnessScore, ...]:
    """What earlier runs kept there; () where there is nothing. Raises IntegrityError for a changed file."""
    path = training_folder / SCORES_NAME
    if not path.is_file():
        return ()
    return tuple(HarnessScore(**score) for score in read_record(path)["scores"])


def _check_installed() -> None:
    if find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed: pip install 'sft-pipeline[lm-eval]'")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _task_manager(tasks: Sequence[str], settings: HarnessSettings) -> Any:
    if settings.task_folder is not None and not settings.task_folder.is_dir():
        raise InputError(f"no folder of tasks at {settings.task_folder}")
    from lm_eval.tasks import TaskManager

    own = settings.task_folder is not None
    manager = TaskManager(include_path=str(settings.task_folder) if own else None, include_defaults=not own)
    missing = sorted(set(tasks) - set(manager.all_tasks))
    if missing or not tasks:
        known = ", ".join(sorted(manager.all_tasks)[:10]) or "none"
        raise ConfigError(f"no task {', '.join(missing) or 'is named'}; there are {known}")
    return manager


def _evaluated(
    config: PipelineConfig,
    choice: Choice,
    tasks: Sequence[str],
    settings: HarnessSettings,
    manager: Any,
    device: Device,
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    loaded = load_choice(config, choice, device=device)
    judged: Any = loaded.model
    found = simple_evaluate(
        model=HFLM(pretrained=judged, tokenizer=loaded.tokenizer, batch_size=settings.batch_size),
        tasks=list(tasks),
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        apply_chat_template=settings.use_chat_template,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
    )
    assert found is not None, "None is for other ranks than the first"
    return found


def _scores(found: Mapping[str, Any]) -> Iterator[HarnessScore]:
    """`metric,filter` -> value, with its standard error beside it; both may be words where there is none."""
    for task, results in sorted(found["results"].items()):
        counts = found.get("n-samples", {}).get(task, {})
        for key, value in sorted(results.items()):
            metric, _, filtering = key.partition(",")
            if not filtering or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = results.get(f"{metric}_stderr,{filtering}")
            name = metric if filtering == "none" else f"{metric} ({filtering})"
            is_number = isinstance(stderr, (int, float))
            yield HarnessScore(
                task, name, float(value), float(stderr) if is_number else None, counts.get("effective")
            )


def _scores_path(choice: Choice) -> Path | None:
    """Beside the output of one of our trainings; nowhere for the base model and other folders."""
    if choice.folder is None or not (choice.folder.parent / "training.json").is_file():
        return None
    return choice.folder.parent / SCORES_NAME


def _keep(path: Path, scores: Sequence[HarnessScore], settings: HarnessSettings) -> None:
    measured = {score.task for score in scores}
    kept = [score for score in read_scores(path.parent) if score.task not in measured]
    record = {
        "format_version": FORMAT_VERSION,
        "scores": [asdict(score) for score in sorted([*kept, *scores], key=lambda s: (s.task, s.metric))],
        "settings": asdict(settings) | {"task_folder": str(settings.task_folder)},
        "versions": {"lm-eval": version("lm-eval")},
    }
    write_record(path, record)
