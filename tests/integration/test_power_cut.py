"""The power goes after a rename or an fsync: what is published after the next mount is whole, and the run ends the same.

A loop-mounted image is shut down by FS_IOC_SHUTDOWN without its journal being flushed, so that everything is lost
that no fsync has brought to the disk. Needs root and loop devices.
"""

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.faults.journey import DISK, PHASES, Journey, Phase, travel, write_inputs
from tests.integration.faults.published import check_published, digests
from tests.integration.faults.warm import Call, Fault, Warm
from tests.integration.test_faults import difference

FILE_SYSTEMS = {"ext4": ("64M", "-F"), "xfs": ("320M", "-f")}
SHORT_JOURNEY = ("merge-1", "clean-1", "filter-1", "dedup-1", "holdout-1", "split-1", "pack-1", "train-1")
CUT_IN_SHORT = ("merge-1", "holdout-1", "split-1", "train-1")
NUM_CUTS_IN_SHORT = 4


@pytest.fixture(scope="module", params=sorted(FILE_SYSTEMS))
def image(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system in a file."""
    kind = request.param
    make = shutil.which(f"mkfs.{kind}", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if make is None:
        pytest.skip(f"mkfs.{kind} is not installed: the power of a disk with {kind} can't be cut")
    size, option = FILE_SYSTEMS[kind]
    with tempfile.NamedTemporaryFile(suffix=f".{kind}") as file:
        subprocess.run(["truncate", "--size", size, file.name], check=True)
        subprocess.run([make, "-q", option, file.name], check=True, capture_output=True)
        yield Path(file.name)


@pytest.fixture(scope="module")
def warm(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    folder = tmp_path_factory.mktemp("cut")
    write_inputs(folder)
    warm = Warm.with_own_mounts(folder / "warm")
    try:
        warm.mount("mount", "-o", "loop", image, folder / DISK)
        yield warm
    except subprocess.CalledProcessError as error:
        pytest.skip(f"loop devices can't be mounted here: {error.stderr.strip()}")
    finally:
        warm.close()


@pytest.mark.stress
def test_after_a_power_cut_in_a_first_run_nothing_published_is_half(warm: Warm, image: Path) -> None:
    journey = travel(warm, warm.folder.parent, names=SHORT_JOURNEY)
    draw = random.Random(os.environ.get("FAULTS_SEED", "0"))
    for name in CUT_IN_SHORT:
        phase = journey.phases[name]
        for call in draw.sample(lasting(phase), NUM_CUTS_IN_SHORT):
            check_cut(journey, phase, call, image)


@pytest.mark.hard
@pytest.mark.timeout(0)
def test_after_a_power_cut_at_any_rename_or_fsync_nothing_published_is_half(warm: Warm, image: Path) -> None:
    shutil.rmtree(warm.folder.parent / "before", ignore_errors=True)
    shutil.rmtree(warm.seen(warm.folder.parent / DISK / "run"), ignore_errors=True)
    journey = travel(warm, warm.folder.parent, names=PHASES)
    for phase in journey.phases.values():
        for call in lasting(phase):
            check_cut(journey, phase, call, image)


def lasting(phase: Phase) -> list[Call]:
    """The calls that are meant to last."""
    return [call for call in phase.calls if call.name.startswith(("rename", "fsync", "unlink"))]


def check_cut(journey: Journey, phase: Phase, call: Call, image: Path) -> None:
    warm, disk = journey.warm, journey.run_root.parent
    where = f"{phase.name}: cut after call {call.number}, {call.name} {call.path}"
    journey.rewind(phase)
    warm.mount("sync", "--file-system", disk)
    fault = Fault(call.number, "cut", mount_point=str(disk))
    ended = warm.run(*phase.arguments, under=journey.run_root, fault=fault)
    assert ended.code == -9, f"{where}: exit code {ended.code}: {ended.output[-300:]}"
    warm.mount("umount", disk)
    warm.mount("mount", "-o", "loop", image, disk)
    assert not check_published(journey.seen), where
    again = warm.run(*phase.arguments)
    assert again.code == 0, f"{where}: {again.output[-500:]}"
    assert not difference(digests(journey.seen), phase.after), where
