"""`sft-pipeline doctor`: what is missing or wrong on this machine, each with what was expected and its remedy.

Exit code 0 when the main job would run (a warning does not stop it), 1 when it would not. The main job is
`sft-pipeline run CONFIG`, or its stages up to --until; without a config it is a run with the defaults.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.machine import Finding, check_disk, check_disk_for, check_lock, check_python

if TYPE_CHECKING:
    from schemas.pipeline_config import PipelineConfig

LABEL_COLUMNS = 22


@dataclass(frozen=True, slots=True)
class Question:
    """Would this run, here?"""

    config_path: Path | None = None
    overrides: tuple[str, ...] = ()
    until: str | None = None


def report(question: Question, *, as_json: bool = False) -> int:
    """Print all findings; returns the exit code."""
    findings = list(examine(question))
    num_failed = sum(finding.level == "fails" for finding in findings)
    if as_json:
        config = str(question.config_path) if question.config_path is not None else None
        answer = {"would_run": not num_failed, "config": config, "until": question.until}
        print(json.dumps(answer | {"findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print("\n".join(finding_lines(finding)))
        print(
            "the pipeline would run"
            if not num_failed
            else f"the pipeline would not run: {num_failed} to be mended"
        )
    return 1 if num_failed else 0


def finding_lines(finding: Finding) -> Iterator[str]:
    """For people: level, subject and what was found; below it what was expected and what to do."""
    yield f"{finding.level:<9}{finding.subject:<12} {finding.found}"
    if finding.expected:
        yield f"{'':<{LABEL_COLUMNS}}expected: {finding.expected}"
    if finding.remedy:
        yield f"{'':<{LABEL_COLUMNS}}remedy: {finding.remedy}"


def examine(question: Question) -> Iterator[Finding]:
    """Every check, the cheap ones first. A check that breaks is a finding itself."""
    # Standard library alone until the libraries are known to be there.
    from flows.distributions import check_fasttext, check_libraries, check_our_packages

    yield from check_python()
    yield from check_our_packages()
    libraries = list(guarded("libraries", check_libraries))
    yield from libraries
    yield from guarded("fasttext", check_fasttext)
    if any(finding.level == "fails" for finding in libraries):
        return
    config, problems = read_config(question)
    yield from problems
    for name, check in checks(question, config):
        yield from guarded(name, check)


Check = Callable[[], Iterator[Finding]]


def checks(question: Question, config: "PipelineConfig | None") -> list[tuple[str, Check]]:
    """What is asked once the libraries are there: the machine, then the config on it."""
    from flows.devices import check_training
    from flows.prefect_checks import check_prefect
    from flows.preflight import chosen_stages

    stages = chosen_stages(None, question.until)
    run_root = config.run_root if config is not None else Path.cwd() / "runs" / "first"
    asked: list[tuple[str, Check]] = [
        ("lock", lambda: check_lock(run_root)),
        ("prefect", lambda: check_prefect(run_root)),
    ]
    if config is None:
        asked.append(("disk", lambda: check_disk(run_root)))
    else:
        asked.append(("sources", lambda: check_sources(config, stages)))
        if "dedup" in stages:
            asked.append(("earlier run", lambda: check_earlier_runs(config)))
        asked.append(("config", lambda: check_config(config, stages)))
    if "train" in stages:
        asked.append(("training", lambda: check_training(config)))
    return asked


def guarded(name: str, check: Check) -> Iterator[Finding]:
    """The findings of a check, or the error that it ended in."""
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - an odd machine is what doctor is for: told, and the rest is asked
        what = f"the check broke: {type(error).__name__}: {' '.join(str(error).split())}"
        yield Finding("fails", name, what, "an answer", "mend what it names; if it is nonsense, report this")


def read_config(question: Question) -> tuple["PipelineConfig | None", list[Finding]]:
    """The config that was named, or what is wrong with it."""
    from schemas.config_file import load_config
    from schemas.errors import SftPipelineError

    if question.config_path is None:
        return None, []
    try:
        return load_config(question.config_path, question.overrides), []
    except SftPipelineError as error:
        remedy = "mend the config; docs/configuration.md lists every key"
        return None, [Finding("fails", "config", str(error), "a config that can be read", remedy)]


def check_sources(config: "PipelineConfig", stages: Sequence[str]) -> Iterator[Finding]:
    """Sources and benchmarks are there and can be read, and the disk is large enough for what will come of them."""
    import os

    from flows.disk_need import source_files
    from schemas.errors import InputError

    num_missing = 0
    for source in (*config.sources, *(benchmark.as_source() for benchmark in config.benchmarks)):
        try:
            unreadable = [path for path in source_files(source) if not os.access(path, os.R_OK)]
        except InputError as error:
            num_missing += 1
            yield Finding("fails", "source", str(error), "files with records", "mend its path in the config")
            continue
        if unreadable:
            remedy = f"chmod u+r {unreadable[0]}"
            yield Finding("fails", "source", f"{unreadable[0]} can't be opened", "readable files", remedy)
            num_missing += 1
    if num_missing:
        yield from check_disk(config.run_root)
        return
    yield Finding("ok", "sources", f"{len(config.sources)}, all there")
    yield from check_disk_for(config, stages, model=_model_folder(config))


def check_earlier_runs(config: "PipelineConfig") -> Iterator[Finding]:
    """Each of earlier_runs is finished, whole and of a kind that our rows can be compared with."""
    from pipelines.stage import check_earlier_run
    from schemas.errors import SftPipelineError

    for root in config.earlier_runs:
        try:
            num_rows = check_earlier_run(config, root)
        except SftPipelineError as error:
            expected = "the run root of another run whose stage dedup is finished, made by this version"
            remedy = "run that config again up to dedup, or mend earlier_runs; --until filter stops before they are read"
            yield Finding("fails", "earlier run", str(error), expected, remedy)
        else:
            yield Finding("ok", "earlier run", f"{root}, {num_rows:,} rows that are not taken again")


def check_config(config: "PipelineConfig", stages: Sequence[str]) -> Iterator[Finding]:
    """Nothing that the config asks for is refused."""
    from flows.preflight import check_settings
    from schemas.errors import SftPipelineError

    try:
        check_settings(config, stages)
    except SftPipelineError as error:
        remedy = "see what was found; --until stops before that stage"
        yield Finding("fails", "config", str(error), "settings that work together", remedy)
    else:
        yield Finding("ok", "config", "settings, tokenizer and chat template go together")


def _model_folder(config: "PipelineConfig") -> Path | None:
    from schemas.errors import InputError
    from trainer.memory import read_shapes
    from trainer.support import model_folder

    if config.model is None:
        return None
    try:
        folder = model_folder(config.model.path, config.model.revision)
        read_shapes(folder)
    except InputError:
        return None  # the check of the config names it
    return folder
