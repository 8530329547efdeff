"""Micro-steps are dealt out to the ranks fairly, and each process knows which rank it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import RefusedError
from tests.trainer.rank_groups import run_of
from trainer.data import Plan
from trainer.job import plan_job
from trainer.ranks import ALONE, joined_ranks
from trainer.steps import Step, micro_steps

# Dealing out a step -----------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=1, max_size=12),
    bins_per_micro_step=st.integers(1, 4),
    num_ranks=st.integers(1, 5),
)
def test_every_useful_micro_step_is_computed_by_exactly_one_rank(
    weights: list[float], bins_per_micro_step: int, num_ranks: int
) -> None:
    count = len(weights)
    ones, zeros = np.ones(count, int), np.zeros(count, int)
    plan = Plan("train", 0, np.arange(count), ones, zeros, ones, np.array(weights), np.arange(count + 1))
    step = Step(0, 0, 0, count, count, count, sum(weights))

    def deal(rank: int, ranks: int) -> list[Any]:
        options: Any = {"bins_per_micro_step": bins_per_micro_step, "rank": rank, "num_ranks": ranks}
        return micro_steps(plan, step, **options)

    alone = deal(0, 1)
    assert not any(micro_step.is_filler for micro_step in alone)
    assert sum(sum(weights[m.first_bin : m.end_bin]) for m in alone) == sum(weights)
    shares = [deal(rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(share) for share in shares}) == 1
    real = [m for share in shares for m in share if not m.is_filler]
    assert sorted(real, key=lambda m: m.first_bin) == alone


# Who this process is ----------------------------------------------------------------------------------------


def test_one_process_is_alone(tmp_path: Path) -> None:
    with joined_ranks(run_of(tmp_path / "run", strategy="single")) as ranks:
        assert ranks is ALONE


@pytest.mark.parametrize(
    ("strategy", "num_started", "said"),
    [
        ("single", "2", "2 processes were started, strategy single"),
        ("zero2", "3", "3 processes were started, strategy zero2 with train.num_processes 2 expects 2"),
    ],
)
def test_a_number_of_processes_that_the_config_does_not_want_is_refused(
    tmp_path: Path, strategy: str, num_started: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", num_started)
    config = run_of(tmp_path / "run", strategy=strategy)
    with pytest.raises(RefusedError, match=said), joined_ranks(config):
        pass


def test_strategy_and_number_of_processes_are_outside_the_key_and_the_base_is_inside(tmp_path: Path) -> None:
    keys = {
        name: plan_job(run_of(tmp_path / "run", **settings)).key
        for name, settings in {
            "single": {"strategy": "single"},
            "zero2": {"strategy": "zero2"},
            "int8": {"strategy": "zero2", "base": "int8"},
        }.items()
    }
    assert keys["single"] == keys["zero2"] != keys["int8"]
