"""`sft-pipeline show --shards N`: training examples as the model reads them, what is trained set apart.

Decoded from the shards themselves, so it shows what will be trained, not what a renderer says.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.text import Text

from flows.terminal import safe_text, shortened
from pipelines.colours import ColouredPiece, coloured_pieces
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGE_FOLDERS

OPEN, CLOSE = "[[", "]]"

Pieces = Sequence[ColouredPiece]


@dataclass(frozen=True, slots=True)
class ShownExample:
    """One example: a line about it, and its text in pieces."""

    headline: str
    pieces: Pieces


@dataclass(frozen=True, slots=True)
class SourceShare:
    """What a source has in the training side."""

    source: str
    num_examples: int
    num_tokens: int
    num_trained_tokens: int

    @property
    def trained_share(self) -> float:
        """Share of its tokens that are trained."""
        return self.num_trained_tokens / self.num_tokens if self.num_tokens else 0.0


def print_examples(
    config: PipelineConfig, *, num_examples: int, color: bool, file: TextIO | None = None
) -> None:
    """Prints the sources and examples of the training side. Raises InputError when the shards are not finished."""
    console = Console(
        file=file or sys.stdout, force_terminal=color, no_color=not color, highlight=False, soft_wrap=True
    )
    for share in source_shares(config):
        console.print(Text(share_line(share)))
    for shown in examples(config, num_examples):
        console.print(Text(f"\n{shown.headline}"))
        console.print(colored(shown.pieces) if color else Text(marked(shown.pieces)))


def write_page(config: PipelineConfig, path: Path, *, num_examples: int) -> None:
    """The same as one HTML page, in place of what stood at `path`. Raises InputError as print_examples does."""
    from pipelines.storage import write_bytes

    title = shortened(str(config.run_root))
    page = page_text(title=title, shares=source_shares(config), examples=examples(config, num_examples))
    write_bytes(path, page.encode())


def page_text(*, title: str, shares: Iterable[SourceShare], examples: Iterable[ShownExample]) -> str:
    """A page of its own: no script, nothing loaded from elsewhere."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        autoescape=True, loader=PackageLoader("flows", "pages"), undefined=StrictUndefined
    )
    environment.filters["safe_text"] = safe_text
    return environment.get_template("examples.html.j2").render(title=title, shares=shares, examples=examples)


def source_shares(config: PipelineConfig) -> list[SourceShare]:
    """How many tokens of each source are trained, by name."""
    table = _train_split(config)
    names = pc.list_element(pc.split_pattern(table["source"], "/", max_splits=1), 0)
    columns = {"source": names, "tokens": table["num_tokens"], "trained": table["num_trained_tokens"]}
    sums = (
        pa.table(columns)
        .group_by("source")
        .aggregate([("tokens", "sum"), ("trained", "sum"), ([], "count_all")])
    )
    return [
        SourceShare(row["source"], row["count_all"], row["tokens_sum"], row["trained_sum"])
        for row in sums.sort_by("source").to_pylist()
    ]


def share_line(share: SourceShare) -> str:
    """One line about a source."""
    return (
        f"{shortened(share.source)}: {share.num_examples:,} examples, {share.num_tokens:,} tokens, "
        f"{share.trained_share:.1%} of them trained"
    )


def examples(config: PipelineConfig, num_examples: int) -> Iterator[ShownExample]:
    """Examples at equal distances in the training side, so that all of its sources can be among them."""
    from pipelines.encode import load_encoder

    table = _train_split(config)
    num_shown = min(num_examples, table.num_rows)
    encoder = load_encoder(config)
    for number in (index * table.num_rows // num_shown for index in range(num_shown)):
        example = table.slice(number, 1).to_pylist()[0]
        pieces = coloured_pieces(encoder.tokenizer, encoder.is_control, example)
        yield ShownExample(headline(number, example), pieces)


def headline(number: int, example: Mapping[str, Any]) -> str:
    """Which row, which of its messages, how much of it is trained."""
    return (
        f"example {number}: row {example['row_id']} piece {example['piece']}, messages "
        f"{example['first_message']} to {example['end_message'] - 1}, {shortened(example['source'])}; "
        f"{example['num_trained_tokens']:,} of {example['num_tokens']:,} tokens trained"
    )


def colored(pieces: Pieces) -> Text:
    """Trained text green, yellow where its weight is not 1, the rest dim; control tokens underlined."""
    return Text.assemble(*((safe_text(piece.text), _style(piece)) for piece in pieces))


def _style(piece: ColouredPiece) -> str:
    trained = "bold green" if piece.weight == 1 else "bold yellow"
    return (trained if piece.weight else "dim") + (" underline" if piece.is_control else "")


def marked(pieces: Pieces) -> str:
    """Trained text between [[ and ]], with a weight that is not 1 in front, for terminals without colour."""
    texts = []
    for weight, group in groupby(pieces, key=lambda piece: piece.weight):
        text = "".join(safe_text(piece.text) for piece in group)
        told = "" if weight == 1 else f"{weight:g}x "
        texts.append(f"{OPEN}{told}{text}{CLOSE}" if weight else text)
    return "".join(texts)


def _train_split(config: PipelineConfig) -> pa.Table:
    from pipelines.shards import open_split
    from pipelines.storage import check_manifest

    folder = config.run_root / STAGE_FOLDERS["split"]
    check_manifest(folder, stage="split")
    return open_split(folder, "train")
