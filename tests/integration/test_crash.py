"""Server, worker, flow, pool worker and trainer killed with -9, alone and together: nobody is left, the next run
ends with the same bytes, and Prefect says Crashed in the end.

A pool worker and a trainer never live at the same time, so there are two halves: a run is caught in a stage of the
ETL or in training. Runs whose server and worker meet the same fate go through it together, in one round.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import psutil
import pytest

from flows.automations import SILENCE_SECONDS
from pipelines.storage import TEMPORARY_PREFIX
from tests.integration.prefect_site import FINAL_STATES, Caught, Site, Toys, catch, finish
from tests.integration.processes import Family, command_line, ended_after, go_on, kill, lives
from tests.integration.servers import needs_plugin, wait_for

LEFT_SECONDS = 30.0
ENDS_ALONE_SECONDS = 240.0
"""For a run that nobody has to end: its server came back, or only a pool worker died."""

pytestmark = [pytest.mark.stress, needs_plugin]


@dataclass(frozen=True)
class Case:
    """Who of a run is killed, beside the server and the worker that it shares with others."""

    stage: str
    killed: tuple[str, ...]

    @property
    def name(self) -> str:
        return "-".join([self.stage, *self.killed]).replace(" ", "-")


SHORT: dict[tuple[str, ...], list[Case]] = {
    (): [Case("merge", ("pool worker",)), Case("clean", ("flow",)), Case("train", ("trainer",))],
    ("worker",): [Case("filter", ()), Case("split", ("flow",)), Case("train", ("flow", "trainer"))],
    ("server",): [Case("train", ())],
    ("server", "worker"): [Case("train", ("flow", "trainer"))],
}


def all_cases(base: tuple[str, ...]) -> list[Case]:
    """Every subset of who can be killed in the ETL and in training; not nobody at all."""
    subsets = list(product((False, True), repeat=2))
    return [
        Case(stage, killed)
        for stage, other in (("dedup", "pool worker"), ("train", "trainer"))
        for subset in subsets
        if (killed := tuple(kind for kind, is_hit in zip(("flow", other), subset, strict=True) if is_hit))
        or base
    ]


ROUNDS = [
    *(pytest.param(base, cases, 35.0, id=" and ".join(base) or "none") for base, cases in SHORT.items()),
    *(
        pytest.param(
            base,
            all_cases(base),
            SILENCE_SECONDS,
            id=f"all with {' and '.join(base) or 'none'}",
            marks=pytest.mark.hard,
        )
        for base in SHORT
    ),
]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys")).make()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    family = Family()
    with ended_after(family), Site(tmp_path_factory.mktemp("prefect"), family) as site:
        yield site


@pytest.mark.parametrize(("base", "cases", "silence_seconds"), ROUNDS)
def test_after_kills_nobody_is_left_and_the_next_run_ends_with_the_same_bytes(
    site: Site, toys: Toys, base: tuple[str, ...], cases: list[Case], silence_seconds: float
) -> None:
    site.start()
    site.set_silence(silence_seconds)
    with ThreadPoolExecutor(len(cases)) as threads:
        runs = list(threads.map(lambda case: catch_case(site, toys, case), cases))
    killed_at = time.monotonic()
    kill(
        [
            *(site.process(kind) for kind in base),
            *(process for case, run in zip(cases, runs, strict=True) for process in victims(case, run)),
        ]
    )
    go_on([process for run in runs for process in run.frozen])
    if base == ("server",):
        site.start()  # as a supervisor does; the worker lives, and so do its runs
    for case, run in zip(cases, runs, strict=True):
        alone = ends_alone(base, case)
        wait_for_end(run, killed_at + (ENDS_ALONE_SECONDS if alone else LEFT_SECONDS))
    print(base, f"all gone after {time.monotonic() - killed_at:.1f} s")
    site.start()
    for case, run in zip(cases, runs, strict=True):
        check_next_run(toys, case, run)
    for case, run in zip(cases, runs, strict=True):
        state = wait_for(lambda run=run: site.final_state(run.flow_run_id), f"the end of {run.name}")
        print(run.name, state["type"], state["message"], f"{time.monotonic() - killed_at:.0f} s")
        assert state["type"] in expected_states(base, case), run.name
    wait_for(lambda: len(site.family.members()) == 2, "the end of all but server and worker", LEFT_SECONDS)


def catch_case(site: Site, toys: Toys, case: Case) -> Caught:
    until = case.stage if case.stage == "train" else "pack"
    return catch(site, toys, case.name, first=case.stage, until=until)


def victims(case: Case, run: Caught) -> list[psutil.Process]:
    """Who is to be killed: of several pool workers one."""
    chosen = [run.flow] if "flow" in case.killed else []
    return chosen + (run.frozen[:1] if len(case.killed) > len(chosen) else [])


def ends_alone(base: tuple[str, ...], case: Case) -> bool:
    """Nothing above what does the work was killed, or the work itself: the run goes on and ends by itself."""
    return "worker" not in base and not {"flow", "trainer"} & set(case.killed)


def expected_states(base: tuple[str, ...], case: Case) -> tuple[str, ...]:
    if "server" in base:
        return FINAL_STATES  # what could be told while there was no server is chance; that it is final is not
    if ends_alone(base, case):
        return ("COMPLETED",)
    if case.killed == ("trainer",):  # of that the flow itself can tell, if it is left the time
        return ("FAILED", "CRASHED") if "worker" in base else ("FAILED",)
    return ("CRASHED",)


def wait_for_end(run: Caught, until: float) -> None:
    while any(map(lives, run.family)):
        left = [f"{process.pid} {command_line(process)[:120]}" for process in run.family if lives(process)]
        assert time.monotonic() < until, f"{run.name}: still there: {left}"
        time.sleep(0.1)


def check_next_run(toys: Toys, case: Case, run: Caught) -> None:
    """The lock is free, and the same stages run again leave the bytes of a run that nobody disturbed."""
    until = "evaluate" if case.stage == "train" else "pack"
    finish(toys.folder / f"{run.name}.yaml", until=until)
    assert toys.results(run.name, until=until) == toys.results("reference", until=until), run.name
    assert not list((toys.folder / run.name).rglob(f"{TEMPORARY_PREFIX}*")), run.name
