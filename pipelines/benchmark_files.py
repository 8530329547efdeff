"""Benchmark files -> the questions and answers that must not be trained on."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.containers import RawRecord, read_range
from pipelines.formats.custom import value_at
from pipelines.merge import plan_parts
from pipelines.parse import parse_record
from schemas.conversation import Drop
from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig
from schemas.source_config import BenchmarkConfig

ITEMS = pa.schema(
    [
        pa.field("benchmark", pa.large_string(), nullable=False),
        pa.field("file", pa.large_string(), nullable=False),  # inside benchmarks[].path
        pa.field("record", pa.int64(), nullable=False),  # number in that file, from 0
        pa.field("question", pa.large_string(), nullable=False),  # "": none
        pa.field("answer", pa.large_string(), nullable=False),
    ]
)


def read_benchmarks(config: PipelineConfig) -> pa.Table:
    """All items of all benchmarks, schema ITEMS, by name, file and record.

    Raises InputError: nothing found, a record that can't be read, a path that leads nowhere in all records.
    """
    benchmarks = sorted(config.benchmarks, key=lambda benchmark: benchmark.name)
    items = [item for benchmark in benchmarks for item in _items(benchmark, config)]
    return pa.Table.from_pylist(items, schema=ITEMS)


def _items(benchmark: BenchmarkConfig, config: PipelineConfig) -> list[dict[str, Any]]:
    paths = {"question": benchmark.question, "answer": benchmark.answer}
    found = {path: False for named in paths.values() for path in named}
    items = []
    keys: list[str] = []
    for file, number, record in _records(benchmark, config):
        item: dict[str, Any] = {"benchmark": benchmark.name, "file": file, "record": number}
        for kind, named in paths.items():
            texts = {path: _text(value_at(record, path)) for path in named}
            found |= {path: True for path, text in texts.items() if text}
            item[kind] = "\n\n".join(text for text in texts.values() if text)
        items.append(item)
        keys = keys or list(record)
    for path, is_found in found.items():
        if not is_found:
            shown = ", ".join(map(repr, keys[:10]))[:300]
            raise InputError(
                f"benchmark {benchmark.name}: none of {len(items)} records has a text at {path!r}; keys: {shown}"
            )
    return items


def _records(benchmark: BenchmarkConfig, config: PipelineConfig) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(file, number in it, record). Read as a source is."""
    with tempfile.TemporaryDirectory() as spool:
        for part in plan_parts(benchmark.as_source(), config=config, spool_folder=Path(spool)):
            for number, raw in enumerate(read_range(part), part.first_record):
                yield (
                    part.file,
                    number,
                    _record(raw, f"benchmark {benchmark.name}: {part.file} record {number}"),
                )


def _record(raw: RawRecord, place: str) -> dict[str, Any]:
    # Never skipped: what is not read is not looked for.
    parsed = Drop(raw.reason, raw.detail) if raw.reason else parse_record(raw.raw)
    if isinstance(parsed, Drop):
        raise InputError(f"{place} can't be read ({parsed.reason}: {parsed.detail}): mend or remove it")
    record, _ = parsed
    return record


def _text(value: Any) -> str:
    """Texts and numbers as they are, lists of them line by line; of anything else nothing."""
    if isinstance(value, list):
        return "\n".join(text for text in map(_text, value) if text)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    return str(value).strip()
