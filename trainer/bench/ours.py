"""`ours REQUEST.json`: the training that `sft-pipeline train` runs, in a process whose memory may be capped.

Nothing of a training is done here: trainer.launch is the door of the command too, and leads to trainer.train. What
is told are the lines that the training itself wrote into metrics.jsonl.
"""

import json
from pathlib import Path

from schemas.run import CHECKPOINTS_FOLDER
from trainer.bench.peers.measuring import Request, Result, run
from trainer.launch import main as launch
from trainer.launch import read_config
from trainer.metrics import METRICS_NAME

RECORDED = ("unix_time", "num_tokens", "num_trained_tokens", "loss", "grad_norm")


def train(request: Request) -> Result:
    config_path = Path(request["config"])
    launch(["train", "--config", str(config_path)])
    (metrics,) = (read_config(config_path).run_root / CHECKPOINTS_FOLDER).glob(f"*/{METRICS_NAME}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "num_trained_tokens" in line]
    return {
        "steps": [{name: step[name] for name in RECORDED} for step in steps],
        "first_loss": steps[0]["loss"],
        "bins_at_once": steps[-1]["bins_at_once"],
        "mfu": [step["mfu"] for step in steps],
        "checkpoint_seconds": [line["checkpoint_seconds"] for line in lines if "checkpoint_seconds" in line],
    }


if __name__ == "__main__":
    run(train)
