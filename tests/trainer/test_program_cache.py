"""Compiled programs are kept where the config says, unless the user's own variables say another place."""

from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir

from trainer.program_cache import VARIABLES, keep_programs


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)


def test_torchs_compiler_keeps_its_programs_in_the_folder(tmp_path: Path) -> None:
    keep_programs(str(tmp_path))
    assert cache_dir() == str(tmp_path / "inductor")


def test_the_users_own_variable_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    keep_programs(str(tmp_path / "config"))
    assert cache_dir() == str(tmp_path / "own")


def test_without_a_folder_nothing_is_said(tmp_path: Path) -> None:
    before = cache_dir()
    keep_programs(None)
    assert cache_dir() == before
