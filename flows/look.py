"""A look at one dump: how many of its first records are chats, in which shape, with what kind of answers.

Only the first megabytes of a file are read, so a folder of large dumps takes seconds.
"""

import bz2
import gzip
import io
import lzma
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from schemas.conversation import Conversation, Drop
from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig
from schemas.source_config import SourceConfig

HEAD_BYTES = 4 << 20
MAX_RECORDS = 500
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_BZIP, _XZ = b"BZh", b"\xfd7zXZ\x00"
_ZIP, _ARROW_FILE = (b"PK\x03\x04", b"PK\x05\x06"), b"ARROW1\0\0"


@dataclass(frozen=True, slots=True)
class FileLook:
    """What the first records of a file are. `formats` and `drops` are counted by name."""

    path: Path
    num_rows: int
    formats: dict[str, int]
    drops: dict[str, int]
    num_answers: int
    num_html_answers: int
    longest_characters: int
    problem: str = ""

    def summary(self) -> str:
        """One line of counts; no text of a chat."""
        if self.problem:
            return f"{self.path.name}: {self.problem}"
        kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(self.formats.items())) or "no chats"
        words = [f"{self.path.name}, first {self.num_rows + sum(self.drops.values()):,} records: {kinds}"]
        if self.drops:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self.drops.items()))
            words.append(f"unusable {sum(self.drops.values()):,} ({reasons})")
        if self.num_answers:
            words.append(f"{self.num_html_answers / self.num_answers:.0%} of the answers are HTML")
            words.append(f"longest chat {self.longest_characters:,} characters")
        return "; ".join(words)


def look_at(path: Path) -> FileLook:
    """Read the first records as the stage merge would. A file that can't be read is told, not raised."""
    from pipelines.html import looks_like_page

    formats: Counter[str] = Counter()
    drops: Counter[str] = Counter()
    num_answers = num_html = longest = 0
    try:
        for result in islice(_first_records(path), MAX_RECORDS):
            if isinstance(result, Drop):
                drops[result.reason] += 1
                continue
            formats[str(result.meta.get("format", "unknown"))] += 1
            answers = [message.content for message in result.messages if message.role == "assistant"]
            num_answers += len(answers)
            num_html += sum(map(looks_like_page, answers))
            longest = max(longest, sum(len(message.content) for message in result.messages))
    except InputError as error:
        return FileLook(path, 0, {}, {}, 0, 0, 0, problem=str(error))
    return FileLook(path, formats.total(), dict(formats), dict(drops), num_answers, num_html, longest)


def _first_records(path: Path) -> Iterator[Conversation | Drop]:
    from pipelines.containers import plan_file
    from pipelines.merge import read_part
    from pipelines.message_trees import with_trees

    config = PipelineConfig(run_root=Path(), sources=[SourceConfig(name="look", path=str(path))])
    with tempfile.TemporaryDirectory() as folder:
        head, name, is_cut = _head(path, Path(folder) / "head")
        spool, source = Path(folder) / "spool", config.sources[0]
        planned = plan_file(head, source=source, file=name, spool_path=spool, config=config.merge, notes=[])
        parts = with_trees(planned, planned[:1], source, config.merge, Path(folder))
        results = (
            row if result is None else result
            for part in parts
            for row, result in read_part(part, config, ordinal_offsets={})
        )
        yield from _without_our_cut(list(results)) if is_cut else results


def _without_our_cut(results: list[Conversation | Drop]) -> list[Conversation | Drop]:
    """The last record of a cut head is broken by us alone, and so is the end of the array that it lies in."""
    for _ in range(2):
        if results and isinstance(results[-1], Drop):
            results.pop()
    return results


def _head(path: Path, copy: Path) -> tuple[Path, str, bool]:
    """The file itself, or the first megabytes of what it holds; its name; whether something was left out."""
    name = path.name
    with path.open("rb") as file:
        magic = file.read(8)
        if magic.startswith(_PARQUET):  # its index is at the end; parts are planned from that alone
            return path, name, False
        is_packed = magic.startswith((_GZIP, _ZSTD, _BZIP, _XZ, *_ZIP))
        if path.stat().st_size <= HEAD_BYTES and not is_packed:
            return path, name, False
        # Behind its magic an Arrow file is a stream, which can be read without its index at the end.
        file.seek(len(_ARROW_FILE) if magic == _ARROW_FILE else 0)
        if magic.startswith(_ZIP):
            name, head = _first_member(path)
        else:
            head = _read(_unpacked(file, magic), HEAD_BYTES)
    copy.write_bytes(head)
    return copy, name, len(head) == HEAD_BYTES


def _first_member(path: Path) -> tuple[str, bytes]:
    """The largest file of an archive that is read by its name."""
    import zipfile

    from pipelines.sources import SUFFIXES

    try:
        with zipfile.ZipFile(path) as archive:
            known = [info for info in archive.infolist() if info.filename.lower().endswith(SUFFIXES)]
            if not known:
                raise InputError(f"holds {len(archive.infolist())} files, none of {', '.join(SUFFIXES)}")
            largest = max(known, key=lambda info: info.file_size)
            with archive.open(largest) as file:
                return largest.filename, _read(file, HEAD_BYTES)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise InputError(f"not a zip archive that can be read: {error}") from None


def _unpacked(file: BinaryIO, magic: bytes) -> BinaryIO:
    if magic.startswith(_GZIP):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if magic.startswith(_BZIP):
        return bz2.BZ2File(file)  # type: ignore[return-value]
    if magic.startswith(_XZ):
        return lzma.LZMAFile(file)  # type: ignore[return-value]
    if magic.startswith(_ZSTD):
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))  # type: ignore[arg-type]
    return file


def _read(stream: BinaryIO, num_bytes: int) -> bytes:
    """The first bytes of a stream; of one that breaks off, those before the damage."""
    import zlib

    import zstandard

    head = bytearray()
    try:
        while len(head) < num_bytes and (chunk := stream.read(min(1 << 16, num_bytes - len(head)))):
            head += chunk
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        if not head:
            raise InputError(f"can't be unpacked: {error}") from None
    return bytes(head)
