"""What trackers are given: read back by TensorBoard, and by wandb's own format; no network, ever."""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import RefusedError
from trainer.metrics import Metrics, flat_numbers, step_line
from trainer.trackers import TRACKERS, TrackedRun, open_trackers

ROOT = Path(__file__).parent.parent.parent


def step_record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": 0,
        "loss": 2.0 / step,
        "learning_rate": 0.5,
        "grad_norm": None,
        "num_tokens": 100,
        "num_trained_tokens": 60,
        "seconds": 0.5,
        "tokens_per_second": 200.0,
        "teraflops_per_second": 1.5,
        "mfu": None,
        "memory_gib": 3.25,
        "device_memory_gib": None,
        **more,
    }


VALIDATION = {
    "step": 2,
    "validation_loss": 1.5,
    "validation_bits_per_byte": None,
    "validation_by_source": {"chats": {"loss": 1.25, "bits_per_byte": 0.75}},
}


def write_two_steps(run: TrackedRun, *trackers: str) -> None:
    with Metrics(run, num_steps=2, num_tokens_left=200, trackers=trackers) as metrics:
        metrics.log_step(step_record(1))
        metrics.log_step(step_record(2, mfu=0.5))
        metrics.log_validation(VALIDATION)


# JSON lines and people --------------------------------------------------------------------------------------


def test_json_lines_are_written_without_any_tracker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_two_steps(TrackedRun(tmp_path, "key", 0, {}))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[0] | {"seconds_left": 0} == step_record(1) | {"seconds_left": 0}
    assert lines[0]["seconds_left"] > 0
    assert lines[1]["seconds_left"] == 0
    assert lines[2] == VALIDATION
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_line_for_people_has_what_is_known() -> None:
    record = step_record(7, seconds_left=3671, loss=1.25, grad_norm=0.5)
    assert step_line(record, 90) == (
        "step 7/90  loss 1.2500  lr 5.00e-01  grad 0.5000  200 tokens/s  3.2 GiB  1:01:11 left"
    )
    known = record | {"mfu": 0.4567, "device_memory_gib": 71.04}
    assert "200 tokens/s  MFU 45.7%  3.2 GiB of 71.0 in use  1:01:11 left" in step_line(known, 90)


def test_numbers_inside_numbers_get_a_path() -> None:
    assert dict(flat_numbers(VALIDATION)) == {
        "step": 2,
        "validation_loss": 1.5,
        "validation_by_source/chats/loss": 1.25,
        "validation_by_source/chats/bits_per_byte": 0.75,
    }


# Trackers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_tracker_that_is_not_installed_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        RefusedError, match=f"names {name}, which is not installed; pip install 'sft-pipeline"
    ):
        open_trackers([name], TrackedRun(tmp_path, "key", 0, {}))


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_two_steps(TrackedRun(tmp_path, "key", 0, {}), "tensorboard")
    found = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    values = {
        name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]
    }
    assert values["loss"] == [(1, 2.0), (2, 1.0)]
    assert values["mfu"] == [(2, 0.5)]
    assert values["validation_by_source/chats/loss"] == [(2, 1.25)]


# A process of its own: wandb starts another one, and hooks into the end of ours.
WANDB_PROGRAM = """
import sys
from pathlib import Path
from tests.trainer.test_trackers import write_two_steps
from trainer.trackers import TrackedRun
write_two_steps(TrackedRun(Path(sys.argv[1]), "key", 0, {"seed": 7}), "wandb")
"""


@pytest.mark.slow
def test_wandb_writes_a_folder_and_asks_nobody(tmp_path: Path) -> None:
    """Told by its own variables to go online, to a server that counts who calls."""
    pytest.importorskip("wandb")
    with counting_server() as (port, calls):
        variables = {
            "WANDB_MODE": "online",
            "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
            "WANDB_API_KEY": "x" * 40,
        }
        done = subprocess.run(
            [sys.executable, "-c", WANDB_PROGRAM, str(tmp_path)],
            cwd=ROOT,
            env=os.environ | variables | {"HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert calls == []
    assert "wandb" not in done.stderr
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    runs, history = wandb_records(path)
    assert [(run.run_group, run.project, run.display_name) for run in runs] == [
        ("key", "sft-pipeline", "key after step 0")
    ]
    steps = {row["_step"]: row for row in history}
    assert steps[1]["loss"] == 2.0
    assert steps[2]["mfu"] == 0.5
    assert steps[2]["validation_by_source/chats/bits_per_byte"] == 0.75
    assert "grad_norm" not in steps[1]


@contextmanager
def counting_server() -> Iterator[tuple[int, list[Any]]]:
    calls: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, caller = server.accept()
                except OSError:
                    return
                calls.append(caller)
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1], calls
        server.shutdown(socket.SHUT_RDWR)


def wandb_records(path: Path) -> tuple[list[Any], list[dict[str, Any]]]:
    """The runs and the rows of history in a file of wandb's: a header, then LevelDB's log of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    place, whole, runs, history = 7, b"", [], []
    while place + 7 <= len(data):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "run":
                runs.append(record.run)
            elif record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): item.value_json for item in record.history.item
                }
                history.append({key: json.loads(value) for key, value in items.items()})
    return runs, history
