"""Real starts of two processes, by every program that may start them: the same training as by one.

Two "nodes" are two starts on this machine.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from schemas.pipeline_config import PipelineConfig
from tests.integration.toy import folder_digests
from tests.trainer.tiny_models import tiny_run, write_model
from trainer.job import plan_job
from trainer.train import train

ROOT = Path(__file__).parent.parent.parent
WAIT_SECONDS = 300
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
ARGUMENTS = ("trainer.launch", "train", "--config")


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def run_of(folder: Path, **train_settings: Any) -> Path:
    """A run root with a config for two processes; the path of its config.json."""
    model = folder.parent / "model"
    if not model.exists():
        write_model(model)
    settings = {"strategy": "ddp", "num_processes": 2, "bins_per_step": 3, "evaluate_every_steps": 3}
    config = tiny_run(folder, train=settings | train_settings, model={"path": str(model)}, num_documents=24)
    path = config.run_root / "config.json"
    path.write_text(config.model_dump_json())
    return path


def config_at(path: Path) -> PipelineConfig:
    return PipelineConfig.model_validate_json(path.read_bytes())


@contextmanager
def started(
    commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]
) -> Iterator[list["subprocess.Popen[str]"]]:
    """All at once, in sessions of their own; none outlives the block."""
    with ExitStack() as stack:
        processes = []
        for command, environment in zip(commands, environments, strict=True):
            process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                env=ENVIRONMENT | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            stack.callback(end_session, process)
            processes.append(process)
        yield processes


def end_session(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, 9)
    process.communicate()


def run_all(
    commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]] | None = None
) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    with started(commands, environments or [{} for _ in commands]) as processes:
        said = [process.communicate(timeout=WAIT_SECONDS) for process in processes]
        return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def losses(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what is measured."""
    folder = plan_job(config_at(path)).folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "num_tokens", "validation_loss", "validation_by_source", "validation_by_language")
    found = [{name: line[name] for name in kept if name in line} for line in lines]
    for line, all_of_it in zip(found, lines, strict=True):
        if "loss" in line:
            line["flops"] = all_of_it["teraflops_per_second"] * all_of_it["seconds"]
    return [line for line in found if len(line) > 1]


def assert_same_as_alone(path: Path, folder: Path) -> None:
    """The same steps and losses as one process has, and the same tokens and FLOPs: of all processes together."""
    alone = run_of(folder, strategy="single", num_processes=None)
    train(config_at(alone))
    found, expected = losses(path), losses(alone)
    assert len(found) == len(expected) > 4
    assert any("validation_by_source" in line for line in found)
    for line, reference in zip(found, expected, strict=True):
        assert flat(line) == pytest.approx(flat(reference), rel=1e-3)


def flat(line: dict[str, Any], before: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in line.items():
        found |= flat(value, f"{before}{name}/") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


# One node ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    path = run_of(tmp_path / "run")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port(),
    ]
    ((code, output, errors),) = run_all([[*torchrun, "-m", *ARGUMENTS, str(path)]])
    assert code == 0, errors
    assert output.count("/adapter\n") == 1, "only the first process says where the result is"
    assert errors.count("ddp over 2 processes") == 1
    assert_same_as_alone(path, tmp_path / "alone")


@pytest.mark.stress
def test_deepspeeds_launcher(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    path = run_of(tmp_path / "run", strategy="zero2")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    options = [
        "--hostfile",
        str(tmp_path / "hosts"),
        "--no_ssh",
        "--node_rank",
        "0",
        "--master_addr",
        "127.0.0.1",
    ]
    command = [
        str(BIN / "deepspeed"),
        *options,
        "--master_port",
        free_port(),
        "--module",
        *ARGUMENTS,
        str(path),
    ]
    ((code, output, errors),) = run_all([command])
    assert code == 0, errors + output
    assert_same_as_alone(path, tmp_path / "alone")


# Two nodes --------------------------------------------------------------------------------------------------


@pytest.mark.stress
def test_torchrun_over_two_nodes(tmp_path: Path) -> None:
    path = run_of(tmp_path / "run", strategy="fsdp2")
    port = free_port()
    commands = [
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number)),
            *("--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port),
            *("-m", *ARGUMENTS, str(path)),
        ]
        for number in range(2)
    ]
    for code, _, errors in run_all(commands):
        assert code == 0, errors
    assert_same_as_alone(path, tmp_path / "alone")


@pytest.mark.stress
def test_deepspeeds_launcher_over_two_nodes(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    path = run_of(tmp_path / "run", strategy="zero3")
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    port = free_port()
    commands = [
        [
            *(
                str(BIN / "deepspeed"),
                "--hostfile",
                str(tmp_path / "hosts"),
                "--no_ssh",
                "--node_rank",
                str(number),
            ),
            *("--master_addr", "127.0.0.1", "--master_port", port, "--module", *ARGUMENTS, str(path)),
        ]
        for number in range(2)
    ]
    for code, output, errors in run_all(commands):
        assert code == 0, errors + output
    assert_same_as_alone(path, tmp_path / "alone")


# Slurm ------------------------------------------------------------------------------------------------------

SBATCH = ROOT / "examples" / "slurm" / "train.sbatch"
SRUN = """#!/bin/bash
# As srun does it: one task after the other is started with its own numbers, and the highest exit code counts.
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
  SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_PROCID=$task SLURM_LOCALID=0 "$@" &
done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit "$status"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$(dirname "$0")/scontrol.log"
if [[ $1 == show ]]; then
  echo 127.0.0.1
  sleep 0.2  # who reads no further than the first line has left by now
  echo node-b
fi
"""


def slurm(folder: Path, *, srun: str = SRUN) -> dict[str, str]:
    """Programs in the place of Slurm's, and what a batch script finds in its environment."""
    folder.mkdir()
    for name, text in (("srun", srun), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": free_port(),  # the place to meet hangs on it
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }


@pytest.mark.stress
def test_the_script_for_slurm(tmp_path: Path) -> None:
    path = run_of(tmp_path / "run")
    ((code, output, errors),) = run_all([["bash", str(SBATCH), str(path)]], [slurm(tmp_path / "bin")])
    assert code == 0, errors
    assert output.count("/adapter\n") == 1
    assert output.count("\n") == 1
    assert (tmp_path / "bin" / "scontrol.log").read_text() == "show hostnames node-[a-b]\n"
    assert_same_as_alone(path, tmp_path / "alone")


@pytest.mark.parametrize(
    ("srun", "code", "is_requeued"),
    [
        ("echo run/checkpoints/x/adapter", 0, False),
        ("echo 'stopped by signal 10 after step 7' >&2", 0, True),
        ("echo 'error: no space left' >&2; exit 1", 1, False),
    ],
    ids=["finished", "stopped", "failed"],
)
def test_a_job_goes_back_into_the_queue_after_a_stop_in_good_order_alone(
    tmp_path: Path, srun: str, code: int, is_requeued: bool
) -> None:
    environment = slurm(tmp_path / "bin", srun=f"#!/bin/bash\n{srun}\n")
    ((found, _, errors),) = run_all([["bash", str(SBATCH), "config.json"]], [environment])
    assert found == code, errors
    said = (tmp_path / "bin" / "scontrol.log").read_text()
    assert (f"requeue {environment['SLURM_JOB_ID']}\n" in said) == is_requeued


def test_the_script_says_what_it_needs(tmp_path: Path) -> None:
    ((code, _, errors),) = run_all([["bash", str(SBATCH)]], [slurm(tmp_path / "bin")])
    assert code != 0
    assert "usage: sbatch examples/slurm/train.sbatch RUN_ROOT/config.json" in errors


# Processes that are not alike -------------------------------------------------------------------------------


def by_hand(paths: Sequence[Path]) -> tuple[list[list[str]], list[dict[str, str]]]:
    """A process for each config, placed by the variables that torch reads."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(len(paths))}
    commands = [[sys.executable, "-m", *ARGUMENTS, str(path)] for path in paths]
    return commands, [shared | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(len(paths))]


@pytest.mark.stress
def test_another_version_and_another_setting_on_one_process_are_refused(tmp_path: Path) -> None:
    """Both at once: a start takes longer than all that is looked at."""
    first = run_of(tmp_path / "run")
    second = first.with_name("second.json")
    second.write_text(first.read_text().replace('"learning_rate":0.01', '"learning_rate":0.5'))
    planted = tmp_path / "site" / "peft-0.0.1.dist-info"
    planted.mkdir(parents=True)
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    commands, environments = by_hand([first, second])
    environments[1]["PYTHONPATH"] = f"{tmp_path / 'site'}:{ROOT}"
    for code, output, errors in run_all(commands, environments):
        assert (code, output) == (2, "")
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert "the processes of this training are not alike" in line
        assert "0.0.1 on process 1 (" in line
        assert "train.learning_rate is 0.01 on process 0 (" in line
        assert "0.5 on process 1 (" in line
    assert not (first.parent / "checkpoints").exists()


@pytest.mark.stress
def test_a_run_root_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    """The second machine has a copy, in which nothing is written; on the first nothing is left."""
    paths = [run_of(tmp_path / name) for name in ("first", "second")]
    before = [folder_digests(path.parent) for path in paths]
    for code, output, errors in run_all(*by_hand(paths)):
        assert (code, output) == (2, "")
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert f" on process 1 ({socket.gethostname()}) is not the folder that process 0 " in line
    assert [folder_digests(path.parent) for path in paths] == before
