"""Methods freeze and expand: what they choose, what an expanded model is, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from schemas.errors import ConfigError, RefusedError
from schemas.training_config import TrainConfig
from tests.trainer.tiny_models import tiny_model, tiny_run, write_model
from trainer.layer_names import copied_layers
from trainer.methods import expand, freeze
from trainer.train import train

IDS = torch.arange(3, 40)[None]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 3},
    "olmo2": {},
    "phi3": {},
    "smollm3": {"no_rope_layer_interval": 2},
}


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return logits


def expanded(model: PreTrainedModel, new_layers: int) -> PreTrainedModel:
    return expand.apply(model, TrainConfig.model_validate({"expand": {"new_layers": new_layers}}))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expanded_model_computes_what_its_base_does_and_is_one_of_its_family(
    tmp_path: Path, family: str
) -> None:
    """Saved and loaded by plain transformers too, where layers are built from the config; and with a cache."""
    model = tiny_model(family, num_hidden_layers=4, **FAMILIES[family])
    expected = logits_of(model)
    types = getattr(model.config, "layer_types", None)
    model = expanded(model, 2)
    assert torch.equal(logits_of(model), expected)
    torch.manual_seed(0)
    with torch.no_grad():  # as if it had learnt: copies that compute nothing would hide which ones they are
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter) * parameter.requires_grad
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.num_hidden_layers == len(loaded.model.layers) == 6
    if types is not None:
        assert loaded.config.layer_types == [types[n] for n in (0, 1, 1, 2, 3, 3)]
    assert torch.allclose(logits_of(loaded), logits_of(model), atol=1e-5)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, anew = (model.generate(input_ids=IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, anew)


def test_training_begins_with_the_losses_of_the_base(tmp_path: Path) -> None:
    write_model(tmp_path / "model", num_hidden_layers=3)
    model = {"path": str(tmp_path / "model")}
    settings = {"max_steps": 1, "kernels": "plain"}
    first = [
        train(tiny_run(tmp_path / str(number), model=model, train=settings | method)).first_loss
        for number, method in enumerate([{}, {"method": "expand", "expand": {"new_layers": 2}}])
    ]
    assert first[0] == first[1], "a fresh adapter adds nothing either"


@pytest.mark.parametrize(
    ("num_layers", "new", "copied"),
    [(32, 8, [3, 7, 11, 15, 19, 23, 27, 31]), (5, 2, [1, 4]), (4, 4, [0, 1, 2, 3]), (3, 1, [2])],
)
def test_copies_stand_evenly_among_the_layers(num_layers: int, new: int, copied: list[int]) -> None:
    assert copied_layers(num_layers, new) == copied


EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 1}, "ends its blocks in the families"),
        ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 2}, "ends its blocks|builds layer"),
        ("glm4_moe", {"n_routed_experts": 2, "first_k_dense_replace": 4}, "builds layer"),
    ],
)
def test_families_that_an_added_layer_would_change_are_refused(
    family: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        expanded(tiny_model(family, num_hidden_layers=4, **settings), 2)


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="new_layers is 3, the model has 2 layers; set 2 or fewer"):
        expanded(tiny_model(), 3)
    with pytest.raises(ConfigError, match="last_layers is 3, the model has 2 layers; set 2 or fewer"):
        freeze.apply(tiny_model(), TrainConfig.model_validate({"freeze": {"last_layers": 3}}))


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names() -> None:
    settings = TrainConfig.model_validate({"freeze": {"parameters": ["model.layers.0.mlp.up.weight"]}})
    with pytest.raises(ConfigError, match=re.escape("nearest: model.layers.0.mlp.up_proj.weight")):
        freeze.apply(tiny_model(), settings)
