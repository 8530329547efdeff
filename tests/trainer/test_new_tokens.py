"""New tokens, from text to answer: ids in the tokenizer, rows that begin as the mean, learn, are measured and spoken.

Judges: the mean by hand, and PEFT's own way to compute with trained rows.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer

from pipelines.encode import load_encoder
from pipelines.tokenizer_files import tokenizer_versions
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import LoraConfig, TrainConfig
from tests.trainer.tiny_models import Document, tiny_model, tiny_run, write_model, write_plans, write_shards
from trainer.answer import Sampling, answer
from trainer.evaluation import evaluate
from trainer.load_trained import load_for_generation
from trainer.methods import lora
from trainer.model import load_base_model, load_tokenizer
from trainer.new_tokens import add_rows
from trainer.start_adapter import take_off_adapter
from trainer.train import train

NEW = ["<|tool|>", "zebra"]
NUM_KNOWN = 295
TIES = pytest.mark.parametrize("tie", [False, True], ids=["apart", "tied"])


def config_of(folder: Path, *, tie: bool = False, rows: int = NUM_KNOWN, **train: Any) -> PipelineConfig:
    write_model(folder / "model", vocab_size=rows, tie_word_embeddings=tie)
    return tiny_run(folder, model={"path": str(folder / "model"), "new_tokens": NEW}, train=train)


def test_words_are_found_in_texts_and_other_tokens_are_borders(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    encoder = load_encoder(config)
    assert encoder.num_embeddings == NUM_KNOWN + len(NEW)
    assert encoder.control_ids["<|tool|>"] == NUM_KNOWN
    assert "zebra" not in encoder.control_ids
    assert NUM_KNOWN + 1 in encoder.backend.encode("a zebra runs").ids
    without = config.model_copy(update={"model": config.model.model_copy(update={"new_tokens": []})})  # type: ignore[union-attr]
    assert tokenizer_versions(config).items() - tokenizer_versions(without).items() == {
        ("new_tokens", '["<|tool|>", "zebra"]')
    }


@TIES
@pytest.mark.parametrize("rows", [NUM_KNOWN, 320], ids=["made larger", "rows to spare"])
def test_new_rows_begin_as_the_mean_of_the_known_ones(tmp_path: Path, rows: int, tie: bool) -> None:
    config = config_of(tmp_path, rows=rows, tie=tie)
    assert config.model is not None
    loaded: Any = load_base_model(config.model)
    base: Any = tiny_model(vocab_size=rows, tie_word_embeddings=tie)
    assert loaded.config.vocab_size == max(rows, NUM_KNOWN + 2)
    for ours, theirs in (
        (loaded.get_input_embeddings().weight, base.get_input_embeddings().weight),
        (loaded.lm_head.weight, base.lm_head.weight),
    ):
        assert torch.equal(ours[:NUM_KNOWN], theirs[:NUM_KNOWN])
        mean = theirs[:NUM_KNOWN].mean(dim=0)
        assert torch.allclose(ours[NUM_KNOWN : NUM_KNOWN + 2], mean.expand(2, -1), atol=1e-6)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tie


@TIES
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_beside_the_matrix_compute_what_peft_does(family: str, tie: bool) -> None:
    """Logits and gradients; ids out of order, one of them known before."""
    model = tiny_model(family, vocab_size=NUM_KNOWN, tie_word_embeddings=tie)
    add_rows(model, [NUM_KNOWN + 1, 40, NUM_KNOWN], num_known=NUM_KNOWN)
    wrapped = lora.apply(model, TrainConfig(lora=LoraConfig(rank=2)))
    rows = [p for name, p in wrapped.named_parameters() if "trainable_tokens" in name]
    assert len(rows) == 2 - tie
    torch.manual_seed(0)
    for parameter in rows:
        torch.nn.init.normal_(parameter)
    ids = torch.tensor([[NUM_KNOWN, 5, 40, 3, NUM_KNOWN + 1, 40, 7]])

    def computed() -> list[torch.Tensor]:
        logits = wrapped(input_ids=ids).logits
        return [logits, *torch.autograd.grad(logits.square().sum(), rows)]

    ours = computed()
    for layer in wrapped.modules():
        if isinstance(layer, TrainableTokensLayer):
            del layer.forward
    for found, expected in zip(ours, computed(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert float(ours[1].norm()) > 1


def documents(config: PipelineConfig) -> list[Document]:
    """What the template makes of one question and an answer that is a new token."""
    tokenizer: Any = load_tokenizer(config)
    prompt, reply = (tokenizer(text)["input_ids"] for text in ("<user>red</s>", "<assistant>zebra</s>"))
    assert reply.count(NUM_KNOWN + 1) == 1
    return [Document(prompt + reply, [(len(prompt), len(prompt + reply), 1.0)])] * 30


@pytest.mark.parametrize(("method", "tie"), [("lora", False), ("lora", True), ("full", False)], ids=str)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_new_token_is_learnt_measured_and_spoken(tmp_path: Path, method: str, tie: bool) -> None:
    settings = {"method": method, "learning_rate": 2e-2 if method == "lora" else 8e-3, "bins_per_step": 1}
    config = config_of(tmp_path, tie=tie, **settings)
    splits = dict.fromkeys(("train", "validation", "test"), documents(config))
    write_shards(config.run_root, splits)
    write_plans(config.run_root, splits, capacity=12)
    train(config)
    base, candidate = (model.total.loss for model in evaluate(config).models)
    assert base is not None
    assert candidate is not None
    assert base - candidate > 0.5
    loaded = load_for_generation(config, "current")
    messages = [{"role": "user", "content": "red"}]
    text = answer(loaded.model, loaded.tokenizer, messages, Sampling(max_new_tokens=20))
    if not tie:  # a head of tiny random embeddings learns too slowly to speak
        assert text.startswith("<assistant>zebra")


@TIES
def test_the_base_is_as_before_when_the_adapter_is_off(tmp_path: Path, tie: bool) -> None:
    model = tiny_model(vocab_size=NUM_KNOWN, tie_word_embeddings=tie)
    add_rows(model, [NUM_KNOWN], num_known=NUM_KNOWN)
    ids = torch.tensor([[NUM_KNOWN, 5, 40]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        wrapped = lora.apply(model, TrainConfig(lora=LoraConfig(rank=2)))
        for name, parameter in wrapped.named_parameters():
            if "trainable_tokens" in name:
                parameter += 1
        assert not torch.equal(wrapped(input_ids=ids).logits, before)
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(input_ids=ids).logits, before)
        take_off_adapter(wrapped)
        assert torch.equal(model(input_ids=ids).logits, before)
