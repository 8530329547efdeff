"""DeepSpeed's ZeRO 1 and 2: each rank keeps a part of the masters and moments, with ZeRO 2 of the gradients too.

The base model stays whole on each rank and DeepSpeed never sees it, so it may be quantised. DeepSpeed sums the
gradients, clips, updates, and gathers the new weights; it neither reads nor writes checkpoints here, since its own
are pickles for one number of ranks. Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models (2020).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from schemas.training_config import TrainConfig
from trainer.optimizers import (
    NO_LIMITS,
    ComputeLoss,
    Limits,
    trainable,
    trained_parameters,
)
from trainer.pieces import KINDS, MOMENTS, Piece, ReadPiece, Shapes, stored_bytes
from trainer.ranks import Ranks
from trainer.strategies.deepspeed_engine import engine_settings, start_engine
from trainer.updates.adamw import step_count
from trainer.weights import whole_shape

Parameters = Mapping[str, torch.nn.Parameter]


def build_optimizer(model: torch.nn.Module, train: TrainConfig, ranks: Ranks, *, stage: int) -> "ZeroAdamW":
    parameters = trainable(trained_parameters(model))
    weights = list(parameters.values())
    settings = engine_settings(weights, train, stage=stage, device=ranks.device)
    settings["gradient_allreduce_op"] = "sum"
    engine = start_engine(_TrainedWeights(weights), weights, train, ranks, settings)
    return ZeroAdamW(parameters, engine, ranks, SHARDS)


class Fragment(NamedTuple):
    """This rank's numbers [start, ...) of one flattened weight: by kind, fp32, 1-D, where DeepSpeed keeps them."""

    name: str
    start: int
    numbers: Mapping[str, torch.Tensor]


class Shards(NamedTuple):
    """Where a stage of ZeRO keeps what the optimiser adds up.

    `parts` are this rank's masters, flat, each of many weights; `fragments` say which numbers in them and their
    moments are of which weight; `write_back` casts masters into what computes. With `takes_mean` gradients are
    divided by the number of ranks on the way.
    """

    parts: Callable[[Any], list[torch.Tensor]]
    fragments: Callable[[Any, Parameters], Iterator[Fragment]]
    write_back: Callable[[Any], None]
    takes_mean: bool


class ZeroAdamW:
    """A trainer.optimizers.Optimizer: torch's AdamW inside DeepSpeed."""

    def __init__(self, parameters: Parameters, engine: Any, ranks: Ranks, shards: Shards) -> None:
        self.parameters = parameters
        self._ranks = ranks
        self._engine = engine
        self._shards = shards
        self._adamw = engine.optimizer.optimizer
        self._make_moments()

    def _make_moments(self) -> None:
        """All at 0, as torch would in the first update: so there are some to be restored before it."""
        for part in self._shards.parts(self._engine):
            empty = {kind: torch.zeros_like(part) for kind in MOMENTS}
            self._adamw.state[part] = {"step": step_count(0, part), **empty}

    def backward(self, compute_loss: ComputeLoss, *, is_last: bool = True) -> torch.Tensor:
        loss = self._engine(compute_loss)
        # A loss that is not finite may have a finite gradient; so it has not, and DeepSpeed drops the step.
        factor = 1 + 0 * loss.detach()
        if self._shards.takes_mean:
            factor *= self._ranks.count
        self._engine.backward(loss * factor, scale_wrt_gas=False)
        return loss.detach()

    def update(
        self,
        loss: torch.Tensor,
        learning_rate: float,
        limits: Limits = NO_LIMITS,
        *,
        loss_scale: float = 1.0,
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
        return {name: torch.Size(whole_shape(parameter)) for name, parameter in self.parameters.items()}

    def pieces(self) -> Iterator[Piece]:
        for fragment in self._shards.fragments(self._engine, self.parameters):
            for kind in KINDS:
                yield Piece(kind, fragment.name, fragment.start, fragment.numbers[kind])

    def num_bytes(self) -> int:
        fragments = self._shards.fragments(self._engine, self.parameters)
        return sum(stored_bytes(fragment.numbers.values()) for fragment in fragments)

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()

    @torch.no_grad()
    def restore(self, read: ReadPiece, *, num_updates: int) -> None:
        for part in self._shards.parts(self._engine):
            self._adamw.state[part]["step"].fill_(float(num_updates))
        for name, start, numbers in self._shards.fragments(self._engine, self.parameters):
            for kind, here in numbers.items():
                found = read(kind, name, start, start + here.numel())
                here.copy_(found if found is not None else torch.zeros_like(here))
        self._shards.write_back(self._engine)


class _TrainedWeights(torch.nn.Module):
    """All that DeepSpeed may touch: it casts, moves and broadcasts every parameter of the module that it gets."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__()
        self.trained = torch.nn.ParameterList(parameters)

    def forward(self, compute_loss: ComputeLoss) -> torch.Tensor:
        return compute_loss()


# Where stages 1 and 2 keep them -----------------------------------------------------------------------------


def _parts(engine: Any) -> list[torch.Tensor]:
    return [part for group in engine.optimizer.optimizer.param_groups for part in group["params"]]


def _fragments(engine: Any, parameters: Parameters) -> Iterator[Fragment]:
    # DeepSpeed looks where the moments are once, after the first of its groups; those of a second one come later.
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in parameters.items():
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:  # else another rank has it
            numbers = {kind: mapping.get_hp_fragment(None if kind == "weight" else kind) for kind in KINDS}
            yield Fragment(name, mapping.lp_fragment_address.start, numbers)


def _write_back(engine: Any) -> None:
    engine.optimizer.update_lp_params()


SHARDS = Shards(_parts, _fragments, _write_back, takes_mean=False)
