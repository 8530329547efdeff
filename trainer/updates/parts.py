"""What an update is, and the three that others are made of: by a function, by torch's optimisers, by several."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

State = dict[str, torch.Tensor]
"""By a kind of trainer/pieces.py."""


class Weight(NamedTuple):
    """One that is trained. `number` is its place among all; each step shrinks it by learning rate x `decay`, and its
    learning rate is that of the step x `rate_factor`.
    """

    name: str
    number: int
    parameter: torch.nn.Parameter
    decay: float = 0.0
    rate_factor: float = 1.0


class Update(Protocol):
    """Changes weights in place. A weight without a gradient stays, and has no state before its first."""

    def step(self, learning_rate: float) -> None:
        """One update by the gradients that are there."""

    def state(self, weight: Weight) -> State:
        """What it keeps for a weight; empty before its first gradient."""

    def empty(self, weight: Weight) -> State:
        """That state before its first update, in tensors of their own, on the weight's device."""

    def begin(self, weight: Weight, num_updates: int) -> State:
        """The state that it keeps for a weight which was updated so often: the caller fills it in."""


# By a function ----------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """The how many-th update it is, from 1, the learning rate of a weight, and whether it is its first gradient."""

    number: int
    learning_rate: float
    is_first: bool


class Formula(NamedTuple):
    """`empty` is the state before the first update, of a weight on any device; `change` updates weight and state."""

    empty: Callable[[Weight], State]
    change: Callable[[Weight, torch.Tensor, State, Step], None]


class ByFormula:
    """An Update that goes from weight to weight."""

    def __init__(self, weights: Sequence[Weight], formula: Formula) -> None:
        self._weights = weights
        self._formula = formula
        self._states: dict[str, State] = {}
        self._num_updates = 0

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        self._num_updates += 1
        for weight in self._weights:
            gradient = weight.parameter.grad
            if gradient is None:
                continue
            is_first = weight.name not in self._states
            if is_first:
                self._states[weight.name] = self._formula.empty(weight)
            step = Step(self._num_updates, learning_rate * weight.rate_factor, is_first)
            self._formula.change(weight, gradient, self._states[weight.name], step)

    def state(self, weight: Weight) -> State:
        return self._states.get(weight.name, {})

    def empty(self, weight: Weight) -> State:
        return self._formula.empty(weight)

    def begin(self, weight: Weight, num_updates: int) -> State:
        self._num_updates = num_updates
        self._states[weight.name] = self._formula.empty(weight)
        return self._states[weight.name]


# By an optimiser of torch's kind ----------------------------------------------------------------------------


class ByTorch:
    """An Update by a torch.optim.Optimizer over `groups`, which keeps the tensor of a kind under that key.

    `begin` makes the optimiser's state of a weight that was updated so often. With `can_skip` the optimiser's kernels
    themselves leave everything as it is where a tensor on their device says 1.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        keys: Mapping[str, str],
        *,
        empty: Callable[[torch.Tensor], State],
        begin: Callable[[torch.nn.Parameter, int], None],
        can_skip: bool = False,
    ) -> None:
        self.can_skip = can_skip
        self._optimizer = optimizer
        self._keys = keys
        self._empty = empty
        self._begin = begin

    def step(self, learning_rate: float, *, skip: torch.Tensor | None = None) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_factor"]
        if self.can_skip:
            # What torch's fused kernels are told by its GradScaler.
            self._optimizer.found_inf = skip  # type: ignore[attr-defined]
        self._optimizer.step()

    def state(self, weight: Weight) -> State:
        kept = self._optimizer.state.get(weight.parameter, {})
        return {kind: kept[key] for kind, key in self._keys.items() if key in kept}

    def empty(self, weight: Weight) -> State:
        return self._empty(weight.parameter)

    def begin(self, weight: Weight, num_updates: int) -> State:
        self._begin(weight.parameter, num_updates)
        return self.state(weight)


def groups(weights: Sequence[Weight]) -> list[dict[str, Any]]:
    """Weights that decay alike, at the same rate, as torch's optimisers take them."""
    found: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for weight in weights:
        found.setdefault((weight.decay, weight.rate_factor), []).append(weight.parameter)
    return [
        {"params": members, "weight_decay": decay, "rate_factor": factor}
        for (decay, factor), members in found.items()
    ]


# By several -------------------------------------------------------------------------------------------------

Build = Callable[[Sequence[Weight]], Update]


class BySeveral:
    """An Update that leaves some weights to one, the others to another. Either may get none."""

    def __init__(
        self, weights: Sequence[Weight], chosen: Callable[[Weight], bool], build: Build, build_others: Build
    ) -> None:
        own = [weight for weight in weights if chosen(weight)]
        others = [weight for weight in weights if not chosen(weight)]
        updates = [(make(part), part) for make, part in ((build, own), (build_others, others)) if part]
        self._updates = [update for update, _ in updates]
        self._of = {weight.name: update for update, part in updates for weight in part}

    def step(self, learning_rate: float) -> None:
        for update in self._updates:
            update.step(learning_rate)

    def state(self, weight: Weight) -> State:
        return self._of[weight.name].state(weight)

    def empty(self, weight: Weight) -> State:
        return self._of[weight.name].empty(weight)

    def begin(self, weight: Weight, num_updates: int) -> State:
        return self._of[weight.name].begin(weight, num_updates)
