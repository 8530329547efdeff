"""The work on a file of prompts: lines into batches of like length, batches into answers, on one device or several.

Each device takes every n-th line that is missing, in a process of its own with a model of its own. Processes end
with the one that started them.
"""

import gc
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from multiprocessing.connection import Connection, wait
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import torch

from pipelines.executors import exit_with_starter
from schemas.errors import InputError, SftPipelineError, WorkerError
from schemas.pipeline_config import PipelineConfig
from trainer.answer import Answered, answer_prompts, can_be_padded, room, seed_of
from trainer.answer_files import BEFORE, ERROR, FileWork, Line, new_share
from trainer.launch import prepare_libraries
from trainer.load_trained import LoadedModel, answering_device, load_choice
from trainer.prompts import PromptReader, encode_prompt, prompt_reader
from trainer.stepping import is_out_of_memory

BATCHES_IN_WINDOW = 32
"""So many batches' lines are read and sorted by length before the first of them is answered."""
Pending: TypeAlias = Sequence[tuple[str, list[Line]]]
"""A side, and the lines that it has not answered yet."""
Told: TypeAlias = Callable[[int], object]
"""Hears how many lines were done."""
Append: TypeAlias = Callable[[Sequence[dict[str, Any]]], None]


def answer_lines(config: PipelineConfig, work: FileWork, pending: Pending) -> None:
    """All of it, here or in processes. Raises the first error of one of them; the others are ended."""
    count = count_devices(config, work, pending)
    show = _shown_progress(sum(len(lines) for _, lines in pending))
    if count == 1:
        answer_share(config, work, pending, told=show)
    else:
        _in_processes(config, work, pending, count, show)


def count_devices(config: PipelineConfig, work: FileWork, pending: Pending) -> int:
    """Without a number one for each GPU, but none without a batch of its own."""
    num_batches = -(-max((len(lines) for _, lines in pending), default=0) // work.rows_at_once)
    wanted = work.num_processes
    if wanted is None:
        is_cuda = answering_device(config, work.device).type == "cuda"
        wanted = torch.cuda.device_count() if is_cuda else 1
    return max(min(wanted, num_batches), 1)


def answer_share(config: PipelineConfig, work: FileWork, pending: Pending, *, told: Told) -> None:
    """These lines on this process's device."""
    if not pending:
        return
    with new_share(work.folder) as append:
        for side, lines, loaded in _models(config, work, pending):
            with _side_of(loaded, side) as model:
                _Answering(config, work, side, model, loaded.tokenizer, append, told).answer(lines)
            del loaded, model  # else a whole model would stay while the next one is loaded


@contextmanager
def _side_of(loaded: LoadedModel, side: str) -> Iterator[torch.nn.Module]:
    if side == BEFORE and loaded.has_adapter:
        with loaded.without_adapter() as base:
            yield base
    else:
        yield loaded.model


def _models(
    config: PipelineConfig, work: FileWork, pending: Pending
) -> Iterator[tuple[str, list[Line], LoadedModel]]:
    """The model of each side: an adapter's base is loaded once for both, whole models one after the other."""
    if work.choice.is_adapter:
        loaded = load_choice(config, work.choice, device=work.device)
        for side, lines in pending:
            yield side, lines, loaded
        return
    for side, lines in pending:
        yield side, lines, load_choice(config, work.sides[side], device=work.device)
        _release_memory()


# Batches ----------------------------------------------------------------------------------------------------


class _Prompt(NamedTuple):
    number: int
    ids: list[int]
    room: int


@dataclass(slots=True)
class _Answering:
    """One side with one model."""

    config: PipelineConfig
    work: FileWork
    side: str
    model: torch.nn.Module
    tokenizer: Any
    append: Append
    told: Told
    rows_at_once: int = 0

    def answer(self, lines: Sequence[Line]) -> None:
        """In windows: like lengths meet in a batch, and of the lines of a killed run few are lost."""
        self.rows_at_once = self.work.rows_at_once
        reader, remaining = prompt_reader(self.config, self.tokenizer), iter(lines)
        with self.work.input_path.open("rb") as file:
            while window := list(islice(remaining, self.work.rows_at_once * BATCHES_IN_WINDOW)):
                prompts = list(self._prompts(reader, file, window))
                for batch in self._batches(prompts):
                    self._answer_batch(batch)

    def _prompts(self, reader: PromptReader, file: BinaryIO, window: Sequence[Line]) -> Iterator[_Prompt]:
        for line in window:
            file.seek(line.offset)
            try:
                asked = reader.read(file.readline())
                ids = encode_prompt(self.tokenizer, asked.messages, asked.tools)
                yield _Prompt(line.number, ids, room(self.model, self.work.sampling, len(ids)))
            except InputError as error:
                self.append([{"line": line.number, "side": ERROR, "error": str(error)}])
                self.told(1)

    def _batches(self, prompts: list[_Prompt]) -> Iterator[list[_Prompt]]:
        """Longest first, so that too little memory shows at once; all of a batch have the same room."""
        is_padded = can_be_padded(self.model)

        def kind(prompt: _Prompt) -> tuple[int, int]:
            return (-prompt.room, 0 if is_padded else -len(prompt.ids))

        ordered = sorted(prompts, key=lambda prompt: (kind(prompt), -len(prompt.ids), prompt.number))
        for _, alike in groupby(ordered, key=kind):
            while batch := list(islice(alike, self.rows_at_once)):
                yield batch

    def _answer_batch(self, batch: list[_Prompt]) -> None:
        """Half as many at once from here on where memory is short of it; raises where it is short of one."""
        try:
            answers = self._answers(batch)
        except Exception as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            answers = None
        if answers is None:  # only here, where the exception is gone, is what it held free again
            _release_memory()
            self.rows_at_once = len(batch) // 2
            self._answer_batch(batch[: self.rows_at_once])
            self._answer_batch(batch[self.rows_at_once :])
            return
        self.append([self._record(prompt, answered) for prompt, answered in zip(batch, answers, strict=True)])
        self.told(len(batch))

    def _answers(self, batch: list[_Prompt]) -> list[Answered]:
        sampling = self.work.sampling
        seeds = [seed_of(sampling.seed, prompt.number) for prompt in batch]
        prompts = [prompt.ids for prompt in batch]
        return answer_prompts(self.model, self.tokenizer, prompts, sampling, seeds=seeds)

    def _record(self, prompt: _Prompt, answered: Answered) -> dict[str, Any]:
        return {
            "line": prompt.number,
            "side": self.side,
            "text": answered.text,
            "num_tokens": answered.num_tokens,
            "is_finished": answered.is_finished,
        }


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Processes --------------------------------------------------------------------------------------------------


def _in_processes(config: PipelineConfig, work: FileWork, pending: Pending, count: int, show: Told) -> None:
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pipes: dict[Connection, int] = {}
        processes: list[Any] = []
        for number in range(count):
            share = [(side, lines[number::count]) for side, lines in pending if lines[number::count]]
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_share, args=(config, work, share, number, count, theirs), daemon=True
            )
            process.start()
            stack.callback(_end, process)
            theirs.close()
            pipes[ours], processes = number, [*processes, process]
        while pipes:
            for pipe in wait(list(pipes)):
                assert isinstance(pipe, Connection)
                if not _hear(pipe, show):
                    _check_end(processes[pipes.pop(pipe)])


def _hear(pipe: Connection, show: Told) -> bool:
    """False once the other side is gone; raises what it raised."""
    try:
        told = pipe.recv()
    except EOFError:
        return False
    if isinstance(told, Exception):
        raise told
    show(told)
    return True


def _check_end(process: Any) -> None:
    process.join()
    if process.exitcode:
        raise WorkerError(
            f"a process that answered prompts ended with exit code {process.exitcode}: killed for memory? "
            "Run the same command again to go on, with a smaller --batch-size"
        )


def _end(process: Any) -> None:
    process.kill()
    process.join()


def _run_share(
    config: PipelineConfig, work: FileWork, share: Pending, number: int, count: int, pipe: Connection
) -> None:
    """The program of one process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the starter ends us
    exit_with_starter()
    prepare_libraries()
    try:
        if answering_device(config, work.device).type == "cuda":
            torch.cuda.set_device(number % torch.cuda.device_count())
        else:
            torch.set_num_threads(max(torch.get_num_threads() // count, 1))
        answer_share(config, work, share, told=pipe.send)
    except SftPipelineError as error:
        pipe.send(error)
    except Exception as error:  # noqa: BLE001 - told on one line by the starter
        pipe.send(WorkerError(f"process {number} of {count}: {type(error).__name__}: {error}"))


def _shown_progress(total: int, seconds: float = 5.0) -> Told:
    """Lines on stderr with rate and time left, at most one in so many seconds."""
    begun = shown = time.monotonic()
    done = 0

    def show(count: int) -> None:
        nonlocal done, shown
        done, now = done + count, time.monotonic()
        if now - shown < seconds:
            return
        shown = now
        rate = done / (now - begun)
        print(
            f"{done} of {total} answers, {rate:.1f} a second, {(total - done) / rate:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return show
