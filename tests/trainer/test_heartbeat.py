"""A process that keeps the others waiting is named: real stores and threads, and real processes stopped by a signal."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from schemas.pipeline_config import PipelineConfig
from tests.trainer.test_rank_processes import launched
from tests.trainer.tiny_models import tiny_run
from trainer.heartbeat import Heartbeat
from trainer.ranks import Ranks

TIMEOUT_SECONDS = 4.0
WAIT_SECONDS = 120.0


@pytest.fixture
def connect() -> Iterator[Callable[[float], dist.Store]]:
    """Connections to a store of this process, as its ranks make them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"wait_for_workers": False, "timeout": timedelta(seconds=WAIT_SECONDS)}
    server = dist.TCPStore("127.0.0.1", port, is_master=True, **options)  # type: ignore[call-overload]
    yield lambda _: dist.TCPStore("127.0.0.1", port, is_master=False, **options)  # type: ignore[call-overload]
    del server


class Training:
    """Ranks as threads. `words` are the last ones, by number."""

    def __init__(self, count: int, connect: Callable[[float], dist.Store]) -> None:
        self.ranks = [Ranks(number, count) for number in range(count)]
        self.words: dict[int, str] = {}
        self.beats = [
            Heartbeat(
                ranks,
                timeout_seconds=TIMEOUT_SECONDS,
                end=lambda words, number=ranks.number: self.words.setdefault(number, words),  # type: ignore[misc]
                connect=connect,
            )
            for ranks in self.ranks
        ]

    def wait_for_words(self, seconds: float = WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not self.words and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        for beat in self.beats:
            beat.__exit__(None, None, None)


@pytest.fixture
def training(connect: Callable[[float], dist.Store]) -> Iterator[Training]:
    found = Training(3, connect)
    yield found
    found.close()


@pytest.mark.slow
def test_a_rank_that_stays_in_a_step_while_the_others_wait_behind_it_is_named(training: Training) -> None:
    for beat in training.beats:
        beat.__enter__()
    for ranks in training.ranks:
        ranks.pulse.mark("computing step 7")
        if ranks.number != 1:
            ranks.pulse.mark("updating in step 7")
    training.wait_for_words()
    assert set(training.words) == {0}, "the first one speaks"
    assert training.words[0].startswith("process 1 of 3 has not gone on for ")
    assert "last seen computing step 7;" in training.words[0]


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 2])
def test_a_rank_that_says_nothing_any_more_is_named(training: Training, silent: int) -> None:
    is_over = threading.Event()

    def go_on() -> None:
        while not is_over.wait(0.1):
            for ranks in training.ranks:
                ranks.pulse.move()

    threading.Thread(target=go_on, daemon=True).start()
    for beat in training.beats:
        beat.__enter__()
    time.sleep(TIMEOUT_SECONDS)
    assert not training.words, "all go on"
    training.beats[silent].__exit__(None, None, None)
    training.wait_for_words()
    is_over.set()
    assert training.words, "nobody has noticed"
    for words in training.words.values():
        assert words.startswith(f"process {silent} of 3 has not answered for ")


# Real processes ---------------------------------------------------------------------------------------------


def run_of(folder: Path) -> PipelineConfig:
    settings = {"strategy": "ddp", "num_processes": 2, "bins_per_step": 3, "rank_timeout_seconds": 5.0}
    config = tiny_run(folder, epochs=60, train=settings)
    (config.run_root / "config.json").write_text(config.model_dump_json())
    return config


@pytest.mark.stress
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_was_stopped_is_named_and_all_end(tmp_path: Path, number: int) -> None:
    with launched(run_of(tmp_path)) as training:
        training.wait_for(lambda: training.num_steps() >= 5)
        os.kill(training.ranks()[number].pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        assert training.end() == 1, training.words()
    last = training.words().splitlines()[-1]
    assert last.startswith(f"error: process {number} of 2 has not answered for "), training.words()
    assert time.monotonic() - stopped_at < 60
