"""What a strategy's optimiser does, AdamW over fp32 masters of the trained weights, and learning rates.

Parameters compute in the model's dtype; what the optimiser adds up is fp32. In bf16 alone, 8 bits of mantissa
lose every update below 1/256 of a weight.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

from schemas.errors import TrainingError
from schemas.training_config import TrainConfig
from trainer.pieces import MOMENTS, Piece, ReadPiece, Shapes, own_names, read_whole
from trainer.ranks import ALONE, Ranks
from trainer.weights import whole_shape

ComputeLoss = Callable[[], torch.Tensor]


class Limits(NamedTuple):
    """Above them a step is skipped, as one whose numbers are not finite."""

    loss: float = math.inf
    grad_norm: float = math.inf

    def allow(self, loss: float, grad_norm: float) -> bool:
        return _is_below(loss, self.loss) and _is_below(grad_norm, self.grad_norm)


NO_LIMITS = Limits()


def _is_below(value: float, limit: float) -> bool:
    return math.isfinite(value) and value <= limit


class Optimizer(Protocol):
    """The trained weights, their gradients and moments, wherever a strategy keeps them.

    All ranks call the same methods in the same order. What is saved has the parameters' names and none of a
    strategy's own numbering, so that any other strategy can go on with it.
    """

    def backward(self, compute_loss: ComputeLoss, *, is_last: bool = True) -> torch.Tensor:
        """Compute one micro-step's loss and add its gradient to what is there; the loss, detached.

        `is_last`: no other micro-step of this step follows on this rank, so gradients may be exchanged.
        """

    def update(
        self,
        loss: torch.Tensor,
        learning_rate: float,
        limits: Limits = NO_LIMITS,
        *,
        loss_scale: float = 1.0,
    ) -> tuple[float, float]:
        """End a step: sum the ranks' losses and gradients, clip, and update if the limits allow both.

        `loss` is this rank's part; the gradients are those of `loss_scale` times the loss, and are divided by it.
        Returns the step's loss and the norm of its gradient before clipping.
        """

    def drop_gradients(self) -> None:
        """Forget what was added up since the last update; asked of strategies that can redo a step."""

    def shapes(self) -> Shapes:
        """Of all trained weights, whole, by parameter name; equal on all ranks."""

    def pieces(self) -> Iterator[Piece]:
        """What this rank has to write: over all ranks each number once. Not copied: valid until the next update.

        A weight that was never updated may have no moments. No rank waits for another in here.
        """

    def restore(self, read: ReadPiece, *, num_updates: int) -> None:
        """Take over what was saved, of weights of these shapes: masters, moments, counts, and what computes."""


class MasterAdamW:
    """torch's AdamW, stepping fp32 masters and writing them back into the parameters. Each rank holds all.

    The master of an fp32 parameter is the parameter itself. Other gradients are added up in fp32 by
    `collect_gradients`, one micro-step after the other. Source: Loshchilov and Hutter, Decoupled Weight
    Decay Regularization (2019).
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        train: TrainConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        self.parameters = trainable(parameters)
        self._ranks = ranks
        self.masters = {name: _master(parameter) for name, parameter in self.parameters.items()}
        self._adamw = torch_adamw(self.masters.values(), train)
        self._max_grad_norm = train.max_grad_norm or math.inf
        self.num_updates = 0

    def backward(self, compute_loss: ComputeLoss, *, is_last: bool = True) -> torch.Tensor:
        loss = compute_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.collect_gradients()
        return loss.detach()

    def update(
        self,
        loss: torch.Tensor,
        learning_rate: float,
        limits: Limits = NO_LIMITS,
        *,
        loss_scale: float = 1.0,
    ) -> tuple[float, float]:
        summed, num_gradients = self._sum_over_ranks(loss)
        if loss_scale != 1.0:
            for master in self.masters.values():
                if master.grad is not None:
                    master.grad /= loss_scale
        # One wait for the device a step, here: the update depends on both numbers.
        numbers = torch.cat([summed.reshape(1), self.clip().reshape(1), num_gradients])
        loss_value, grad_norm, *counts = numbers.tolist()
        for master, count in zip(self.masters.values(), counts, strict=False):
            master.grad = master.grad if count else None
        if limits.allow(loss_value, grad_norm):
            self.step(learning_rate)
        else:
            self.drop_gradients()
        return loss_value, grad_norm

    def _sum_over_ranks(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The step's loss, and how many ranks have a gradient of each weight: what none has, is not updated."""
        if self._ranks.count == 1:
            return loss, loss.new_zeros(0)
        masters = list(self.masters.values())
        shared = torch.stack([loss, *(loss.new_tensor(float(m.grad is not None)) for m in masters)])
        self._ranks.add_up(shared)
        for master in masters:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad
        self._ranks.add_up_all([master.grad for master in masters if master.grad is not None])
        return shared[0], shared[1:]

    def collect_gradients(self) -> None:
        """After each backward pass: add gradients up in fp32."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def clip(self) -> torch.Tensor:
        """Norm of the whole gradient before clipping; clips it to max_grad_norm. No synchronisation."""
        return torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self._max_grad_norm)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update of masters and parameters; drops the gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.num_updates += 1
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.masters[name].grad = None

    # State, by parameter name --------------------------------------------------------------------------------

    def shapes(self) -> Shapes:
        return {name: master.shape for name, master in self.masters.items()}

    def pieces(self) -> Iterator[Piece]:
        for name in own_names(list(self.masters), self._ranks):
            master = self.masters[name]
            state = self._adamw.state.get(master, {})
            yield Piece("weight", name, 0, master.detach().view(-1))
            for kind in MOMENTS:
                if kind in state:
                    yield Piece(kind, name, 0, state[kind].view(-1))

    @torch.no_grad()
    def restore(self, read: ReadPiece, *, num_updates: int) -> None:
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            weight = read_whole(read, "weight", name, master.shape)
            assert weight is not None, "a checkpoint holds all weights"
            master.copy_(weight)
            if master is not parameter:
                parameter.copy_(master)
            moments = {kind: read_whole(read, kind, name, master.shape) for kind in MOMENTS}
            if found := {kind: moment for kind, moment in moments.items() if moment is not None}:
                on_device = {kind: moment.to(master.device) for kind, moment in found.items()}
                self._adamw.state[master] = {"step": step_count(num_updates, master), **on_device}
        self.num_updates = num_updates


def trainable(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.nn.Parameter]:
    """By name. Raises TrainingError when there are none."""
    found = dict(parameters)
    if not found:
        raise TrainingError("nothing is trainable; check train.method and train.lora.targets")
    return found


def trained_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def torch_adamw(weights: Iterable[torch.Tensor], train: TrainConfig) -> torch.optim.AdamW:
    """AdamW as the config asks for it; its rate is set anew in each step."""
    everything = list(weights)
    return torch.optim.AdamW(
        _groups(everything, train.weight_decay),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=all(weight.is_cuda for weight in everything),
        foreach=False,
    )


def _groups(weights: Iterable[torch.Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases don't: pulling a scale towards 0 is no regularisation."""
    everything = list(weights)
    matrices = [weight for weight in everything if len(whole_shape(weight)) >= 2]
    vectors = [weight for weight in everything if len(whole_shape(weight)) < 2]
    groups = ((matrices, weight_decay), (vectors, 0.0))
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]


def _master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return torch.nn.Parameter(parameter.detach().float())


def step_count(num_updates: int, weight: torch.Tensor) -> torch.Tensor:
    """AdamW's own count of its updates of a weight."""
    # The fused kernel counts on the GPU, the plain one on the CPU.
    return torch.tensor(float(num_updates), device=weight.device if weight.is_cuda else "cpu")


# Learning rates ---------------------------------------------------------------------------------------------


def learning_rate(train: TrainConfig, step: int, num_steps: int) -> float:
    """Rate of step `step` (from 0) of `num_steps`.

    Warm-up rises in equal parts and never starts at 0; the decay starts at the full rate and would reach its
    end at step `num_steps`. With w warm-up steps this is transformers' schedule of w + 1 warm-up and
    `num_steps` + 1 steps, one step later: no step is spent at rate 0.
    """
    warmup_steps = num_warmup_steps(train, num_steps)
    if step < warmup_steps:
        return train.learning_rate * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    floor = train.min_learning_rate_share
    share = SCHEDULES[train.schedule](min(progress, 1.0))
    if train.schedule != "constant":
        share = floor + (1.0 - floor) * share
    return train.learning_rate * share


def num_warmup_steps(train: TrainConfig, num_steps: int) -> int:
    if train.warmup_steps is not None:
        return min(train.warmup_steps, num_steps)
    return math.ceil(train.warmup_share * num_steps)


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}
