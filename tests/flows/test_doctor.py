"""`doctor`: its checks one by one, and what it prints."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import distributions, machine
from flows.devices import Gpu, Torch, check_deepspeed, device_findings, memory_findings
from flows.distributions import (
    check_fasttext,
    check_libraries,
    check_our_packages,
    problems_with,
    requirements,
)
from flows.doctor import Question, check_earlier_runs, examine, finding_lines, guarded
from flows.machine import Finding, check_disk, check_lock, excludes_others, file_system, size_text
from flows.prefect_checks import Settings, check_home
from flows.preflight import check_before_start
from pipelines.storage import read_manifest, write_manifest
from schemas.config_file import load_config
from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig
from tests.integration import toy
from tests.pipelines.test_dedup_stage import run_to_dedup, write_project

ROOT = Path(__file__).parent.parent.parent
GIB = 2**30


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


def config_with(**sections: Any) -> PipelineConfig:
    return PipelineConfig.model_validate(
        {"run_root": "run", "sources": [{"name": "a", "path": "a.json"}], **sections}
    )


@pytest.mark.slow
def test_on_a_machine_where_the_tests_run_the_pipeline_would_run(tmp_path: Path) -> None:
    result = run_doctor(folder=tmp_path)
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == "the pipeline would run"
    assert not [line for line in result.stdout.splitlines() if line.startswith("fails")]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_config_that_would_run_is_told_with_its_disk_and_memory_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    toy.write_dumps(tmp_path / "dumps", num_chats=20, num_records=10)
    toy.write_model(tmp_path / "model")
    config = toy.write_config(tmp_path)
    before = toy.folder_digests(tmp_path)
    result = run_doctor(str(config), "--json", folder=tmp_path)
    assert result.returncode == 0, result.stdout
    answer = json.loads(result.stdout)
    assert answer["would_run"] is True
    subjects = {finding["subject"]: finding for finding in answer["findings"]}
    assert {"sources", "disk", "memory", "training", "config", "lock", "prefect home"} <= subjects.keys()
    assert all(
        set(finding) == {"level", "subject", "found", "expected", "remedy"} for finding in subjects.values()
    )
    assert toy.folder_digests(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dumps", "model", "run.yaml"]


def test_a_config_that_could_not_run_is_found_with_its_reasons(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "run_root: run\nsources: [{name: a, path: absent.json}]\nmodel: {path: absent}\n"
        "benchmarks: [{name: b, path: no-benchmark.json, question: [question]}]\n"
    )
    result = run_doctor(str(config), "--until", "pack", folder=tmp_path)
    assert result.returncode == 1
    failures = [line for line in result.stdout.splitlines() if line.startswith("fails")]
    assert any("absent.json" in line for line in failures)
    assert any("no-benchmark.json" in line for line in failures)
    assert any(str(tmp_path / "absent") in line for line in failures)
    assert "would not run: 3" in result.stdout


def break_features(root: Path) -> None:
    file = next((root / "04_deduplicated" / "features").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-1])


def make_older(root: Path) -> None:
    manifest = read_manifest(root / "04_deduplicated")
    assert manifest is not None
    write_manifest(root / "04_deduplicated", manifest.model_copy(update={"stage_version": 0}))


EARLIER: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (shutil.rmtree, "is not finished: run the stage 'dedup' first"),
    "stopped before dedup": (lambda root: shutil.rmtree(root / "04_deduplicated"), "is not finished"),
    "of another version": (make_older, "was made by version 0"),
    "cut short": (break_features, "bytes, its manifest names"),
    "without kept rows": (
        lambda root: next((root / "04_deduplicated").glob("part-*")).unlink(),
        "has 0 bytes, its manifest names",
    ),
}


@pytest.mark.parametrize("name", EARLIER)
def test_an_earlier_run_that_can_not_be_taken_is_found_before_hours_of_work(
    name: str, tmp_path: Path
) -> None:
    run_to_dedup(write_project(tmp_path, [("one", "two"), ("three", "four")], "other"))
    path = write_project(tmp_path, [("five", "six")])
    config = load_config(path, ["earlier_runs=[other]"])
    stages = ["merge", "clean", "filter", "dedup"]
    (finding,) = check_earlier_runs(config)
    assert (finding.level, finding.found) == ("ok", f"{tmp_path}/other, 2 rows that are not taken again")
    check_before_start(config, stages)

    damage, said = EARLIER[name]
    damage(tmp_path / "other")
    (finding,) = check_earlier_runs(config)
    assert finding.level == "fails"
    assert said in finding.found
    with pytest.raises(InputError, match=re.escape(said)):
        check_before_start(config, stages)
    check_before_start(config, stages[:-1])


def test_doctor_asks_for_earlier_runs_where_dedup_is_to_run(tmp_path: Path) -> None:
    path = write_project(tmp_path, [("five", "six")])
    for until, levels in (("dedup", ["fails", "fails"]), ("filter", [])):
        question = Question(path, (f"earlier_runs=[{tmp_path}/run, {tmp_path}/absent]",), until=until)
        found = [finding for finding in examine(question) if finding.subject == "earlier run"]
        assert [finding.level for finding in found] == levels


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["absent.yaml"], "no config file at absent.yaml"),
        (["config.yaml", "--set", "train.max_step=3"], "did you mean 'train.max_steps'?"),
    ],
)
def test_a_config_that_can_not_be_read_is_one_finding(
    tmp_path: Path, arguments: list[str], found: str
) -> None:
    (tmp_path / "config.yaml").write_text("run_root: run\nsources: [{name: a, path: a.json}]\n")
    result = run_doctor(*arguments, "--until", "merge", "--json", folder=tmp_path)
    assert result.returncode == 1
    failures = [finding for finding in json.loads(result.stdout)["findings"] if finding["level"] == "fails"]
    assert [finding["subject"] for finding in failures] == ["config"]
    assert found in failures[0]["found"]
    assert failures[0]["expected"]
    assert failures[0]["remedy"]


def test_every_finding_that_is_not_ok_says_what_was_expected_and_what_to_do(tmp_path: Path) -> None:
    findings = list(examine(Question(tmp_path / "absent.yaml", until="pack")))
    assert any(finding.level == "fails" for finding in findings)
    assert all(finding.expected and finding.remedy for finding in findings if finding.level != "ok")
    assert not any(finding.expected or finding.remedy for finding in findings if finding.level == "ok")


def test_a_finding_is_printed_with_what_was_expected_and_its_remedy_below() -> None:
    lines = list(finding_lines(Finding("warns", "disk", "1 GiB free", "2 GiB", "free some")))
    assert lines == [
        "warns    disk         1 GiB free",
        "                      expected: 2 GiB",
        "                      remedy: free some",
    ]


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on() -> None:
    def broken() -> Any:
        yield Finding("ok", "first", "fine")
        raise ValueError("odd machine")

    first, second = guarded("odd", broken)
    assert first.level == "ok"
    assert (second.level, second.subject) == ("fails", "odd")
    assert "ValueError: odd machine" in second.found


# Packages ---------------------------------------------------------------------------------------------------


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(distributions.NEEDED_MODULES, "no_such_module", "no-such-distribution")
    monkeypatch.setitem(distributions.NEEDED_MODULES, "no_such.sub_module", "another")
    (finding,) = check_libraries()
    assert finding.level == "fails"
    assert finding.remedy == "pip install 'no-such-distribution' 'another'"


def test_what_is_installed_here_is_what_our_metadata_asks_for() -> None:
    assert requirements("")["fastapi"] == "<0.151,>=0.139"
    assert "torch" in requirements("train")
    assert "torch" not in requirements("")
    assert "deepspeed" in requirements("deepspeed")
    assert problems_with("") == problems_with("train") == []


def distribution(folder: Path, name: str, version: str = "1.0", module: str = "") -> None:
    """What pip leaves of an installed distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "top_level.txt").write_text(f"{module or name}\n")
    (info / "RECORD").write_text(f"{module or name}/__init__.py,,\n")


def test_two_distributions_with_one_fasttext_module_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(check_fasttext()) == []
    distribution(tmp_path, "fasttext-wheel", module="fasttext")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = check_fasttext()
    assert finding.level == "fails"
    assert "fasttext-predict and fasttext-wheel" in finding.found


def test_our_packages_are_found_to_be_ours() -> None:
    assert [finding.level for finding in check_our_packages()] == ["ok"]


# Disk and locks ---------------------------------------------------------------------------------------------


def test_a_lock_keeps_a_second_process_out_here(tmp_path: Path) -> None:
    assert excludes_others(tmp_path)
    assert [finding.level for finding in check_lock(tmp_path / "not" / "yet")] == ["ok"]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_keeps_nobody_out_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a file system without locks: the other process is let in.
    monkeypatch.setattr(machine, "_TRY_LOCK", "import sys; sys.exit(1)")
    assert [finding.level for finding in check_lock(tmp_path)] == ["fails"]


MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/export /home/team\\040share nfs4 rw 0 0
tmpfs /home/team\\040share/scratch tmpfs rw 0 0
me@host:/ /mnt/there fuse.sshfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/me", "ext4"),
        ("/home/team share/runs", "nfs4"),
        ("/home/team share/scratch/runs", "tmpfs"),
        ("/mnt/there/x", "fuse.sshfs"),
    ],
)
def test_the_kind_of_a_file_system_is_that_of_the_innermost_mount(folder: str, kind: str) -> None:
    assert file_system(Path(folder), MOUNTS) == kind


def test_the_kernel_is_asked_for_the_kind_of_a_file_system() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/")) not in ("proc", "unknown")


def test_a_run_root_on_a_network_file_system_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "NETWORK_FILE_SYSTEMS", {file_system(tmp_path)})
    assert [finding.level for finding in check_lock(tmp_path)] == ["warns"]


@pytest.mark.parametrize(
    ("api_url", "own_database", "level"),
    [("", False, "fails"), ("", True, "ok"), ("http://127.0.0.1:4200/api", False, "ok")],
)
def test_prefects_sqlite_database_may_not_lie_on_a_network_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api_url: str, own_database: bool, level: str
) -> None:
    monkeypatch.setattr("flows.prefect_checks.NETWORK_FILE_SYSTEMS", {file_system(tmp_path)})
    findings = check_home(Settings(api_url, tmp_path / "home", own_database))
    assert [finding.level for finding in findings] == [level]


@pytest.mark.parametrize(("mode", "level"), [(0o755, "warns"), (0o740, "warns"), (0o700, "ok")])
def test_a_prefect_folder_that_others_can_read_is_warned_about(tmp_path: Path, mode: int, level: str) -> None:
    tmp_path.chmod(mode)
    (finding,) = check_home(Settings("", tmp_path, has_own_database=False))
    assert finding.level == level
    assert finding.remedy.startswith(f"chmod 700 {tmp_path}") == (level == "warns")


def test_little_disk_is_warned_about_without_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "WANTED_FREE_GIB", 10**9)
    (finding,) = check_disk(tmp_path)
    assert finding.level == "warns"
    assert "GiB free" in finding.found


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(3 * GIB // 2, "1.50 GiB"), (GIB // 16, "64.0 MiB"), (0, "0.0 MiB")]
)
def test_sizes_are_told_in_a_readable_unit(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


# Devices ----------------------------------------------------------------------------------------------------

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79 * GIB, 78 * GIB)
T4 = Gpu("Tesla T4", (7, 5), 15 * GIB, 14 * GIB)
BROKEN = Gpu("RTX 5090", (12, 0), 32 * GIB, 31 * GIB, "no kernel image is available for execution")


@pytest.mark.parametrize(
    ("gpus", "model", "levels"),
    [
        ((), {}, ["warns"]),
        ((), {"device": "cuda"}, ["fails"]),
        ((), {"device": "cpu"}, ["ok"]),
        ((H100,), {}, ["ok"]),
        ((H100,), {"dtype": "bfloat16"}, ["ok"]),
        ((H100, T4), {}, ["ok", "warns"]),
        ((T4,), {"dtype": "bfloat16"}, ["fails"]),
        ((T4,), {"dtype": "float32"}, ["ok"]),
        ((T4,), {"device": "cpu", "dtype": "bfloat16"}, ["ok"]),
        ((BROKEN,), {}, ["fails"]),
        ((BROKEN,), {"device": "cpu"}, ["ok"]),
    ],
)
def test_a_gpu_is_judged_by_its_compute_capability_against_the_dtype(
    gpus: tuple[Gpu, ...], model: dict[str, str], levels: list[str]
) -> None:
    config = config_with(model={"path": "m"} | model)
    assert [finding.level for finding in device_findings(Torch("2.13.0", gpus), config)] == levels


def sized_model(folder: Path, *, layers: int, hidden: int) -> Path:
    """A model folder whose files tell of a size and hold no weights."""
    folder.mkdir()
    inner = 4 * hidden
    shapes = {"model.embed_tokens.weight": [32000, hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        for name, shape in (
            ("self_attn.q_proj", [hidden, hidden]),
            ("self_attn.k_proj", [hidden, hidden]),
            ("self_attn.v_proj", [hidden, hidden]),
            ("self_attn.o_proj", [hidden, hidden]),
            ("mlp.up_proj", [inner, hidden]),
            ("mlp.down_proj", [hidden, inner]),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    header = json.dumps(
        {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    ).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    numbers = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 32, **numbers})
    )
    return folder


@pytest.mark.parametrize(
    ("gpu", "layers", "train", "level"),
    [
        (H100, 32, {}, "ok"),  # 6.6 G weights, LoRA
        (H100, 32, {"method": "full"}, "fails"),
        (T4, 32, {}, "warns"),  # 13 GiB in float16
        (T4, 4, {}, "ok"),
        (H100, 32, {"bins_per_micro_step": 8}, "warns"),
        (H100, 32, {"bins_per_micro_step": 8, "gradient_checkpointing": True}, "ok"),
    ],
)
def test_a_model_is_held_against_the_gpus_free_memory(
    tmp_path: Path, gpu: Gpu, layers: int, train: dict[str, Any], level: str
) -> None:
    folder = sized_model(tmp_path / "model", layers=layers, hidden=4096)
    config = config_with(model={"path": str(folder)}, train=train)
    (finding,) = memory_findings(Torch("2.13.0", (gpu,)), config)
    assert finding.level == level, finding
    assert gpu.name in finding.found


def test_on_a_cpu_the_machines_memory_counts(tmp_path: Path) -> None:
    small = sized_model(tmp_path / "small", layers=1, hidden=64)
    large = sized_model(tmp_path / "large", layers=4000, hidden=8192)
    for folder, level in ((small, "ok"), (large, "fails")):
        (finding,) = memory_findings(Torch("2.13.0"), config_with(model={"path": str(folder)}))
        assert (finding.level, finding.subject) == (level, "memory")


def test_deepspeeds_tools_are_looked_for_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for tool in ("g++", "ninja"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_deepspeed("zero2").level == "ok"
    (tmp_path / "g++").unlink()
    missing = check_deepspeed("zero2")
    assert (missing.level, missing.found) == ("warns", "not on PATH: g++")
    assert "apt-get install g++" in missing.remedy
    assert check_deepspeed("zero2", tools=("nvcc",)).found == "not on PATH: nvcc"
