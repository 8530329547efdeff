"""Dropout belongs to a bin: neither the cut of a step nor recomputation changes a draw."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.tiny_models import tiny_model, tiny_run
from trainer.building import apply_method, build_optimizer, load_model, place, use_draws
from trainer.draws import BinDropout, drawing_for, use_bin_dropout
from trainer.job import plan_job
from trainer.stepping import run_step

BINS = ((11, 7), (12, 5), (13, 9))


def dropped(bins: tuple[tuple[int, int], ...], *, padding: int = 0) -> torch.Tensor:
    row = torch.ones(1, sum(length for _, length in bins) + padding, 16)
    with drawing_for(bins):
        found: torch.Tensor = BinDropout(0.25, 3).train()(row)
    return found


@pytest.mark.parametrize("padding", [0, 4])
def test_a_bin_draws_the_same_alone_and_among_others(padding: int) -> None:
    together = dropped(BINS, padding=padding)
    alone = torch.cat([dropped((bin,)) for bin in BINS], dim=1)
    assert torch.equal(together[:, : alone.shape[1]], alone)
    assert torch.equal(together[:, alone.shape[1] :], torch.ones(1, padding, 16))
    assert not torch.equal(alone[:, :5], alone[:, 7:12])


def test_the_share_that_is_dropped_and_the_scale_of_the_rest_are_torchs() -> None:
    found = dropped(((5, 4000),))
    assert float((found == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.75])


def test_layers_and_calls_outside_of_a_row_draw_by_themselves() -> None:
    row = torch.ones(1, 7, 16)
    with drawing_for(BINS[:1]):
        first, second = (BinDropout(0.5, number).train()(row) for number in (0, 1))
        assert not torch.equal(first, second)
        assert torch.equal(BinDropout(0.5, 0).eval()(row), row)
    torch.manual_seed(1)
    expected = torch.nn.functional.dropout(row, 0.5)
    torch.manual_seed(1)
    assert torch.equal(BinDropout(0.5, 0).train()(row), expected)


def test_every_dropout_of_a_model_is_replaced() -> None:
    model = tiny_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    num_before = sum(type(module) is torch.nn.Dropout and module.p > 0 for module in model.modules())
    use_bin_dropout(model)
    found = [module for module in model.modules() if isinstance(module, BinDropout)]
    assert len(found) == num_before > 4
    assert sorted(module.number for module in found) == list(range(num_before))


def gradients(folder: Path, **train: Any) -> tuple[float, np.ndarray]:
    """Loss and gradient of the first step."""
    settings = {"bins_per_step": 4, **train}
    job = plan_job(tiny_run(folder, train=settings))
    model = apply_method(job, load_model(job))
    use_draws(job, model)
    model = place(job, model)
    optimizer: Any = build_optimizer(job, model)
    found = {}
    optimizer.update = lambda loss, *_, **__: (
        found.update({name: master.grad.clone() for name, master in optimizer.masters.items()})
        or (float(loss), 0.0)
    )
    outcome = run_step(job, model, optimizer, job.steps[0])
    return outcome.loss, torch.cat([grad.flatten() for grad in found.values()]).numpy()


@pytest.mark.parametrize("draws", [{"lora": {"dropout": 0.3}}, {"neftune_alpha": 20.0}], ids=str)
def test_neither_the_cut_of_a_step_nor_recomputing_changes_its_gradient(
    tmp_path: Path, draws: dict[str, Any]
) -> None:
    loss, gradient = gradients(tmp_path, **draws)
    for other in ({"bins_per_micro_step": 2}, {"bins_per_micro_step": 4}, {"gradient_checkpointing": True}):
        other_loss, other_gradient = gradients(tmp_path, **draws, **other)
        assert other_loss == pytest.approx(loss, abs=1e-5), other
        np.testing.assert_allclose(other_gradient, gradient, atol=1e-5, err_msg=str(other))
    without = gradients(tmp_path)[1]
    assert not np.allclose(without, gradient, atol=1e-3), "what is drawn says something"
