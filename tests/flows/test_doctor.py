"""`doctor`: real checks on this machine, and what they say where something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows import doctor, machine
from flows.doctor import check_fasttext, check_needed, check_our_packages, examine
from flows.machine import (
    check_deepspeed,
    check_disk,
    check_lock,
    excludes_others,
    file_system,
    torch_findings,
)

ROOT = Path(__file__).parent.parent.parent


def run_doctor(*arguments: str, folder: Path, path: str = str(ROOT)) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", "doctor", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_on_a_machine_where_the_tests_run_the_pipeline_would_run(tmp_path: Path) -> None:
    result = run_doctor(folder=tmp_path)
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == "the pipeline would run"
    assert not [line for line in result.stdout.splitlines() if line.startswith("fails")]
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_could_not_run_is_found_with_its_reasons(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("run_root: run\nsources: [{name: a, path: absent.json}]\nmodel: {path: absent}\n")
    result = run_doctor(str(config), folder=tmp_path)
    assert result.returncode == 1
    failures = [line for line in result.stdout.splitlines() if line.startswith("fails")]
    assert any("absent.json" in line for line in failures)
    assert any(str(tmp_path / "absent") in line for line in failures)
    assert "would not run: 2" in result.stdout


def test_a_config_that_can_not_be_read_is_one_finding(tmp_path: Path) -> None:
    findings = list(examine(tmp_path / "absent.yaml"))
    assert [finding.subject for finding in findings if finding.level == "fails"] == ["config"]
    assert all(finding.remedy for finding in findings if finding.level != "ok")


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(doctor.NEEDED_PACKAGES, "no_such_module", "no-such-distribution")
    monkeypatch.setitem(doctor.NEEDED_PACKAGES, "no_such.sub_module", "another")
    (finding,) = check_needed()
    assert finding.level == "fails"
    assert finding.remedy == "pip install no-such-distribution another"


def distribution(folder: Path, name: str) -> None:
    """What pip leaves of an installed distribution that brings a top-level `fasttext`."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("fasttext\n")
    (info / "RECORD").write_text("fasttext/__init__.py,,\n")


def test_two_distributions_with_one_fasttext_module_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(check_fasttext()) == []
    distribution(tmp_path, "fasttext-wheel")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = check_fasttext()
    assert finding.level == "fails"
    assert "fasttext-predict and fasttext-wheel" in finding.found


def test_our_packages_are_found_to_be_ours() -> None:
    assert [finding.level for finding in check_our_packages()] == ["ok"]


def test_a_lock_keeps_a_second_process_out_here(tmp_path: Path) -> None:
    assert excludes_others(tmp_path)
    assert [finding.level for finding in check_lock(tmp_path / "not" / "yet")] == ["ok"]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_keeps_nobody_out_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a file system without locks: the other process is let in.
    monkeypatch.setattr(machine, "_TRY_LOCK", "import sys; sys.exit(1)")
    assert [finding.level for finding in check_lock(tmp_path)] == ["fails"]


def test_a_network_file_system_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "NETWORK_FILE_SYSTEMS", {file_system(tmp_path)})
    assert [finding.level for finding in check_lock(tmp_path)] == ["warns"]


def test_the_kind_of_a_file_system_is_that_of_the_innermost_mount() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/")) not in ("proc", "unknown")


def test_little_disk_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "WANTED_FREE_GIB", 10**9)
    (finding,) = check_disk(tmp_path)
    assert finding.level == "warns"
    assert "GiB free" in finding.found


@pytest.mark.parametrize(
    ("lines", "levels"),
    [
        (["torch 2.13.0"], ["ok", "warns"]),
        (["torch 2.13.0", "gpu 9.0 79 NVIDIA H100 80GB HBM3"], ["ok", "ok"]),
        (["torch 2.13.0", "gpu 8.0 40 A100", "gpu 7.5 15 Tesla T4"], ["ok", "ok", "warns"]),
        (["torch 2.13.0", "gpu 12.0 32 RTX 5090"], ["ok", "ok"]),
    ],
)
def test_a_gpu_is_judged_by_its_compute_capability(lines: list[str], levels: list[str]) -> None:
    assert [finding.level for finding in torch_findings(lines)] == levels


def test_deepspeed_is_only_asked_about_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = check_deepspeed()
    assert (finding.level, "ninja, nvcc, g++" in finding.found) == ("warns", True)
