"""A decoder layer written out computes what PEFT's and transformers' own modules compute. They are the judge."""

import copy
from typing import Any

import pytest
import torch

from schemas.errors import TrainingError
from tests.trainer.fast.families import (
    FAMILIES,
    MAX_DIFFERENCE,
    adapted,
    batch,
    distance,
    fast,
    loss_and_gradients,
)
from tests.trainer.matrix_rows import QUICK_BACKEND
from tests.trainer.tiny_models import example_of, random_documents
from trainer import compiling
from trainer.data import collate
from trainer.fast import pointwise, taking
from trainer.fast.offload import CheckpointOffload
from trainer.fast.taking import give_back
from trainer.loss import summed_loss, token_losses

CPU = torch.device("cpu")
MANNERS: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"keep": "selective"},
    "full": {"keep": "full"},
    "tiles": {"keep": "none", "mlp_tokens": 50},
    "offloaded": {"keep": "full", "mlp_tokens": 50, "offload": CheckpointOffload(CPU)},
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the layers that were computed as one, in order."""
    numbers: list[int] = []
    run_layer = taking.run_layer

    def noted(layer: Any, *others: Any) -> torch.Tensor:
        numbers.append(layer.number)
        return run_layer(layer, *others)

    monkeypatch.setattr(taking, "run_layer", noted)
    return numbers


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_libraries_layers(
    family: str, manner: str, runs: list[int]
) -> None:
    model = adapted(family)
    expected_loss, expected = loss_and_gradients(model)
    assert not runs
    ours, _ = fast(model, **MANNERS[manner])
    for _ in range(2):  # the second time with what the first one has left
        loss, gradients = loss_and_gradients(ours)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert distance(gradients, expected) < MAX_DIFFERENCE[torch.float32]
    assert runs == [0, 1, 0, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_alone(family: str) -> None:
    ours, _ = fast(adapted(family))
    examples = [example_of(document) for document in random_documents((37, 5, 22))]
    with torch.no_grad():
        packed = token_losses(ours, collate(examples))
        alone = torch.cat([token_losses(ours, collate([example])) for example in examples])
    assert torch.allclose(packed, alone, atol=1e-5)


def test_in_bf16_it_is_no_further_from_fp32_than_the_libraries_layers() -> None:
    """Over several rows: of one row the noise is a die."""
    of_ours, of_theirs = 0.0, 0.0
    for family in ("llama", "qwen3", "gemma3"):
        model = adapted(family, torch.bfloat16)
        exact, (ours, _) = copy.deepcopy(model).float(), fast(model)
        for lengths in ((37, 5, 64, 22), (80,), (11, 60)):
            expected, theirs, found = (
                loss_and_gradients(each, batch(lengths))[1] for each in (exact, model, ours)
            )
            of_ours += distance(found, expected)
            of_theirs += distance(theirs, expected)
    assert of_ours < of_theirs


def test_an_update_of_the_adapters_is_seen() -> None:
    model = adapted("llama")
    ours, _ = fast(model)
    summed_loss(ours, batch())
    for each in (model, ours):
        with torch.no_grad():
            for parameter in each.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.03)
    expected_loss, expected = loss_and_gradients(model)
    loss, gradients = loss_and_gradients(ours)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert distance(gradients, expected) < MAX_DIFFERENCE[torch.float32]


def test_without_gradients_and_with_the_adapters_off_it_is_the_same_model() -> None:
    model = adapted("qwen3")
    ours, _ = fast(model)
    with torch.no_grad():
        assert torch.allclose(token_losses(ours, batch()), token_losses(model, batch()), atol=1e-5)
        with model.disable_adapter(), ours.disable_adapter():
            assert torch.equal(token_losses(ours, batch()), token_losses(model, batch()))


def test_a_layer_that_is_given_back_computes_its_own_way(runs: list[int]) -> None:
    model = adapted("llama")
    expected_loss, expected = loss_and_gradients(model)
    ours, taken = fast(model)
    give_back(taken, checkpointing=False)
    loss, gradients = loss_and_gradients(ours)
    assert not runs
    assert (loss, distance(gradients, expected)) == (
        pytest.approx(expected_loss),
        pytest.approx(0.0, abs=1e-6),
    )


def test_an_offloaded_checkpoint_that_was_overwritten_is_refused() -> None:
    ours, _ = fast(adapted("llama"), keep="full", offload=CheckpointOffload(CPU))
    first = summed_loss(ours, batch())
    summed_loss(ours, batch())
    with pytest.raises(TrainingError, match="was overwritten before its backward pass"):
        first.backward()


def held_bytes(keep: Any) -> int:
    """What a forward pass leaves for the backward pass, weights not counted."""
    ours, _ = fast(adapted("llama"), keep=keep)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = summed_loss(ours, batch())
    node, seen = loss.grad_fn, set()
    todo = [node]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [edge for edge, _ in node.next_functions]
        for half in (getattr(node, "attended", None), getattr(node, "mlp", None)):
            for name in getattr(half, "__slots__", ()):
                value = getattr(half, name)
                if isinstance(value, torch.Tensor):
                    kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(size for place, size in kept.items() if place not in weights)


def test_the_more_is_recomputed_the_less_is_kept() -> None:
    none, selective, full = (held_bytes(keep) for keep in ("none", "selective", "full"))
    assert full < 0.6 * selective < 0.6 * 0.7 * none


@pytest.mark.slow
def test_compiled_pieces_give_the_same_and_are_whole_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function is one program without a break; a fourth row length needs no new ones."""
    monkeypatch.setattr(compiling, "BACKEND", QUICK_BACKEND)
    counters = torch._dynamo.utils.counters
    model = adapted("llama")
    ours, _ = fast(model, pointwise=pointwise.compiled(compiling.compiler_backend()))
    counters.clear()
    numbers = []
    for lengths in ((37, 5), (30,), (11, 9), (26,)):
        _, expected = loss_and_gradients(model, batch(lengths))
        _, gradients = loss_and_gradients(ours, batch(lengths))
        assert distance(gradients, expected) < MAX_DIFFERENCE[torch.float32]
        numbers.append(counters["stats"]["unique_graphs"])
    assert numbers[0] >= len(pointwise.PLAIN)
    assert numbers[3] == numbers[2] <= 3 * numbers[0]
    assert not counters["graph_break"]
