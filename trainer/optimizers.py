"""What a strategy's optimiser does, and the one of strategies whose ranks hold everything: any update over masters.

Parameters compute in the model's dtype; what the optimiser adds up is fp32. In bf16 alone, 8 bits of mantissa
lose every update below 1/256 of a weight.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch

from schemas.errors import TrainingError
from schemas.training_config import TrainConfig
from trainer.averaging import MovingAverage
from trainer.pieces import Piece, ReadPiece, Shapes, own_names, stored_bytes
from trainer.ranks import ALONE, Ranks
from trainer.updates import UPDATES, Kind
from trainer.updates.parts import ByTorch, State, Weight
from trainer.updates.schedule_free import computing_weight

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

    def num_bytes(self) -> int:
        """Room for all pieces of this rank, once every weight was updated."""

    def restore(self, read: ReadPiece, *, num_updates: int) -> None:
        """Take over what was saved, of weights of these shapes: masters, moments, counts, and what computes."""

    def averaged(self) -> AbstractContextManager[None]:
        """In here the model computes with the averages of its trained weights, where there are any: they are what is
        validated and published. The training's own weights come back after it, bit for bit.
        """


class MasterOptimizer:
    """Any update of trainer/updates, stepping masters and writing them back into the parameters. Each rank holds all.

    The master of an fp32 parameter is the parameter itself, unless the model computes with another weight than the one
    that steps; an update without masters steps the parameters themselves. Gradients are added up in fp32, one
    micro-step after the other.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        train: TrainConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        self.parameters = trainable(parameters)
        self._train = train
        self._ranks = ranks
        self._kind = UPDATES[train.optimizer]
        self.masters = {name: _master(parameter, self._kind) for name, parameter in self.parameters.items()}
        self._weights = {
            name: _weight(name, number, master, train)
            for number, (name, master) in enumerate(self.masters.items())
        }
        self._update = self._kind.build(list(self._weights.values()), train, ranks)
        self._average = MovingAverage(self.masters, train.ema_decay) if train.ema_decay else None
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
        numbers = torch.cat([summed.reshape(1), self.clip().reshape(1), num_gradients])
        if self._can_skip_on_device():
            return self._update_or_skip(numbers, learning_rate, limits)
        # One wait for the device a step, here: the update depends on both numbers.
        loss_value, grad_norm, *counts = numbers.tolist()
        for master, count in zip(self.masters.values(), counts, strict=False):
            master.grad = master.grad if count else None
        if limits.allow(loss_value, grad_norm):
            self.step(learning_rate)
        else:
            self.drop_gradients()
        return loss_value, grad_norm

    def _can_skip_on_device(self) -> bool:
        can = isinstance(self._update, ByTorch) and self._update.can_skip
        return can and self._ranks.count == 1 and self._average is None

    @torch.no_grad()
    def _update_or_skip(
        self, numbers: torch.Tensor, learning_rate: float, limits: Limits
    ) -> tuple[float, float]:
        """The device itself skips what the limits forbid: all is queued before its numbers are known here.

        Otherwise a GPU has nothing to do while Python prepares the update: 6 of 448 ms in a profile of an 8B step.
        """
        arrived = begin_reading(numbers)
        highest = (min(limit, torch.finfo(torch.float32).max) for limit in limits)  # it is finite
        is_allowed = [number <= limit for number, limit in zip(numbers, highest, strict=True)]
        assert isinstance(self._update, ByTorch)
        self._update.step(learning_rate, skip=1.0 - (is_allowed[0] & is_allowed[1]).float())
        self._write_back()
        self.drop_gradients()
        loss, grad_norm = arrived()
        self.num_updates += limits.allow(loss, grad_norm)
        return loss, grad_norm

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
        """After each backward pass: add gradients up in fp32. Few calls for all: one a weight keeps a GPU waiting."""
        added: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        copied: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            targets, sources = copied if master.grad is None else added
            master.grad = torch.empty_like(master) if master.grad is None else master.grad
            targets.append(master.grad)
            sources.append(parameter.grad)
            parameter.grad = None
        if copied[0]:
            torch._foreach_copy_(*copied)
        if added[0]:
            torch._foreach_add_(*added)

    def clip(self) -> torch.Tensor:
        """Norm of the whole gradient before clipping; clips it to max_grad_norm. No synchronisation."""
        return torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self._max_grad_norm)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update of masters and parameters; drops the gradients."""
        self._update.step(learning_rate)
        self.num_updates += 1
        if self._average is not None:
            self._average.add(self.masters, self.num_updates)
        self._write_back()
        self.drop_gradients()

    def _write_back(self) -> None:
        if self._kind.moves_apart:
            for name, parameter in self.parameters.items():
                weight = self._weights[name]
                parameter.copy_(computing_weight(self._train, weight.parameter, self._update.state(weight)))
            return
        pairs = [
            (p, self.masters[name]) for name, p in self.parameters.items() if self.masters[name] is not p
        ]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [master for _, master in pairs])

    def drop_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.masters[name].grad = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        averages = {name: state["average"] for name, state in self._states() if "average" in state}
        kept = {name: self.parameters[name].detach().clone() for name in averages}
        self._compute_with(averages)
        try:
            yield
        finally:
            self._compute_with(kept)

    @torch.no_grad()
    def _compute_with(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self.parameters[name].copy_(tensor)

    # State, by parameter name --------------------------------------------------------------------------------

    def _states(self) -> Iterator[tuple[str, State]]:
        """Of each weight, all that is kept beside it."""
        for name, weight in self._weights.items():
            average = {} if self._average is None else {"average": self._average.of[name]}
            yield name, self._update.state(weight) | average

    def shapes(self) -> Shapes:
        return {name: master.shape for name, master in self.masters.items()}

    def pieces(self) -> Iterator[Piece]:
        own = set(own_names(list(self.masters), self._ranks))
        for name, state in self._states():
            if name in own:
                yield Piece("weight", name, 0, self.masters[name].detach().view(-1))
                yield from (Piece(kind, name, 0, tensor.view(-1)) for kind, tensor in state.items())

    def num_bytes(self) -> int:
        total = 0
        for name in own_names(list(self.masters), self._ranks):
            weight = self._weights[name]
            total += stored_bytes([weight.parameter, *self._empty_state(weight).values()])
            total += stored_bytes([self._average.of[name]]) if self._average is not None else 0
        return total

    def _empty_state(self, weight: Weight) -> State:
        """Kinds and shapes alone: nothing is allocated."""
        on_meta = torch.nn.Parameter(weight.parameter.detach().to("meta"))
        return self._update.empty(weight._replace(parameter=on_meta))

    @torch.no_grad()
    def restore(self, read: ReadPiece, *, num_updates: int) -> None:
        for name, weight in self._weights.items():
            weight.parameter.copy_(_saved(read, "weight", name, weight.parameter))
            if self._average is not None:
                self._average.of[name].copy_(_saved(read, "average", name, weight.parameter))
            if any(read(kind, name, 0, 0) is not None for kind in self._empty_state(weight)):
                for kind, tensor in self._update.begin(weight, num_updates).items():
                    tensor.copy_(_saved(read, kind, name, tensor))
        self.num_updates = num_updates
        self._write_back()


def begin_reading(numbers: torch.Tensor) -> Callable[[], list[float]]:
    """Ask a device for numbers; what is returned waits for them, and for nothing that is queued from now on."""
    if not numbers.is_cuda:
        return numbers.tolist
    on_host = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
    have_arrived = torch.cuda.Event()
    have_arrived.record()

    def wait() -> list[float]:
        have_arrived.synchronize()
        return on_host.tolist()

    return wait


def _saved(read: ReadPiece, kind: str, name: str, like: torch.Tensor) -> torch.Tensor:
    """Raises TrainingError where a checkpoint lacks it, or has another number of numbers of it."""
    found = read(kind, name, 0, like.numel())
    if found is None or found.numel() != like.numel():
        raise TrainingError(
            f"the checkpoint holds {0 if found is None else found.numel()} numbers of {kind} of {name}, expected "
            f"{like.numel()}; it belongs to other settings, use a new run_root"
        )
    return found.view(like.shape)


def trainable(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.nn.Parameter]:
    """By name. Raises TrainingError when there are none."""
    found = dict(parameters)
    if not found:
        raise TrainingError("nothing is trainable; check train.method and train.lora.targets")
    return found


def trained_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _weight(name: str, number: int, master: torch.nn.Parameter, train: TrainConfig) -> Weight:
    """Matrices decay; norms and biases don't: pulling a scale towards 0 is no regularisation.

    The second matrix of LoRA may learn faster. Source: Hayou et al., LoRA+ (2024).
    """
    decay = train.weight_decay if master.dim() >= 2 else 0.0
    rate_factor = train.lora.learning_rate_ratio if ".lora_B." in name else 1.0
    return Weight(name, number, master, decay, rate_factor)


def _master(parameter: torch.nn.Parameter, kind: Kind) -> torch.nn.Parameter:
    if kind.is_masterless:
        parameter.grad_dtype = torch.float32  # autograd adds micro-steps up in it
        return parameter
    if parameter.dtype == torch.float32 and not kind.moves_apart:
        return parameter
    return torch.nn.Parameter(parameter.detach().float().clone())
