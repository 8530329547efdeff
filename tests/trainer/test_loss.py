"""The loss without logits. Judge: torch's cross entropy over all logits at once."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.trainer.tiny_models import (
    Document,
    example_of,
    random_documents,
    tiny_lora,
    tiny_model,
    write_plans,
    write_shards,
)
from trainer import loss
from trainer.attention import use_packed_attention
from trainer.data import collate, read_plan
from trainer.loss import head_outcomes, split_loss, summed_loss, token_losses
from trainer.shard_reader import ShardReader


def whole_logits(
    model: Any, hidden: torch.Tensor, targets: torch.Tensor, *, label_smoothing: float = 0.0
) -> torch.Tensor:
    logits = model.get_output_embeddings()(hidden).float()
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def head_losses(model: Any, *inputs: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    return head_outcomes(model, *inputs, label_smoothing=label_smoothing).losses


def draws(num_rows: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, targets, and weights of different sign and size."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, 32, generator=generator)
    targets = torch.randint(0, 320, (num_rows,), generator=generator)
    return hidden, targets, torch.randn(num_rows, generator=generator)


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 50, 64])
@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_losses_and_gradients_are_torchs_for_any_chunk_size(
    rows_per_chunk: int, is_frozen: bool, label_smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", rows_per_chunk * 320)
    model = tiny_model().requires_grad_(not is_frozen)
    head = model.get_output_embeddings()
    found = []
    for losses_of in (head_losses, whole_logits):
        hidden, targets, weights = draws()
        hidden.requires_grad_()
        losses = losses_of(model, hidden, targets, label_smoothing=label_smoothing)
        (losses * weights).sum().backward()
        found.append((losses.detach(), hidden.grad, head.weight.grad))
        model.zero_grad()
    (losses, grad, head_grad), (expected, expected_grad, expected_head_grad) = found
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-5)
    if is_frozen:
        assert head_grad is None
        assert expected_head_grad is None
    else:
        torch.testing.assert_close(head_grad, expected_head_grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_token_is_right_where_its_logit_is_the_largest(
    is_frozen: bool, has_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 7 * 320)
    model = tiny_model().requires_grad_(not is_frozen)
    hidden, targets, _ = draws()
    most_likely = model.get_output_embeddings()(hidden).argmax(dim=-1)
    targets[::3] = most_likely[::3]
    with torch.set_grad_enabled(has_gradients):
        found = head_outcomes(model, hidden.requires_grad_(has_gradients), targets, label_smoothing=0.1)
    assert torch.equal(found.is_right, (most_likely == targets).float())
    assert 17 <= int(found.is_right.sum()) < 50


def test_a_frozen_head_keeps_nothing_of_vocabulary_size() -> None:
    model = tiny_model(vocab_size=5000).requires_grad_(False)
    hidden, targets, _ = draws()
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head_losses(model, hidden.requires_grad_(), targets)
    assert kept
    assert max(kept) == hidden.numel()


def test_a_bias_of_the_head_is_counted() -> None:
    model = tiny_model("phi").requires_grad_(False)
    head = model.get_output_embeddings()
    torch.nn.init.normal_(head.bias)
    hidden, targets, _ = draws()
    losses = head_losses(model, hidden.requires_grad_(), targets)
    torch.testing.assert_close(losses, whole_logits(model, hidden, targets), rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_training", [True, False])
def test_gemmas_capped_logits_are_capped(is_training: bool) -> None:
    model = tiny_model("gemma2", final_logit_softcapping=2.0).requires_grad_(False)
    hidden, targets, _ = draws()
    with torch.set_grad_enabled(is_training):
        losses = head_losses(model, hidden.requires_grad_(), targets)
    capped = torch.tanh(model.get_output_embeddings()(hidden) / 2.0) * 2.0
    torch.testing.assert_close(losses, F.cross_entropy(capped, targets, reduction="none"))


def test_bf16_losses_are_fp32_and_near_those_of_fp32() -> None:
    hidden, targets, _ = draws()
    model = tiny_model().requires_grad_(False)
    exact = head_losses(model, hidden, targets)
    ours = head_losses(model.bfloat16(), hidden.bfloat16().requires_grad_(), targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=0.02, atol=0.05)


def test_the_sum_over_micro_batches_does_not_depend_on_how_documents_are_cut_into_them() -> None:
    model = tiny_lora(tiny_model())
    use_packed_attention(model)
    examples = [example_of(d, row) for row, d in enumerate(random_documents([20, 9, 33, 12, 5, 41, 8, 17]))]
    sums, gradients = [], []
    for size in (1, 2, 8):
        total = 0.0
        for first in range(0, 8, size):
            part = summed_loss(model, collate(examples[first : first + size]))
            part.backward()
            total += float(part.detach())
        sums.append(total)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    assert sums[0] == pytest.approx(sums[1], rel=1e-6) == pytest.approx(sums[2], rel=1e-6)
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() / gradients[0].norm() < 1e-6


def test_weights_scale_a_tokens_part_of_the_sum() -> None:
    model = tiny_model()
    use_packed_attention(model)
    document = random_documents([20])[0]
    batch = collate([example_of(document)])
    doubled = Document(document.ids, [(start, end, 2 * weight) for start, end, weight in document.spans])
    with torch.no_grad():
        losses = token_losses(model, batch)
        assert float(summed_loss(model, batch)) == pytest.approx(float((losses * batch.weights).sum()))
        twice = float(summed_loss(model, collate([example_of(doubled)])))
        assert twice == pytest.approx(2 * float(summed_loss(model, batch)))


def test_the_loss_of_a_split_counts_each_trained_token_once(tmp_path: Path) -> None:
    documents = {"test": random_documents([30, 12, 50, 7, 22])}
    reader = ShardReader(write_shards(tmp_path, documents), "test")
    write_plans(tmp_path, documents)
    model = tiny_model().train()
    use_packed_attention(model)
    plan = read_plan(tmp_path, "test", 0)
    found = split_loss(model, reader, plan, device=torch.device("cpu"), bins_per_micro_step=2)
    with torch.no_grad():
        batch = collate([reader.example(row) for row in range(5)])
        losses = token_losses(model, batch).double()
    assert model.training
    assert found.num_trained_tokens == len(losses)
    assert found.loss == pytest.approx(float((losses * batch.weights).sum() / batch.weights.sum()), rel=1e-6)
    num_bytes = 3 * len(losses)
    assert found.bits_per_byte == pytest.approx(float(losses.sum()) / math.log(2) / num_bytes, rel=1e-6)
