"""What all processes are asked before any weight is loaded: who differs, in what, and what is done about it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import RefusedError, TrainingError
from tests.trainer.tiny_models import tiny_run
from trainer import preflight
from trainer.job import Job, plan_job
from trainer.preflight import (
    check_adding_up,
    check_ranks,
    clock_findings,
    code_digest,
    gpu_findings,
    memory_findings,
    own_facts,
    refuse_differences,
)
from trainer.ranks import Ranks
from trainer.train import train


def job_of(folder: Path, **train_settings: Any) -> Job:
    return plan_job(tiny_run(folder, train=train_settings))


def facts(number: int, **changes: Any) -> dict[str, Any]:
    return {"host": f"node-{number // 2}", "gpu": None, "free_bytes": 2**40, "clock": 1000.0, **changes}


# Differences ------------------------------------------------------------------------------------------------


def test_a_process_of_its_own_agrees_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_of(tmp_path)
    capsys.readouterr()
    check_ranks(job)
    assert capsys.readouterr().err == ""


def test_facts_name_versions_settings_and_inputs(tmp_path: Path) -> None:
    same = own_facts(job_of(tmp_path, learning_rate=0.25))["same"]
    assert same["torch"] == torch.__version__
    assert same["train.learning_rate"] == 0.25
    assert same["our code"] == code_digest()
    assert {name for name in same if name.startswith("input ")} == {
        "input 06_shards",
        "input 07_plan",
        "input model",
    }


def test_a_difference_is_refused_with_values_and_processes() -> None:
    same = {"torch": "2.13.0", "train.learning_rate": 0.1}
    found = [same, same | {"torch": "2.11.0"}, same, same | {"train.learning_rate": 0.2}]
    with pytest.raises(RefusedError) as refused:
        refuse_differences(found, ["a", "a", "b", "b"])
    assert str(refused.value) == (
        "the processes of this training are not alike: torch is 2.13.0 on processes 0, 2, 3 (a, b), "
        "2.11.0 on process 1 (a); train.learning_rate is 0.1 on processes 0, 1, 2 (a, b), 0.2 on process 3 (b): "
        "start all of them with the same config, files and packages"
    )


def test_many_differences_and_processes_are_counted() -> None:
    found = [{f"setting {n}": rank % 2 for n in range(9)} for rank in range(20)]
    with pytest.raises(RefusedError, match=r"on processes 0, 2, 4, 6, \.\.\. \(h\).*; and 5 more: start all"):
        refuse_differences(found, ["h"] * 20)


def test_what_one_process_alone_has_is_a_difference() -> None:
    with pytest.raises(RefusedError, match=r"deepspeed is null on process 0 \(a\), 0\.19 on process 1 \(b\)"):
        refuse_differences([{}, {"deepspeed": "0.19"}], ["a", "b"])


# Memory, clocks, GPUs ---------------------------------------------------------------------------------------


def test_a_process_without_room_for_its_weights_is_refused(tmp_path: Path) -> None:
    found = [facts(0), facts(1, host="small", free_bytes=10_000)]
    with pytest.raises(
        RefusedError, match=r"0\.00 GiB of memory are free for process 1 \(small\), weights and"
    ):
        list(memory_findings(job_of(tmp_path), found))


def test_where_shards_may_need_less_it_is_a_warning(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    sharded = job.config.train.model_copy(update={"strategy": "fsdp2"})
    job = dataclasses.replace(job, config=job.config.model_copy(update={"train": sharded}))
    (warning,) = memory_findings(job, [facts(0), facts(1, free_bytes=10_000)])
    assert "are free for process 1 (node-0), with activations about" in warning


def test_the_memory_of_a_machine_is_shared_by_its_processes_and_that_of_gpus_is_not(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    enough = int(preflight._need(job).likely * 1.5)  # type: ignore[union-attr]
    assert list(memory_findings(job, [facts(0, free_bytes=enough)])) == []
    (warning,) = memory_findings(job, [facts(n, free_bytes=enough) for n in range(2)])
    assert "for processes 0, 1 (node-0)" in warning
    assert list(memory_findings(job, [facts(n, free_bytes=enough, gpu="H200") for n in range(2)])) == []


def test_too_little_memory_stops_a_training_before_its_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path)
    monkeypatch.setattr(preflight, "free_machine_bytes", lambda: 10_000)
    monkeypatch.setattr("trainer.train.load_model", lambda job: pytest.fail("weights were loaded"))
    with pytest.raises(RefusedError, match="sft-pipeline doctor"):
        train(config)


def test_a_clock_that_is_far_off_is_told() -> None:
    assert list(clock_findings([facts(0), facts(1, clock=1004.0)])) == []
    (warning,) = clock_findings([facts(0), facts(1, clock=993.0), facts(2), facts(3, clock=1060.0)])
    assert warning.startswith("the clock of processes 1, 3 (node-0, node-1) is +60 s from that of process 0")


def test_gpus_of_two_kinds_are_told() -> None:
    assert list(gpu_findings([facts(0, gpu="H100"), facts(1, gpu="H100")])) == []
    (warning,) = gpu_findings([facts(0, gpu="H100"), facts(1, gpu="A100")])
    assert "(A100, H100)" in warning


# Adding up --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Three(Ranks):
    """The second of three; what the other two add is known, but for `lost` of their numbers."""

    number: int = 1
    count: int = 3
    lost: int = 0

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        summed = tensor / 2 * 6
        if self.lost:
            summed[-self.lost :] += 1
        return summed


def test_right_sums_pass_and_wrong_ones_name_the_process() -> None:
    check_adding_up(Three())
    with pytest.raises(
        TrainingError, match=r"process 1 of 3 on .*: 3 of 262144 numbers were added up wrongly"
    ):
        check_adding_up(Three(lost=3))
