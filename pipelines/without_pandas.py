"""pyarrow without pandas: 0.4 s of every process.

Where pandas is installed, the first `pyarrow.array` imports it, to know whether its argument is one of pandas'. pyarrow
asks once: whoever is told then that there is none is never asked again. `to_pandas` and `from_pandas` still work.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

import pyarrow as pa


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
