"""AdamW in 16 bits: bfloat16 weights without fp32 masters, bfloat16 moments, and beside each weight what rounding has
left over, which the next update starts from (Kahan's summation).

8 bytes a weight in place of 14. An update is reckoned in fp32, weight by weight. Moments are rounded up or down by
chance: rounded to the nearest, a mean of squares whose gradients have become small would never fall again, since
bfloat16 has no number 0.1 % below another.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch

from schemas.errors import RefusedError
from schemas.training_config import TrainConfig
from trainer.draws import draw_seed
from trainer.ranks import Ranks
from trainer.updates import adamw
from trainer.updates.parts import ByFormula, BySeveral, Formula, State, Step, Weight


def build(weights: Sequence[Weight], train: TrainConfig, ranks: Ranks) -> BySeveral:
    """Raises RefusedError for a model that does not compute in bfloat16."""
    if not any(_is_bfloat16(weight) for weight in weights):
        dtype = str(weights[0].parameter.dtype).removeprefix("torch.")
        raise RefusedError(
            f"train.optimizer is adamw_bf16 and the model computes in {dtype}: its trained weights are bfloat16 and "
            "nothing else; set model.dtype to bfloat16, or train.optimizer to adamw or adamw_8bit"
        )
    return BySeveral(
        weights,  # some families keep a few weights in fp32
        _is_bfloat16,
        lambda own: ByFormula(own, Formula(_empty, partial(_change, train))),
        lambda others: adamw.build(others, train, ranks),
    )


def _is_bfloat16(weight: Weight) -> bool:
    return weight.parameter.dtype == torch.bfloat16


def _empty(weight: Weight) -> State:
    return {kind: torch.zeros_like(weight.parameter) for kind in ("compensation", "exp_avg", "exp_avg_sq")}


def _change(train: TrainConfig, weight: Weight, gradient: torch.Tensor, state: State, step: Step) -> None:
    beta1, beta2 = train.adam_beta1, train.adam_beta2
    mean = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
    square = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    seed = draw_seed(train.seed, weight.number, step.number)
    draws = torch.Generator(gradient.device).manual_seed(seed)
    state["exp_avg"].copy_(rounded_by_chance(mean, draws))
    state["exp_avg_sq"].copy_(rounded_by_chance(square, draws))
    root = square.sqrt_().div_(math.sqrt(1 - beta2**step.number)).add_(train.adam_epsilon)
    exact = weight.parameter.float().add_(state["compensation"])
    exact.mul_(1 - step.learning_rate * weight.decay)
    exact.addcdiv_(mean, root, value=-step.learning_rate / (1 - beta1**step.number))
    weight.parameter.copy_(exact)
    state["compensation"].copy_(exact.sub_(weight.parameter))


def rounded_by_chance(values: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """fp32 -> bfloat16, one of the two neighbours, the nearer one the more often: right on average."""
    bits = values.view(torch.int32)
    carried = bits + torch.empty_like(bits).random_(0, 1 << 16, generator=draws)
    return carried.bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()
