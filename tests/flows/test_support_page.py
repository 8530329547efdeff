"""`sft-pipeline support`: the page in docs/ is the one that the tables give, and both forms say every answer."""

import json
from pathlib import Path

import pytest

from flows.cli import run_command
from flows.support_page import support_page
from schemas.errors import ConfigError
from trainer.support_matrix import answers

ROOT = Path(__file__).parent.parent.parent


def test_the_page_in_docs_is_the_one_that_the_tables_give() -> None:
    page = (ROOT / "docs" / "support-matrix.md").read_text()
    assert page == support_page(), "run: sft-pipeline support --markdown > docs/support-matrix.md"
    assert len(page.splitlines()) < 200


def test_json_has_every_combination_with_its_answer(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["support", "--json"])
    records = json.loads(capsys.readouterr().out)
    expected = [{**one.settings, "answer": one.verdict, "reasons": list(one.reasons)} for one in answers()]
    assert records == expected


def test_options_choose_rows_and_the_notes_are_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--strategy", "ddp", "--strategy", "zero2", "--base", "int8", "--dtype", "bfloat16"]
    run_command(["support", *options, "--no-compile"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:5] == [
        ["strategy", "method", "base", "bfloat16"],
        ["ddp", "lora", "int8", "adapted", "a"],
        ["ddp", "full", "int8", "refused", "1"],
        ["zero2", "lora", "int8", "adapted", "a"],
        ["zero2", "full", "int8", "refused", "1"],
    ]
    assert [line[:2] for line in lines[6:]] == [["a:", "`lora-over-bits`:"], ["1:", "`int8-full`:"]]


def test_an_unknown_choice_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="dtype 'float8' is unknown; expected one of float32, bfloat16"):
        run_command(["support", "--dtype", "float8"])
