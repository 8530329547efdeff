"""A secret reaches the trainer's environment and none of its lines; the message about an absent one holds no value."""

import os
from pathlib import Path

import pytest

from flows.secret_values import hider, secret_variables
from flows.training import run_child
from schemas.errors import ConfigError, TrainingError

BLOCKS = {"hf-token": "hf_s3cr3t-of-a-block"}


def read_block(name: str) -> str:
    if name not in BLOCKS:
        raise ValueError("Unable to find block document")
    return BLOCKS[name]


def test_a_variable_that_is_not_set_is_asked_of_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert secret_variables({"HF_TOKEN": "hf-token"}, read_block) == {"HF_TOKEN": BLOCKS["hf-token"]}


@pytest.mark.parametrize("block", ["hf-token", "absent"])
def test_a_variable_that_is_set_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, block: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of-the-worker")
    assert secret_variables({"HF_TOKEN": block}, read_block) == {"HF_TOKEN": "hf_of-the-worker"}
    assert secret_variables({"HF_TOKEN": block}, None) == {"HF_TOKEN": "hf_of-the-worker"}


@pytest.mark.parametrize("asks_prefect", [True, False])
def test_an_absent_secret_is_refused_by_its_variable_and_not_by_what_may_be_the_value(
    monkeypatch: pytest.MonkeyPatch, asks_prefect: bool
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="HF_TOKEN") as error:
        secret_variables({"HF_TOKEN": "0123456789abcdef"}, read_block if asks_prefect else None)
    assert "0123456789abcdef" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("loading with hf_s3cr3t-of-a-block now", "loading with *** now"),
        ("first line of a key", "*** of a key"),
        ("GET https://me:pa@host/x?sig=abc failed", "GET https://***@host/x?*** failed"),
        ("of-the-worker/2 and of-the-worker", "*** and ***"),
        ("step 3/12  loss 5.9147", "step 3/12  loss 5.9147"),
        ("on", "on"),
    ],
)
def test_a_line_is_shown_without_secrets(monkeypatch: pytest.MonkeyPatch, line: str, shown: str) -> None:
    secrets = {"A": BLOCKS["hf-token"], "B": "first line\nsecond line", "C": "on", "D": "of-the-worker"}
    monkeypatch.setenv("WANDB_API_KEY", "of-the-worker/2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "loading")
    assert hider(secrets)(line) == shown


def test_the_child_has_the_secret_and_its_lines_and_its_error_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    program = (
        "import os, pathlib, sys; token = os.environ['HF_TOKEN']; print(f'using {token}'); "
        "pathlib.Path(sys.argv[1]).write_text(token); raise RuntimeError(f'401 for {token}')"
    )
    (tmp_path / "stand_in_leaks.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines: list[str] = []
    with pytest.raises(TrainingError, match=r"401 for \*\*\*$"):
        run_child(
            ["stand_in_leaks", str(tmp_path / "seen")],
            pid_path=tmp_path / "train.pid",
            lock=(),
            say=lines.append,
            secrets={"HF_TOKEN": BLOCKS["hf-token"]},
        )
    assert (tmp_path / "seen").read_text() == BLOCKS["hf-token"]
    assert "using ***" in lines
    assert not any("s3cr3t" in line for line in lines)
    assert "HF_TOKEN" not in os.environ
