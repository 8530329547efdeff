"""Cancelled in every stage, by a real Prefect server and worker: soon Cancelled, nobody left, the next run goes on.

All runs are caught midway at the same time, each in a stage of its own and on a run root of its own.
"""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from pipelines.storage import TEMPORARY_PREFIX
from schemas.run import STAGES
from tests.integration.prefect_site import Caught, Site, Toys, catch, finish, has_pending, is_free
from tests.integration.processes import Family, ended_after, go_on, lives
from tests.integration.servers import needs_plugin, wait_for

CANCELLED_SECONDS = 40.0
LEFT_SECONDS = 30.0
CAUGHT = (*STAGES, "train")

pytestmark = [pytest.mark.stress, needs_plugin]


@dataclass
class Cancelled:
    """What became of it; seconds since the cancel, and since the state Cancelled."""

    name: str
    state: str
    seconds_to_state: float
    seconds_to_last_process: float


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys")).make()


@pytest.fixture(scope="module")
def cancelled(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Cancelled]]:
    """A run cancelled in each stage, by stage."""
    family = Family()
    with (
        ended_after(family),
        Site(tmp_path_factory.mktemp("prefect"), family) as site,
        ThreadPoolExecutor(len(CAUGHT)) as catchers,
        ThreadPoolExecutor(2) as cancellers,
    ):
        caught = list(catchers.map(lambda stage: catch(site, toys, stage, first=stage, until=stage), CAUGHT))
        # Prefect's worker starts a process for the hooks of each: no more at once than there are cores.
        outcomes = list(cancellers.map(lambda stage, run: cancel(site, stage, run), CAUGHT, caught))
        yield dict(zip(CAUGHT, outcomes, strict=True))


def cancel(site: Site, stage: str, run: Caught) -> Cancelled:
    started = time.monotonic()
    site.cancel(run.flow_run_id)
    if stage in ("pack", "train"):  # these hear of it themselves; pool workers need not go on to be killed
        for process in run.frozen:
            wait_for(lambda process=process: has_pending(process, signal.SIGTERM), "SIGTERM", 60)
        go_on(run.frozen)
    wait_for(lambda: site.state(run.flow_run_id)["type"] == "CANCELLED", f"Cancelled in {stage}", 120)
    at_state = time.monotonic()
    wait_for(lambda: not any(map(lives, run.family)), f"the end of all processes of {stage}", 120)
    state = site.state(run.flow_run_id)["type"]
    return Cancelled(run.name, state, at_state - started, time.monotonic() - at_state)


@pytest.mark.parametrize("stage", CAUGHT)
def test_cancelled_in_a_stage_it_ends_soon_and_the_next_run_ends_with_the_same_bytes(
    cancelled: dict[str, Cancelled], toys: Toys, stage: str
) -> None:
    outcome = cancelled[stage]
    print(outcome)
    assert outcome.state == "CANCELLED"
    assert outcome.seconds_to_state < CANCELLED_SECONDS
    assert outcome.seconds_to_last_process < LEFT_SECONDS
    run_root = toys.folder / outcome.name
    assert is_free(run_root)
    assert not (run_root / "train.pid").exists()
    finish(toys.folder / f"{outcome.name}.yaml", first=stage, until=stage)
    assert not list(run_root.rglob(f"{TEMPORARY_PREFIX}*"))
    assert toys.results(outcome.name, until=stage) == toys.results("reference", until=stage)
