"""A file of prompts answered into a file: one JSON line for each line, whatever was wrong with it.

    answer_file(config, work)    prompts.jsonl -> answers.jsonl

Finished batches lie in `<answers>.partial/` until all are there: a killed run goes on from them, on any number of
devices, and ends with the same lines. Lines that can't be answered are kept, with the reason.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from pipelines.storage import durable_file, file_sha256, json_digest, write_json
from schemas.errors import BusyError, ConfigError, InputError, IntegrityError, LimitError
from schemas.pipeline_config import PipelineConfig
from trainer.answer import Sampling
from trainer.dtypes import resolve_dtype
from trainer.load_trained import Choice, Device
from trainer.model import load_tokenizer, needed_model, resolve_device
from trainer.prompts import Asked, PromptReader, prompt_reader

WORK_NAME = "work.json"
WORK_VERSION = 1
"""Raise it when the same lines and models would give other answers: unfinished work is then begun anew."""
SHARE_PATTERN = "answers-*.jsonl"
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True, slots=True)
class FileWork:
    """What is answered, by whom, into what. With `before_after` the base model answers too."""

    input_path: Path
    output_path: Path
    choice: Choice
    base: Choice
    sampling: Sampling
    before_after: bool = False
    rows_at_once: int = 16
    device: Device = "auto"
    num_processes: int | None = None

    @property
    def folder(self) -> Path:
        return self.output_path.with_name(f"{self.output_path.name}.partial")

    @property
    def sides(self) -> dict[str, Choice]:
        return {BEFORE: self.base, AFTER: self.choice} if self.before_after else {AFTER: self.choice}


class Line(NamedTuple):
    """A line that is not blank: its number, from 1, and its first byte."""

    number: int
    offset: int


@dataclass(frozen=True, slots=True)
class AnsweredFile:
    """What came of a file. `bad_lines` are (line number, what is wrong)."""

    path: Path
    num_answers: int
    num_taken_over: int
    bad_lines: tuple[tuple[int, str], ...]


Run = Callable[[Sequence[tuple[str, list[Line]]]], None]
"""Answers these lines of these sides, and leaves what comes of them in the work's folder."""


def answer_file(config: PipelineConfig, work: FileWork, run: Run) -> AnsweredFile:
    """The output appears whole, at the end, in the order of the input.

    Raises InputError without an input, ConfigError where the folder holds other work, LimitError when no line could
    be answered.
    """
    _check_paths(work)
    lines = list(_lines(work.input_path))
    with _held(work.folder):
        _check_same_work(config, work)
        found = dict(read_shares(work.folder))
        missing = [
            (side, [line for line in lines if _is_missing(found, line.number, side)]) for side in work.sides
        ]
        run([(side, pending) for side, pending in missing if pending])
        try:
            result = _put_together(config, work, lines, num_taken_over=len(found))
        except LimitError:
            shutil.rmtree(work.folder)  # nothing in it is worth going on from
            raise
        shutil.rmtree(work.folder)
    return result


def _check_paths(work: FileWork) -> None:
    if not work.input_path.is_file():
        raise InputError(f"no file of prompts at {work.input_path}")
    if work.output_path.exists() and work.output_path.samefile(work.input_path):
        raise ConfigError(f"{work.output_path} is the input as well: name another file for the answers")


def _lines(path: Path) -> Iterator[Line]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield Line(number, offset)
            offset += len(raw)


# The folder of unfinished work ------------------------------------------------------------------------------

Key = tuple[int, str]
"""Number of a line, and a side; a line that can't be read stands there once, under the side "error"."""
ERROR = "error"


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One run at a time. Raises BusyError."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{folder} is held by another run: wait for it, or name another output") from None
        yield
    finally:
        os.close(descriptor)


def _check_same_work(config: PipelineConfig, work: FileWork) -> None:
    path, facts = work.folder / WORK_NAME, _facts(config, work)
    if not path.exists():
        write_json(path, facts)
        return
    found = orjson.loads(path.read_bytes())
    changed = sorted(name for name in facts.keys() | found.keys() if facts.get(name) != found.get(name))
    if changed:
        raise ConfigError(
            f"{work.folder} holds unfinished answers of another {' and '.join(changed)}: repeat the command that "
            "began them, delete the folder, or name another output"
        )


def _facts(config: PipelineConfig, work: FileWork) -> dict[str, str]:
    """All that shapes the answers but for rounding; devices and batches are left out on purpose."""
    model = needed_model(config)
    tokenizer = load_tokenizer(config)
    template = [str(tokenizer.get_chat_template()), config.split.model_dump(mode="json")]
    return {
        "version": str(WORK_VERSION),
        "input": file_sha256(work.input_path),
        "model": json_digest([choice.digest for choice in work.sides.values()]),
        "form": f"{config.train.base} {resolve_dtype(model, resolve_device(model))}",
        "template": json_digest([*template, config.clean.model_dump(mode="json")]),
        "sampling": json_digest(asdict(work.sampling)),
    }


def read_shares(folder: Path) -> Iterator[tuple[Key, dict[str, Any]]]:
    """What earlier runs left. Their last lines may be torn: those are answered again."""
    for path in sorted(folder.glob(SHARE_PATTERN)):
        for raw in path.read_bytes().splitlines():
            try:
                record = orjson.loads(raw)
            except orjson.JSONDecodeError:
                continue
            yield (record["line"], record["side"]), record


def _is_missing(found: Mapping[Key, Any], number: int, side: str) -> bool:
    return (number, side) not in found and (number, ERROR) not in found


@contextmanager
def new_share(folder: Path) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """A file of our own in the folder; the yielded function appends records to it, whole lines at a time."""
    with _created(folder) as file:

        def append(records: Sequence[Mapping[str, Any]]) -> None:
            file.write(b"".join(orjson.dumps(record) + b"\n" for record in records))
            file.flush()

        yield append


def _created(folder: Path) -> BinaryIO:
    number = len(list(folder.glob(SHARE_PATTERN)))
    while True:
        try:
            return (folder / SHARE_PATTERN.replace("*", f"{number:06d}")).open("xb")
        except FileExistsError:  # another process of this run was faster
            number += 1


# The output -------------------------------------------------------------------------------------------------


def _put_together(
    config: PipelineConfig, work: FileWork, lines: Sequence[Line], *, num_taken_over: int
) -> AnsweredFile:
    found = dict(read_shares(work.folder))
    reader = prompt_reader(config, load_tokenizer(config))
    bad_lines: list[tuple[int, str]] = []
    with (
        durable_file(work.output_path) as temporary,
        temporary.open("wb") as output,
        work.input_path.open("rb") as file,
    ):
        for line in lines:
            record = _record(work, found, reader, line, file)
            if ERROR in record:
                bad_lines.append((line.number, record[ERROR]))
            output.write(orjson.dumps(record) + b"\n")
        if len(bad_lines) == len(lines):
            raise LimitError(f"{work.input_path}: no line could be answered{_first(bad_lines)}")
    return AnsweredFile(work.output_path, len(lines) - len(bad_lines), num_taken_over, tuple(bad_lines))


def _record(
    work: FileWork, found: Mapping[Key, dict[str, Any]], reader: PromptReader, line: Line, file: BinaryIO
) -> dict[str, Any]:
    if (bad := found.get((line.number, ERROR))) is not None:
        return {"line": line.number, "error": bad["error"]}
    answers = {side: found.get((line.number, side)) for side in work.sides}
    if None in answers.values():
        raise IntegrityError(f"line {line.number} has no answer in {work.folder}: run the same command again")
    file.seek(line.offset)
    return {"line": line.number} | _about(reader.read(file.readline()), answers)


def _about(asked: Asked, answers: Mapping[str, Any]) -> dict[str, Any]:
    """`messages` ends with the answer; where there are two, they stand under their own names."""
    messages = [{"role": message.role, "content": message.content} for message in asked.messages]
    record: dict[str, Any] = {"id": asked.id} if asked.id is not None else {}
    if BEFORE in answers:
        record |= {"messages": messages} | {side: _answer(found) for side, found in answers.items()}
    else:
        said = {"role": "assistant", "content": answers[AFTER]["text"]}
        details = {name: value for name, value in _answer(answers[AFTER]).items() if name != "text"}
        record |= {"messages": [*messages, said]} | details
    return record if asked.reference is None else record | {"reference": asked.reference}


def _answer(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("text", "num_tokens", "is_finished")}


def _first(bad_lines: Sequence[tuple[int, str]]) -> str:
    return f"; line {bad_lines[0][0]}: {bad_lines[0][1]}" if bad_lines else ": it is empty"
