"""Cross entropy of the trained tokens, without ever holding the logits of a whole row.

Positions are picked before the LM head, so prompts and padding cost no head work, and the head runs over chunks
of them. The sum is what a step needs: its divisor, the step's sum of weights, is known from the plan, so the
result does not depend on how a step is cut into micro-batches.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from schemas.errors import RefusedError
from trainer.attention import packing_arguments, unwrapped
from trainer.data import MicroBatch, Plan
from trainer.fast.pointwise import has_triton
from trainer.loss_by_group import LossSums, SplitLoss
from trainer.padding import computed_batches
from trainer.ranks import ALONE, Ranks
from trainer.shard_reader import ShardReader
from trainer.steps import MicroStep
from trainer.virtual_tokens import padded_hidden_states

LOGITS_PER_CHUNK = 1 << 26
"""Most logits in memory at once, in fp32: 256 MiB."""
ROWS_OF_TILE = 128


class Outcomes(NamedTuple):
    """Of each trained token, float32 [N]: its unweighted loss in nats, differentiable where gradients are on, and 1
    where the most likely token is the right one, else 0.
    """

    losses: torch.Tensor
    is_right: torch.Tensor


def token_losses(model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """Unweighted loss in nats of each trained token: float32 [N], differentiable where gradients are on.

    `model` is a causal language model, in a PEFT wrapper or not, that uses packed attention, on the device of
    the micro-batch. Raises RefusedError for a model without a plain LM head.
    """
    return token_outcomes(model, micro_batch).losses


def token_outcomes(
    model: torch.nn.Module, micro_batch: MicroBatch, *, label_smoothing: float = 0.0
) -> Outcomes:
    """The same, with what was predicted."""
    hidden = hidden_states(model, micro_batch).index_select(0, micro_batch.target_positions)
    return head_outcomes(model, hidden, micro_batch.targets, label_smoothing=label_smoothing)


def summed_loss(
    model: torch.nn.Module,
    micro_batch: MicroBatch,
    *,
    label_smoothing: float = 0.0,
    num_right: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over the trained tokens of weight x loss: a float32 scalar. Adds to `num_right` how many were predicted."""
    outcomes = token_outcomes(model, micro_batch, label_smoothing=label_smoothing)
    if num_right is not None:
        num_right += outcomes.is_right.detach().sum()
    return (outcomes.losses * micro_batch.weights).sum()


def hidden_states(model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """What the LM head would see: [T, hidden size]; of padded rows one after the other."""
    if micro_batch.padded_rows:
        return padded_hidden_states(model, micro_batch.input_ids)
    backbone = unwrapped(model).base_model
    output = backbone(
        input_ids=micro_batch.input_ids,
        position_ids=micro_batch.position_ids,
        use_cache=False,
        **packing_arguments(micro_batch),
    )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def head_outcomes(
    model: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, *, label_smoothing: float = 0.0
) -> Outcomes:
    """Of rows that are already picked: `hidden` [N, hidden size], `targets` [N].

    With label smoothing the loss is against a target that is right by 1 - smoothing, and spreads the rest over all of
    the vocabulary.
    """
    causal_lm = unwrapped(model)
    head = causal_lm.get_output_embeddings()
    if head is None:
        raise RefusedError(
            f"{type(causal_lm).__name__} has no LM head; use a model for causal language modelling"
        )
    adjust = _logit_adjustment(causal_lm.config.get_text_config())
    is_frozen = _is_frozen_linear(head) and adjust is None
    # With Triton the gradient takes the logits' place, and nothing is there in fp32.
    most_logits = 2 * LOGITS_PER_CHUNK if is_frozen and has_triton(hidden.device) else LOGITS_PER_CHUNK
    num_rows = _rows_per_chunk(causal_lm.config.get_text_config().vocab_size, most_logits)
    forward = head.forward

    def in_chunks(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        chunks = zip(hidden.split(num_rows), targets.split(num_rows), strict=True)
        if not torch.is_grad_enabled():
            found = [_of_chunk(forward, adjust, label_smoothing, rows, ids) for rows, ids in chunks]
        elif is_frozen:
            found = [
                _FrozenHeadLoss.apply(rows, head.weight, head.bias, ids, label_smoothing)
                for rows, ids in chunks
            ]
        else:
            found = [
                checkpoint(_of_chunk, forward, adjust, label_smoothing, rows, ids, use_reentrant=False)
                for rows, ids in chunks
            ]
        # One tensor: strategies hang their hooks on a module's output.
        return torch.stack([torch.cat(parts) for parts in zip(*found, strict=True)])

    return Outcomes(*computed_by(head, in_chunks, hidden, targets))


def _rows_per_chunk(vocab_size: int, most_logits: int) -> int:
    """Whole tiles of a GPU's matrix product: 523 rows cost what 640 do."""
    most = max(most_logits // vocab_size, 1)
    return most - most % ROWS_OF_TILE if most > ROWS_OF_TILE else most


def computed_by(
    module: torch.nn.Module, compute: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> torch.Tensor:
    """compute(*inputs) as the forward pass of a module.

    A strategy that keeps weights in parts gathers them in hooks around a module's forward pass, and again before
    the gradient of its output is used: so they are there, and are gathered once for all that `compute` does.
    """
    own = module.__dict__.get("forward")
    module.forward = compute  # type: ignore[method-assign]
    try:
        result: torch.Tensor = module(*inputs)
        return result
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


Adjustment = Callable[[torch.Tensor], torch.Tensor]


def _of_chunk(
    project: Adjustment,
    adjust: Adjustment | None,
    label_smoothing: float,
    hidden: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = project(hidden)
    logits = (adjust(logits) if adjust is not None else logits).float()
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return losses, _is_right(logits, targets)


def _is_right(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (logits.detach().argmax(dim=-1) == targets).float()


def _is_frozen_linear(head: torch.nn.Module) -> bool:
    # Strategies subclass it; what computes otherwise has another forward.
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        return False
    return head.weight.is_floating_point() and not head.weight.requires_grad


class _FrozenHeadLoss(torch.autograd.Function):
    """Linear head and cross entropy in one, for a head that is not trained.

    A token's gradient is (softmax - target) @ weight times the incoming scalar, so it is computed while the
    logits are at hand and nothing of vocabulary size is kept; recomputing would cost a third head product. The
    target is 1 - smoothing at the right token, and smoothing / vocabulary everywhere.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        label_smoothing: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden, weight, bias)
        losses, is_right, gradients = _cross_entropy(logits, targets, label_smoothing)
        ctx.save_for_backward(gradients @ weight)
        ctx.mark_non_differentiable(is_right)
        return losses, is_right

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (unit_gradient,) = ctx.saved_tensors
        scaled = unit_gradient * grad_outputs[0][:, None]
        return scaled.to(unit_gradient.dtype), None, None, None, None


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses and what was right, float32 [N]; the gradient in the dtype, and it may be in the place, of `logits`."""
    if has_triton(logits.device):
        from trainer.fast.triton_loss import cross_entropy

        return *cross_entropy(logits, targets, label_smoothing), logits
    wide = logits.float()
    is_right = _is_right(wide, targets)
    log_sums = wide.logsumexp(dim=-1)
    losses = log_sums - (1.0 - label_smoothing) * wide.gather(1, targets[:, None]).squeeze(1)
    if label_smoothing:
        losses -= label_smoothing * wide.mean(dim=-1)
    gradients = wide.sub_(log_sums[:, None]).exp_()
    if label_smoothing:
        gradients -= label_smoothing / logits.shape[1]
    gradients[torch.arange(len(targets), device=targets.device), targets] -= 1.0 - label_smoothing
    return losses, is_right, gradients.to(logits.dtype)


def _logit_adjustment(config: Any) -> Adjustment | None:
    """What some families do to logits after the head: Gemma caps them, Cohere and Granite scale them."""
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        return lambda logits: torch.tanh(logits / cap) * cap
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return None if factor == 1.0 else lambda logits: logits * factor


# Loss of a whole split --------------------------------------------------------------------------------------


@torch.no_grad()
def split_loss(
    model: torch.nn.Module,
    reader: ShardReader,
    plan: Plan,
    *,
    device: torch.device,
    bins_per_micro_step: int = 1,
    tokens_per_bin: int | None = None,
    ranks: Ranks = ALONE,
) -> SplitLoss:
    """Loss of the model over every bin of a plan, in evaluation mode; leaves the model in the mode it had.

    With `tokens_per_bin` rows are padded. The ranks take turns over the bins, each runs the model equally often,
    padded rows aside, and all get the whole result.
    """
    was_training = model.training
    model.eval()
    sums = LossSums(reader, plan)
    for turn in _turns(plan, bins_per_micro_step, ranks):
        ranks.pulse.move()
        for batch in computed_batches(
            plan, reader, turn.first_bin, turn.end_bin, tokens_per_bin=tokens_per_bin
        ):
            outcomes = token_outcomes(model, batch.to(device))
            if not turn.is_filler:
                sums.add(batch, *(values.double().cpu() for values in outcomes))
    model.train(was_training)
    return sums.result(ranks, device)


def _turns(plan: Plan, bins_per_micro_step: int, ranks: Ranks) -> list[MicroStep]:
    """This rank's part of a plan. Fillers run the model where others still do: they may gather weights for that."""
    useful = [
        MicroStep(first, end)
        for first in range(0, plan.num_bins, bins_per_micro_step)
        if plan.num_trained_tokens[
            plan.documents(first, end := min(first + bins_per_micro_step, plan.num_bins))
        ].any()
    ]
    own = useful[ranks.number :: ranks.count]
    num_missing = -(-len(useful) // ranks.count) - len(own)
    return own + [replace(turn, is_filler=True) for turn in useful[:num_missing]]
