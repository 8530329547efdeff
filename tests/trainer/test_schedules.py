"""Learning rates as a function of the step. Judges: transformers' schedules, and torch's for steps."""

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
    get_wsd_schedule,
)

from schemas.training_config import TrainConfig
from trainer.schedules import SCHEDULES, learning_rate, num_warmup_steps


def rates_of_transformers(train: TrainConfig, warmup_steps: int, num_steps: int) -> list[float]:
    """One warm-up step and one step more, first step left out: see `learning_rate`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    settings: dict[str, Any] = {"num_warmup_steps": warmup_steps + 1}
    if train.schedule == "constant":
        schedule = get_constant_schedule_with_warmup(optimizer, **settings)
    elif train.schedule == "linear":
        schedule = get_linear_schedule_with_warmup(optimizer, num_training_steps=num_steps + 1, **settings)
    elif train.schedule == "wsd":
        schedule = get_wsd_schedule(
            optimizer,
            num_training_steps=num_steps + 1,
            num_decay_steps=round(train.decay_share * (num_steps - warmup_steps)),
            decay_type="1-sqrt",
            min_lr_ratio=train.min_learning_rate_share,
            **settings,
        )
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


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize(("warmup_steps", "num_steps"), [(0, 10), (3, 20), (9, 10), (0, 1)])
def test_schedules_are_those_of_transformers(schedule: Any, warmup_steps: int, num_steps: int) -> None:
    share = 0.1 if schedule == "cosine" else 0.0
    train = TrainConfig(schedule=schedule, warmup_steps=warmup_steps, min_learning_rate_share=share)
    ours = [learning_rate(train, step, num_steps) for step in range(num_steps)]
    assert ours == pytest.approx(rates_of_transformers(train, warmup_steps, num_steps), rel=1e-9)


@given(
    st.sampled_from(sorted(SCHEDULES)),
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


@pytest.mark.parametrize(("length", "epochs", "expected_length"), [(3, 1, 3), (None, 4, 5), (None, 3, 7)])
def test_steps_down_are_torchs(length: int | None, epochs: int, expected_length: int) -> None:
    train = TrainConfig(
        schedule="step",
        step_decay_steps=length,
        step_decay_factor=0.5,
        epochs=epochs,
        warmup_steps=2,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, expected_length, gamma=0.5)
    for step in range(2, 20):
        assert learning_rate(train, step, 20) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_every_schedule_of_the_config_is_there() -> None:
    choices = TrainConfig.model_json_schema()["properties"]["schedule"]["enum"]
    assert set(SCHEDULES) == set(choices)
