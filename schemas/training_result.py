"""training.json: what a finished training was made from and what came out. Byte-equal for equal work: no times."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from schemas.run import FORMAT_VERSION, FileEntry

TRAINING_RESULT_NAME = "training.json"
CURRENT_TRAINING_NAME = "current"
"""Text file in checkpoints/ with the key of the newest finished training."""


class TrainingResult(BaseModel):
    """Written last into the training's folder: without it the training is not finished."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    format_version: int = FORMAT_VERSION
    key: str
    """16 hex digits: an equal key is equal work. The folder's name."""
    method: str
    output: Literal["adapter", "model"]
    """Folder beside this file that holds the trained weights, the tokenizer and its chat template."""
    model_path: str
    """The base model, as the config names it."""
    inputs: dict[str, str]
    """What was read, by name -> digest: shards, plan, model."""
    settings: dict[str, object]
    """The train section of the config."""
    dtype: str
    device: str
    num_steps: int
    output_step: int | None = None
    """The trained weights are those after this step: the best one with train.keep_best, else the last."""
    num_updates: int
    """Steps that changed the weights: all but those with a loss or gradient that was not finite."""
    num_overflow_steps: int = 0
    """Of the others, those that overflowed in float16 while its loss scale was found."""
    num_tokens: int
    """Tokens read, padding not counted."""
    num_trained_tokens: int
    num_trainable_weights: int
    first_loss: float | None
    last_loss: float | None
    validation_loss: float | None
    """None without a validation side."""
    validation_bits_per_byte: float | None
    validation_token_accuracy: float | None = None
    """Share of the trained tokens that were the most likely ones."""
    strategy: str = "single"
    num_processes: int = 1
    """How the run that finished was laid over devices. Bytes are equal for equal strategy and number alone."""
    versions: dict[str, str]
    """Of the libraries that shape the numbers."""
    files: tuple[FileEntry, ...]
    """Everything in the output folder; paths are relative to this file's folder."""
