"""Whose variables say that we are one of several: torchrun's, deepspeed's, srun's; and whose do not."""

from typing import Any

import pytest

from schemas.errors import RefusedError
from trainer.launch import _parser
from trainer.launchers import take_place

STEP = {
    "SLURM_JOB_ID": "70004",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
}


def taken(environment: dict[str, str], **options: Any) -> dict[str, str]:
    """What was added to an environment."""
    after = dict(environment)
    take_place(after, **options)
    return {name: value for name, value in after.items() if environment.get(name) != value}


def test_a_task_of_srun_takes_its_number_among_all() -> None:
    assert taken(STEP | {"MASTER_ADDR": "node-a"}) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_PORT": "15004",
    }


def test_on_one_node_the_place_to_meet_is_known() -> None:
    assert taken(STEP | {"SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"


def test_on_several_nodes_the_place_to_meet_has_to_be_said() -> None:
    with pytest.raises(
        RefusedError, match=r"one of 2 nodes and MASTER_ADDR is not set; .*scontrol show hostnames"
    ):
        taken(STEP)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # A batch script is one process, although it has these.
        {name: value for name, value in STEP.items() if "STEP" not in name},
        # An interactive shell of srun, in a job of eight tasks.
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        # torchrun, deepspeed or our own starter inside a task.
        STEP | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
    ],
    ids=["nobody", "batch script", "shell", "torchrun"],
)
def test_else_nothing_is_taken(environment: dict[str, str]) -> None:
    assert taken(environment) == {}


@pytest.mark.parametrize("option", ["--local_rank=3", "--local-rank=3"])
def test_the_argument_of_deepspeeds_launcher_is_understood(option: str) -> None:
    options = _parser().parse_args([option, "train", "--config", "x.json"])
    assert taken({"RANK": "7", "WORLD_SIZE": "8"}, local_rank=options.local_rank) == {"LOCAL_RANK": "3"}
    assert taken({"RANK": "7", "LOCAL_RANK": "1"}, local_rank=options.local_rank) == {}
