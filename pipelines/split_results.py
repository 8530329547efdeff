"""What became of each row of a part in stage 6: a row that comes again in another part is not encoded again.

Beside the examples of a part lies a table with a line for each of its rows, in their order. After a change of an
earlier stage (a threshold of a filter, say), the new part is made from those rows of the old one that are in it.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from pipelines.shards import examples_to_batch, table_to_examples
from pipelines.split import SplitResult
from pipelines.storage import check_file, file_entry, read_arrow, write_arrow
from schemas.conversation import Conversation, Drop, utf8
from schemas.errors import IntegrityError
from schemas.run import FileEntry, PartEntry

RESULTS = pa.schema(
    [
        pa.field("key", pa.binary(16), nullable=False),  # of the row: result_key
        pa.field("num_examples", pa.int32(), nullable=False),  # 0: dropped
        pa.field("counts", pa.large_string(), nullable=False),  # JSON object
        pa.field("reason", pa.large_string(), nullable=False),
        pa.field("detail", pa.large_string(), nullable=False),
    ]
)

Result = SplitResult | Drop


def result_key(row: Conversation) -> bytes:
    """Digest of all of a row that stage 6 reads."""
    messages = [[message.role, message.content, message.extras] for message in row.messages]
    text = json.dumps([row.row_id, row.source, messages, row.meta], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(utf8(text), digest_size=16).digest()


def write_results(
    folder: Path, name: str, keys: Sequence[bytes], results: Sequence[Result]
) -> tuple[FileEntry, FileEntry]:
    """Writes the examples of a part, and a line about each of its rows. Durable when it returns."""
    examples = [
        example for result in results if isinstance(result, SplitResult) for example in result.examples
    ]
    path = folder / f"parts/{name}.arrow"
    write_arrow(path, pa.Table.from_batches([examples_to_batch(examples)]))
    lines = [_line(result) for result in results]
    columns = {"key": keys, **{name: [line[name] for line in lines] for name in RESULTS.names[1:]}}
    results_path = folder / f"parts/{name}-rows.arrow"
    write_arrow(results_path, pa.table(columns, schema=RESULTS))
    return (
        file_entry(path, folder=folder, num_rows=len(examples)),
        file_entry(results_path, folder=folder, num_rows=0),
    )


def _line(result: Result) -> dict[str, object]:
    if isinstance(result, Drop):
        return {"num_examples": 0, "counts": "{}", "reason": result.reason, "detail": result.detail}
    counts = json.dumps(result.counts, sort_keys=True)
    return {"num_examples": len(result.examples), "counts": counts, "reason": "", "detail": ""}


def known_results(folder: Path, entry: PartEntry | None) -> dict[bytes, Result]:
    """Results by result_key of a part that was made with the same settings and tokenizer; empty for a damaged one."""
    if entry is None:
        return {}
    try:
        examples, results = (read_arrow(check_file(folder, file)) for file in entry.kept)
    except IntegrityError:
        return {}
    found: dict[bytes, Result] = {}
    start = 0
    for line in results.to_pylist():
        end = start + line["num_examples"]
        if end == start:
            found[line["key"]] = Drop(line["reason"], line["detail"])
        else:
            pieces = table_to_examples(examples.slice(start, end - start))
            found[line["key"]] = SplitResult(pieces, json.loads(line["counts"]))
        start = end
    return found
