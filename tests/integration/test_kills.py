"""Kill it anywhere, run it again: same shards, same adapter bit for bit, and what it left half-written is never read.

Whole commands as processes, kill -9 inside a phase while its work is going on; killing/ does it from outside, by a
start-up file of Python. Each kill's line says where it hit: `pytest -rP`, or kills.log beside the run roots.

    SFT_KILLS=9 SFT_SEED=1 pytest tests/integration/test_kills.py -m hard -k random
"""

import functools
import gzip
import importlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.run import STAGE_FOLDERS, STAGES
from tests.integration import toy
from tests.integration.killing.journey import (
    COMMANDS,
    HERE,
    WHOLE_FLOW,
    Journey,
    Kill,
    assert_as_undisturbed,
    bytes_of,
    commands_from,
    forget_from,
)
from tests.integration.killing.leftovers import leftovers, poison, watched
from tests.integration.killing.places import FILES, FUNCTIONS, WRITER

NUM_RANDOM_KILLS = int(os.environ.get("SFT_KILLS", "30"))

pytestmark = pytest.mark.timeout(7200)


@pytest.fixture(scope="module")
def seed() -> int:
    return int(os.environ.get("SFT_SEED") or random.SystemRandom().randrange(10**9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dumps, one of them compressed, and a model with a real tokenizer."""
    folder = tmp_path_factory.mktemp("kills")
    toy.write_dumps(folder / "dumps")
    plain = folder / "dumps" / "alpaca.jsonl"
    (folder / "dumps" / "alpaca.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    plain.unlink()
    toy.write_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Journey:
    """The undisturbed run; its marks are those of all its commands."""
    journey = journey_in(folder, "reference")
    for command in COMMANDS:
        journey.run_well(command)
        journey.num_marks += len(journey.marks())
    assert (journey.run_root / "promoted.json").exists()
    return journey


def journey_in(folder: Path, name: str) -> Journey:
    config = toy.write_config(folder, run_root=name)
    text = config.read_text().replace("alpaca.jsonl}", "alpaca.jsonl.gz}")
    # Random draws in training, and a validation on the way: both must be the same after a kill.
    text = text.replace("max_steps: 12,", "max_steps: 12, lora: {dropout: 0.1}, evaluate_every_steps: 5,")
    config.write_text(text)
    return Journey(config)


def copy_before(reference: Journey, command: str, name: str) -> Journey:
    """A run root of its own in which everything before that command is done."""
    journey = journey_in(reference.config.parent, name)
    shutil.copytree(reference.run_root, journey.run_root)
    forget_from(journey.run_root, command)
    return journey


def tell(journey: Journey, line: str) -> None:
    print(line)
    with journey.config.with_name("kills.log").open("a") as log:
        log.write(f"{line}\n")


# Short form: one run that is killed twelve times -----------------------------------------------------------

TWELVE = [
    Kill("merge", WHOLE_FLOW, event=3),
    Kill("clean", "clean", file="*/part-*", call=2, event=200, workers=2),
    Kill("filter", "filter", file="*/part-*", call=2, event=30, workers=2, whom="parent"),
    Kill("dedup", "dedup", file="*/features/*", call=3, event=2),
    Kill("holdout", "holdout", file="*/manifest.json", event=2),
    Kill("split", "split", file="*/train/data-*", event=1),
    Kill("pack", "pack", call=2, event=2),
    Kill("backward", "train", call=7, event=9),
    Kill("checkpoint", "train", file="*/state.json", event=2),
    Kill("optimiser", WHOLE_FLOW, call=6, event=150, whom="alone"),
    Kill("evaluation", "evaluate", event=20_000),
    Kill("promotion file", "promote", event=2),
]


@pytest.mark.stress
def test_a_run_killed_twelve_times_ends_with_the_same_bytes(reference: Journey, folder: Path) -> None:
    journey = journey_in(folder, "twelve")
    num_done = 0
    for kill in TWELVE:
        if kill.command != WHOLE_FLOW:
            journey.run_well(*COMMANDS[num_done : COMMANDS.index(kill.command)])
            num_done = COMMANDS.index(kill.command)
        tell(journey, journey.be_killed(kill))
    journey.run_well(*COMMANDS[num_done:])
    assert journey.num_spoiled >= len([kill for kill in TWELVE if kill.phase in FILES])
    assert_as_undisturbed(journey.run_root, reference.run_root)


# Long form: each kill on a run root of its own -------------------------------------------------------------


def kills_of_stage(stage: str) -> list[Kill]:
    """A file just begun; the manifest; and in mid-part in the pool, by each way of dying in turn."""
    whom = ("alone", "group", "parent")[STAGES.index(stage) % 3]
    # Short files have few events before they are closed.
    part, event = ("*/parts/*", 3) if stage == "split" else ("*/part-*", 25)
    in_pool = [Kill(stage, stage, file=part, call=2, event=event, workers=2, whom=whom)]
    return [
        Kill(stage, stage),
        Kill(stage, stage, file="*/manifest.json", event=3),
        *(in_pool if stage != "pack" else []),
    ]


KILLS = [
    *(kill for stage in STAGES for kill in kills_of_stage(stage)),
    Kill("unpack", "merge", event=30),
    Kill("ledger", "holdout"),
    Kill("split", "split", file="*/state.json"),
    Kill("config", "pack"),
    Kill("load", "train", event=30),
    Kill("load", "train", event=3000),
    Kill("forward", "train", call=2, event=300),
    Kill("forward", "train", call=11, event=900),
    Kill("backward", "train", call=3, event=2),
    Kill("backward", "train", call=10, event=30),
    Kill("validation", "train", event=40),
    Kill("validation", "train", call=2, event=900),
    Kill("snapshot", "train", event=3),
    Kill("snapshot", "train", call=3, event=30),
    Kill("rename", "train", event=5),
    Kill("rename", "train", call=2, event=60),
    Kill("optimiser", "train", event=40),
    Kill("optimiser", "train", call=9, event=600),
    Kill("save tensors", "train", file="*-step-*/pieces*", event=2),
    Kill("save tensors", "train", file="*-step-*/pieces*", call=2, event=60),
    Kill("checkpoint", "train", file="*/state.json", call=2, event=3),
    Kill("checkpoint", "train", file="*/manifest.json", call=3),
    Kill("latest", "train"),
    Kill("latest", "train", call=3, event=2),
    Kill("remove folder", "train", file="*/.tmp-removed-*", event=20),
    Kill("output", "train", event=4000),
    Kill("adapter", "train"),
    Kill("training", "train", event=2),
    Kill("current", "train"),
    Kill("evaluation", "evaluate", event=200),
    Kill("evaluation", "evaluate", event=40_000),
    Kill("evaluation file", "evaluate", file="*.arrow"),
    Kill("evaluation file", "evaluate", file="*.json", event=2),
    Kill("promotion", "promote", event=200),
    Kill("promotion file", "promote", event=3),
    Kill("merge", WHOLE_FLOW, since="merge", file="*/part-*", call=3, event=100),
    Kill("dedup", WHOLE_FLOW, since="dedup", file="*/part-*", workers=2, whom="parent"),
    Kill("forward", WHOLE_FLOW, since="train", call=6, event=500, whom="alone"),
    Kill("checkpoint", WHOLE_FLOW, since="train", file="*/manifest.json", call=2, whom="parent"),
    Kill("evaluation", WHOLE_FLOW, since="evaluate", event=5000, whom="parent"),
    Kill("promotion file", WHOLE_FLOW, since="promote", whom="alone"),
]


@pytest.mark.hard
@pytest.mark.parametrize("kill", KILLS, ids=str)
def test_killed_in_any_phase_and_run_again_it_ends_with_the_same_bytes(
    reference: Journey, kill: Kill
) -> None:
    since = kill.since or kill.command
    journey = copy_before(reference, since, f"one-{KILLS.index(kill)}")
    tell(journey, journey.be_killed(kill))
    journey.run_well(*commands_again(kill.command))
    assert_as_undisturbed(journey.run_root, reference.run_root)
    assert journey.num_spoiled > 0 or kill.phase not in FILES
    shutil.rmtree(journey.run_root)


def commands_again(command: str) -> tuple[str, ...]:
    """What is typed after a command was killed."""
    return (WHOLE_FLOW,) if command == WHOLE_FLOW else commands_from(command)


@pytest.mark.hard
@pytest.mark.parametrize("number", range(NUM_RANDOM_KILLS))
def test_killed_at_a_random_moment_and_run_again_it_ends_with_the_same_bytes(
    reference: Journey, seed: int, number: int
) -> None:
    draw = random.Random(f"{seed}:{number}")
    journey = journey_in(reference.config.parent, f"random-{number}")
    commands = (WHOLE_FLOW,) if draw.random() < 0.3 else COMMANDS
    tell(journey, f"SFT_SEED={seed} number {number}")
    tell(journey, journey.be_killed_at_random(draw, commands, reference.num_marks))
    journey.run_well(*commands)
    assert_as_undisturbed(journey.run_root, reference.run_root)
    shutil.rmtree(journey.run_root)


@pytest.mark.hard
@pytest.mark.parametrize(
    "kill",
    [
        Kill("split", "split", file="*/parts/*", call=2),
        Kill("split", "split", file="*/train/state.json"),
        Kill("split", "split", file="*/test/data-*"),
        Kill("split", "split", file="*/06_shards/manifest.json"),
        Kill("pack", "pack", call=2),
        Kill("pack", "pack", file="*/manifest.json"),
    ],
    ids=str,
)
def test_killed_while_a_finished_stage_is_made_anew_either_config_ends_with_its_own_bytes(
    reference: Journey, kill: Kill
) -> None:
    """The old manifest stands while new files take the names of old ones."""
    other = journey_in(reference.config.parent, "other-limit")
    change_limit(other)
    other.run_well(*STAGES)
    for name, back in (("forth", False), ("back", True)):
        journey = copy_before(reference, "train", name)
        unchanged = journey.config.read_text()
        change_limit(journey)
        journey.run_well(*STAGES[STAGES.index("split") : STAGES.index(kill.command)])
        tell(journey, journey.be_killed(kill))
        if back:
            journey.config.write_text(unchanged)
        journey.run_well(*STAGES)
        assert shards_of(journey) == shards_of(reference if back else other)
        shutil.rmtree(journey.run_root)


def change_limit(journey: Journey) -> None:
    journey.config.write_text(journey.config.read_text().replace("max_tokens: 256", "max_tokens: 192"))


def shards_of(journey: Journey) -> dict[str, str]:
    folders = tuple(STAGE_FOLDERS.values())
    return {path: digest for path, digest in bytes_of(journey.run_root).items() if path.startswith(folders)}


# The tools themselves ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_place_to_be_killed_in_is_there() -> None:
    for place in (*FUNCTIONS.values(), WRITER):
        module, _, name = place.partition(":")
        assert callable(functools.reduce(getattr, name.split("."), importlib.import_module(module)))


def test_a_place_that_is_gone_ends_the_process(tmp_path: Path) -> None:
    shutil.copy(HERE / "sitecustomize.py", tmp_path)
    text = (HERE / "places.py").read_text().replace('"shutil:rmtree"', '"shutil:rm_tree"')
    (tmp_path / "places.py").write_text(text)
    environment = {"PYTHONPATH": str(tmp_path), "SFT_KILL_LOG": str(tmp_path / "log")}
    ended = subprocess.run(
        [sys.executable, "-c", "import shutil"], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 98
    assert "shutil has no rm_tree: mend killing/places.py" in ended.stderr


@pytest.mark.stress
def test_a_kill_that_hits_nothing_fails(folder: Path) -> None:
    journey = journey_in(folder, "unhurt")
    with pytest.raises(AssertionError, match="hit nothing, exit code 0"):
        journey.be_killed(Kill("merge", "merge", call=10_000))


def test_a_left_file_that_is_read_is_seen(tmp_path: Path) -> None:
    left = tmp_path / "01_merged" / ".tmp-7-part-1.parquet"
    left.parent.mkdir()
    left.write_bytes(b"half")
    assert poison(tmp_path) == leftovers(tmp_path) == [left]
    assert b"half" not in left.read_bytes()
    with watched([left]) as watch:
        assert watch.opened() == set()
        left.read_bytes()
        assert watch.opened() == {left}
