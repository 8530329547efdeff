"""EVA: where the inputs of layers vary. Judge: numpy's eigenvectors of what plain transformers feeds the layers."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.errors import TrainingError
from schemas.pipeline_config import PipelineConfig
from tests.trainer.tiny_models import learnable_documents, tiny_run
from trainer.building import load_model
from trainer.data import micro_batch
from trainer.eva import leading_directions, shared_ranks
from trainer.job import plan_job
from trainer.lora_targets import target_layers
from trainer.loss import hidden_states

NUM_DOCUMENTS, NUM_DIRECTIONS = 24, 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    return tiny_run(tmp_path_factory.mktemp("eva"), num_documents=NUM_DOCUMENTS)


def inputs_alone(config: PipelineConfig) -> dict[str, np.ndarray]:
    """What flows into each layer when the documents are read one by one."""
    assert config.model is not None
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
    seen: dict[str, list[np.ndarray]] = {}
    for name, layer in target_layers(model, "all-linear").items():
        rows = seen.setdefault(name, [])
        layer.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0][0].numpy()))
    with torch.no_grad():
        for document in learnable_documents(NUM_DOCUMENTS):
            model(input_ids=torch.tensor([document.ids]))
    return {name: np.concatenate(rows).astype(np.float64) for name, rows in seen.items()}


def found_packed(config: PipelineConfig) -> Any:
    job = plan_job(config)
    model = load_model(job).eval()
    layers = target_layers(model, "all-linear")  # type: ignore[arg-type]
    plan = job.plans[0]

    def passes() -> Any:
        for number in range(plan.num_bins):
            yield hidden_states(model, micro_batch(plan, job.reader, number, number + 1))

    return leading_directions(layers, passes, num=NUM_DIRECTIONS)


def test_directions_and_shares_are_those_of_the_documents_read_alone(config: PipelineConfig) -> None:
    found = found_packed(config)
    for name, rows in inputs_alone(config).items():
        values, vectors = np.linalg.eigh(np.cov(rows.T))
        values, vectors = values[::-1], vectors.T[::-1]
        shares = values[:NUM_DIRECTIONS] / values.sum()
        assert found[name].shares.numpy() == pytest.approx(shares, rel=0.02), name
        explained = np.square(found[name].vectors.numpy() @ np.linalg.cholesky(np.cov(rows.T))).sum()
        assert explained == pytest.approx(values[:NUM_DIRECTIONS].sum(), rel=0.01), name
        # The first two, apart from the sign.
        for place in range(2):
            assert abs(found[name].vectors[place].numpy() @ vectors[place]) > 0.995, name


def test_directions_are_the_same_each_time(config: PipelineConfig) -> None:
    first, second = found_packed(config), found_packed(config)
    for name, directions in first.items():
        assert torch.equal(directions.vectors, second[name].vectors)
        assert torch.allclose(directions.vectors @ directions.vectors.T, torch.eye(NUM_DIRECTIONS), atol=1e-4)


def test_ranks_go_where_most_is_explained() -> None:
    shares = {
        "even": torch.tensor([0.3, 0.3, 0.2, 0.1]),
        "steep": torch.tensor([0.9, 0.05, 0.01, 0.01]),
        "flat": torch.tensor([0.02, 0.02, 0.02, 0.02]),
    }
    assert shared_ranks(shares, 2) == {"even": 4, "steep": 2, "flat": 0}
    assert sum(shared_ranks(shares, 3).values()) == 9


def test_too_few_tokens_show_too_few_directions() -> None:
    layer = torch.nn.Linear(32, 8)
    with pytest.raises(TrainingError, match=r"5 tokens flow through proj.*raise train\.lora\.eva_bins"):
        leading_directions({"proj": layer}, lambda: [layer(torch.randn(1, 5, 32))], num=6)
