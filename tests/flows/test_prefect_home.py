"""A folder of Prefect's that others can read is told, with the remedy."""

from pathlib import Path

import pytest

from flows.prefect_home import open_home_problem


@pytest.mark.parametrize(("mode", "is_told"), [(0o700, False), (0o755, True), (0o710, True), (0o701, True)])
def test_a_folder_that_others_may_enter_is_told(tmp_path: Path, mode: int, is_told: bool) -> None:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(mode)
    problem = open_home_problem({"PREFECT_HOME": str(home)})
    assert (problem is not None) == is_told
    assert problem is None or f"chmod 700 {home}" in problem


def test_a_folder_that_is_not_there_is_no_problem(tmp_path: Path) -> None:
    assert open_home_problem({"PREFECT_HOME": str(tmp_path / "absent")}) is None
