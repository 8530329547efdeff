"""Makes much of a little: a JSON array of any size out of a ShareGPT dump, no two records alike.

    python benchmarks/enlarged.py sharegpt.json.gz --megabytes 1000 --to big.json [--files 8]

Each copy of a record has an id of its own and every fifth word outside of tags from elsewhere in the dump, so that
its copies are no near-duplicates. The same arguments give the same bytes.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEGABYTE = 1_000_000
ALTERED_SHARE = 0.2
_TAG = re.compile(r"(<[^>]*>)")
_WORD = re.compile(r"(?<![&\w])[A-Za-z]{3,12}\b")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a JSON array of ShareGPT records, .json or .json.gz")
    parser.add_argument("--megabytes", type=float, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument(
        "--files", type=int, default=0, help="write so many .json.gz in the folder --to instead"
    )
    options = parser.parse_args()
    if options.files:
        write_files(enlarged(options.data), options.megabytes, options.to, options.files)
    else:
        write_array(enlarged(options.data), options.megabytes, options.to)


def enlarged(data: Path, *, seed: int = 0) -> Iterator[bytes]:
    """Records as JSON, for ever: the first round as they are in the dump, all further ones altered."""
    raw = data.read_bytes()
    records = json.loads(gzip.decompress(raw) if data.suffix == ".gz" else raw)
    words = sorted(
        {word for record in records for turn in turns(record) for word in _WORD.findall(turn["value"])}
    )
    draw = random.Random(seed)
    number = 0
    while True:
        for record in records:
            copy = record if number == 0 else altered(record, number, words, draw)
            yield json.dumps(copy, ensure_ascii=False).encode("utf-8", "backslashreplace")
        number += 1


def turns(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [turn for turn in record.get("conversations", []) if isinstance(turn.get("value"), str)]


def altered(record: dict[str, Any], number: int, words: list[str], draw: random.Random) -> dict[str, Any]:
    """A copy with other words; tags, entities and the number of turns stay."""

    def other(match: re.Match[str]) -> str:
        return draw.choice(words) if draw.random() < ALTERED_SHARE else match.group()

    def rewritten(text: str) -> str:
        pieces = _TAG.split(text)
        return "".join(piece if place % 2 else _WORD.sub(other, piece) for place, piece in enumerate(pieces))

    said = [turn | {"value": rewritten(turn["value"])} for turn in turns(record)]
    return record | {"id": f"{record.get('id', '')}-{number}", "conversations": said}


def write_array(records: Iterator[bytes], megabytes: float, path: Path) -> int:
    """One JSON array of about that size; returns the number of its records."""
    num_bytes = num_records = 0
    with path.open("wb") as file:
        file.write(b"[\n")
        while num_bytes < megabytes * MEGABYTE:
            num_bytes += file.write((b",\n" if num_records else b"") + next(records))
            num_records += 1
        file.write(b"\n]\n")
    return num_records


def write_files(records: Iterator[bytes], megabytes: float, folder: Path, num_files: int) -> None:
    """So many gzip files of JSON Lines, of that size together before they are compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        num_bytes = 0
        with gzip.open(folder / f"{number}.jsonl.gz", "wb", compresslevel=6) as file:
            while num_bytes < megabytes * MEGABYTE / num_files:
                num_bytes += file.write(next(records) + b"\n")


if __name__ == "__main__":
    main()
