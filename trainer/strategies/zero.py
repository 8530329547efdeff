"""DeepSpeed's ZeRO 1 and 2: each rank keeps a part of the masters and moments, with ZeRO 2 of the gradients too.

The base model stays whole on each rank and DeepSpeed never sees it, so it may be held in 8 bits. DeepSpeed sums the
gradients, clips, updates, and gathers the new weights; it neither reads nor writes checkpoints here, since its own
are pickles for one number of ranks. Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models (2020).
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from schemas.training_config import TrainConfig
from trainer.optimizers import (
    NO_LIMITS,
    ComputeLoss,
    Limits,
    step_count,
    torch_adamw,
    trainable,
    trained_parameters,
)
from trainer.pieces import KINDS, MOMENTS, Piece, ReadPiece, Shapes
from trainer.ranks import Ranks

MAX_BUCKET_NUMBERS = 1 << 26
"""Gradients in one message. DeepSpeed allocates a buffer of this size, by default 500 million numbers."""


def build_optimizer(model: torch.nn.Module, train: TrainConfig, ranks: Ranks, *, stage: int) -> "ZeroAdamW":
    return ZeroAdamW(trained_parameters(model), train, ranks, stage=stage)


class ZeroAdamW:
    """A trainer.optimizers.Optimizer: torch's AdamW inside DeepSpeed."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        train: TrainConfig,
        ranks: Ranks,
        *,
        stage: int,
    ) -> None:
        self.parameters = trainable(parameters)
        self._ranks = ranks
        self._adamw = torch_adamw(self.parameters.values(), train)
        deepspeed = _import_deepspeed(ranks.device)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how much memory is in use
            self._engine: Any = deepspeed.initialize(
                model=_TrainedWeights(self.parameters.values()),
                optimizer=self._adamw,
                config=_settings(list(self.parameters.values()), train, stage),
                dist_init_required=False,
            )[0]
        self._make_moments()

    def _make_moments(self) -> None:
        """All at 0, as torch would in the first update. DeepSpeed looks there which part of them is whose, and it
        looks once, after the first of its groups: left to themselves, the moments of a second one are not found.
        """
        for part in self._parts():
            empty = {kind: torch.zeros_like(part) for kind in MOMENTS}
            self._adamw.state[part] = {"step": step_count(0, part), **empty}
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _parts(self) -> Iterator[torch.Tensor]:
        """This rank's parts of the masters, one for each group of weights: DeepSpeed has put them in their place."""
        for group in self._adamw.param_groups:
            yield from group["params"]

    def backward(self, compute_loss: ComputeLoss, *, is_last: bool = True) -> torch.Tensor:
        loss = self._engine(compute_loss)
        # A loss that is not finite may have a finite gradient; so it has not, and DeepSpeed drops the step.
        self._engine.backward(loss * (1 + 0 * loss.detach()), scale_wrt_gas=False)
        return loss.detach()

    def update(
        self, loss: torch.Tensor, learning_rate: float, limits: Limits = NO_LIMITS
    ) -> tuple[float, float]:
        assert limits == NO_LIMITS, "DeepSpeed decides by itself which step it skips: a rule refuses limits"
        loss_value = float(self._ranks.add_up(loss))
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return loss_value, float(self._engine.get_global_grad_norm())

    def drop_gradients(self) -> None:
        raise NotImplementedError("DeepSpeed exchanges gradients in the backward pass")

    def shapes(self) -> Shapes:
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    def pieces(self) -> Iterator[Piece]:
        for name, fragment in self._fragments():
            for kind in KINDS:
                yield Piece(kind, name, fragment.lp_fragment_address.start, _numbers(fragment, kind))

    def _fragments(self) -> Iterator[tuple[str, Any]]:
        """Of each weight the part whose master is here, as DeepSpeed's own record of it."""
        for name, parameter in self.parameters.items():
            fragment: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if fragment is not None:
                yield name, fragment

    @torch.no_grad()
    def restore(self, read: ReadPiece, *, num_updates: int) -> None:
        for part in self._parts():
            self._adamw.state[part]["step"].fill_(float(num_updates))
        for name, fragment in self._fragments():
            start = fragment.lp_fragment_address.start
            for kind in KINDS:
                here = _numbers(fragment, kind)
                found = read(kind, name, start, start + here.numel())
                here.copy_(found if found is not None else torch.zeros_like(here))
        self._engine.optimizer.update_lp_params()


def _numbers(fragment: Any, kind: str) -> torch.Tensor:
    """fp32, 1-D, where DeepSpeed keeps them."""
    found: torch.Tensor = fragment.get_hp_fragment(None if kind == "weight" else kind)
    return found


class _TrainedWeights(torch.nn.Module):
    """All that DeepSpeed may touch: it casts, moves and broadcasts every parameter of the module that it gets."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__()
        self.trained = torch.nn.ParameterList(parameters)

    def forward(self, compute_loss: ComputeLoss) -> torch.Tensor:
        return compute_loss()


def _settings(parameters: list[torch.nn.Parameter], train: TrainConfig, stage: int) -> dict[str, Any]:
    bucket = min(sum(parameter.numel() for parameter in parameters), MAX_BUCKET_NUMBERS)
    bucket += bucket % 2  # it wants an even one
    return {
        "train_micro_batch_size_per_gpu": 1,  # it counts samples by it, for its own log
        "gradient_accumulation_steps": 1,
        # We say with step() when the micro-steps of a step are done. The loss is divided by the whole step's weight.
        "managed_gradient_accumulation": False,
        "gradient_allreduce_op": "sum",
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": parameters[0].dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_force_ds_cpu_optimizer": False,
    }


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told what it would otherwise find out by compiling programs and asking for MPI."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed
    import deepspeed.ops

    # DeepSpeed 0.19 gathers by a name that torch 2.13 is giving up; nobody can act on the warning.
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor. is deprecated", FutureWarning)
    # It would compile its own all-reduce for CPUs, half a minute at first use, and look for a compiler for that.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
