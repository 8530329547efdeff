"""How much disk a run will take, from the sizes of its sources: a smallest and a largest figure.

The factors are bytes in a stage's folder for each byte of unpacked source, measured on six dumps of 3 to 23 MB
with SmolLM2's tokenizer: the smallest on pages of HTML, of which cleaning leaves a fifteenth, the largest on short
Chinese instructions, three bytes a character and up to two tokens. `docs/operations.md` prints the table.
"""

import bz2
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGE_FOLDERS
from schemas.source_config import SourceConfig
from trainer.memory import (
    WHOLE_MODEL_METHODS,
    checkpoint_bytes_per_weight,
    num_saved_weights,
    num_trained_weights,
    read_shapes,
)

STAGE_FACTORS: dict[str, tuple[float, float]] = {
    "merge": (0.11, 0.70),
    "clean": (0.07, 0.70),
    "filter": (0.07, 0.71),
    "dedup": (0.25, 2.80),
    "holdout": (0.25, 2.90),  # with the ledger
    "split": (0.43, 5.20),
    "pack": (0.00, 0.12),
}
PART_BYTES = 8192
"""Of a part whatever is in it: heads and indexes of its files."""
SAMPLED_BYTES = 1 << 20
SAMPLE_BUDGET_BYTES = 64 << 20
TOKENIZER_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that something will take: at least, and at most by the measured factors."""

    name: str
    smallest: int
    largest: int


def disk_need(config: PipelineConfig, stages: Sequence[str], *, model: Path | None) -> list[Need]:
    """What the stages will write, less what lies in the run root already. Raises InputError for an absent source."""
    sizes = [raw_bytes(path) for source in config.sources for path in source_files(source)]
    plain, spooled = sum(size for size, _ in sizes), sum(size for size, packed in sizes if packed)
    needs = list(_stage_needs(config, stages, plain))
    if spooled and "merge" in stages:
        needs.append(_spool_need(needs, spooled))
    if "train" in stages and model is not None:
        needs += _training_needs(config, model)
    return needs


def total(needs: Iterable[Need]) -> Need:
    """All together."""
    listed = list(needs)
    return Need("all", sum(need.smallest for need in listed), sum(need.largest for need in listed))


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a source on this machine; none for a URL or an identity. Raises InputError for an empty source."""
    from pipelines.downloads import is_url
    from pipelines.sources import find_files

    if is_url(source.path) or not source.path:
        return []
    return [path for _, path in find_files(source)[0]]


def raw_bytes(path: Path) -> tuple[int, bool]:
    """Bytes of a source file once it is unpacked, and whether it has to be; by a sample of its beginning."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(SAMPLED_BYTES)
    if head.startswith(b"PAR1"):
        return _parquet_bytes(path), False
    sample = _unpacked_sample(head)
    if sample is None:
        return num_bytes, False
    taken, given = sample
    return int(num_bytes * given / taken), True


def _stage_needs(config: PipelineConfig, stages: Sequence[str], plain: int) -> Iterator[Need]:
    of_parts = PART_BYTES * (1 + plain // config.merge.part_bytes)
    for stage, (smallest, largest) in STAGE_FACTORS.items():
        if stage not in stages:
            continue
        present = folder_bytes(config.run_root / STAGE_FOLDERS[stage])
        most = int(largest * plain) + of_parts
        yield Need(STAGE_FOLDERS[stage], max(0, int(smallest * plain) - present), most)


def _spool_need(needs: Sequence[Need], spooled: int) -> Need:
    # Compressed sources lie unpacked beside 01_merged and are gone before the later stages write theirs.
    merged, stages = needs[0], total(needs)
    return Need(
        "unpacked files",
        max(0, spooled + merged.smallest - stages.smallest),
        max(0, spooled + merged.largest - stages.largest),
    )


def _training_needs(config: PipelineConfig, model: Path) -> Iterator[Need]:
    shapes = read_shapes(model)
    num_trained = num_trained_weights(shapes, config.train)
    checkpoint = round(checkpoint_bytes_per_weight(config.train, shapes) * num_trained)
    # One more than are kept lies there while it is written.
    most = config.train.keep_checkpoints + config.train.keep_best + 1
    yield Need("checkpoints", checkpoint, most * checkpoint)
    num_saved = num_saved_weights(shapes, config.train)
    name = "model" if config.train.method in WHOLE_MODEL_METHODS else "adapter"
    yield Need(name, 2 * num_saved, 4 * num_saved + TOKENIZER_BYTES)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _parquet_bytes(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.ParquetFile(path).metadata
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is no whole Parquet file ({error}); write it again") from None
    return sum(footer.row_group(number).total_byte_size for number in range(footer.num_row_groups))


def _unpacked_sample(head: bytes) -> tuple[int, int] | None:
    """Bytes taken from the beginning of a packed file and bytes given for them; None for a plain one.

    A broken file counts as it is: merge says what is wrong with it.
    """
    if head.startswith(b"\x1f\x8b"):
        return _gunzip_sample(head)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return _unzstd_sample(head)
    if head.startswith(b"BZh"):
        return _sample_in_bites(head, bz2.BZ2Decompressor())
    if head.startswith(b"\xfd7zXZ\x00"):
        return _sample_in_bites(head, lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=256 << 20))
    return None


def _gunzip_sample(head: bytes) -> tuple[int, int]:
    member = zlib.decompressobj(wbits=31)
    try:
        given = len(member.decompress(head, SAMPLE_BUDGET_BYTES))
    except zlib.error:
        return 1, 1
    return len(head) - len(member.unused_data) - len(member.unconsumed_tail), given


def _sample_in_bites(head: bytes, stream: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> tuple[int, int]:
    taken = given = 0
    try:
        while (
            given < SAMPLE_BUDGET_BYTES and not stream.eof and (taken < len(head) or not stream.needs_input)
        ):
            bite = head[taken : taken + (1 << 12)] if stream.needs_input else b""
            given += len(stream.decompress(bite, 1 << 20))
            taken += len(bite)
    except (OSError, lzma.LZMAError):
        return 1, 1
    return max(1, taken - len(stream.unused_data)), given


def _unzstd_sample(head: bytes) -> tuple[int, int]:
    import zstandard

    # In small bites: a block of a few bytes may hold 128 KiB.
    frame, taken, given = zstandard.ZstdDecompressor().decompressobj(), 0, 0
    try:
        while taken < len(head) and given < SAMPLE_BUDGET_BYTES and not frame.eof:
            bite = head[taken : taken + (1 << 10)]
            given += len(frame.decompress(bite))
            taken += len(bite)
    except zstandard.ZstdError:
        return 1, 1
    return taken - len(frame.unused_data), given
