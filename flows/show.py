"""`sft-pipeline show ID`: one row on its way through the stages, from the folders that are finished.

`follow(run_root, "3f2a")` gives the places; every stage that changed the row shows it again, and a drop says why.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.terminal import shortened, wants_color
from pipelines.storage import check_file, read_manifest, read_rows
from schemas.config_file import load_config
from schemas.conversation import Conversation
from schemas.dataset import SPLITS
from schemas.errors import ConfigError, InputError
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGE_FOLDERS, FileEntry, Manifest, first_record

NUM_CANDIDATES_SHOWN = 5
PAGE_EXAMPLES = 50
ROW_STAGES = ("merge", "clean", "filter", "dedup", "holdout")


@dataclass(frozen=True, slots=True)
class Place:
    """A row in one stage: kept, with its messages, or dropped. `where` is a file in the stage's folder.

    `row.record` is the number in the source's file.
    """

    stage: str
    where: str
    row: Conversation
    reason: str = ""
    detail: str = ""
    survivor: str | None = None


def show_command(
    row: str | None,
    *,
    config: Path | None,
    run_root: Path | None,
    num_examples: int | None,
    color: bool | None,
    html: Path | None = None,
) -> None:
    """What `sft-pipeline show` prints. Raises ConfigError, InputError."""
    if num_examples is not None or html is not None:
        if config is None:
            raise ConfigError("show --shards needs --config: the tokenizer that its model section names")
        _show_shards(load_config(config), num_examples=num_examples, color=color, html=html)
        return
    if row is None:
        raise ConfigError("show needs the id of a row, or --shards with a number of examples")
    if run_root is None and config is None:
        raise ConfigError("show needs --config or --run-root: where the row is looked for")
    root = run_root if run_root is not None else load_config(config).run_root if config is not None else None
    assert root is not None, "one of the two is given"
    row_id = find_row(root, row)
    for line in story(follow(root, row_id), row_id):
        print(line)


def _show_shards(
    config: PipelineConfig, *, num_examples: int | None, color: bool | None, html: Path | None
) -> None:
    from flows.show_examples import print_examples, write_page

    if html is None:
        print_examples(config, num_examples=num_examples or 0, color=wants_color(color))
        return
    write_page(config, html, num_examples=PAGE_EXAMPLES if num_examples is None else num_examples)
    print(f"written: {html}")


def find_row(run_root: Path, prefix: str) -> str:
    """The one row id that begins so, by what merge kept or dropped. Raises InputError for none or several."""
    folder, manifest = _finished(run_root, "merge")
    found = sorted({row_id for file in _files(manifest) for row_id in _ids(folder, file, prefix)})
    if not found:
        raise InputError(f"no row id in {folder} begins with {prefix!r}; ids are 32 hex digits")
    if len(found) > 1:
        some = ", ".join(found[:NUM_CANDIDATES_SHOWN])
        raise InputError(f"{len(found)} row ids begin with {prefix!r}: {some}; give more digits")
    return found[0]


def follow(run_root: Path, row_id: str) -> list[Place]:
    """Where the row is in each finished stage, in the order of the journey; in the shards a place a piece."""
    places: list[Place] = []
    for stage in STAGE_FOLDERS:
        manifest = read_manifest(run_root / STAGE_FOLDERS[stage])
        if manifest is None or stage == "pack":
            break
        places += _places(run_root / STAGE_FOLDERS[stage], manifest, row_id)
        if stage == "split" and places and not places[-1].reason:
            places += _examples(run_root / STAGE_FOLDERS[stage], places[-1].row)
    return places


def story(places: list[Place], row_id: str) -> Iterator[str]:
    """Lines for people: where the row came from, then each stage; messages only where they changed."""
    first = places[0]
    yield f"row {row_id}"
    yield f"from {shortened(first.row.source)}, record {first.row.record}"
    before = None
    for place in places:
        yield f"{STAGE_FOLDERS[place.stage]:<16} {_verdict(place)}"
        messages = [(str(message.role), message.content) for message in place.row.messages]
        if messages != before:
            yield from (f"    {role:<10} {shortened(content)}" for role, content in messages)
        before = messages
    if raw := first.row.meta.get("raw"):
        yield f"    raw        {shortened(str(raw))}"


def _verdict(place: Place) -> str:
    if place.stage == "split" and not place.reason:
        return f"in {place.where}"
    if not place.reason:
        repairs = place.row.meta.get("repairs") or {}
        told = ", ".join(f"{name} {count}" for name, count in sorted(repairs.items()))
        return f"kept in {place.where}" + (f"  (repairs so far: {shortened(told)})" if told else "")
    survivor = f"; {place.survivor} stands for it" if place.survivor else ""
    return f"DROPPED {place.reason}: {shortened(place.detail)}{survivor}"


def _places(folder: Path, manifest: Manifest, row_id: str) -> Iterator[Place]:
    for part in manifest.parts:
        places: list[Place] = []
        if manifest.stage in ROW_STAGES:
            for file in part.kept:
                places += _kept(folder, file, manifest.stage, row_id)
        if part.dropped is not None:
            places += _dropped(folder, part.dropped, manifest.stage, row_id)
        for place in places:
            place.row.record += first_record(part.label)
        yield from places


def _kept(folder: Path, file: FileEntry, stage: str, row_id: str) -> Iterator[Place]:
    if _ids(folder, file, row_id):
        for row in read_rows(folder / file.path):
            if row.row_id == row_id:
                yield Place(stage, file.path, row)


def _dropped(folder: Path, file: FileEntry, stage: str, row_id: str) -> Iterator[Place]:
    if not _ids(folder, file, row_id):
        return
    verdicts = pq.read_table(folder / file.path, columns=["reason", "detail", "survivor"]).to_pylist()
    for row, drop in zip(read_rows(folder / file.path), verdicts, strict=True):
        if row.row_id == row_id:
            yield Place(stage, file.path, row, drop["reason"], drop["detail"], drop["survivor"])


def _examples(folder: Path, row: Conversation) -> Iterator[Place]:
    from pipelines.shards import open_split

    for side in SPLITS:
        ids = open_split(folder, side)["row_id"]
        for number in pc.indices_nonzero(pc.equal(ids, row.row_id)).to_pylist():
            example = open_split(folder, side).slice(number, 1).to_pylist()[0]
            where = (
                f"{side}, example {number}, piece {example['piece']}: "
                f"{example['num_trained_tokens']:,} of {example['num_tokens']:,} tokens trained"
            )
            yield Place("split", where, row)


def _ids(folder: Path, file: FileEntry, prefix: str) -> list[str]:
    column = pq.read_table(check_file(folder, file), columns=["row_id"])["row_id"]
    found: list[str] = column.filter(pc.starts_with(column, prefix)).to_pylist()
    return found


def _files(manifest: Manifest) -> Iterator[FileEntry]:
    for part in manifest.parts:
        yield from part.kept
        if part.dropped is not None:
            yield part.dropped


def _finished(run_root: Path, stage: str) -> tuple[Path, Manifest]:
    folder = run_root / STAGE_FOLDERS[stage]
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder} is not finished: run `sft-pipeline step {stage} CONFIG` first")
    return folder, manifest
