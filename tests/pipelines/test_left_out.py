"""Our processes for data import neither pandas nor torch, and lose nothing by it."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa

from pipelines.executors import close_workers, run_tasks
from pipelines.left_out import torch_left_out
from tests.pipelines.tiny_tokenizers import FAMILIES, tiny_tokenizer

IMPORTED_BY_PYARROW = """
import sys, pyarrow as pa
{}
pa.array([1])
print("pandas" in sys.modules)
"""
OUR_OWN = "from pipelines.left_out import keep_pandas_out; keep_pandas_out()"
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


def has_torch(folder: str) -> bool:
    with torch_left_out():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(folder)
    return "torch" in sys.modules


def test_workers_load_tokenizers_without_torch(tmp_path: Path) -> None:
    tiny_tokenizer(next(iter(FAMILIES))).save_pretrained(tmp_path)
    found = dict(run_tasks(has_torch, [str(tmp_path)] * 2, num_workers=2, label=str))
    close_workers()
    assert found == {0: False, 1: False}


def has_pandas(number: int) -> bool:
    pa.array([number])
    return "pandas" in sys.modules


def test_workers_do_without_it() -> None:
    found = dict(run_tasks(has_pandas, [1, 2], num_workers=2, label=str))
    close_workers()
    assert found == {0: False, 1: False}
