"""Search for planted secrets: every file of a folder and every row of a database, in every way a secret is written."""

import base64
import json
import sqlite3
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path


def found_in(texts: Mapping[str, bytes], secrets: Iterable[str]) -> list[str]:
    """Where a secret stands: 'place: which one, how it is written'."""
    written = [(secret, name, form) for secret in secrets for name, form in forms(secret)]
    return [
        f"{place}: {secret[:8]}..., {name}"
        for place, text in texts.items()
        for secret, name, form in written
        if form in text
    ]


def forms(secret: str) -> Iterator[tuple[str, bytes]]:
    """As it is, escaped for a URL or JSON, in hexadecimal, and in base64 wherever in a text it began."""
    raw = secret.encode()
    yield "plain", raw
    yield "URL", urllib.parse.quote(secret, safe="").encode()
    yield "URL path", urllib.parse.quote(secret).encode()
    yield "form", urllib.parse.quote_plus(secret).encode()
    yield "JSON", json.dumps(secret)[1:-1].encode()
    yield "hex", raw.hex().encode()
    for before in range(3):
        # The first and the last letters also hang on the neighbours.
        whole = base64.b64encode(b"\0" * before + raw)
        inner = whole[4 if before else 0 : -4]
        yield f"base64 from {before}", inner
        yield f"base64 for URLs from {before}", inner.replace(b"+", b"-").replace(b"/", b"_")


def texts_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every file; of databases and Parquet also what their pages and columns say."""
    texts: dict[str, bytes] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        texts[str(path)] = path.read_bytes()
        if path.suffix == ".db":
            texts[f"rows of {path}"] = sqlite_rows(path)
        if path.suffix == ".parquet":
            texts[f"columns of {path}"] = parquet_rows(path)
    return texts


def sqlite_rows(path: Path) -> bytes:
    """Every row as SQL: a long value lies on several pages, where no search of the bytes finds it."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return "\n".join(connection.iterdump()).encode("utf-8", "surrogateescape")


def parquet_rows(path: Path) -> bytes:
    import pyarrow.parquet

    return json.dumps(pyarrow.parquet.read_table(path).to_pylist(), default=str).encode()
