"""Tables that Prefect keeps as artifacts, one a stage: counts and numbers, never chat text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemas.evaluation import Evaluation
from schemas.run import CHECKPOINTS_FOLDER, Manifest
from schemas.training_result import TrainingResult
from trainer.service import current_training, read_evaluation, read_training

Table = list[dict[str, Any]]

TRAINING_NUMBERS = (
    "num_steps",
    "num_updates",
    "num_tokens",
    "num_trained_tokens",
    "num_trainable_weights",
    "first_loss",
    "last_loss",
    "validation_loss",
    "validation_bits_per_byte",
)


def stage_table(manifest: Manifest) -> Table:
    """What came in, what went out, and every reason with its count."""
    table: Table = [
        {"what": "rows in", "rows": manifest.num_rows_in},
        {"what": "rows out", "rows": manifest.num_rows_out},
        {"what": "pieces cut", "rows": manifest.num_pieces_cut},
    ]
    drops = sorted(manifest.drops.items(), key=lambda item: (-item[1], item[0]))
    table += [{"what": f"dropped: {reason}", "rows": count} for reason, count in drops]
    table += [{"what": f"counted: {name}", "rows": count} for name, count in sorted(manifest.counts.items())]
    return table


def trainer_table(stage: str, run_root: Path, *, lines: Sequence[str]) -> Table:
    """What train or evaluate wrote down; of promote, the last line that it printed: its decision with numbers."""
    if stage == "train":
        key = current_training(run_root)
        assert key is not None, "the training has just ended well"
        return training_table(read_training(run_root / CHECKPOINTS_FOLDER / key))
    if stage == "evaluate":
        return evaluation_table(read_evaluation(run_root))
    return [{"what": "decision", "value": lines[-1] if lines else "none was printed"}]


def training_table(result: TrainingResult) -> Table:
    """The size of the work and its losses."""
    return [
        {"what": "training", "value": result.key},
        *({"what": name, "value": getattr(result, name)} for name in TRAINING_NUMBERS),
    ]


def evaluation_table(evaluation: Evaluation) -> Table:
    """A row for each model and source: examples and bits per byte."""
    return [
        {
            "model": model.label,
            "source": source,
            "examples": loss.num_examples,
            "bits per byte": loss.bits_per_byte,
        }
        for model in evaluation.models
        for source, loss in (("all", model.total), *sorted(model.by_source.items()))
    ]
