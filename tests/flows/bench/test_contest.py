"""Contestants in turns, each a process that really runs: who fails stops nobody, and what is there is noted at once."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from flows.bench.contest import Clock, Entry, take_turns
from flows.bench.contestants import Contestant, contestants_of
from flows.bench.options import BenchOptions, check_options, numbers_of
from flows.bench.table import markdown, record
from schemas.errors import ConfigError

COUNTS = [{"num_tokens": 100, "num_trained_tokens": 65}] * 9
PROGRAM = """
import json, sys, time
from pathlib import Path
request = json.loads(Path(sys.argv[1]).read_text())
{before}
steps = [
    {{"unix_time": time.time() + n, "num_tokens": 100, "num_trained_tokens": 65, "loss": 6.0, "grad_norm": 0.5}}
    for n in range(request["num_steps"])
]
result = {{
    "steps": steps, "first_loss": 6.0, "kernel": "none", "reserved_gib": None, "resident_gib": 1.0,
    "device": "CPU", "versions": {{"torch": "2"}},
}}
Path(request["result"]).write_text(json.dumps(result))
"""


def contestant(folder: Path, name: str, before: str = "") -> Entry:
    """`before` runs in its process before it makes its steps."""
    path = folder / f"{name}.py"
    path.write_text(PROGRAM.format(before=before))
    return Entry(Contestant(name, (sys.executable, str(path)), {}), {"packing": False})


def options_of(folder: Path) -> BenchOptions:
    return BenchOptions(folder, shape="toy", num_steps=6, num_warm_up=2, num_rounds=3)


def test_one_that_fails_is_named_with_its_error_and_the_others_go_on_in_turns(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    entries = [
        contestant(tmp_path, "a"),
        contestant(tmp_path, "b", "assert 'round-1' in request['folder'], 'only once'"),
        contestant(tmp_path, "c", "raise RuntimeError('no kernel for this card')"),
    ]
    orders: list[list[int]] = []
    take_turns(
        entries,
        options,
        COUNTS,
        Clock(None),
        lambda found: orders.append([len(entry.runs) for entry in found]),
    )
    assert orders == [[1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0], [2, 1, 0], [3, 1, 0]]
    assert "RuntimeError: no kernel for this card; see " in entries[2].problem
    text = markdown(options, entries)
    assert "| a | 100 (100 to 100) |" in text
    assert "| b | 100 (100 to 100) | 1.00 x |" in text
    assert "- b was in no more rounds: round 2: ended with 1: AssertionError: only once; see " in text
    assert "- c is left out: round 1: ended with 1: RuntimeError: no kernel for this card; see " in text


def test_a_slow_peer_may_make_fewer_steps_in_fewer_rounds(tmp_path: Path) -> None:
    options = dataclasses.replace(options_of(tmp_path), steps_of={"b": 3}, rounds_of={"b": 1})
    entries = [contestant(tmp_path, "a"), contestant(tmp_path, "b")]
    take_turns(entries, options, COUNTS, Clock(None))
    assert [[run.num_timed_steps for run in entry.runs] for entry in entries] == [[6, 6, 6], [3]]
    assert "b: none; 1 process of 3 steps." in markdown(options, entries)


def test_what_is_there_when_ours_fails_is_shown_and_recorded(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    entries = [contestant(tmp_path, "a", "raise MemoryError('here')"), contestant(tmp_path, "b")]
    take_turns(entries, options, COUNTS, Clock(None))
    text = markdown(options, entries)
    assert "| b | 100 (100 to 100) |  |" in text
    assert "- a is left out: round 1: ended with 1: MemoryError: here; see " in text
    found = json.loads(json.dumps(record(options, entries)))["contestants"]
    assert [len(entry["runs"]) for entry in found] == [0, 3]
    assert "first_loss_difference" not in found[1]


def test_no_process_outlives_the_limit_of_the_whole_benchmark(tmp_path: Path) -> None:
    options = dataclasses.replace(options_of(tmp_path), num_rounds=2)
    entries = [contestant(tmp_path, "a"), contestant(tmp_path, "b", "time.sleep(600)")]
    clock = Clock(14.0)
    take_turns(entries, options, COUNTS, clock)
    assert -5 < clock.left() < 10
    assert len(entries[0].runs) == 1
    assert "round 1: not ready after 1" in entries[1].problem
    assert "of --limit-seconds are left" in entries[0].problem


@pytest.mark.parametrize("pair", ["padded", "padded=", "=3", "padded=0", "padded=x"])
def test_numbers_of_peers_are_refused_where_they_are_none(pair: str) -> None:
    assert numbers_of(["padded=10", "trl=2"], "--peer-steps") == {"padded": 10, "trl": 2}
    with pytest.raises(ConfigError, match="expected NAME=NUMBER, such as padded=10"):
        numbers_of([pair], "--peer-steps")


def test_peers_that_nobody_knows_or_with_more_steps_than_ours_are_refused(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    with pytest.raises(ConfigError, match="'axolotl' is not known"):
        contestants_of(dataclasses.replace(options, rounds_of={"axolotl": 1}))
    with pytest.raises(ConfigError, match="--peer-steps padded=7: expected at most --steps, 6"):
        check_options(dataclasses.replace(options, steps_of={"padded": 7}))
