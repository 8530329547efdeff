"""Methods prefix, prompt, p_tuning and llama_adapter, from the loss to the model in service. Judge: plain PEFT."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import TrainConfig
from tests.trainer.padded_judge import DOCUMENTS, gradients, judged_loss
from tests.trainer.tiny_models import example_of, learnable_documents, tiny_model, tiny_run, write_model
from trainer.answer import Sampling, answer, stop_token_ids
from trainer.attention import use_packed_attention, use_plain_attention
from trainer.consolidate import consolidate
from trainer.data import collate
from trainer.evaluation import evaluate
from trainer.job import plan_job
from trainer.load_trained import LoadedModel, load_for_generation
from trainer.loss import summed_loss, token_losses
from trainer.memory import num_trained_weights, read_shapes
from trainer.methods import METHODS
from trainer.model import load_adapter, load_base_model, outdated_names_allowed
from trainer.output import num_trainable_weights
from trainer.padding import collate_padded
from trainer.promotion import promote
from trainer.prompts import encode_prompt
from trainer.start_adapter import take_off_adapter
from trainer.train import train
from trainer.virtual_rules import VIRTUAL_TOKEN_METHODS

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
}
LEARNED: dict[str, dict[str, Any]] = {
    "prefix": {"method": "prefix", "learning_rate": 0.3, "virtual_tokens": {"count": 8}},
    "prefix network": {
        "method": "prefix",
        "learning_rate": 0.03,
        "virtual_tokens": {"count": 8, "inner_size": 16},
    },
    "prompt": {"method": "prompt", "learning_rate": 0.1, "virtual_tokens": {"count": 8}},
    "p_tuning": {"method": "p_tuning", "learning_rate": 0.02, "virtual_tokens": {"count": 8}},
    "llama_adapter": {"method": "llama_adapter", "learning_rate": 0.3, "virtual_tokens": {"count": 8}},
}
MESSAGES = [{"role": "user", "content": "red cat"}]


def wrapped(method: str, family: str = "llama", **settings: Any) -> Any:
    """A model with virtual tokens that say something: the gate of llama_adapter begins at zero."""
    train_config = TrainConfig.model_validate(
        {"method": method, "virtual_tokens": {"count": 5, **settings}, "seed": 3}
    )
    model = METHODS[method].apply(tiny_model(family, **FAMILIES[family]), train_config)
    for name, parameter in model.named_parameters():
        if name.endswith("adaption_gate"):
            torch.nn.init.constant_(parameter, 0.7)
    use_plain_attention(model)
    return model.train()


def pairs() -> list[Any]:
    """Families of the default run step through the methods."""
    found = []
    for number, method in enumerate(VIRTUAL_TOKEN_METHODS):
        families = ["llama", "mistral"] if method == "llama_adapter" else list(FAMILIES)
        for place, family in enumerate(families):
            is_short = place in (number % len(families), (number + 2) % len(families))
            marks = [] if is_short else [pytest.mark.stress]
            found.append(pytest.param(method, family, marks=marks))
    return found


@pytest.mark.parametrize(("method", "family"), pairs())
def test_loss_and_gradients_are_pefts(method: str, family: str) -> None:
    model = wrapped(method, family)
    examples = [example_of(document, row) for row, document in enumerate(DOCUMENTS)]
    ours, judged = summed_loss(model, collate_padded(examples)), judged_loss(model, DOCUMENTS)
    assert ours.item() == pytest.approx(judged.item(), rel=1e-6)
    found, right = gradients(model, ours), gradients(model, judged)
    assert found.keys() == right.keys()
    assert any(float(gradient.norm()) > 1e-2 for gradient in right.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"inner_size": 6}], ids=str)
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "llama_adapter"),
        *itertools.product(("llama", "phi3", "gemma3_text"), ("prefix", "prompt", "p_tuning")),
    ],
)
def test_memory_counts_what_is_trained(
    tmp_path: Path, family: str, method: str, settings: dict[str, Any]
) -> None:
    folder = write_model(tmp_path / "model", family, **FAMILIES[family])
    config = TrainConfig.model_validate({"method": method, "virtual_tokens": {"count": 5, **settings}})
    model = METHODS[method].apply(AutoModelForCausalLM.from_pretrained(folder), config)
    assert num_trained_weights(read_shapes(folder), config) == num_trainable_weights(model)


@pytest.mark.parametrize("method", VIRTUAL_TOKEN_METHODS)
def test_the_base_is_as_before_when_the_adapter_is_off(tmp_path: Path, method: str) -> None:
    """Evaluation loads the base once, for itself and all adapters."""
    config = run_of(tmp_path, method, max_steps=1)
    adapter = plan_job(config).folder / "adapter"
    train(config)
    assert config.model is not None
    base = load_base_model(config.model, dtype=torch.float32).eval()
    names = set(dict(base.named_parameters()))
    example = example_of(learnable_documents(1)[0])
    with torch.no_grad():
        before = token_losses(base, collate([example]))
        adapted = load_adapter(base, adapter).eval()
        use_plain_attention(adapted)
        assert not torch.allclose(token_losses(adapted, collate_padded([example])), before)
        take_off_adapter(adapted)
        use_packed_attention(base)
        assert torch.equal(token_losses(base, collate([example])), before)
    assert set(dict(base.named_parameters())) == names


def test_a_llama_adapter_begins_as_the_base(tmp_path: Path) -> None:
    found, base = (
        train(run_of(tmp_path / name, name, max_steps=1)).first_loss for name in ("llama_adapter", "lora")
    )
    assert found == pytest.approx(base, rel=1e-6)


# From training to service -------------------------------------------------------------------------------------


def run_of(folder: Path, what: str, **changes: Any) -> PipelineConfig:
    settings = {"max_steps": 16, **LEARNED.get(what, {"method": what}), **changes}
    return tiny_run(folder, train=settings, num_documents=120, evaluate={"split": "test"})


def plain(config: PipelineConfig, adapter: Path) -> Any:
    assert config.model is not None
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    with outdated_names_allowed():
        return PeftModel.from_pretrained(base, adapter).eval()


@torch.no_grad()
def greedy(model: Any, prompt_ids: list[int], stop_ids: list[int], num_tokens: int) -> list[int]:
    """By whole forward passes, without a cache."""
    ids = list(prompt_ids)
    while len(ids) < len(prompt_ids) + num_tokens and (
        len(ids) == len(prompt_ids) or ids[-1] not in stop_ids
    ):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def said(loaded: LoadedModel) -> str:
    return answer(loaded.model, loaded.tokenizer, MESSAGES, Sampling(max_new_tokens=6))


@pytest.mark.parametrize("what", LEARNED)
def test_evaluation_promotion_and_answers_are_those_of_plain_peft(tmp_path: Path, what: str) -> None:
    config = run_of(tmp_path, what)
    train(config)
    adapter = plan_job(config).folder / "adapter"
    judge = plain(config, adapter)
    documents = learnable_documents(6, seed=2)  # what tiny_run holds out for tests
    report = {model.label: model.total for model in evaluate(config).models}
    found, base = report["candidate"], report["base"]
    with torch.no_grad():
        nats = sum(float(judged_loss(judge, [document])) for document in documents)
    assert found.loss is not None
    assert base.loss is not None
    assert found.loss * found.num_trained_tokens == pytest.approx(nats, rel=1e-5)
    assert found.loss < base.loss
    assert promote(config).outcome == "promoted"
    loaded = load_for_generation(config, "promoted")
    prompt_ids = encode_prompt(loaded.tokenizer, MESSAGES)
    ids = greedy(judge, prompt_ids, stop_token_ids(loaded.model, loaded.tokenizer), 6)
    assert said(loaded) == loaded.tokenizer.decode(ids, skip_special_tokens=True)
    with loaded.model.disable_adapter():  # type: ignore[operator]
        without = said(loaded)
    assert without == said(load_for_generation(config, "none"))
    assert without != said(loaded)


def test_virtual_tokens_in_service_are_compared_with_a_packed_candidate(tmp_path: Path) -> None:
    config = run_of(tmp_path, "prefix")
    train(config)
    before = {model.label: model.total.loss for model in evaluate(config).models}
    assert promote(config).outcome == "promoted"
    lora = config.model_copy(update={"train": run_of(tmp_path / "other", "lora").train})
    train(lora)
    after = {model.label: model.total.loss for model in evaluate(lora).models}
    assert after["incumbent"] == pytest.approx(before["candidate"], rel=1e-6)
    assert after["base"] == pytest.approx(before["base"], rel=1e-6)


def test_virtual_tokens_take_room_from_an_answer(tmp_path: Path) -> None:
    config = run_of(tmp_path, "prompt", max_steps=1, virtual_tokens={"count": 150})
    train(config)
    loaded = load_for_generation(config, "current")
    positions = 256  # of the tiny model
    long = [{"role": "user", "content": "a" * (positions - 20)}]
    num_tokens = len(encode_prompt(loaded.tokenizer, long))
    assert num_tokens < positions
    with pytest.raises(InputError, match=f"the prompt has {num_tokens + 150} tokens and the model reads 256"):
        answer(loaded.model, loaded.tokenizer, long, Sampling(max_new_tokens=5))


@pytest.mark.parametrize("what", ["prefix network", "p_tuning", "llama_adapter"])
def test_consolidate_makes_the_same_adapter(tmp_path: Path, what: str) -> None:
    config = run_of(tmp_path, what, max_steps=2)
    train(config)
    out = consolidate(config, out=tmp_path / "out")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (plan_job(config).folder / "adapter" / name).read_bytes()


def test_two_trainings_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    one, same, other = (
        train(run_of(tmp_path / name, "p_tuning", max_steps=2, seed=seed))
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert [entry.sha256 for entry in one.files if entry.path.endswith(".safetensors")] == [
        entry.sha256 for entry in same.files if entry.path.endswith(".safetensors")
    ]
    assert one.first_loss != other.first_loss
    assert np.isfinite(one.last_loss or np.nan)
