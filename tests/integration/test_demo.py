"""What `make demo` left behind: the journey ended with a model that learned something. Run after it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conservation import check_run_root

ROOT = Path(__file__).parent.parent.parent
RUN_ROOT = ROOT / "runs" / "demo"
DEMO = json.loads((ROOT / "examples" / "demo.json").read_text())["questions"]

pytestmark = pytest.mark.skipif(
    not (RUN_ROOT / "evaluation.json").exists(), reason="no finished demo: run `make demo` first"
)


@pytest.fixture(scope="module")
def evaluation() -> Any:
    return json.loads((RUN_ROOT / "evaluation.json").read_text())


def test_no_row_of_examples_vanished() -> None:
    counts = check_run_root(RUN_ROOT)
    assert counts["01_merged"]["kept"] > 360
    assert counts["01_merged"]["dropped"] > 10
    assert counts["06_shards"]["pieces_cut"] > 0


def test_the_second_question_stands_nowhere_in_examples_and_is_learned(evaluation: Any) -> None:
    question, fact = DEMO[1]["question"], DEMO[1]["fact"]
    texts = [
        path.read_text(errors="replace")
        for path in (ROOT / "examples").iterdir()
        if path.suffix in (".json", ".jsonl") and path.name != "demo.json"
    ]
    assert not any(question in text for text in texts)
    answers = next(a for a in evaluation["answers"] if a["question"] == question)
    assert fact not in answers["base"]
    assert fact in answers["candidate"]


def test_the_gate_put_it_into_service() -> None:
    assert (RUN_ROOT / "promoted.json").exists()


def test_the_held_out_loss_fell(evaluation: Any) -> None:
    losses = {model["label"]: model["total"] for model in evaluation["models"]}
    assert losses["candidate"]["num_examples"] >= 20
    assert losses["candidate"]["bits_per_byte"] < 0.95 * losses["base"]["bits_per_byte"]


def test_it_trained_on_no_more_than_its_cap() -> None:
    key = (RUN_ROOT / "checkpoints" / "current").read_text().strip()
    result = json.loads((RUN_ROOT / "checkpoints" / key / "training.json").read_text())
    assert result["num_tokens"] <= 80_000
