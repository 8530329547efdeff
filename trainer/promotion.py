"""The gate: a candidate goes into service if and only if it is better on held-out chats than what is there.

    promote(config)    evaluation.json -> decision; writes promoted.json when the candidate is better
    rollback(config)   puts the model before it back into service
    decide(losses, c)  the rule alone: arrays in, decision with its numbers out

The rule: the lower bound of the improvement in bits per byte, by a paired bootstrap, is above zero, and no
source got worse by more than promote.max_source_regression. Chats are resampled, not examples: the pieces of
one long chat are not independent. The caller holds the run root. No torch here: this reads files and decides.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipelines.storage import check_file, file_sha256, read_arrow
from schemas.errors import InputError
from schemas.evaluation import (
    Decision,
    Evaluation,
    PromotedModel,
    Promotion,
    Promotions,
    SourceVerdict,
    TrainedModel,
)
from schemas.pipeline_config import PipelineConfig
from schemas.run import EVALUATION_NAME
from schemas.training_config import PromoteConfig
from trainer.service import (
    check_trained_model,
    find_candidate,
    find_incumbent,
    read_evaluation,
    read_promotions,
    write_promotions,
)

Floats: TypeAlias = NDArray[np.float64]


def promote(config: PipelineConfig, *, withdrawn_too: bool = False) -> Promotion:
    """Decide on the newest training by evaluation.json; promoted.json changes only when it is better.

    A model that was rolled back stays out, unless `withdrawn_too`. Raises InputError when there is no
    evaluation of this candidate against what is in service now, IntegrityError when files were changed.
    """
    run_root = config.run_root
    candidate, promotions = find_candidate(run_root), read_promotions(run_root)
    check_trained_model(run_root, candidate)
    if promotions is not None and promotions.current.model.digest == candidate.digest:
        decision = promotions.current.decision
        return Promotion(
            outcome="unchanged", model=candidate, decision=decision, explanation="is in service already"
        )
    evaluation = read_evaluation(run_root)
    _check_is_about(evaluation, candidate, find_incumbent(run_root, candidate))
    decision = decide(chat_losses(run_root, evaluation), config.promote)
    if promotions is not None and candidate.digest in promotions.withdrawn and not withdrawn_too:
        return Promotion(
            outcome="withdrawn",
            model=candidate,
            decision=decision,
            explanation="was rolled back before; train again, or promote it with --withdrawn-too",
        )
    if config.model is not None and config.model.init == "random":
        explanation = "was trained over drawn weights: model.init is random"
        return Promotion(outcome="refused", model=candidate, decision=decision, explanation=explanation)
    if not decision.promote:
        return Promotion(
            outcome="refused", model=candidate, decision=decision, explanation=decision.explanation
        )
    _put_into_service(run_root, evaluation, decision, promotions)
    return Promotion(outcome="promoted", model=candidate, decision=decision, explanation=decision.explanation)


def rollback(config: PipelineConfig) -> Promotion:
    """Put the model before the current one back into service, and keep the current one out from now on.

    Raises InputError when nothing came before it or its files are gone, IntegrityError when they were changed.
    """
    promotions = read_promotions(config.run_root)
    if promotions is None or not promotions.history:
        found = "nothing is in service" if promotions is None else "the model in service is the first one"
        raise InputError(f"{found} in {config.run_root}: there is nothing to roll back to")
    current, previous = promotions.current, promotions.history[-1]
    check_trained_model(config.run_root, previous.model)
    withdrawn = {*promotions.withdrawn, current.model.digest} - {previous.model.digest}
    write_promotions(
        config.run_root,
        Promotions(current=previous, history=promotions.history[:-1], withdrawn=tuple(sorted(withdrawn))),
    )
    return Promotion(
        outcome="rolled_back",
        model=previous.model,
        decision=previous.decision,
        explanation=f"is in service again in place of {current.model.path}",
    )


def _put_into_service(
    run_root: Path, evaluation: Evaluation, decision: Decision, promotions: Promotions | None
) -> None:
    promoted = PromotedModel(
        model=evaluation.candidate,
        evaluation_key=evaluation.key,
        evaluation_sha256=file_sha256(run_root / EVALUATION_NAME),
        decision=decision,
        incumbent=evaluation.incumbent,
    )
    history = (*promotions.history, promotions.current) if promotions is not None else ()
    withdrawn = set(promotions.withdrawn) if promotions is not None else set()
    kept_out = tuple(sorted(withdrawn - {evaluation.candidate.digest}))
    write_promotions(run_root, Promotions(current=promoted, history=history, withdrawn=kept_out))


def _check_is_about(evaluation: Evaluation, candidate: TrainedModel, incumbent: TrainedModel | None) -> None:
    if evaluation.candidate.digest != candidate.digest:
        raise InputError(
            f"{EVALUATION_NAME} is about {evaluation.candidate.path}, the newest training is {candidate.path}: "
            "run `sft-pipeline evaluate` first"
        )
    compared, in_service = (model.digest if model else "" for model in (evaluation.incumbent, incumbent))
    if compared != in_service:
        raise InputError(
            f"{EVALUATION_NAME} compares with {evaluation.incumbent.path if evaluation.incumbent else 'the base'}, "
            f"in service is {incumbent.path if incumbent else 'the base'}: run `sft-pipeline evaluate` first"
        )


def chat_losses(run_root: Path, evaluation: Evaluation) -> "ChatLosses":
    """evaluation_examples.arrow with the pieces of a chat added up. Without an incumbent the base stands for it."""
    table = read_arrow(check_file(run_root, evaluation.examples))
    baseline = "nats_incumbent" if evaluation.incumbent is not None else "nats_base"
    _, first, chats = np.unique(
        table.column("row_id").to_numpy(zero_copy_only=False).astype(str),
        return_index=True,
        return_inverse=True,
    )

    def summed(column: str) -> Floats:
        values = table.column(column).to_numpy(zero_copy_only=False).astype(np.float64)
        return np.bincount(chats, weights=values, minlength=len(first)).astype(np.float64)

    sources = table.column("source").to_numpy(zero_copy_only=False).astype(str)[first]
    return ChatLosses(sources, summed("num_trained_bytes"), summed("nats_candidate"), summed(baseline))


# The rule ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChatLosses:
    """Held-out chats under two models, one place a chat: all arrays have the same length."""

    sources: NDArray[np.str_]
    num_bytes: Floats
    candidate_nats: Floats
    incumbent_nats: Floats

    def only(self, chosen: NDArray[np.bool_]) -> "ChatLosses":
        return ChatLosses(
            self.sources[chosen],
            self.num_bytes[chosen],
            self.candidate_nats[chosen],
            self.incumbent_nats[chosen],
        )


def decide(losses: ChatLosses, config: PromoteConfig) -> Decision:
    """Whether the candidate is better than the incumbent, with the numbers. Same input, same decision."""
    incumbent = bits_per_byte(losses.incumbent_nats, losses.num_bytes)
    candidate = bits_per_byte(losses.candidate_nats, losses.num_bytes)
    finite = incumbent is not None and candidate is not None
    bound = improvement_lower_bound(losses, config) if finite else None
    sources = tuple(_source_verdicts(losses, config))
    reason, explanation = _verdict(losses, config, incumbent, candidate, bound, sources)
    return Decision(
        promote=reason == "better",
        reason=reason,
        explanation=explanation,
        num_chats=len(losses.num_bytes),
        incumbent_bits_per_byte=incumbent,
        candidate_bits_per_byte=candidate,
        improvement=incumbent - candidate if incumbent is not None and candidate is not None else None,
        improvement_lower_bound=bound,
        confidence=config.confidence,
        bootstrap_samples=config.bootstrap_samples,
        sources=sources,
    )


def bits_per_byte(nats: Floats, num_bytes: Floats) -> float | None:
    """Ratio of sums; None where there are no bytes or a loss is not finite."""
    total_nats, total_bytes = float(nats.sum()), float(num_bytes.sum())
    if not math.isfinite(total_nats) or total_bytes <= 0:
        return None
    return total_nats / math.log(2) / total_bytes


def improvement_lower_bound(losses: ChatLosses, config: PromoteConfig) -> float:
    """The (1 - confidence) quantile of the improvement over resampled sets of chats (percentile bootstrap).

    Paired: a resample takes a chat's losses under both models. The ratio is of sums, so long chats weigh more,
    as they do in the number itself. Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    random = np.random.default_rng(config.seed)
    gained_bits = (losses.incumbent_nats - losses.candidate_nats) / math.log(2)
    num_chats = len(gained_bits)
    improvements = np.empty(config.bootstrap_samples)
    for sample in range(config.bootstrap_samples):
        chosen = random.integers(num_chats, size=num_chats)
        num_bytes = losses.num_bytes[chosen].sum()
        # A resample without any byte says nothing about the ratio: it must not speak for the candidate.
        improvements[sample] = gained_bits[chosen].sum() / num_bytes if num_bytes > 0 else -math.inf
    return float(np.quantile(improvements, 1 - config.confidence, method="lower"))


def num_chats_needed(confidence: float) -> int:
    """Fewest chats that can carry the confidence: fewer all point one way by chance too often (sign test).

    0.95 -> 5 chats, since 0.5^4 > 0.05 >= 0.5^5.
    """
    return math.ceil(math.log2(1 / (1 - confidence)) - 1e-9)


def _source_verdicts(losses: ChatLosses, config: PromoteConfig) -> Iterator[SourceVerdict]:
    for source in sorted(set(losses.sources.tolist())):
        chats = losses.only(losses.sources == source)
        incumbent = bits_per_byte(chats.incumbent_nats, chats.num_bytes)
        candidate = bits_per_byte(chats.candidate_nats, chats.num_bytes)
        change = (candidate - incumbent) / incumbent if incumbent and candidate is not None else None
        judged = change is not None and len(chats.num_bytes) >= num_chats_needed(config.confidence)
        yield SourceVerdict(
            source=source,
            num_chats=len(chats.num_bytes),
            incumbent_bits_per_byte=incumbent,
            candidate_bits_per_byte=candidate,
            change_share=change,
            judged=judged,
            too_much_worse=judged and change is not None and change > config.max_source_regression,
        )


Reason = Literal["better", "not_better", "source_worse", "too_few_chats", "not_finite"]


def _verdict(
    losses: ChatLosses,
    config: PromoteConfig,
    incumbent: float | None,
    candidate: float | None,
    bound: float | None,
    sources: tuple[SourceVerdict, ...],
) -> tuple[Reason, str]:
    num_chats, needed = len(losses.num_bytes), num_chats_needed(config.confidence)
    if incumbent is None or candidate is None or bound is None:
        return "not_finite", f"no bits per byte: incumbent {incumbent}, candidate {candidate}"
    numbers = (
        f"bits per byte {incumbent:.4f} -> {candidate:.4f}, improvement {incumbent - candidate:+.4f}, "
        f"lower bound {bound:+.4f} at {config.confidence:.0%} over {num_chats} chats"
    )
    if num_chats < needed:
        return "too_few_chats", f"{numbers}; at least {needed} chats are needed: hold out more"
    if bound <= 0:
        return "not_better", f"{numbers}; expected a lower bound above 0"
    if worse := [source for source in sources if source.too_much_worse]:
        return "source_worse", f"{numbers}; {_worse_sources(worse, config)}"
    return "better", numbers


def _worse_sources(worse: list[SourceVerdict], config: PromoteConfig) -> str:
    changes = ", ".join(f"{source.source} {source.change_share:+.1%}" for source in worse)
    return f"worse by more than promote.max_source_regression ({config.max_source_regression:.1%}): {changes}"


# The command ------------------------------------------------------------------------------------------------


def run_promote(config: PipelineConfig, *, withdrawn_too: bool = False) -> None:
    """`sft-pipeline promote`: decides and says why."""
    _print_promotion(promote(config, withdrawn_too=withdrawn_too))


def run_rollback(config: PipelineConfig) -> None:
    """`sft-pipeline rollback`."""
    _print_promotion(rollback(config))


def _print_promotion(promotion: Promotion) -> None:
    print(f"{promotion.outcome.replace('_', ' ')}: {promotion.model.path}: {promotion.explanation}")
    if promotion.outcome not in ("promoted", "refused") or promotion.decision is None:
        return
    for source in promotion.decision.sources:
        change = f"{source.change_share:+.1%}" if source.change_share is not None else "no bytes"
        judged = "" if source.judged else ", too few to judge"
        print(f"  {source.source}: {change} bits per byte over {source.num_chats} chats{judged}")
