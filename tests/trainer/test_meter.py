"""Speed and memory of a step: of all processes together, of real tokens, and None where nobody knows."""

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.tiny_models import tiny_lora, tiny_model, tiny_run
from trainer.job import Job, plan_job
from trainer.meter import DeviceMemory, StepMeter
from trainer.mfu import count_work
from trainer.ranks import Ranks
from trainer.train import train

CUDA = torch.device("cuda", 0)


def job_of(folder: Path, **changes: Any) -> Job:
    return dataclasses.replace(plan_job(tiny_run(folder)), **changes)


def on_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 2**30)


def test_each_line_of_a_training_says_how_fast_and_how_long_still(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"trackers": ["tensorboard"], "evaluate_every_steps": 3})
    result = train(config)
    folder = config.run_root / "checkpoints" / result.key
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    work = count_work(tiny_lora(tiny_model()))  # as many layers as the model of the run, but of rank 4
    for line in steps:
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(line["num_tokens"])
        flops = line["teraflops_per_second"] * 1e12 * line["seconds"]
        assert flops > work.per_token * line["num_tokens"]
        assert line["mfu"] is None
        assert line["device_memory_gib"] is None
        assert line["memory_gib"] > 0.05
    left = [line["seconds_left"] for line in steps]
    assert left[-1] == 0
    assert all(seconds > 0 for seconds in left[:-1])
    assert sum(line["num_tokens"] for line in steps) == result.num_tokens
    validations = [line for line in lines if "validation_loss" in line]
    assert len(validations) > 1
    for line in validations:
        names = ("loss", "bits_per_byte", "token_accuracy")
        whole = {name: line[f"validation_{name}"] for name in names}
        assert line["validation_by_source"] == {"tiny": whole}
        assert line["validation_by_language"] == {"en": whole}
    assert list((folder / "tensorboard").iterdir())


def test_a_trainings_own_choice_of_no_tracker_leaves_none(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"trackers": [], "max_steps": 1})
    folder = config.run_root / "checkpoints" / train(config).key
    assert (folder / "metrics.jsonl").read_bytes()
    assert not (folder / "tensorboard").exists()


def test_flops_are_those_of_the_documents_that_a_step_computes(tmp_path: Path) -> None:
    job, model = job_of(tmp_path), tiny_lora(tiny_model())
    work = count_work(model)
    for step in job.steps:
        here = job.plans[step.epoch].documents(step.first_bin, step.end_bin)
        lengths = job.plans[step.epoch].num_tokens[here].astype(np.float64)
        attention = sum(flops * (lengths @ lengths) / 2 for _, flops in work.per_pair)
        expected = (
            work.per_token * step.num_tokens + work.per_trained_token * step.num_trained_tokens + attention
        )
        found = StepMeter(job, model).read(step, 0.25)["teraflops_per_second"]
        assert found == pytest.approx(expected / 0.25 / 1e12)


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_mfu_is_the_share_of_the_peak_of_all_gpus(
    num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu("NVIDIA H200", monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda device: 7 * 2**30)
    monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(NVMLError=OSError, __spec__=object()))
    job = job_of(tmp_path, device=CUDA, ranks=Ranks(0, num_ranks))
    read = StepMeter(job, tiny_lora(tiny_model())).read(job.steps[0], 1e-6)
    assert read["mfu"] == pytest.approx(read["teraflops_per_second"] / 989.4 / num_ranks)
    assert read["tokens_per_second"] == pytest.approx(job.steps[0].num_tokens * 1e6)  # of all together
    assert read["memory_gib"] == 3
    assert read["device_memory_gib"] == 7


def test_an_unknown_gpu_has_no_mfu_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_gpu("NVIDIA GeForce RTX 4090 Laptop GPU", monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    jobs = [job_of(tmp_path, device=CUDA, ranks=Ranks(number, 2)) for number in (0, 1)]
    capsys.readouterr()
    meters = [StepMeter(job, tiny_model()) for job in jobs]
    step = jobs[0].steps[0]
    reads = [meter.read(step, 1.0) for meter in meters for _ in range(3)]
    assert {read["mfu"] for read in reads} == {None}
    assert {read["device_memory_gib"] for read in reads} == {None}
    assert all(read["teraflops_per_second"] > 0 for read in reads)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == [
        "no MFU will be shown",
        "memory in use on the whole GPU is not shown",
    ]
    assert "NVIDIA GeForce RTX 4090 Laptop GPU" in said[0]
    assert said[1].endswith("pip install nvidia-ml-py")


def test_nvml_is_asked_every_few_seconds_and_no_more_after_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NVMLError(Exception):
        pass

    asked: list[Any] = []

    def answer(device: torch.device) -> int:
        asked.append(device)
        if len(asked) == 3:
            raise NVMLError("Insufficient\nPermissions")
        return len(asked) * 2**30

    seconds = 0.0
    monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(NVMLError=NVMLError, __spec__=object()))
    monkeypatch.setattr(torch.cuda, "device_memory_used", answer)
    monkeypatch.setattr("trainer.meter.time.monotonic", lambda: seconds)
    memory = DeviceMemory(CUDA)
    found = []
    for seconds in (0.0, 1.0, 4.9, 5.0, 9.0, 10.0, 20.0, 90.0):  # noqa: B007 - read by the clock above
        found.append(memory.gib())
    assert found == [1, 1, 1, 2, 2, None, None, None]
    assert len(asked) == 3
    assert capsys.readouterr().err == (
        "memory in use on the whole GPU is not shown: Insufficient Permissions\n"
    )
