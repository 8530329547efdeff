"""Kill one of several ranks, all of them, or their starter, in each phase: the same adapter, bit for bit.

One training that is killed again and again and always gone on with; killing/ does it from outside. Each kill's line
says where it hit: `pytest -rP`.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TrainingResult
from tests.integration.killing.journey import HERE, ROOT, Kill
from tests.trainer.tiny_models import tiny_run, write_model
from trainer.job import plan_job, read_result

PATIENCE_SECONDS = 600.0
WHOM = ("alone", "group", "parent")

KILLS = [
    Kill("load", "train", event=300),
    Kill("forward", "train", call=9, event=300),
    Kill("backward", "train", call=12, event=5),
    Kill("optimiser", "train", call=5, event=40),
    Kill("snapshot", "train", call=2, event=20),
    Kill("save tensors", "train", call=2, event=30),
    Kill("rename", "train", call=2, event=30),
    Kill("validation", "train", event=200),
]


class Ranks:
    """A training of two ranks on one run root, started again and again."""

    def __init__(self, folder: Path) -> None:
        model = folder.parent / "model"
        if not model.exists():
            write_model(model)
        settings = {
            "strategy": "ddp",
            "num_processes": 2,
            "lora": {"dropout": 0.1},
            "checkpoint_every_steps": 2,
            "evaluate_every_steps": 3,
        }
        self.config: PipelineConfig = tiny_run(folder, epochs=5, train=settings, model={"path": str(model)})
        self.path = self.config.run_root / "config.json"
        self.path.write_text(self.config.model_dump_json())
        self.num_starts = 0

    @property
    def log(self) -> Path:
        return self.path.with_name(f"phases-{self.num_starts:02d}.log")

    def run(self, kill: Kill | None = None) -> tuple[int, str]:
        """Exit code and words of one start, once no process of it is left."""
        self.num_starts += 1
        environment = os.environ | {
            "PYTHONPATH": f"{HERE}:{ROOT}",
            "OMP_NUM_THREADS": "1",
            "SFT_KILL_LOG": str(self.log),
        }
        if kill is not None:
            environment["SFT_KILL"] = kill.order
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer.launch", "train", "--config", str(self.path)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        words = process.communicate(timeout=PATIENCE_SECONDS)[1]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while alive := [found for found in psutil.process_iter() if self._is_ours(found)]:
            assert time.monotonic() < deadline, f"still alive: {alive}"
            time.sleep(0.05)
        return process.returncode, words

    def be_killed(self, kill: Kill) -> str:
        code, words = self.run(kill)
        hit = Path(f"{self.log}.hit")
        assert hit.exists(), f"{kill} hit nothing, exit code {code}: {words}"
        found = json.loads(hit.read_text())
        assert found["phase"] == kill.phase
        assert found["event"] != "its end", f"{kill} came too late: {found}"
        assert code == (1 if kill.whom == "alone" else -signal.SIGKILL), f"{kill}: {words}"
        return f"killed in {kill}: {json.dumps(found)}"

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("SFT_KILL_LOG") == str(self.log)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False

    def result(self) -> TrainingResult:
        """With the digest of each output file."""
        found = read_result(plan_job(self.config))
        assert found is not None
        return found


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "num_rounds", [pytest.param(1, marks=pytest.mark.stress), pytest.param(3, marks=pytest.mark.hard)]
)
def test_ranks_killed_in_every_phase_end_with_the_same_bytes(tmp_path: Path, num_rounds: int) -> None:
    """Each round kills in each phase, each time someone else."""
    unbroken, broken = Ranks(tmp_path / "unbroken"), Ranks(tmp_path / "broken")
    assert unbroken.run()[0] == 0
    for number in range(num_rounds):
        for place, kill in enumerate(KILLS):
            print(broken.be_killed(dataclasses.replace(kill, whom=WHOM[(place + number) % len(WHOM)])))
    code, words = broken.run()
    assert code == 0, words
    assert "can't be used" not in words
    assert broken.result() == unbroken.result()
    assert not list(plan_job(broken.config).folder.glob(".tmp-*"))
