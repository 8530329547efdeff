"""AdamW over the slices that FSDP2 leaves on each rank: fp32 masters, moments and gradients of a share of each weight."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from schemas.training_config import TrainConfig
from trainer.optimizers import NO_LIMITS, ComputeLoss, Limits, trainable
from trainer.pieces import KINDS, MOMENTS, Piece, ReadPiece, Shapes, stored_bytes
from trainer.ranks import Ranks
from trainer.updates.adamw import step_count, torch_adamw

MAX_KEPT_GRADIENT_NUMBERS = 1 << 28
"""Up to so many trained weights (1 GiB of fp32) the whole gradient is kept on each rank until the last micro-step,
and sent once; above, each micro-step sends it and only a slice is kept."""


def element_range(parameter: DTensor) -> tuple[int, int]:
    """Which elements of the flattened whole are on this rank: cut along the first dimension they are one run."""
    num_rows, count = parameter.shape[0], parameter.device_mesh.size()
    rows_per_rank = -(-num_rows // count)
    row_size = math.prod(parameter.shape[1:])
    start = min(parameter.device_mesh.get_local_rank() * rows_per_rank, num_rows) * row_size
    return start, start + parameter.to_local().numel()


class ShardedAdamW:
    """A trainer.optimizers.Optimizer. The masters share memory with what FSDP2 gathers from, unless train.offload
    keeps masters and moments on the CPU.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        units: Sequence[FSDPModule],
        train: TrainConfig,
        ranks: Ranks,
    ) -> None:
        self.parameters: dict[str, DTensor] = trainable(parameters)  # type: ignore[assignment]
        self._units = units
        self._ranks = ranks
        self._max_grad_norm = train.max_grad_norm or math.inf
        self._sends_once = sum(p.numel() for p in self.parameters.values()) <= MAX_KEPT_GRADIENT_NUMBERS
        for unit in units:
            unit.unshard()  # once, so that FSDP2 allocates no slice anew after this
            unit.reshard()
        self._is_offloaded = train.offload == "optimizer"
        self.masters = {name: torch.nn.Parameter(self._master(p)) for name, p in self.parameters.items()}
        # An empty slice, of a weight with fewer rows than ranks, has nothing to update.
        self._adamw = torch_adamw([m for m in self.masters.values() if m.numel()], train)
        self.num_updates = 0

    def _master(self, parameter: DTensor) -> torch.Tensor:
        local: torch.Tensor = parameter.to_local().detach()
        return local.to("cpu", copy=True) if self._is_offloaded else local

    def backward(self, compute_loss: ComputeLoss, *, is_last: bool = True) -> torch.Tensor:
        for unit in self._units:
            unit.set_requires_gradient_sync(is_last or not self._sends_once, recurse=False)
        loss = compute_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def update(
        self,
        loss: torch.Tensor,
        learning_rate: float,
        limits: Limits = NO_LIMITS,
        *,
        loss_scale: float = 1.0,
    ) -> tuple[float, float]:
        self._take_gradients()
        gradients = [m.grad for m in self.masters.values() if m.grad is not None and m.grad.numel()]
        if loss_scale != 1.0 and gradients:
            torch._foreach_div_(gradients, loss_scale)
        norms = torch._foreach_norm(gradients) if gradients else []
        squares = sum((norm.double().square() for norm in norms), loss.new_zeros((), dtype=torch.float64))
        # One wait for the device a step, here: the update depends on both numbers.
        loss_value, square = self._ranks.add_up(
            torch.stack([loss.double(), squares.to(loss.device)])
        ).tolist()
        grad_norm = math.sqrt(square) if square >= 0 else math.nan
        if limits.allow(loss_value, grad_norm):
            self._clip(gradients, grad_norm)
            self._step(learning_rate)
        self.drop_gradients()
        return loss_value, grad_norm

    def _take_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            gradient, master = parameter.grad, self.masters[name]
            master.grad = gradient.to_local().to(master.device) if isinstance(gradient, DTensor) else None

    def _clip(self, gradients: list[torch.Tensor], grad_norm: float) -> None:
        factor = self._max_grad_norm / (grad_norm + 1e-6)
        if factor < 1.0:
            torch._foreach_mul_(gradients, factor)

    def _step(self, learning_rate: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.num_updates += 1
        self._write_back()

    @torch.no_grad()
    def _write_back(self) -> None:
        if self._is_offloaded:
            for name, parameter in self.parameters.items():
                parameter.to_local().copy_(self.masters[name])

    def drop_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.masters[name].grad = None

    # State, by parameter name --------------------------------------------------------------------------------

    def shapes(self) -> Shapes:
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    def pieces(self) -> Iterator[Piece]:
        for name, start, master in self._slices():
            yield Piece("weight", name, start, master.detach().view(-1))
            state = self._adamw.state.get(master, {})
            for kind in MOMENTS:
                if kind in state:
                    yield Piece(kind, name, start, state[kind].view(-1))

    def num_bytes(self) -> int:
        return len(KINDS) * stored_bytes(master for _, _, master in self._slices())

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()

    @torch.no_grad()
    def restore(self, read: ReadPiece, *, num_updates: int) -> None:
        for name, start, master in self._slices():
            end = start + master.numel()
            weight = read("weight", name, start, end)
            assert weight is not None, "a checkpoint holds all weights"
            master.copy_(weight.view(master.shape))
            moments = {kind: read(kind, name, start, end) for kind in MOMENTS}
            if found := {kind: moment for kind, moment in moments.items() if moment is not None}:
                there = {kind: moment.view(master.shape).to(master.device) for kind, moment in found.items()}
                self._adamw.state[master] = {"step": step_count(num_updates, master), **there}
        self.num_updates = num_updates
        self._write_back()

    def _slices(self) -> Iterator[tuple[str, int, torch.nn.Parameter]]:
        """Name, first element and master of each slice that is not empty."""
        for name, master in self.masters.items():
            if master.numel():
                yield name, element_range(self.parameters[name])[0], master
