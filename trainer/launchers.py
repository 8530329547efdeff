"""Who may have started us as one of several processes: torchrun, deepspeed, srun, or our own starter.

torchrun, our own starter and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK and where to meet. deepspeed passes an
argument besides, and srun has names of its own. Light: no torch.
"""

import os
from collections.abc import MutableMapping

from schemas.errors import RefusedError

FIRST_PORT, NUM_PORTS = 15_000, 10_000
"""Two jobs on a node rarely meet: the port hangs on the job's number."""


def take_place(environment: MutableMapping[str, str], *, local_rank: int | None = None) -> None:
    """Put this process's place among the others under the names that torch reads.

    `local_rank` is deepspeed's argument. Raises RefusedError where srun started us and nothing says where to meet.
    """
    if local_rank is not None:
        environment.setdefault("LOCAL_RANK", str(local_rank))
    if "RANK" not in environment and (num_tasks := tasks_of_step(environment)) > 1:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = str(num_tasks)
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = _meeting_host(environment)
        environment.setdefault("MASTER_PORT", str(_meeting_port(environment)))


def tasks_of_step(environment: MutableMapping[str, str]) -> int:
    """How many tasks srun started beside this one, itself included; 1 where it did not.

    A batch script, too, has SLURM_PROCID and SLURM_NTASKS, and is one process; only a step has a number.
    """
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return 1
    return int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1"))


def _meeting_host(environment: MutableMapping[str, str]) -> str:
    num_nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1")
    if num_nodes == "1":
        return "127.0.0.1"
    raise RefusedError(
        f"srun started process {environment['SLURM_PROCID']} on one of {num_nodes} nodes and MASTER_ADDR is not set; "
        "export it in the batch script: the first line of `scontrol show hostnames $SLURM_JOB_NODELIST`"
    )


def _meeting_port(environment: MutableMapping[str, str]) -> int:
    return FIRST_PORT + int(environment.get("SLURM_JOB_ID", "0")) % NUM_PORTS


def is_one_of_several() -> bool:
    """Whether somebody else started this process and others beside it."""
    return "RANK" in os.environ


def is_first() -> bool:
    """Only the first of all, not one a machine, takes the run root, writes and prints results."""
    return os.environ.get("RANK", "0") == "0"
