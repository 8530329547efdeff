"""Our four packages have everyday names: refuse to start when another distribution's stands in place of ours.

Standard library alone, and nothing of ours is imported: this runs before anything that could be foreign.
"""

import functools
import importlib.util
import sys
from pathlib import Path

OUR_PACKAGES = ("schemas", "pipelines", "trainer", "flows")
OUR_FOLDER = Path(__file__).resolve().parent.parent


def check_packages() -> None:
    """Raises ForeignPackageError naming the intruder's file."""
    problem = foreign_package(OUR_FOLDER)
    if problem is not None:
        from schemas.errors import ForeignPackageError

        raise ForeignPackageError(problem)


def use_ours() -> None:
    """From now on ours are imported, whoever stands before them: for doctor, which tells of the intruder."""
    sys.path.insert(0, str(OUR_FOLDER))


@functools.cache
def foreign_package(ours: Path) -> str | None:
    """One sentence about the first of our packages that would be imported from elsewhere, or None.

    Answered once a process, so still true after `use_ours`. Paths are compared, not metadata: `packages_distributions()` knows nothing of some editable installs.
    """
    for name in OUR_PACKAGES:
        found = _folder_of(name)
        if found is None:
            return f"package {name!r} is missing beside {ours / 'flows'}: install sft-pipeline again"
        if found != ours / name:
            return (
                f"package {name!r} is imported from {found}, expected {ours / name}: another distribution or "
                f"folder shadows it; install sft-pipeline in a virtual environment of its own, or remove that one"
            )
    return None


def _folder_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin or package).resolve()  # a single file trainer.py
