"""A Prefect server and worker that tests kill and start again, and toy runs under them that are caught midway.

Runs that must not be over before they are killed are frozen (SIGSTOP): the pool's workers or the trainer, as soon
as the stage has written something. The flow itself goes on, so that it can hear what it is told.
"""

import shutil
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prefect.client.orchestration import SyncPrefectClient

from flows.automations import create_rules
from flows.preflight import open_run
from flows.training import run_trainer
from pipelines.run_lock import hold_run_root
from pipelines.stage import run_stage
from schemas.run import HOLDOUT_LEDGER_NAME, MANIFEST_NAME, STAGE_FOLDERS, STAGES
from tests.integration import toy
from tests.integration.processes import Family, command_line, descendants, lives, stop
from tests.integration.servers import Server, serving_alone, wait_for, working

DEPLOYMENT = "many-at-once"
OVERRIDES: dict[str, Any] = {
    "merge.part_bytes": 4_000,
    "train.epochs": 60,
    "train.max_steps": 60,
    "engine.min_free_gib": 0.01,
}
FINAL_STATES = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Site:
    """Server, worker and deployments; both processes can be killed, and are started again when asked for."""

    def __init__(self, home: Path, family: Family) -> None:
        self.family = family
        self.server = Server(home)
        self.server.environment.update(family.environment)
        # The default polls every 10 s.
        self.server.environment["PREFECT_WORKER_QUERY_SECONDS"] = "1"
        self._running = ExitStack()
        self._processes: dict[str, psutil.Process] = {}
        self._deployment_id = ""

    def __enter__(self) -> "Site":
        home = self.server.home
        home.mkdir(mode=0o700, exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def start(self) -> None:
        """Start what does not run."""
        if not self._is_up("server"):
            self._processes["server"] = self._entered(serving_alone(self.server))
        if not self._deployment_id:
            self._deploy()
        if not self._is_up("worker"):
            self._processes["worker"] = self._entered(working(self.server))

    def process(self, kind: str) -> psutil.Process:
        return self._processes[kind]

    def run(self, config: Path, *, first: str, until: str, **overrides: Any) -> str:
        """Ask for a run of these stages; the id of its flow run."""
        parameters = {
            "config_path": str(config),
            "overrides": OVERRIDES | {"engine.workers": 2} | overrides,
            "from_stage": first,
            "until": until,
        }
        made = self.server.ask(
            f"deployments/{self._deployment_id}/create_flow_run",
            parameters=parameters,
            state={"type": "SCHEDULED"},
        )
        return str(made["id"])

    def state(self, flow_run_id: str) -> dict[str, Any]:
        state: dict[str, Any] = self.server.ask(f"flow_runs/{flow_run_id}", method="GET")["state"]
        return state

    def final_state(self, flow_run_id: str) -> dict[str, Any] | None:
        """The state of a run that is over."""
        state = self.state(flow_run_id)
        return state if state["type"] in FINAL_STATES else None

    def set_silence(self, seconds: float) -> None:
        """The rule of `sft-pipeline deploy`, after another time without a heartbeat."""
        with SyncPrefectClient(self.server.api) as client:
            create_rules(client, silence_seconds=seconds)

    def cancel(self, flow_run_id: str) -> None:
        """What `prefect flow-run cancel` does."""
        self.server.ask(f"flow_runs/{flow_run_id}/set_state", state={"type": "CANCELLING"})

    def flow(self, flow_run_id: str) -> psutil.Process:
        """The process of a flow run, once it is there."""
        found: psutil.Process = wait_for(
            lambda: self._not_over(flow_run_id) and self.family.flow(flow_run_id), "the start of a flow"
        )
        return found

    def _not_over(self, flow_run_id: str) -> bool:
        state = self.state(flow_run_id)
        assert state["type"] not in FINAL_STATES, state
        return True

    def _is_up(self, kind: str) -> bool:
        return kind in self._processes and lives(self._processes[kind])

    def _entered(self, started: Any) -> psutil.Process:
        return psutil.Process(self._running.enter_context(started).pid)

    def _deploy(self) -> None:
        """All of prefect.yaml, and the flow once more without its limit of one run at a time."""
        for line in (
            "prefect work-pool create sft-pipeline --type process",
            "prefect --no-prompt deploy --name sft-pipeline",
        ):
            done = self.server.type(line)
            assert done.returncode == 0, line + done.stdout + done.stderr
        [deployed] = self.server.ask("deployments/filter")
        kept = ("flow_id", "entrypoint", "path", "job_variables", "tags", "work_pool_name", "pull_steps")
        made = self.server.ask("deployments/", {"name": DEPLOYMENT} | {name: deployed[name] for name in kept})
        self._deployment_id = made["id"]


@dataclass(frozen=True)
class Toys:
    """Run roots in one folder: `reference` is finished, the others begin as its copies up to some stage."""

    folder: Path

    def make(self) -> "Toys":
        toy.write_dumps(self.folder / "dumps", num_chats=160, num_records=60)
        toy.write_model(self.folder / "model")
        toy.write_config(self.folder, run_root="reference")
        finish(self.folder / "reference.yaml", workers=2)
        return self

    def new_name(self, kind: str) -> str:
        """A name that no run root of this folder has."""
        return f"{kind}-{len(list(self.folder.glob(f'{kind}-*.yaml')))}"

    def copy(self, name: str, *, first: str) -> Path:
        """The config of a run root where everything before the stage `first` is finished."""
        run_root = self.folder / name
        before = STAGES[: STAGES.index(first)] if first in STAGES else STAGES
        for stage in before:
            shutil.copytree(self.folder / "reference" / STAGE_FOLDERS[stage], run_root / STAGE_FOLDERS[stage])
        if "holdout" in before:
            shutil.copy(self.folder / "reference" / HOLDOUT_LEDGER_NAME, run_root / HOLDOUT_LEDGER_NAME)
        return toy.write_config(self.folder, run_root=name)

    def results(self, name: str, *, until: str) -> dict[str, str]:
        """sha256 of everything that a run up to the stage `until` is there for."""
        stages = [
            stage for stage in STAGES if until not in STAGES or STAGES.index(stage) <= STAGES.index(until)
        ]
        folders = [STAGE_FOLDERS[stage] for stage in stages]
        found = toy.folder_digests(self.folder / name)
        return {
            path: digest
            for path, digest in found.items()
            if path.split("/")[0] in folders
            or ("/adapter/" in path and until not in STAGES)
            or (path == "evaluation.json" and until == "evaluate")
        }


def finish(config: Path, *, first: str = "merge", until: str = "evaluate", workers: int = 1) -> None:
    """The stages without Prefect, under the lock, as far as anything is left to do."""
    overrides: Mapping[str, Any] = OVERRIDES | {"engine.workers": workers, "engine.lock_wait_seconds": 0}
    with open_run(config, overrides, first=first, last=until) as run:
        for name in run.stages:
            if name in STAGES:
                run_stage(name, run.config)
            else:
                run_trainer(name, run.config.run_root, lock=run.lock, say=print)


@dataclass
class Caught:
    """A run that is frozen in the middle of a stage; `family` is the flow and all below it."""

    name: str
    flow_run_id: str
    flow: psutil.Process
    frozen: list[psutil.Process]
    family: list[psutil.Process]


def catch(site: Site, toys: Toys, kind: str, *, first: str, until: str) -> Caught:
    """A run that has begun to write in the stage `first` and has not ended it; a busy machine may need a second try."""
    for _ in range(3):
        name = toys.new_name(kind)
        flow_run_id = site.run(toys.copy(name, first=first), first=first, until=until)
        flow = site.flow(flow_run_id)
        try:
            frozen = freeze_in(first, toys.folder / name, flow)
        except AssertionError as too_late:
            print(name, too_late)
            continue
        return Caught(name, flow_run_id, flow, frozen, [flow, *descendants(flow)])
    raise AssertionError(f"{kind} was over three times before it could be caught")


def freeze_in(stage: str, run_root: Path, flow: psutil.Process) -> list[psutil.Process]:
    """Stop what works below `flow` once `stage` has begun to write; it has not ended. Returns the stopped."""
    if stage == "train":
        wait_midway(lambda: any(run_root.glob("checkpoints/*/latest")), flow)
        frozen = stop([p for p in descendants(flow) if "trainer.launch" in command_line(p)])
        assert not any(run_root.glob("checkpoints/*/adapter")), "too late"
    else:
        folder = run_root / STAGE_FOLDERS[stage]
        wait_midway(lambda: folder.exists() and any(folder.rglob("*.*")), flow)
        frozen = stop([flow] if stage == "pack" else pool_workers(flow))
        assert not (folder / MANIFEST_NAME).exists(), "too late"
    assert frozen, "nobody works there"
    return frozen


def pool_workers(flow: psutil.Process) -> list[psutil.Process]:
    return [process for process in descendants(flow) if "multiprocessing.spawn" in command_line(process)]


def wait_midway(condition: Any, flow: psutil.Process, seconds: float = 240.0) -> None:
    """As `wait_for`, without missing a stage of a fraction of a second."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert lives(flow), "the flow has ended"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def has_pending(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a signal waits for a stopped process to go on."""
    fields = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
    )
    return any(int(fields[name].strip(), 16) >> (number - 1) & 1 for name in ("SigPnd", "ShdPnd"))


def is_free(run_root: Path) -> bool:
    """Whether a run would get the run root at once."""
    with hold_run_root(run_root, wait_seconds=0):
        return True
