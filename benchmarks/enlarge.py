"""Real dumps made larger: whole copies with new ids, in which words of the prose are changed for others of the dump.

    python benchmarks/enlarge.py sharegpt_html.json.gz --megabytes 1000 --out large.json [--files 8]

Tags, code, addresses and character references stay as they are, so a copy costs a converter what the original costs;
a quarter of the longer words differs, so no copy is a near-duplicate of another. "openai" and "chatgpt", for which
FastChat drops a chat, become words of the same length. Equal arguments give equal bytes.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TAGS_AND_CODE = re.compile(r"(<pre[\s>].*?</pre>|<[^<>]*>|```.*?```)", re.DOTALL)
_WORD = re.compile(r"(?<![\w&#./@:])[^\W\d_]{4,}(?![\w;/@:])")
_HAN_OR_KANA = re.compile("[\u3040-\u30ff\u3400-\u9fff]")
SHARE = 0.25
"""Of the words of four letters and more."""

Record = dict[str, Any]
MEGABYTE = 1_000_000


def main() -> None:
    options = parse_arguments()
    records = copies(read_records(options.file))
    if options.files:
        write_files(records, options.out, num_bytes=options.megabytes * MEGABYTE, num_files=options.files)
    else:
        write_array(records, options.out, num_bytes=options.megabytes * MEGABYTE)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--megabytes", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--files", type=int, default=0, help="write so many .jsonl.gz in the folder --out instead"
    )
    return parser.parse_args()


def write_array(records: Iterator[Record], target: Path, *, num_bytes: int) -> int:
    """Write a JSON array of records, at least `num_bytes` long; returns their number."""
    count, written = 0, 0
    with target.open("wb") as file:
        while written < num_bytes:
            written += file.write((b",\n" if count else b"[") + as_json(next(records)))
            count += 1
        file.write(b"]\n")
    return count


def write_files(records: Iterator[Record], folder: Path, *, num_bytes: int, num_files: int) -> None:
    """So many gzip files of JSON Lines, of that size together before they are compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        written = 0
        with gzip.open(folder / f"{number}.jsonl.gz", "wb", compresslevel=6) as file:
            while written < num_bytes / num_files:
                written += file.write(as_json(next(records)) + b"\n")


def as_json(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")


def read_records(source: Path) -> list[Record]:
    data = source.read_bytes()
    text = (gzip.decompress(data) if source.suffix == ".gz" else data).decode()
    return [json.loads(line) for line in text.splitlines()] if text.lstrip()[:1] == "{" else json.loads(text)


def copies(records: list[Record]) -> Iterator[Record]:
    """The records, then changed copies of them without end."""
    records = [_map_texts(record, without_blocked_words) for record in records]
    yield from records
    number = 0
    while True:
        number += 1
        for position, record in enumerate(records):
            draw = random.Random(f"{number}/{position}")
            copy = _map_texts(record, Altered(_words(record), draw).text)
            yield copy | ({"id": f"{record['id']}-{number}"} if "id" in record else {})


def without_blocked_words(text: str) -> str:
    return re.sub("openai", "opnaei", re.sub("chatgpt", "chattgp", text, flags=re.I), flags=re.I)


class Altered:
    """Changes words of texts for words of the same record, so that the language stays."""

    def __init__(self, words: list[str], draw: random.Random) -> None:
        self.words, self.draw = words or ["word"], draw

    def text(self, text: str) -> str:
        pieces = _TAGS_AND_CODE.split(text)
        pieces[::2] = [self._prose(piece) if len(piece) > 3 else piece for piece in pieces[::2]]
        return "".join(pieces)

    def _prose(self, text: str) -> str:
        draw, words = self.draw, self.words

        def other(match: re.Match[str]) -> str:
            word: str = match[0]
            if draw.random() >= SHARE:
                return word
            if _HAN_OR_KANA.match(word):  # no blanks between words: the whole run counts as one
                shift = draw.randrange(1, len(word))
                return word[shift:] + word[:shift]
            return draw.choice(words)

        return _WORD.sub(other, text)


def _words(record: Record) -> list[str]:
    prose = (piece for text in _texts(record) for piece in _TAGS_AND_CODE.split(text)[::2])
    return sorted({word for piece in prose for word in _WORD.findall(piece) if len(word) <= 20})


def _texts(record: Record) -> list[str]:
    if "conversations" in record:
        return [turn["value"] for turn in record["conversations"]]
    return [value for value in record.values() if isinstance(value, str)]


def _map_texts(record: Record, change: Any) -> Record:
    if "conversations" in record:
        turns = [turn | {"value": change(turn["value"])} for turn in record["conversations"]]
        return record | {"conversations": turns}
    return {key: change(value) if isinstance(value, str) else value for key, value in record.items()}


if __name__ == "__main__":
    main()
