"""Documents in padded rows. Judges: the packed path, and transformers' own forward with a mask over the padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.pack import plan_epoch
from schemas.pipeline_config import PipelineConfig
from tests.trainer.padded_judge import DOCUMENTS, gradients, judged_loss
from tests.trainer.rank_groups import Finished
from tests.trainer.tiny_models import (
    example_of,
    random_documents,
    tiny_lora,
    tiny_model,
    tiny_run,
    write_plans,
    write_shards,
)
from trainer.attention import use_packed_attention, use_plain_attention
from trainer.data import collate, read_plan
from trainer.job import plan_job
from trainer.loss import split_loss, summed_loss, token_losses
from trainer.padding import collate_padded, computed_batches, cut_by_length
from trainer.shard_reader import ShardReader
from trainer.train import train

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
}


# Layout -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 64), max_size=40), st.integers(64, 300))
def test_every_document_stands_in_one_batch_that_keeps_to_the_budget(
    lengths: list[int], max_tokens: int
) -> None:
    found = cut_by_length(np.array(lengths, np.int64), max_tokens=max_tokens)
    assert sorted(number for batch in found for number in batch) == [
        number for number, length in enumerate(lengths) if length
    ]
    for batch in found:
        assert len(batch) * max(lengths[number] for number in batch) <= max_tokens
    longest_first = [max(lengths[number] for number in batch) for batch in found]
    assert longest_first == sorted(longest_first, reverse=True)


def test_a_bin_that_was_planned_for_padding_is_one_batch(tmp_path: Path) -> None:
    """pack.mode token_budget and the trainer count alike."""
    lengths = np.random.default_rng(0).integers(5, 64, 300)
    keys = np.arange(300, dtype=np.uint64)
    plan = plan_epoch(lengths, keys, capacity=128, seed=0, epoch=0, mode="token_budget")
    bins, examples = plan["bin"].to_numpy(), plan["example"].to_numpy()
    for number in range(int(bins.max()) + 1):
        assert len(cut_by_length(lengths[examples[bins == number]], max_tokens=128)) == 1


def test_rows_hold_the_documents_and_their_targets() -> None:
    batch = collate_padded([example_of(document, row) for row, document in enumerate(DOCUMENTS)])
    assert batch.input_ids.shape == (4, 40)
    for row, document in zip(batch.input_ids.tolist(), DOCUMENTS, strict=True):
        assert row == document.ids + [0] * (40 - len(document.ids))
    packed = collate([example_of(document, row) for row, document in enumerate(DOCUMENTS)])
    for name in ("targets", "weights", "target_documents"):
        assert torch.equal(getattr(batch, name), getattr(packed, name)), name
    before = batch.input_ids.flatten()[batch.target_positions]
    assert torch.equal(before, packed.input_ids[0, packed.target_positions])
    assert (batch.num_tokens, batch.num_trained_tokens, batch.rows) == (
        packed.num_tokens,
        packed.num_trained_tokens,
        packed.rows,
    )


# Maths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_lora_are_those_packed_and_those_of_transformers(family: str) -> None:
    model = tiny_lora(tiny_model(family, **FAMILIES[family])).train()
    examples = [example_of(document, row) for row, document in enumerate(DOCUMENTS)]
    use_plain_attention(model)
    padded = summed_loss(model, collate_padded(examples))
    ours = gradients(model, padded)
    judged = judged_loss(model, DOCUMENTS)
    right = gradients(model, judged)
    use_packed_attention(model)
    packed = summed_loss(model, collate(examples))
    assert padded.item() == pytest.approx(packed.item(), rel=1e-6)
    assert padded.item() == pytest.approx(judged.item(), rel=1e-6)
    for name, gradient in gradients(model, packed).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours[name], right[name], rtol=1e-4, atol=1e-4)


def test_what_stands_in_the_padding_changes_nothing() -> None:
    model = tiny_lora(tiny_model()).eval()
    use_plain_attention(model)
    batch = collate_padded([example_of(document, row) for row, document in enumerate(DOCUMENTS)])
    with torch.no_grad():
        before = token_losses(model, batch)
        batch.input_ids[0, 29:] = torch.arange(5, 16)
        assert torch.equal(token_losses(model, batch), before)


@pytest.mark.parametrize("capacity", [64, 100])
def test_the_loss_of_a_split_is_the_packed_one(tmp_path: Path, capacity: int) -> None:
    documents = random_documents([29, 40, 7, 18, 33, 5, 12])
    reader = ShardReader(write_shards(tmp_path, {"train": documents}), "train")
    write_plans(tmp_path, {"train": documents}, capacity=capacity)
    plan = read_plan(tmp_path, "train", 0)
    model = tiny_model()
    device = torch.device("cpu")
    use_packed_attention(model)
    packed = split_loss(model, reader, plan, device=device)
    use_plain_attention(model)
    padded = split_loss(model, reader, plan, device=device, tokens_per_bin=capacity)
    assert padded.loss == pytest.approx(packed.loss, rel=1e-6)
    assert padded.bits_per_byte == pytest.approx(packed.bits_per_byte, rel=1e-6)
    assert padded.num_trained_tokens == packed.num_trained_tokens


# Trainings --------------------------------------------------------------------------------------------------


def run_of(folder: Path, **settings: Any) -> PipelineConfig:
    return tiny_run(folder, train={"max_steps": 6, "bins_per_step": 3, **settings})


def trained(folder: Path, **settings: Any) -> Finished:
    config = run_of(folder, **settings)
    return Finished(config, train(config))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_is_the_packed_one(tmp_path: Path, method: str) -> None:
    settings = {"method": method, "learning_rate": 1e-2 if method == "lora" else 1e-3}
    packed = trained(tmp_path / "packed", **settings)
    padded = trained(tmp_path / "padded", batches="unpacked", gradient_checkpointing=True, **settings)
    assert packed.result.key != padded.result.key
    assert packed.result.validation_loss == pytest.approx(padded.result.validation_loss, rel=1e-5)
    np.testing.assert_allclose(padded.numbers("loss"), packed.numbers("loss"), rtol=1e-5)
    np.testing.assert_allclose(padded.numbers("grad_norm"), packed.numbers("grad_norm"), rtol=1e-4)
    expected = packed.weights
    for name, weight in padded.weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


def test_draws_of_dropout_belong_to_a_document(tmp_path: Path) -> None:
    """However many bins are computed at once, and in which batch a document stands."""
    settings = {"batches": "unpacked", "lora": {"dropout": 0.2}}
    one, three = (
        trained(tmp_path / str(n), **settings, bins_per_micro_step=n).numbers("loss") for n in (1, 3)
    )
    np.testing.assert_allclose(one, three, rtol=1e-6)
    plain = trained(tmp_path / "plain", batches="unpacked").numbers("loss")
    assert abs(plain[0] - one[0]) < 1e-6  # the second matrices begin at zero
    assert abs(plain[3] - one[3]) > 1e-4


def test_padding_is_told_with_each_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = trained(tmp_path, batches="unpacked", max_steps=2)
    job = plan_job(found.config)
    plan = job.plans[0]
    for step, line in zip(job.steps, found.steps, strict=True):
        batches = [
            batch
            for number in range(step.first_bin, step.end_bin)
            for batch in computed_batches(plan, job.reader, number, number + 1, tokens_per_bin=64)
        ]
        num_computed = sum(batch.input_ids.numel() for batch in batches)
        assert line["padding_share"] == pytest.approx(1 - step.num_tokens / num_computed)
        assert line["num_tokens"] == sum(batch.num_tokens for batch in batches)
    assert "  padding " in capsys.readouterr().err


def test_packed_steps_say_nothing_of_padding(tmp_path: Path) -> None:
    assert "padding_share" not in trained(tmp_path, max_steps=1).steps[0]


def test_a_training_of_padded_rows_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    config = run_of(tmp_path, batches="unpacked", lora={"dropout": 0.1}, checkpoint_every_steps=3)
    whole = train(config)
    folder = plan_job(config).folder
    (folder / "training.json").unlink()
    for file in max(folder.glob("step-*")).iterdir():
        file.write_bytes(b"damaged")
    assert train(config).files == whole.files


def test_settings_at_their_defaults_leave_the_key_of_a_training_as_it_was(tmp_path: Path) -> None:
    config = run_of(tmp_path)
    settings = plan_job(config).settings
    assert not {"batches", "virtual_tokens"} & settings.keys()
    assert "batches" in plan_job(run_of(tmp_path, batches="unpacked")).settings
