"""AdamW over masters and closed-form schedules. Judges: torch.optim.AdamW and transformers' schedules."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from schemas.errors import TrainingError
from schemas.training_config import TrainConfig
from trainer.optimizers import MasterAdamW, learning_rate, num_warmup_steps
from trainer.pieces import ReadPiece
from trainer.ranks import Ranks

SETTINGS: dict[str, Any] = {"weight_decay": 0.1, "adam_beta2": 0.99, "max_grad_norm": 0.5}


def small_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(dtype)


def backward(model: torch.nn.Module, step: int) -> None:
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    model(inputs.to(next(model.parameters()).dtype)).float().square().sum().backward()


def test_fp32_updates_are_those_of_torchs_adamw_bit_for_bit() -> None:
    ours, judge = small_model(), small_model()
    optimizer = MasterAdamW(ours.named_parameters(), TrainConfig(**SETTINGS))
    matrices = [p for p in judge.parameters() if p.dim() == 2]
    vectors = [p for p in judge.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.99), foreach=False)
    for step in range(8):
        backward(ours, step)
        optimizer.collect_gradients()
        norm = optimizer.clip()
        optimizer.step(1e-2 / (step + 1))
        backward(judge, step)
        assert norm == torch.nn.utils.clip_grad_norm_(judge.parameters(), 0.5)
        for group in adamw.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        adamw.step()
        adamw.zero_grad()
        for mine, theirs in zip(ours.parameters(), judge.parameters(), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.grad is None


def test_bf16_weights_follow_their_fp32_masters_through_updates_too_small_for_bf16() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", parameter)], TrainConfig(max_grad_norm=0))
    for _ in range(40):
        parameter.grad = torch.ones_like(parameter)
        optimizer.collect_gradients()
        optimizer.step(2e-4)
    master = optimizer.masters["w"].detach()
    assert master.dtype == torch.float32
    assert torch.equal(parameter, master.bfloat16())
    # 40 updates of 2e-4 each; bf16 alone would have stayed at 1: its next smaller number is 0.996.
    assert float(master[0, 0]) == pytest.approx(1 - 40 * 2e-4, abs=1e-5)
    assert float(parameter.detach()[0, 0]) < 1


def test_micro_step_gradients_of_bf16_weights_add_up_in_fp32() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", parameter)], TrainConfig(max_grad_norm=0))
    for gradient in (256.0, 1.0, 1.0, 1.0):
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.collect_gradients()
        assert parameter.grad is None
    assert float(optimizer.clip()) == 259.0  # in bf16 256 + 1 is 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    model = small_model(dtype)
    optimizer = MasterAdamW(model.named_parameters(), TrainConfig(**SETTINGS))

    def run(model: torch.nn.Module, optimizer: MasterAdamW, steps: range) -> None:
        for step in steps:
            backward(model, step)
            optimizer.collect_gradients()
            optimizer.clip()
            optimizer.step(1e-2)

    run(model, optimizer, range(5))
    read = memory_of(optimizer)
    other = small_model(dtype)
    resumed = MasterAdamW(other.named_parameters(), TrainConfig(**SETTINGS))
    resumed.restore(read, num_updates=optimizer.num_updates)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    run(model, optimizer, range(5, 10))
    run(other, resumed, range(5, 10))
    for name, master in optimizer.masters.items():
        assert torch.equal(master, resumed.masters[name])
    assert resumed.num_updates == 10


def memory_of(optimizer: MasterAdamW) -> ReadPiece:
    """What is read from a checkpoint of its state."""
    kept = {(piece.kind, piece.name): piece.values.clone() for piece in optimizer.pieces()}

    def read(kind: str, name: str, start: int, end: int) -> torch.Tensor | None:
        return kept[kind, name][start:end].clone() if (kind, name) in kept else None

    return read


def test_each_rank_hands_over_its_share_of_the_tensors_that_all_hold() -> None:
    model = small_model()
    whole = MasterAdamW(model.named_parameters(), TrainConfig())
    backward(model, 0)
    whole.collect_gradients()
    whole.step(1e-2)
    shares = []
    for number in range(3):
        share = MasterAdamW(model.named_parameters(), TrainConfig(), Ranks(number, 3))
        share.restore(memory_of(whole), num_updates=1)
        shares.append({(piece.kind, piece.name): piece.values for piece in share.pieces()})
    assert sum(map(len, shares)) == 3 * 4
    together = {key: values for share in shares for key, values in share.items()}
    for piece in whole.pieces():
        assert torch.equal(together[piece.kind, piece.name], piece.values)
        assert piece.values.shape == (whole.shapes()[piece.name].numel(),)


def test_nothing_trainable_is_an_error() -> None:
    with pytest.raises(TrainingError, match="nothing is trainable"):
        MasterAdamW([], TrainConfig())


# Schedules --------------------------------------------------------------------------------------------------


def rates_of_transformers(train: TrainConfig, warmup_steps: int, num_steps: int) -> list[float]:
    """One warm-up step and one step more, first step left out: see `learning_rate`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    settings: dict[str, Any] = {"num_warmup_steps": warmup_steps + 1}
    if train.schedule == "constant":
        schedule = get_constant_schedule_with_warmup(optimizer, **settings)
    elif train.schedule == "linear":
        schedule = get_linear_schedule_with_warmup(optimizer, num_training_steps=num_steps + 1, **settings)
    else:
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer,
            num_training_steps=num_steps + 1,
            min_lr_rate=train.min_learning_rate_share,
            **settings,
        )
    rates = []
    for _ in range(num_steps):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup_steps", "num_steps"), [(0, 10), (3, 20), (9, 10), (0, 1)])
def test_schedules_are_those_of_transformers(schedule: Any, warmup_steps: int, num_steps: int) -> None:
    share = 0.1 if schedule == "cosine" else 0.0
    train = TrainConfig(schedule=schedule, warmup_steps=warmup_steps, min_learning_rate_share=share)
    ours = [learning_rate(train, step, num_steps) for step in range(num_steps)]
    assert ours == pytest.approx(rates_of_transformers(train, warmup_steps, num_steps), rel=1e-9)


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(1, 400),
    st.floats(0, 0.9),
    st.floats(0, 1),
)
def test_no_step_is_spent_at_rate_zero_and_none_is_above_the_rate(
    schedule: Any, num_steps: int, warmup_share: float, floor: float
) -> None:
    train = TrainConfig(schedule=schedule, warmup_share=warmup_share, min_learning_rate_share=floor)
    rates = [learning_rate(train, step, num_steps) for step in range(num_steps)]
    assert all(0 < rate <= train.learning_rate * (1 + 1e-12) for rate in rates)
    warmup_steps = num_warmup_steps(train, num_steps)
    assert rates[:warmup_steps] == sorted(rates[:warmup_steps])
    decay = rates[warmup_steps:]
    assert decay == sorted(decay, reverse=True)
    if decay:
        assert math.isclose(decay[0], train.learning_rate)
