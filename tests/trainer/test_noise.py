"""Noise on embeddings: as large as a document's length says, its own for each bin, and in training alone.

Judge of its size: the hook of transformers, for one document in a row.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from tests.trainer.tiny_models import tiny_model
from trainer.noise import noise_for, use_noise

ALPHA, HIDDEN_SIZE = 5.0, 32
BINS: list[tuple[int, Sequence[int]]] = [(11, (7, 20)), (12, (5,)), (13, (9, 1, 30))]


def noisy(
    *rows: Sequence[tuple[int, Sequence[int]]], padding: int = 0, is_training: bool = True
) -> torch.Tensor:
    """What is added to the embeddings of such rows."""
    model: Any = tiny_model().train(is_training)
    longest = max(sum(sum(lengths) for _, lengths in row) for row in rows)
    ids = torch.arange(len(rows) * (longest + padding)).view(len(rows), -1) % 320
    with torch.no_grad():
        before = model.get_input_embeddings()(ids)
        use_noise(model, ALPHA)
        with noise_for(*rows):
            found: torch.Tensor = model.get_input_embeddings()(ids) - before
    return found


def test_noise_is_as_large_as_the_length_of_its_own_document_says() -> None:
    found = noisy(BINS)[0]
    for document in found.split([7, 20, 5, 9, 1, 30]):
        largest = ALPHA / math.sqrt(len(document) * HIDDEN_SIZE)
        assert 0.8 * largest < float(document.abs().max()) <= largest * (1 + 1e-4)


def test_a_document_alone_in_its_row_gets_noise_as_large_as_transformers() -> None:
    class Table(torch.nn.Embedding):
        neftune_noise_alpha = ALPHA

    table = Table(320, HIDDEN_SIZE).train()
    ids = torch.zeros(1, 200, dtype=torch.long)
    expected = neftune_post_forward_hook(table, ids, torch.zeros(1, 200, HIDDEN_SIZE))
    found = noisy([(1, (200,))])
    assert float(found.std()) == pytest.approx(float(expected.std()), rel=0.03)


@pytest.mark.parametrize("padding", [0, 4])
def test_a_bin_gets_the_same_noise_alone_and_among_others(padding: int) -> None:
    together = noisy(BINS, padding=padding)[0]
    alone = [noisy([one])[0] for one in BINS]
    torch.testing.assert_close(together[: len(together) - padding], torch.cat(alone), rtol=0, atol=1e-6)
    assert torch.equal(together[len(together) - padding :], torch.zeros(padding, HIDDEN_SIZE))
    assert not torch.allclose(alone[0][:5] * math.sqrt(7), alone[1] * math.sqrt(5), atol=1e-2)


def test_each_row_of_a_batch_has_its_own_documents() -> None:
    found = noisy([(1, (6,))], [(2, (4,))])
    for number, one in enumerate(([(1, (6,))], [(2, (4,))])):
        length = sum(one[0][1])
        torch.testing.assert_close(found[number, :length], noisy(one)[0], rtol=0, atol=1e-6)
    assert torch.equal(found[1, 4:], torch.zeros(2, HIDDEN_SIZE))


def test_there_is_none_in_evaluation_and_outside_of_a_step() -> None:
    assert not noisy(BINS, is_training=False).any()
    model: Any = tiny_model().train()
    before = model.get_input_embeddings().weight[:9].clone()
    use_noise(model, ALPHA)
    assert torch.equal(model.get_input_embeddings()(torch.arange(9)), before)
