"""From what a process noted of its steps to numbers: the same arithmetic for every contestant."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from schemas.errors import IntegrityError

NUM_LAST_STEPS = 10
MAX_SHARE_DIFFERENCE = 0.03

Step = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One process that came to its end. Times are of the steps behind the warm-up, with all that happens between."""

    tokens_per_second: float
    num_tokens: int
    """Of the timed steps, trained and context; padding is none."""
    num_trained_tokens: int
    num_timed_steps: int
    seconds: float
    seconds_to_first_step: float
    """From the start of the process to the end of its first step."""
    process_seconds: float
    first_loss: float
    """On the tokens of ours' first step, with the untrained adapter."""
    last_loss: float
    """Mean of what was logged of the last ten steps."""
    grad_norms: tuple[float, float]
    """First and last that was logged."""
    reserved_gib: float | None
    nvml_gib: float | None
    resident_gib: float
    kernel: str
    device: str
    versions: dict[str, str]
    is_cold: bool
    """Nothing compiled was kept from an earlier process."""
    more: dict[str, Any]


def run_of(
    raw: Mapping[str, Any],
    *,
    num_warm_up: int,
    started_at: float,
    ended_at: float,
    nvml_gib: float | None,
    is_cold: bool,
    kernel: str,
) -> Run:
    """Times are Unix seconds, of the same machine's clock."""
    steps: Sequence[Step] = raw["steps"]
    timed = steps[num_warm_up:]
    seconds = steps[-1]["unix_time"] - steps[num_warm_up - 1]["unix_time"]
    num_tokens = sum(step["num_tokens"] for step in timed)
    losses = [step["loss"] for step in steps[-NUM_LAST_STEPS:] if step["loss"] is not None]
    norms = [step["grad_norm"] for step in steps if step["grad_norm"] is not None]
    known = {"steps", "first_loss", "reserved_gib", "resident_gib", "device", "versions", "kernel"}
    return Run(
        tokens_per_second=num_tokens / seconds,
        num_tokens=num_tokens,
        num_trained_tokens=sum(step["num_trained_tokens"] for step in timed),
        num_timed_steps=len(timed),
        seconds=seconds,
        seconds_to_first_step=steps[0]["unix_time"] - started_at,
        process_seconds=ended_at - started_at,
        first_loss=raw["first_loss"],
        last_loss=sum(losses) / len(losses),
        grad_norms=(norms[0], norms[-1]),
        reserved_gib=raw["reserved_gib"],
        nvml_gib=nvml_gib,
        resident_gib=raw["resident_gib"],
        kernel=raw.get("kernel", kernel),
        device=raw["device"],
        versions=raw["versions"],
        is_cold=is_cold,
        more={name: value for name, value in raw.items() if name not in known},
    )


def check_counts(
    name: str, steps: Sequence[Step], expected: Sequence[Mapping[str, int]], *, exact: bool
) -> None:
    """Tokens that were counted are tokens of documents, trained or context, and as many are targets as in ours.

    `exact`: step by step; else, of a contestant that cuts its own batches, by the share of targets. Raises
    IntegrityError.
    """
    if exact:
        for number, (found, wanted) in enumerate(zip(steps, expected, strict=False), 1):
            counted = {what: found[what] for what in wanted}
            if counted != dict(wanted):
                raise IntegrityError(
                    f"{name}, step {number}: {counted} were counted, {dict(wanted)} are in the plan"
                )
        return
    found_share, expected_share = _trained_share(steps), _trained_share(expected)
    if abs(found_share - expected_share) > MAX_SHARE_DIFFERENCE:
        raise IntegrityError(
            f"{name} trains {found_share:.1%} of its tokens, ours {expected_share:.1%}: it does not do the same work"
        )


def _trained_share(steps: Sequence[Step]) -> float:
    return sum(step["num_trained_tokens"] for step in steps) / max(
        sum(step["num_tokens"] for step in steps), 1
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one contestant's rounds."""

    name: str
    runs: tuple[Run, ...]

    @property
    def tokens_per_second(self) -> float:
        return median(run.tokens_per_second for run in self.runs)

    @property
    def spread(self) -> tuple[float, float]:
        """Slowest and fastest round."""
        speeds = [run.tokens_per_second for run in self.runs]
        return min(speeds), max(speeds)

    @property
    def trained_share(self) -> float:
        return self.runs[0].num_trained_tokens / self.runs[0].num_tokens

    def most(self, field: str) -> float | None:
        """The largest of the rounds; None where it is not known."""
        values = [value for run in self.runs if (value := getattr(run, field)) is not None]
        return max(values, default=None)

    def seconds_to_first_step(self, *, cold: bool) -> float | None:
        found = [run.seconds_to_first_step for run in self.runs if run.is_cold == cold]
        return median(found) if found else None


def loss_difference(ours: Summary, other: Summary) -> float:
    """Between the losses on the tokens of the first step with the same weights, as a share of ours."""
    expected = ours.runs[0].first_loss
    return abs(other.runs[0].first_loss - expected) / max(abs(expected), 1e-9)
