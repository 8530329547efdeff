"""The answers of the support matrix: each combination has one, the rules give it, and rows that work do train.

A row that works is trained for three steps; judge: strategy single over the plain base in fp32, one document in a
row of its own where it packs none. Which rows: few in which every two settings meet; compiled ones, under stress,
in which every setting is met; in the long form all of them.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ConfigError
from tests.trainer.matrix_rows import covering, losses_of_rows, reference_of, row_name
from trainer.adaptations import ADAPTATIONS
from trainer.support import RULES, refusals
from trainer.support_matrix import AXES, METHODS, Answer, answer, answers, axes_that_matter, config_of

ALL = list(answers())
BASIC_METHODS = ("lora", "full")
GOING = [row for row in ALL if row.verdict != "refused"]
TRAINED = [row for row in GOING if row.settings["method"] in BASIC_METHODS]
"""Of these rows every two settings meet in some that are trained. The other methods meet all strategies and bases."""
OTHER_METHODS = [name for name in METHODS if name not in BASIC_METHODS]
MAX_LOSS_DIFFERENCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 3e-2}
"""From the reference, in nats, with a plain base. A gradient of another half of the data gives 0.05 at step 2."""
MAX_LOSS_DIFFERENCE_OF_BITS = {"int8": 0.05, "int8_rows": 0.05, "nf4": 0.6}


def test_every_combination_has_one_answer() -> None:
    size = 1
    for values in AXES.values():
        size *= len(values)
    assert len(ALL) == len({tuple(row.settings.items()) for row in ALL}) == size
    assert set(Counter(row.verdict for row in ALL)) == {"works", "adapted", "refused"}


def test_an_answer_of_refused_is_what_the_check_before_the_first_stage_says() -> None:
    of_machine = {rule.id for rule in RULES if rule.of_machine}
    for row in ALL:
        said = {problem.partition(":")[0] for problem in refusals(config_of(row.settings))} - of_machine
        assert said == (set(row.reasons) if row.verdict == "refused" else set()), row_name(row.settings)


def test_choices_keep_the_rows_that_have_them() -> None:
    found = list(answers(strategy=["ddp", "zero2"], checkpointing=[True]))
    expected = [r for r in ALL if r.settings["strategy"] in ("ddp", "zero2") and r.settings["checkpointing"]]
    assert found == expected
    with pytest.raises(ConfigError, match="strategy 'zero9' is unknown; expected one of single, ddp"):
        list(answers(strategy=["zero9"]))


def test_axes_that_matter_are_those_on_which_an_answer_hangs() -> None:
    rows = [Answer({"a": a, "b": b}, "refused" if a == 1 else "works") for a in (1, 2) for b in (1, 2)]
    assert axes_that_matter(rows) == ["a"]
    assert axes_that_matter(rows[:2]) == []


def settings_of(**changes: Any) -> dict[str, Any]:
    plain = {axis: values[0] for axis, values in AXES.items()}
    return plain | {"dtype": "bfloat16", "packing": "packed"} | changes


@pytest.mark.parametrize(
    ("changes", "verdict", "reasons"),
    [
        ({}, "works", ()),
        ({"base": "int8"}, "adapted", ("lora-over-bits",)),
        ({"dtype": "float32"}, "adapted", ("attention-by-document",)),
        ({"base": "int8", "method": "full"}, "refused", ("int8-full",)),
        ({"base": "int8", "strategy": "fsdp2"}, "refused", ("int8-sharded",)),
        ({"base": "int8", "strategy": "zero3"}, "refused", ("int8-sharded",)),
    ],
    ids=str,
)
def test_an_answer(changes: dict[str, Any], verdict: str, reasons: tuple[str, ...]) -> None:
    found = answer(settings_of(**changes))
    assert (found.verdict, found.reasons) == (verdict, reasons)


def test_entries_of_the_tables_have_ids_of_their_own() -> None:
    ids = [entry.id for entry in (*RULES, *ADAPTATIONS)]
    assert len(ids) == len(set(ids))


def check_losses(folder: Path, rows: list[Answer]) -> None:
    """Train rows and their references, and compare."""
    wanted = {row_name(one): one for row in rows for one in (reference_of(row.settings), row.settings)}
    losses = losses_of_rows(folder, list(wanted.values()))
    wrong = []
    for row in rows:
        found, expected = (losses[row_name(one)] for one in (row.settings, reference_of(row.settings)))
        limit = MAX_LOSS_DIFFERENCE_OF_BITS.get(
            row.settings["base"], MAX_LOSS_DIFFERENCE[row.settings["dtype"]]
        )
        differences = [abs(ours - right) for ours, right in zip(found, expected, strict=True)]
        if not all(difference <= limit for difference in differences):
            wrong.append(f"{row_name(row.settings)}: {differences}, allowed {limit}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_rows_that_work_train_as_strategy_single_does(tmp_path: Path) -> None:
    uncompiled = [row for row in TRAINED if not row.settings["compile"]]
    check_losses(tmp_path, covering(uncompiled, num_settings=2))


@pytest.mark.stress
def test_rows_that_work_train_as_strategy_single_does_compiled_too(tmp_path: Path) -> None:
    compiled = [row for row in TRAINED if row.settings["compile"]]
    check_losses(tmp_path, covering(compiled, num_settings=1))


def plain_rows(method: str) -> list[Answer]:
    """One row for each strategy and base that the method goes with, all else as plain as it allows."""
    found: dict[tuple[str, str], Answer] = {}
    for row in GOING:
        here = row.settings
        is_plain = here["dtype"] == "float32" and not here["checkpointing"] and not here["compile"]
        if here["method"] == method and is_plain:
            found.setdefault((here["strategy"], here["base"]), row)
    return list(found.values())


@pytest.mark.stress
def test_other_methods_train_over_two_processes_as_on_one(tmp_path: Path) -> None:
    """Under ddp; the long form has all strategies and bases."""
    rows = [row for method in OTHER_METHODS for row in plain_rows(method)]
    check_losses(tmp_path, [row for row in rows if row.settings["strategy"] == "ddp" and is_over_plain(row)])


def is_over_plain(row: Answer) -> bool:
    return bool(row.settings["base"] == "plain")


@pytest.mark.hard
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_methods_train_with_every_strategy_and_base_that_is_allowed(
    tmp_path: Path, method: str
) -> None:
    check_losses(tmp_path, plain_rows(method))


@pytest.mark.hard
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", AXES["strategy"])
def test_all_rows_that_work_train_as_strategy_single_does(tmp_path: Path, strategy: str) -> None:
    rows = [row for row in TRAINED if row.settings["strategy"] == strategy]
    for packing in AXES["packing"]:
        check_losses(tmp_path / packing, [row for row in rows if row.settings["packing"] == packing])
