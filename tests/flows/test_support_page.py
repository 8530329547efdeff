"""`sft-pipeline support`: the page in docs/ is the one that the tables give, and both forms say every answer."""

import json
import re
from pathlib import Path

import pytest

from flows.cli import run_command
from flows.support_page import support_page
from schemas.errors import ConfigError
from trainer.support_matrix import AXES, METHODS, answers

ROOT = Path(__file__).parent.parent.parent


def test_the_page_in_docs_is_the_one_that_the_tables_give() -> None:
    page = (ROOT / "docs" / "support-matrix.md").read_text()
    assert page == support_page(), "run: sft-pipeline support --markdown > docs/support-matrix.md"
    assert len(page.splitlines()) < 240


def test_json_has_every_combination_with_its_answer(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["support", "--json"])
    records = json.loads(capsys.readouterr().out)
    expected = [{**one.settings, "answer": one.verdict, "reasons": list(one.reasons)} for one in answers()]
    assert records == expected


def test_options_choose_rows_and_the_notes_are_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--strategy", "ddp", "--strategy", "zero2", "--base", "int8", "--dtype", "bfloat16"]
    run_command(["support", *options, "--method", "lora", "--method", "full", "--no-compile"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:5] == [
        ["strategy", "method", "base", "bfloat16"],
        ["ddp", "lora", "int8", "adapted", "a"],
        ["ddp", "full", "int8", "refused", "1"],
        ["zero2", "lora", "int8", "adapted", "a"],
        ["zero2", "full", "int8", "refused", "1"],
    ]
    assert [line[:2] for line in lines[6:]] == [["a:", "`lora-over-bits`:"], ["1:", "`int8-full`:"]]


def test_methods_that_are_not_in_the_grid_have_a_line_for_each_base(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A cell is what the tables say to the usual settings."""
    run_command(["support", "--strategy", "single", "--strategy", "zero3"])
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    start = lines.index(["method", "base", "packing", "single", "zero3", "not with"]) + 1
    table = {(line[0], line[1]): line[2:] for line in lines[start : lines.index([""], start)]}
    going = {
        (one.settings["method"], one.settings["base"])
        for one in answers(strategy=["single", "zero3"], dtype=["bfloat16"], compile=[False])
        if one.verdict != "refused" and not one.settings["checkpointing"]
    }
    others = [name for name in METHODS if name not in ("lora", "full")]
    assert list(table) == [(m, b) for m in others for b in AXES["base"] if (m, b) in going]
    assert re.match(r"int8 \d.*, nf4 \d+", table["freeze", "plain"][-1])
    for method, base in table:
        usual = {"method": [method], "base": [base], "dtype": ["bfloat16"], "packing": ["packed"]}
        found = answers(**usual, checkpointing=[False], compile=[False], strategy=["single", "zero3"])
        assert [cell.split()[0] for cell in table[method, base][1:3]] == [one.verdict for one in found]


def test_a_method_that_is_asked_for_has_a_grid(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["support", "--method", "freeze", "--strategy", "single", "--dtype", "bfloat16"])
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["strategy", "method", "base"]
    assert first.split()[:4] == ["single", "freeze", "plain", "works"]


def test_an_unknown_choice_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="dtype 'float8' is unknown; expected one of float32, bfloat16"):
        run_command(["support", "--dtype", "float8"])
