"""pyarrow without pandas, tokenizers without torch: half a second, and two seconds and 200 MB, of every worker.

Where pandas is installed, the first `pyarrow.array` imports it, to know whether its argument is one of pandas'. pyarrow
asks once: whoever is told then that there is none is never asked again. `to_pandas` and `from_pandas` still work.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from types import ModuleType

import pyarrow as pa


def prepare_data_alone() -> None:
    """For processes of our own that only run data stages: they may do without pandas and torch from now on."""
    _for_data_alone.append(True)
    keep_pandas_out()


_for_data_alone: list[bool] = []


def keep_pandas_out() -> None:
    """For processes of our own alone: pyarrow no longer knows a pandas object that it is given for an array."""
    if "pandas" in sys.modules:
        return
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(finder)


class _NoPandas(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("pandas is left out on purpose", name="pandas")


@contextmanager
def torch_left_out() -> Iterator[None]:
    """Inside, and in a process for data alone, transformers finds no torch, and does without it from then on.

    Tokenizers don't need it. In other processes nothing changes: they may train later.
    """
    if not _for_data_alone or "torch" in sys.modules or "transformers" in sys.modules:
        yield
        return
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would advise to install it
    sys.modules["torch"] = None  # type: ignore[assignment]  # how Python writes that there is none
    try:
        yield
    finally:
        del sys.modules["torch"]
