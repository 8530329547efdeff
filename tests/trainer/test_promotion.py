"""The gate: what the rule decides, and what promote and rollback leave on disk."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import storage
from schemas.errors import InputError, IntegrityError
from schemas.evaluation import (
    EVALUATION_EXAMPLES,
    EVALUATION_EXAMPLES_NAME,
    Decision,
    Evaluation,
    Promotion,
    TrainedModel,
)
from schemas.pipeline_config import PipelineConfig
from schemas.run import CHECKPOINTS_FOLDER, EVALUATION_NAME, PROMOTED_NAME
from schemas.training_config import PromoteConfig
from schemas.training_result import CURRENT_TRAINING_NAME, TRAINING_RESULT_NAME, TrainingResult
from trainer.promotion import (
    ChatLosses,
    chat_losses,
    decide,
    improvement_lower_bound,
    num_chats_needed,
    promote,
    rollback,
    run_promote,
)
from trainer.service import find_candidate, find_incumbent, find_promoted, read_promotions

# The rule ---------------------------------------------------------------------------------------------------


def losses_of(
    candidate: Sequence[float] | np.ndarray,
    incumbent: Sequence[float] | np.ndarray,
    *,
    num_bytes: Sequence[float] | np.ndarray | float = 100.0,
    sources: Sequence[str] | str = "chats",
) -> ChatLosses:
    count = len(candidate)
    return ChatLosses(
        sources=np.array([sources] * count if isinstance(sources, str) else sources, np.str_),
        num_bytes=np.broadcast_to(np.asarray(num_bytes, np.float64), (count,)),
        candidate_nats=np.asarray(candidate, np.float64),
        incumbent_nats=np.asarray(incumbent, np.float64),
    )


def noisy_chats(count: int, *, seed: int, mean: float, spread: float) -> ChatLosses:
    """Chats of very unequal length; the improvement of a byte has the mean and spread that are asked for."""
    draws = np.random.default_rng(seed)
    num_bytes = np.exp(draws.normal(5, 1, count))
    incumbent = num_bytes * draws.uniform(0.5, 1.5, count)
    gained_bits = num_bytes * mean + draws.normal(0, spread, count) * np.sqrt(num_bytes)
    return losses_of(incumbent - gained_bits * math.log(2), incumbent, num_bytes=num_bytes)


def test_equal_improvement_of_every_byte_has_that_improvement_as_its_lower_bound() -> None:
    num_bytes = np.arange(1.0, 41.0)
    incumbent = num_bytes * 0.9
    losses = losses_of(incumbent - num_bytes * 0.25 * math.log(2), incumbent, num_bytes=num_bytes)
    decision = decide(losses, PromoteConfig(bootstrap_samples=200))
    assert decision.promote
    assert decision.improvement == pytest.approx(0.25, abs=1e-12)
    assert decision.improvement_lower_bound == pytest.approx(0.25, abs=1e-12)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lower_bound_agrees_with_the_normal_approximation_of_a_ratio(confidence: float, seed: int) -> None:
    losses = noisy_chats(2000, seed=seed, mean=0.02, spread=0.4)
    gained_bits = (losses.incumbent_nats - losses.candidate_nats) / math.log(2)
    ratio = gained_bits.sum() / losses.num_bytes.sum()
    # Delta method: the ratio of two sums moves as the sum of (gain - ratio x bytes) over the bytes.
    spread = math.sqrt(np.sum((gained_bits - ratio * losses.num_bytes) ** 2)) / losses.num_bytes.sum()
    expected = ratio - NormalDist().inv_cdf(confidence) * spread
    bound = improvement_lower_bound(losses, PromoteConfig(confidence=confidence, bootstrap_samples=4000))
    assert bound == pytest.approx(expected, abs=0.15 * spread)


def test_a_model_that_is_no_better_passes_about_as_often_as_the_confidence_allows() -> None:
    config = PromoteConfig(bootstrap_samples=300)
    passed = sum(
        decide(noisy_chats(100, seed=seed, mean=0.0, spread=0.4), config).reason == "better"
        for seed in range(400)
    )
    # 5 % of 400 is 20; four standard deviations of a binomial are 17.
    assert 3 <= passed <= 37


def test_a_worse_model_is_refused_with_its_numbers() -> None:
    decision = decide(losses_of([110.0] * 20, [100.0] * 20), PromoteConfig(bootstrap_samples=100))
    assert (decision.promote, decision.reason) == (False, "not_better")
    assert decision.incumbent_bits_per_byte == pytest.approx(1 / math.log(2))
    assert decision.candidate_bits_per_byte == pytest.approx(1.1 / math.log(2))
    assert decision.improvement == pytest.approx(-0.1 / math.log(2))
    assert "1.4427 -> 1.5870" in decision.explanation
    assert "over 20 chats" in decision.explanation


def test_the_same_model_is_not_promoted_over_itself() -> None:
    decision = decide(losses_of([100.0] * 20, [100.0] * 20), PromoteConfig(bootstrap_samples=100))
    assert (decision.reason, decision.improvement_lower_bound) == ("not_better", 0.0)


def test_a_better_model_that_ruins_one_source_is_refused_and_the_source_is_named() -> None:
    candidate = [50.0] * 50 + [103.0] * 6
    losses = losses_of(candidate, [100.0] * 56, sources=["big"] * 50 + ["small"] * 6)
    refused = decide(losses, PromoteConfig(bootstrap_samples=100))
    assert (refused.promote, refused.reason) == (False, "source_worse")
    assert "small +3.0%" in refused.explanation
    allowed = decide(losses, PromoteConfig(bootstrap_samples=100, max_source_regression=0.031))
    assert allowed.promote


def test_a_source_of_too_few_chats_cannot_refuse_and_says_so() -> None:
    candidate = [50.0] * 50 + [200.0] * 4
    decision = decide(
        losses_of(candidate, [100.0] * 54, sources=["big"] * 50 + ["tiny"] * 4),
        PromoteConfig(bootstrap_samples=100),
    )
    assert decision.promote
    verdicts = {source.source: source for source in decision.sources}
    assert (verdicts["big"].judged, verdicts["tiny"].judged) == (True, False)
    assert verdicts["tiny"].change_share == pytest.approx(1.0)


@pytest.mark.parametrize(("confidence", "needed"), [(0.75, 2), (0.95, 5), (0.96875, 5), (0.99, 7)])
def test_fewest_chats_are_those_that_a_sign_test_needs(confidence: float, needed: int) -> None:
    assert num_chats_needed(confidence) == needed
    assert 0.5**needed <= 1 - confidence < 0.5 ** (needed - 1)


def test_four_chats_are_too_few_however_much_better_they_are() -> None:
    config = PromoteConfig(bootstrap_samples=100)
    assert decide(losses_of([1.0] * 4, [100.0] * 4), config).reason == "too_few_chats"
    assert decide(losses_of([1.0] * 5, [100.0] * 5), config).reason == "better"


@pytest.mark.parametrize(
    ("candidate", "num_bytes"), [([math.nan] + [1.0] * 9, 100.0), ([1.0] * 10, 0.0), ([math.inf] * 10, 1.0)]
)
def test_what_is_no_number_is_refused(candidate: list[float], num_bytes: float) -> None:
    decision = decide(losses_of(candidate, [2.0] * 10, num_bytes=num_bytes), PromoteConfig())
    assert (decision.promote, decision.reason, decision.improvement_lower_bound) == (
        False,
        "not_finite",
        None,
    )


nats = st.lists(st.floats(0.1, 500), min_size=1, max_size=30)


@given(nats=nats, seed=st.integers(0, 100), factor=st.sampled_from([0.5, 2.0, 8.0]))
def test_two_models_never_both_beat_each_other_and_units_do_not_matter(
    nats: list[float], seed: int, factor: float
) -> None:
    config = PromoteConfig(bootstrap_samples=50, seed=seed)
    other = np.random.default_rng(seed).permutation(nats)
    forth, back = decide(losses_of(nats, other), config), decide(losses_of(other, nats), config)
    assert not (forth.promote and back.promote)
    scaled = losses_of(np.array(nats) * factor, other * factor, num_bytes=100.0 * factor)
    assert decide(scaled, config) == forth


@given(nats=nats, seed=st.integers(0, 100))
def test_a_decision_survives_json_and_is_the_same_twice(nats: list[float], seed: int) -> None:
    losses = losses_of(nats, np.random.default_rng(seed).uniform(0.1, 500, len(nats)))
    decision = decide(losses, PromoteConfig(bootstrap_samples=50))
    assert decide(losses, PromoteConfig(bootstrap_samples=50)) == decision
    assert Decision.model_validate_json(decision.model_dump_json()) == decision


# Pointers on disk -------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return PipelineConfig.model_validate(
        {
            "run_root": tmp_path / "run",
            "sources": [{"name": "chats", "path": "chats.json"}],
            "promote": {"bootstrap_samples": 100},
        }
    )


def finish_training(config: PipelineConfig, key: str, *, method: str = "lora") -> TrainedModel:
    """What a finished training leaves, with a few bytes in place of weights."""
    folder = config.run_root / CHECKPOINTS_FOLDER / key
    output = "adapter" if method == "lora" else "model"
    weights = folder / output / f"{output}_model.safetensors"
    storage.write_bytes(weights, f"weights of {key}".encode())
    result = TrainingResult.model_validate(
        {
            "key": key,
            "method": method,
            "output": output,
            "model_path": "base",
            "inputs": {"model": "b" * 32},
            "settings": {},
            "dtype": "float32",
            "device": "cpu",
            "num_steps": 1,
            "num_updates": 1,
            "num_tokens": 1,
            "num_trained_tokens": 1,
            "num_trainable_weights": 1,
            "first_loss": 1.0,
            "last_loss": 1.0,
            "validation_loss": None,
            "validation_bits_per_byte": None,
            "versions": {},
            "files": [storage.file_entry(weights, folder=folder).model_dump()],
        }
    )
    storage.write_record(folder / TRAINING_RESULT_NAME, result.model_dump(mode="json"))
    pointer = config.run_root / CHECKPOINTS_FOLDER / CURRENT_TRAINING_NAME
    storage.write_bytes(pointer, f"{key}\n".encode())
    return find_candidate(config.run_root)


def finish_evaluation(
    config: PipelineConfig, *, candidate: float, incumbent: float, base: float = 9.0
) -> None:
    """evaluation.json of the newest training, with the same nats for each of ten chats."""
    trained = find_candidate(config.run_root)
    before = find_incumbent(config.run_root, trained)
    rows = [
        {
            "example": n,
            "row_id": f"{n:032x}",
            "piece": 0,
            "source": "chats",
            "language": "en",
            "num_trained_tokens": 3,
            "num_trained_bytes": 10,
            "nats_base": base,
            "nats_incumbent": incumbent if before is not None else None,
            "nats_candidate": candidate,
        }
        for n in range(10)
    ]
    path = config.run_root / EVALUATION_EXAMPLES_NAME
    storage.write_arrow(path, pa.Table.from_pylist(rows, schema=EVALUATION_EXAMPLES))
    evaluation = Evaluation(
        key="k",
        split="test",
        shards_digest="s",
        plan_digest="p",
        candidate=trained,
        incumbent=before,
        settings={},
        models=(),
        answers=(),
        examples=storage.file_entry(path, folder=config.run_root, num_rows=10),
    )
    storage.write_record(config.run_root / EVALUATION_NAME, evaluation.model_dump(mode="json"))


def train_and_promote(config: PipelineConfig, key: str, *, candidate: float, incumbent: float) -> Promotion:
    finish_training(config, key)
    finish_evaluation(config, candidate=candidate, incumbent=incumbent)
    return promote(config)


def promoted_bytes(config: PipelineConfig) -> bytes:
    return (config.run_root / PROMOTED_NAME).read_bytes()


def test_the_first_candidate_has_to_beat_the_base_model(config: PipelineConfig) -> None:
    refused = train_and_promote(config, "one", candidate=9.5, incumbent=0.0)
    assert refused.outcome == "refused"
    assert not (config.run_root / PROMOTED_NAME).exists()
    promoted = train_and_promote(config, "two", candidate=8.0, incumbent=0.0)
    assert promoted.outcome == "promoted"
    assert promoted.decision is not None
    assert promoted.decision.incumbent_bits_per_byte == pytest.approx(0.9 / math.log(2))
    assert find_promoted(config.run_root) == promoted.model
    assert promoted.model.path == "checkpoints/two/adapter"


def test_a_refused_candidate_leaves_promoted_json_byte_for_byte(config: PipelineConfig) -> None:
    train_and_promote(config, "one", candidate=8.0, incumbent=0.0)
    before = promoted_bytes(config)
    refused = train_and_promote(config, "two", candidate=8.5, incumbent=8.0)
    assert refused.outcome == "refused"
    assert "improvement -0.0721, lower bound -0.0721" in refused.explanation
    assert promoted_bytes(config) == before


def test_promoting_twice_changes_nothing(config: PipelineConfig) -> None:
    first = train_and_promote(config, "one", candidate=8.0, incumbent=0.0)
    before = promoted_bytes(config)
    second = promote(config)
    assert (second.outcome, second.model) == ("unchanged", first.model)
    assert second.decision == first.decision
    assert promoted_bytes(config) == before


def test_promoted_json_names_model_evidence_and_what_was_there_before(config: PipelineConfig) -> None:
    first = train_and_promote(config, "one", candidate=8.0, incumbent=0.0)
    second = train_and_promote(config, "two", candidate=7.0, incumbent=8.0)
    found = read_promotions(config.run_root)
    assert found is not None
    assert [entry.model.training_key for entry in (*found.history, found.current)] == ["one", "two"]
    assert (found.current.incumbent, found.history[0].incumbent) == (first.model, None)
    assert found.current.evaluation_sha256 == storage.file_sha256(config.run_root / EVALUATION_NAME)
    assert found.current.decision == second.decision


def test_rollback_goes_back_one_at_a_time_and_then_refuses(config: PipelineConfig) -> None:
    train_and_promote(config, "one", candidate=8.0, incumbent=0.0)
    train_and_promote(config, "two", candidate=7.0, incumbent=8.0)
    train_and_promote(config, "three", candidate=6.0, incumbent=7.0)
    assert rollback(config).model.training_key == "two"
    assert rollback(config).model.training_key == "one"
    before = promoted_bytes(config)
    with pytest.raises(InputError, match="the model in service is the first one"):
        rollback(config)
    assert promoted_bytes(config) == before


def test_rollback_without_anything_in_service_is_refused(config: PipelineConfig) -> None:
    with pytest.raises(InputError, match="nothing is in service"):
        rollback(config)


def test_a_model_that_was_rolled_back_is_not_promoted_again_by_itself(config: PipelineConfig) -> None:
    train_and_promote(config, "one", candidate=8.0, incumbent=0.0)
    train_and_promote(config, "two", candidate=7.0, incumbent=8.0)
    rollback(config)
    finish_evaluation(config, candidate=7.0, incumbent=8.0)
    before = promoted_bytes(config)
    assert promote(config).outcome == "withdrawn"
    assert promoted_bytes(config) == before
    assert promote(config, withdrawn_too=True).outcome == "promoted"
    found = read_promotions(config.run_root)
    assert found is not None
    assert found.withdrawn == ()
    assert found.current.model.training_key == "two"


def test_rollback_to_files_that_are_gone_is_refused(config: PipelineConfig) -> None:
    train_and_promote(config, "one", candidate=8.0, incumbent=0.0)
    train_and_promote(config, "two", candidate=7.0, incumbent=8.0)
    (config.run_root / CHECKPOINTS_FOLDER / "one" / TRAINING_RESULT_NAME).unlink()
    before = promoted_bytes(config)
    with pytest.raises(InputError, match="is gone"):
        rollback(config)
    assert promoted_bytes(config) == before


@pytest.mark.parametrize("change", [b"weights of two", b"weights", b""])
def test_changed_weights_are_neither_promoted_nor_rolled_back_to(
    config: PipelineConfig, change: bytes
) -> None:
    weights = "adapter/adapter_model.safetensors"
    train_and_promote(config, "one", candidate=8.0, incumbent=0.0)
    train_and_promote(config, "two", candidate=7.0, incumbent=8.0)
    (config.run_root / CHECKPOINTS_FOLDER / "one" / weights).write_bytes(change)
    with pytest.raises(IntegrityError, match=weights):
        rollback(config)
    finish_training(config, "three")
    finish_evaluation(config, candidate=6.0, incumbent=7.0)
    (config.run_root / CHECKPOINTS_FOLDER / "three" / weights).write_bytes(change)
    with pytest.raises(IntegrityError, match=weights):
        promote(config)


def test_an_exchanged_training_under_the_promoted_name_is_noticed(config: PipelineConfig) -> None:
    train_and_promote(config, "one", candidate=8.0, incumbent=0.0)
    train_and_promote(config, "two", candidate=7.0, incumbent=8.0)
    finish_training(config, "one", method="full")
    with pytest.raises(IntegrityError, match="is not the model that was promoted"):
        rollback(config)


def test_an_evaluation_of_another_training_decides_nothing(config: PipelineConfig) -> None:
    finish_training(config, "one")
    finish_evaluation(config, candidate=8.0, incumbent=0.0)
    finish_training(config, "two")
    with pytest.raises(InputError, match="is about checkpoints/one/adapter, the newest training is"):
        promote(config)


def test_an_evaluation_against_a_model_no_longer_in_service_decides_nothing(config: PipelineConfig) -> None:
    train_and_promote(config, "one", candidate=8.0, incumbent=0.0)
    train_and_promote(config, "two", candidate=7.0, incumbent=8.0)
    finish_training(config, "three")
    finish_evaluation(config, candidate=6.0, incumbent=7.0)
    rollback(config)
    with pytest.raises(InputError, match="in service is checkpoints/one/adapter"):
        promote(config)


def test_changed_example_losses_decide_nothing(config: PipelineConfig) -> None:
    finish_training(config, "one")
    finish_evaluation(config, candidate=9.5, incumbent=0.0)
    path = config.run_root / EVALUATION_EXAMPLES_NAME
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(IntegrityError, match=EVALUATION_EXAMPLES_NAME):
        promote(config)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (PROMOTED_NAME, "{"),
        (PROMOTED_NAME, '{"format_version": 99}'),
        (PROMOTED_NAME, '{"format_version": 1}'),
        (EVALUATION_NAME, "[]"),
    ],
)
def test_records_that_are_not_ours_are_refused_by_name(config: PipelineConfig, name: str, text: str) -> None:
    finish_training(config, "one")
    finish_evaluation(config, candidate=8.0, incumbent=0.0)
    (config.run_root / name).write_text(text)
    with pytest.raises(IntegrityError, match=name):
        promote(config)


def test_without_a_finished_training_there_is_no_candidate(config: PipelineConfig) -> None:
    with pytest.raises(InputError, match="no training is finished"):
        promote(config)


def test_pieces_of_one_chat_count_as_one_chat(config: PipelineConfig) -> None:
    finish_training(config, "one")
    finish_evaluation(config, candidate=8.0, incumbent=0.0)
    path = config.run_root / EVALUATION_EXAMPLES_NAME
    table = storage.read_arrow(path)
    one_chat = pa.array(["same"] * 7 + ["b", "c", "a"], pa.string())
    table = table.set_column(1, EVALUATION_EXAMPLES.field("row_id"), one_chat)
    storage.write_arrow(path, table)
    evaluation = Evaluation.model_validate(storage.read_record(config.run_root / EVALUATION_NAME))
    entry = storage.file_entry(path, folder=config.run_root, num_rows=10)
    losses = chat_losses(config.run_root, evaluation.model_copy(update={"examples": entry}))
    assert losses.num_bytes.tolist() == [10, 10, 10, 70]
    assert losses.candidate_nats.tolist() == [8.0, 8.0, 8.0, 56.0]
    assert decide(losses, config.promote).reason == "too_few_chats"


def test_the_command_says_what_it_did_and_why(
    config: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    finish_training(config, "one")
    finish_evaluation(config, candidate=8.0, incumbent=0.0)
    run_promote(config)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("promoted: checkpoints/one/adapter: bits per byte 1.2984 -> 1.1542")
    assert lines[1] == "  chats: -11.1% bits per byte over 10 chats"
