"""Hook of the flows that train: end the training child of a flow run that was cancelled or crashed.

Prefect calls it in another process than the flow's, by keyword: the parameters must be named as they are.
"""

import inspect
from pathlib import Path
from typing import Any

from flows.training import stop_child
from schemas.config_file import load_config


def stop_training(flow: Any, flow_run: Any, state: Any) -> None:
    """Kill the process group that `<run root>/train.pid` names, if this flow run started it and it still lives."""
    default = inspect.signature(flow.fn).parameters["config_path"].default
    config_path = flow_run.parameters.get("config_path", default)
    config = load_config(Path(config_path), flow_run.parameters.get("overrides") or ())
    stop_child(config.run_root, owner=str(flow_run.id))
