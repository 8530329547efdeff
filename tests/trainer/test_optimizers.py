"""AdamW over masters. Judge: torch.optim.AdamW. Other optimisers: test_updates.py."""

from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import TrainingError
from schemas.training_config import TrainConfig
from trainer.optimizers import Limits, MasterOptimizer
from trainer.pieces import ReadPiece
from trainer.ranks import Ranks
from trainer.updates import adamw

SETTINGS: dict[str, Any] = {"weight_decay": 0.1, "adam_beta2": 0.99, "max_grad_norm": 0.5}


def small_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(dtype)


def backward(model: torch.nn.Module, step: int) -> None:
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    model(inputs.to(next(model.parameters()).dtype)).float().square().sum().backward()


def test_fp32_updates_are_those_of_torchs_adamw_bit_for_bit() -> None:
    ours, judge = small_model(), small_model()
    optimizer = MasterOptimizer(ours.named_parameters(), TrainConfig(**SETTINGS))
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
    optimizer = MasterOptimizer([("w", parameter)], TrainConfig(max_grad_norm=0))
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
    optimizer = MasterOptimizer([("w", parameter)], TrainConfig(max_grad_norm=0))
    for gradient in (256.0, 1.0, 1.0, 1.0):
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.collect_gradients()
        assert parameter.grad is None
    assert float(optimizer.clip()) == 259.0  # in bf16 256 + 1 is 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    model = small_model(dtype)
    optimizer = MasterOptimizer(model.named_parameters(), TrainConfig(**SETTINGS))

    def run(model: torch.nn.Module, optimizer: MasterOptimizer, steps: range) -> None:
        for step in steps:
            backward(model, step)
            optimizer.collect_gradients()
            optimizer.clip()
            optimizer.step(1e-2)

    run(model, optimizer, range(5))
    read = memory_of(optimizer)
    other = small_model(dtype)
    resumed = MasterOptimizer(other.named_parameters(), TrainConfig(**SETTINGS))
    resumed.restore(read, num_updates=optimizer.num_updates)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    run(model, optimizer, range(5, 10))
    run(other, resumed, range(5, 10))
    for name, master in optimizer.masters.items():
        assert torch.equal(master, resumed.masters[name])
    assert resumed.num_updates == 10


def memory_of(optimizer: MasterOptimizer) -> ReadPiece:
    """What is read from a checkpoint of its state."""
    kept = {(piece.kind, piece.name): piece.values.clone() for piece in optimizer.pieces()}

    def read(kind: str, name: str, start: int, end: int) -> torch.Tensor | None:
        return kept[kind, name][start:end].clone() if (kind, name) in kept else None

    return read


def test_each_rank_hands_over_its_share_of_the_tensors_that_all_hold() -> None:
    model = small_model()
    whole = MasterOptimizer(model.named_parameters(), TrainConfig())
    backward(model, 0)
    whole.collect_gradients()
    whole.step(1e-2)
    shares = []
    for number in range(3):
        share = MasterOptimizer(model.named_parameters(), TrainConfig(), Ranks(number, 3))
        share.restore(memory_of(whole), num_updates=1)
        shares.append({(piece.kind, piece.name): piece.values for piece in share.pieces()})
    assert sum(map(len, shares)) == 3 * 4
    together = {key: values for share in shares for key, values in share.items()}
    for piece in whole.pieces():
        assert torch.equal(together[piece.kind, piece.name], piece.values)
        assert piece.values.shape == (whole.shapes()[piece.name].numel(),)


def test_nothing_trainable_is_an_error() -> None:
    with pytest.raises(TrainingError, match="nothing is trainable"):
        MasterOptimizer([], TrainConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_skips_what_the_host_would_have_skipped(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's fused kernel stands for that of a GPU: it is told to skip before anyone has seen the numbers."""
    train = TrainConfig(learning_rate=0.1, weight_decay=0.1)
    options = adamw._options
    monkeypatch.setattr(adamw, "_options", lambda *more: options(*more) | {"fused": True})
    by_host, by_device = ({"w": torch.nn.Parameter(torch.ones(3, 2, dtype=dtype))} for _ in range(2))
    waiting, queued = (MasterOptimizer(weights.items(), train) for weights in (by_host, by_device))
    monkeypatch.setattr(waiting, "_can_skip_on_device", lambda: False)
    limits = Limits(loss=5.0, grad_norm=50.0)
    for factor, loss in [
        (1.0, 1.0),
        (float("nan"), 1.0),
        (2.0, 6.0),
        (100.0, 1.0),
        (float("inf"), 1.0),
        (3.0, 2.0),
    ]:
        for optimizer, weights in ((waiting, by_host), (queued, by_device)):
            (weight,) = weights.values()
            weight.grad = torch.full_like(weight, factor)
            optimizer.collect_gradients()
        found = [o.update(torch.tensor(loss), 0.1, limits) for o in (waiting, queued)]
        assert found[0][0] == found[1][0] == loss
        np.testing.assert_equal(found[0][1], found[1][1])
        assert torch.equal(by_host["w"], by_device["w"])
        assert waiting.num_updates == queued.num_updates
    assert queued.num_updates == 2
    for ours, expected in zip(queued.pieces(), waiting.pieces(), strict=True):
        assert torch.equal(ours.values, expected.values)
