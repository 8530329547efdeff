"""AdamW over fp32 masters of the trained weights, and learning rates in closed form.

Parameters compute in the model's dtype; what the optimiser adds up is fp32. In bf16 alone, 8 bits of mantissa
lose every update below 1/256 of a weight.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from schemas.errors import TrainingError
from schemas.training_config import TrainConfig


class MasterAdamW:
    """torch's AdamW, stepping fp32 masters and writing them back into the parameters.

    The master of an fp32 parameter is the parameter itself. Other gradients are added up in fp32 by
    `collect_gradients`, one micro-step after the other. Source: Loshchilov and Hutter, Decoupled Weight
    Decay Regularization (2019).
    """

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]], train: TrainConfig) -> None:
        self.parameters = dict(parameters)
        if not self.parameters:
            raise TrainingError("nothing is trainable; check train.method and train.lora.targets")
        self.masters = {name: _master(parameter) for name, parameter in self.parameters.items()}
        on_gpu = all(master.is_cuda for master in self.masters.values())
        self._adamw = torch.optim.AdamW(
            _groups(self.masters.values(), train.weight_decay),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            fused=on_gpu,
            foreach=False,
        )
        self._max_grad_norm = train.max_grad_norm or math.inf
        self.num_updates = 0

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

    # State, by parameter name and without torch's own numbering: any strategy can read it -----------------------

    def moments(self) -> dict[str, torch.Tensor]:
        """Both running means of every parameter that was updated, as "exp_avg.<name>" and "exp_avg_sq.<name>"."""
        found = {}
        for name, master in self.masters.items():
            state = self._adamw.state.get(master, {})
            for kind in ("exp_avg", "exp_avg_sq"):
                if kind in state:
                    found[f"{kind}.{name}"] = state[kind]
        return found

    @torch.no_grad()
    def restore(
        self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], *, num_updates: int
    ) -> None:
        """Take over masters, moments and the update count of a checkpoint. Raises TrainingError on a mismatch."""
        _check_names(set(weights), set(self.masters))
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if weights[name].shape != master.shape:
                raise TrainingError(
                    f"checkpointed {name} has shape {tuple(weights[name].shape)}, expected {tuple(master.shape)}"
                )
            master.copy_(weights[name])
            if master is not parameter:
                parameter.copy_(master)
            if f"exp_avg.{name}" in moments:
                self._adamw.state[master] = {
                    "step": torch.tensor(float(num_updates), device=_step_device(master)),
                    "exp_avg": moments[f"exp_avg.{name}"].to(master.device, copy=True),
                    "exp_avg_sq": moments[f"exp_avg_sq.{name}"].to(master.device, copy=True),
                }
        self.num_updates = num_updates


def _groups(masters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases don't: pulling a scale towards 0 is no regularisation."""
    everything = list(masters)
    matrices = [master for master in everything if master.dim() >= 2]
    vectors = [master for master in everything if master.dim() < 2]
    groups = ((matrices, weight_decay), (vectors, 0.0))
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]


def _master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return torch.nn.Parameter(parameter.detach().float())


def _step_device(master: torch.Tensor) -> torch.device:
    # The fused kernel counts steps on the GPU, the plain one on the CPU.
    return master.device if master.is_cuda else torch.device("cpu")


def _check_names(found: set[str], expected: set[str]) -> None:
    if found != expected:
        odd = sorted(found ^ expected)
        raise TrainingError(
            f"the checkpoint holds {len(found)} trained weights, the model has {len(expected)}; first "
            f"difference {odd[0]}: it belongs to other settings, use a new run_root"
        )


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
