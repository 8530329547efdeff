"""The tokens of a run's first steps in a file that any interpreter reads: what the peers train on."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGE_FOLDERS
from trainer.data import MicroBatch, micro_batch, read_plan
from trainer.shard_reader import ShardReader
from trainer.steps import plan_steps

IGNORED = -100
"""Label of a token that is no target."""


def export_documents(config: PipelineConfig, path: Path) -> None:
    """All that the training of this config will read, in its order, and beside it what each step must count.

    input_ids, labels int32 [tokens]: a label stands at its own token; document_starts int64 [documents + 1] in
    tokens, bin_starts int64 [bins + 1] in documents.
    """
    reader = ShardReader(config.run_root / STAGE_FOLDERS["split"], "train")
    plan = read_plan(config.run_root, "train", 0)
    steps = plan_steps([plan], bins_per_step=config.train.bins_per_step, max_steps=config.train.max_steps)
    bins = [micro_batch(plan, reader, number, number + 1) for number in range(steps[-1].end_bin)]
    borders = [np.diff(found.cu_seqlens.numpy()) for found in bins]
    columns = {
        "input_ids": np.concatenate([found.input_ids[0].numpy() for found in bins]).astype(np.int32),
        "labels": np.concatenate([_labels(found) for found in bins]),
        "document_starts": _starts(np.concatenate(borders)),
        "bin_starts": _starts(np.array([len(found) for found in borders])),
    }
    save_file(columns, path)
    counts = [{"num_tokens": s.num_tokens, "num_trained_tokens": s.num_trained_tokens} for s in steps]
    path.with_suffix(".json").write_text(json.dumps(counts))


def _labels(found: MicroBatch) -> np.ndarray:
    labels = np.full(found.num_tokens, IGNORED, np.int32)
    labels[found.target_positions.numpy() + 1] = found.targets.numpy()
    return labels


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
