"""`sft-pipeline show --shards N`: training examples as the model reads them, what is trained set apart.

Decoded from the shards themselves, so it shows what will be trained, not what a renderer says.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from flows.terminal import safe_text, shortened
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGE_FOLDERS

OPEN, CLOSE = "[[", "]]"
TRAINED_STYLE, READ_STYLE = "bold green", "dim"

Pieces = Sequence[tuple[str, bool]]


def print_examples(
    config: PipelineConfig, *, num_examples: int, color: bool, file: TextIO | None = None
) -> None:
    """Prints the first examples of the training side. Raises InputError when the shards are not finished."""
    console = Console(
        file=file or sys.stdout, force_terminal=color, no_color=not color, highlight=False, soft_wrap=True
    )
    for head, pieces in examples(config, num_examples):
        console.print(Text(head))
        console.print(colored(pieces) if color else Text(marked(pieces)))
        console.print()


def examples(config: PipelineConfig, num_examples: int) -> Iterator[tuple[str, Pieces]]:
    """A line about each example, and its text in pieces that are trained (True) or not."""
    from pipelines.encode import load_encoder
    from pipelines.shards import open_split
    from pipelines.split import colour_spans
    from pipelines.storage import check_manifest

    folder = config.run_root / STAGE_FOLDERS["split"]
    check_manifest(folder, stage="split")
    table = open_split(folder, "train").slice(0, num_examples)
    tokenizer = load_encoder(config).tokenizer
    for number, example in enumerate(table.to_pylist()):
        yield headline(number, example), colour_spans(tokenizer, SimpleNamespace(**example))


def headline(number: int, example: Mapping[str, Any]) -> str:
    """Which row, which of its messages, how much of it is trained."""
    return (
        f"example {number}: row {example['row_id']} piece {example['piece']}, messages "
        f"{example['first_message']} to {example['end_message'] - 1}, {shortened(example['source'])}; "
        f"{example['num_trained_tokens']:,} of {example['num_tokens']:,} tokens trained"
    )


def colored(pieces: Pieces) -> Text:
    """Trained text green, the rest dim."""
    styled = [(safe_text(text), TRAINED_STYLE if trained else READ_STYLE) for text, trained in pieces]
    return Text.assemble(*styled)


def marked(pieces: Pieces) -> str:
    """Trained text between [[ and ]], for terminals and files without colour."""
    return "".join(
        f"{OPEN}{safe_text(text)}{CLOSE}" if trained else safe_text(text) for text, trained in pieces
    )
