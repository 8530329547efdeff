"""The stages 1-7 in the order of the journey: what each is called, what it reads of the config, who drives it.

A driver lists parts, names by a key what shapes each one's bytes, has the missing ones worked on, and finishes
with the manifest. Stage modules hold pure functions; pipelines/parts.py and pipelines/work.py do the rest.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

from pipelines.corpus_stages import run_dedup, run_holdout
from pipelines.earlier_runs import check_files_are_there, earlier_manifests
from pipelines.part_files import remove_temporary_files
from pipelines.parts import PartsToRun, Progress, StageResult, StageRun
from pipelines.row_stages import run_merge, run_row_step
from pipelines.shard_stages import run_pack, run_split
from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig


def run_stage(name: str, config: PipelineConfig, *, progress: Progress | None = None) -> StageResult:
    """Run one stage, or find that nothing has changed. The caller holds the run root.

    Raises InputError (stage before is missing), LimitError, IntegrityError, WorkerError.
    """
    run, module = _stage_run(name, config, progress)
    remove_temporary_files(run.folder)
    return _DRIVERS[name](run, module)


def plan_stages(names: Sequence[str], config: PipelineConfig) -> Iterator[tuple[str, str]]:
    """For each stage, whether it would run and why. Writes nothing in the run root."""
    changed = ""
    for name in names:
        if changed:
            yield name, f"runs: {changed} changes"
            continue
        text = _plan_stage(name, config)
        changed = "" if text == UNCHANGED else name
        yield name, text


UNCHANGED = "unchanged, would be skipped"


def _plan_stage(name: str, config: PipelineConfig) -> str:
    run, module = _stage_run(name, config)
    run.dry = True
    try:
        _DRIVERS[name](run, module)
    except PartsToRun as plan:
        return f"runs: {plan.num_parts_to_run} parts changed or new, {plan.num_parts_reused} taken over"
    except InputError as error:
        return f"can't be planned: {error}"
    return UNCHANGED


def check_earlier_run(config: PipelineConfig, root: str) -> int:
    """How many rows one of config.earlier_runs kept. Raises InputError where dedup could not take it."""
    run, _ = _stage_run("dedup", config.model_copy(update={"earlier_runs": [root]}))
    found = earlier_manifests(run)
    check_files_are_there(found)
    return sum(manifest.num_rows_out for _, manifest in found)


def _stage_run(
    name: str, config: PipelineConfig, progress: Progress | None = None
) -> tuple[StageRun, ModuleType]:
    module = importlib.import_module(f"pipelines.{name}")
    # A stage reads the section of its own name; the others may change without making it run again.
    sections: dict[str, object] = {name: getattr(config, name).model_dump(mode="json")}
    return StageRun(name, config, module.STAGE_VERSION, sections, module.versions(config), progress), module


_DRIVERS: dict[str, Callable[[StageRun, ModuleType], StageResult]] = {
    "merge": run_merge,
    "clean": run_row_step,
    "filter": run_row_step,
    "dedup": run_dedup,
    "holdout": run_holdout,
    "split": run_split,
    "pack": run_pack,
}
