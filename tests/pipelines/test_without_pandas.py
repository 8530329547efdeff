"""pyarrow in our processes does not import pandas, and loses nothing by it."""

import subprocess
import sys

import pyarrow as pa

from pipelines.executors import close_workers, run_tasks

IMPORTED_BY_PYARROW = """
import sys, pyarrow as pa
{}
pa.array([1])
print("pandas" in sys.modules)
"""
OUR_OWN = "from pipelines.without_pandas import keep_pandas_out; keep_pandas_out()"
STILL_WORKS = f"""
import pyarrow as pa
{OUR_OWN}
import pandas as pd
print(pa.Table.from_pandas(pd.DataFrame({{"a": [1.5, 2.5]}})).to_pandas()["a"].sum())
"""


def output_of(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_without_it_the_first_array_imports_pandas() -> None:
    assert output_of(IMPORTED_BY_PYARROW.format("")) == "True"
    assert output_of(IMPORTED_BY_PYARROW.format(OUR_OWN)) == "False"


def test_pandas_can_be_used_all_the_same() -> None:
    assert output_of(STILL_WORKS) == "4.0"


def has_pandas(number: int) -> bool:
    pa.array([number])
    return "pandas" in sys.modules


def test_workers_do_without_it() -> None:
    found = dict(run_tasks(has_pandas, [1, 2], num_workers=2, label=str))
    close_workers()
    assert found == {0: False, 1: False}
