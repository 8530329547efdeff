"""Every call that changes a file fails once, or for ever, or stops halfway, or is the process's last.

After each: what is published is whole, old or new; an error names the file, the trouble and what to do on one line;
and the same command, run again, ends with the same bytes as if nothing had happened.

`make hard` takes every call and every fault (hours of a core); `make stress` some of each kind, by FAULTS_SEED.
"""

import errno
import os
import random
import re
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.faults.journey import PHASES, Journey, Phase, travel, write_inputs
from tests.integration.faults.published import check_published, digests, state
from tests.integration.faults.warm import Call, Fault, Warm

WRITES = ("write", "pwrite", "writev", "sendfile", "ftruncate", "ftruncate64")
ERRORS = {
    "write": (errno.ENOSPC, errno.EIO),
    "open": (errno.ENOSPC, errno.EIO, errno.EACCES, errno.ENOENT),
    "mkdir": (errno.ENOSPC, errno.EIO, errno.EPERM, errno.ENOENT),
    "fsync": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EIO, errno.ENOSPC, errno.EACCES, errno.ENOENT),
    "unlink": (errno.EIO, errno.EACCES, errno.ENOENT),
    "rmdir": (errno.EIO, errno.EPERM, errno.ENOENT),
}
NOT_TWICE = ("rollback-2",)
"""Done, though a fault was met: once more would go back one model further."""


@pytest.fixture(scope="module")
def journey() -> Iterator[Journey]:
    """In memory where there is some: a busy disk would be measured here, and no fsync is needed."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        write_inputs(folder)
        warm = Warm(folder / "warm")
        try:
            yield travel(warm, folder)
        finally:
            warm.close()


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    "is_sample",
    [
        pytest.param(True, marks=pytest.mark.stress, id="some"),
        pytest.param(False, marks=pytest.mark.hard, id="every"),
    ],
)
@pytest.mark.parametrize("name", PHASES)
def test_a_fault_at_any_call_leaves_old_or_new_and_the_next_run_ends_with_the_same_bytes(
    journey: Journey, name: str, is_sample: bool
) -> None:
    phase = journey.phases[name]
    assert phase.calls
    healed: set[str] = set()
    faults = sampled(phase) if is_sample else every(phase)
    problems = [
        f"{fault} ({call.name} {call.path}): {problem}"
        for call, fault in faults
        for problem in trouble(journey, phase, fault, healed)
    ]
    assert not problems, f"{len(problems)} problems:\n" + "\n".join(problems[:20])


def every(phase: Phase) -> list[tuple[Call, Fault]]:
    return [(call, fault) for call in phase.calls for fault in possible(call)]


def sampled(phase: Phase) -> list[tuple[Call, Fault]]:
    """For each kind of call on each kind of file a kill in one week, another fault in the other, at a call drawn."""
    draw = random.Random(f"{os.environ.get('FAULTS_SEED', '0')} {phase.name}")
    kinds: dict[tuple[str, str], list[Call]] = defaultdict(list)
    for call in phase.calls:
        kinds[call.name, kind_of_file(call.path)].append(call)
    is_week_of_kills = phase.name.endswith("-1")
    chosen = []
    for (name, path), calls in kinds.items():
        kill, *others = possible(calls[0])
        is_killed = is_week_of_kills ^ (zlib.crc32(f"{name} {Path(path).name}".encode()) % 2 == 0)
        fault = kill if is_killed else draw.choice(others)
        call = draw.choice(calls)
        chosen.append((call, Fault(call.number, fault.action, fault.error, fault.for_ever)))
    return chosen


def possible(call: Call) -> list[Fault]:
    """The kill first."""
    faults = [Fault(call.number, "kill")]
    if call.name == "write":
        faults.append(Fault(call.number, "short"))
    kind = "write" if call.name in WRITES else re.sub(r"(at|at2|at64|64)$", "", call.name)
    faults += [
        Fault(call.number, "fail", error, for_ever) for error in ERRORS[kind] for for_ever in (False, True)
    ]
    return faults


def kind_of_file(path: str) -> str:
    """The path without its numbers and keys."""
    return re.sub(r"[0-9a-f]{16,}|\d+", "#", path)


def trouble(journey: Journey, phase: Phase, fault: Fault, healed: set[str]) -> Iterator[str]:
    """What is wrong after one fault. `healed` holds the states from which a run was seen to finish."""
    journey.rewind(phase)
    ended = journey.warm.run(*phase.arguments, under=journey.run_root, fault=fault)
    assert ended.num_calls >= fault.nth, (
        f"only {ended.num_calls} calls in {phase.name}: not what it was before"
    )
    if fault.action == "kill":
        if ended.code != -9:
            yield f"exit code {ended.code}: {ended.output[-300:]}"
    elif ended.code != 0:
        yield from unclear(ended.code, ended.output, fault, journey.run_root)
    yield from check_published(journey.seen)
    if fault.action == "short" and (ended.code != 0 or digests(journey.seen) != phase.after):
        yield f"a short write was not gone on with: exit code {ended.code}: {ended.output[-300:]}"
    found = state(journey.seen)
    is_done = digests(journey.seen) == phase.after
    if found not in healed and not (is_done and phase.name in NOT_TWICE):
        again = journey.warm.run(*phase.arguments)
        if again.code != 0:
            yield f"the next run fails with {again.code}: {again.output[-300:]}"
        elif odd := difference(digests(journey.seen), phase.after):
            yield f"the next run leaves other files: {odd}"
        else:
            healed.add(found)


def unclear(code: int, output: str, fault: Fault, run_root: Path) -> Iterator[str]:
    """What a message lacks: one line, the file, the trouble in words, what to do."""
    last = output.strip().splitlines()[-1] if output.strip() else ""
    needed = ("sft-pipeline: error: ", str(run_root), os.strerror(fault.error), "run again")
    missing = [what for what in needed if what not in last]
    if code != 1 or missing or "Traceback" in output or "unexpected" in last:
        yield f"exit code {code}, the message lacks {missing}: {output[-400:]!r}"


def difference(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if found.get(name) != expected.get(name)][:5]
