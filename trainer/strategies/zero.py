"""DeepSpeed's ZeRO 1 and 2: each rank keeps a part of the masters and moments, with ZeRO 2 of the gradients too.

The base model stays whole on each rank and DeepSpeed never sees it, so it may be held in 8 bits. DeepSpeed sums the
gradients, clips, updates, and gathers the new weights; it neither reads nor writes checkpoints here, since its own
are pickles for one number of ranks. Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models (2020).
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from schemas.training_config import TrainConfig
from trainer.optimizers import (
    ComputeLoss,
    Tensors,
    check_restored,
    step_count,
    trainable,
)
from trainer.ranks import Ranks
from trainer.strategies.deepspeed_engine import engine_settings, start_engine

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], train: TrainConfig, ranks: Ranks, *, stage: int
) -> "ZeroAdamW":
    trained = trainable(parameters)
    weights = list(trained.values())
    settings = engine_settings(weights, train, stage=stage) | {"gradient_allreduce_op": "sum"}
    return ZeroAdamW(trained, start_engine(_TrainedWeights(weights), weights, train, ranks, settings), ranks)


class ZeroAdamW:
    """A trainer.optimizers.Optimizer: torch's AdamW inside DeepSpeed."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], engine: Any, ranks: Ranks) -> None:
        self.parameters = parameters
        self._ranks = ranks
        self._engine = engine
        self._is_stage_3 = engine.zero_optimization_partition_weights()
        self._adamw = engine.optimizer.optimizer
        self._make_moments()

    def _make_moments(self) -> None:
        """All at 0, as torch would in the first update. DeepSpeed looks there which part of them is whose, and it
        looks once, after the first of its groups: left to themselves, the moments of a second one are not found.
        """
        for part in self._parts():
            empty = {kind: torch.zeros_like(part) for kind in MOMENTS}
            self._adamw.state[part] = {"step": step_count(0, part), **empty}
        if not self._is_stage_3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _parts(self) -> Iterator[torch.Tensor]:
        """This rank's parts of the masters, one for each group of weights: DeepSpeed has put them in their place."""
        if self._is_stage_3:
            yield from self._engine.optimizer.fp32_partitioned_groups_flat
        for group in self._adamw.param_groups:
            yield from group["params"]

    def backward(self, compute_loss: ComputeLoss) -> torch.Tensor:
        loss = self._engine(compute_loss)
        # A loss that is not finite may have a finite gradient; so it has not, and DeepSpeed drops the step.
        factor = 1 + 0 * loss.detach()
        if self._is_stage_3:  # it can't but take the mean over the ranks
            factor *= self._ranks.count
        self._engine.backward(loss * factor, scale_wrt_gas=False)
        return loss.detach()

    def update(self, loss: torch.Tensor, learning_rate: float) -> tuple[float, float]:
        loss_value = float(self._ranks.add_up(loss))
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return loss_value, float(self._engine.get_global_grad_norm())

    def weights(self) -> Tensors:
        from deepspeed.utils import safe_get_full_fp32_param

        gathered = ((name, safe_get_full_fp32_param(p)) for name, p in self.parameters.items())
        return self._kept(gathered)

    def moments(self) -> Tensors:
        from deepspeed.utils import safe_get_full_optimizer_state

        names = ((kind, name, p) for kind in MOMENTS for name, p in self.parameters.items())
        return self._kept(
            (f"{kind}.{name}", safe_get_full_optimizer_state(p, kind)) for kind, name, p in names
        )

    def _kept(self, gathered: Iterable[tuple[str, torch.Tensor]]) -> Tensors:
        """All ranks gather, one weight at a time; the first one keeps them, off the GPU."""
        return {name: tensor.cpu() for name, tensor in gathered if self._ranks.is_first}

    def restore(self, weights: Tensors, moments: Tensors, *, num_updates: int) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        check_restored(weights, self.parameters)
        for part in self._parts():
            self._adamw.state[part]["step"].fill_(float(num_updates))
        for name, parameter in self.parameters.items():
            safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))
            for kind in MOMENTS:
                value = moments.get(f"{kind}.{name}", torch.zeros_like(weights[name]))
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), kind)
        self._engine.optimizer.update_lp_params()


class _TrainedWeights(torch.nn.Module):
    """All that DeepSpeed may touch: it casts, moves and broadcasts every parameter of the module that it gets."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__()
        self.trained = torch.nn.ParameterList(parameters)

    def forward(self, compute_loss: ComputeLoss) -> torch.Tensor:
        return compute_loss()
