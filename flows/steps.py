"""A flow per step, so that each can be deployed, scheduled and run alone: `step-merge` ... `train`.

No `from __future__ import annotations` in flow modules: served flows then fail with undefined references.
"""

from collections.abc import Callable
from typing import Any

from prefect import Flow, flow
from prefect.flows import FlowStateHook

from flows import tasks
from flows.cancelling import stop_training
from flows.flow_run import open_flow_run
from flows.parameters import ConfigPath, Overrides


def step_flow(name: str, first: str, last: str, *steps: Callable[[Any], None]) -> Flow[..., None]:
    """The flow `name`: the stages from `first` to `last` on the run root of a config."""

    def run_steps(config_path: ConfigPath = "configs/demo.yaml", overrides: Overrides = None) -> None:
        with open_flow_run(config_path, overrides, first=first, last=last) as run:
            for step in steps:
                step(run)

    hooks: list[FlowStateHook[..., Any]] = [stop_training] if last in ("train", "promote") else []
    described = f"{name}: the stages {first} to {last} alone, on what the earlier ones left in the run root."
    return flow(
        name=name,
        description=described,
        retries=0,
        persist_result=False,
        on_cancellation=hooks,
        on_crashed=hooks,
    )(run_steps)


step_merge = step_flow("step-merge", "merge", "merge", tasks.merge)
step_clean = step_flow("step-clean", "clean", "clean", tasks.clean)
step_filter = step_flow("step-filter", "filter", "filter", tasks.filter_rows)
step_dedup = step_flow("step-dedup", "dedup", "dedup", tasks.dedup)
step_holdout = step_flow("step-holdout", "holdout", "holdout", tasks.holdout)
step_split = step_flow("step-split", "split", "split", tasks.split)
step_pack = step_flow("step-pack", "pack", "pack", tasks.pack)
train = step_flow("train", "train", "train", tasks.train)
evaluate_promote = step_flow("evaluate-promote", "evaluate", "promote", tasks.evaluate, tasks.promote)
