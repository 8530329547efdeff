"""Where a run can be killed: functions by name, and files by the path that they will have.

Standard library alone: every process of a killed run reads this as it starts.
"""

import fnmatch

FUNCTIONS = {
    "unpack": "pipelines.unpack:unpack",
    "load": "trainer.model:load_base_model",
    "forward": "trainer.loss:summed_loss",
    "backward": "torch:Tensor.backward",
    "optimiser": "torch:optim.AdamW.step",
    "validation": "trainer.loss:split_loss",
    "snapshot": "trainer.checkpoint_writer:HostBuffer.copy",
    "rename": "trainer.folders:publish",
    "save tensors": "trainer.piece_files:write_pieces",
    "save checkpoint": "trainer.checkpoint:complete",
    "remove folder": "shutil:rmtree",
    "output": "trainer.output:write_output",
    "evaluation": "trainer.evaluation:measure",
    "promotion": "trainer.promotion:decide",
}
"""Phase -> module:function. One that is gone ends the process: a kill that hits nothing proves nothing."""

WRITER = "pipelines.storage:durable_file"
"""Every durable file passes here: a temporary file comes in, is open for a while, and goes out renamed."""

FILES = {
    "merge": "*/01_merged/*",
    "clean": "*/02_cleaned/*",
    "filter": "*/03_filtered/*",
    "dedup": "*/04_deduplicated/*",
    "holdout": "*/05_held_out/*",
    "split": "*/06_shards/*",
    "pack": "*/07_plan/*",
    "ledger": "*/holdout.parquet",
    "checkpoint": "*/checkpoints/*/.tmp-*-step-*/*",
    "latest": "*/checkpoints/*/latest",
    "adapter": "*/checkpoints/*/.tmp-*-adapter/*",
    "training": "*/checkpoints/*/training.json",
    "current": "*/checkpoints/current",
    "metrics": "*/metrics.jsonl",
    "evaluation file": "*/evaluation*",
    "promotion file": "*/promoted.json",
    "config": "*/config.json",
    "pid": "*/train.pid",
}
"""Phase -> path of the file that is being written; the first that fits counts."""


def phase_of_file(path: str) -> str:
    """The phase in which that file is written."""
    return next((phase for phase, pattern in FILES.items() if fnmatch.fnmatch(path, pattern)), "other file")
