"""Modules that are trained whole beside LoRA, with head and embedding apart or one matrix. Judge: plain PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigError
from schemas.pipeline_config import PipelineConfig
from tests.trainer.tiny_models import example_of, learnable_documents, tiny_model, tiny_run, write_model
from trainer.attention import unwrapped, use_packed_attention
from trainer.data import collate
from trainer.job import plan_job
from trainer.loss import token_losses
from trainer.memory import num_trained_weights, read_shapes
from trainer.methods import lora
from trainer.model import load_adapter, load_base_model
from trainer.output import num_trainable_weights
from trainer.start_adapter import take_off_adapter
from trainer.train import train

HEAD, EMBEDDING = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"


def run_of(folder: Path, modules: list[str], *, tie: bool, **settings: Any) -> PipelineConfig:
    model = folder / "model"
    if not model.exists():
        write_model(model, tie_word_embeddings=tie)
    changes = {"max_steps": 4, "lora": {"rank": 4, "modules_to_save": modules}} | settings
    return tiny_run(folder, model={"path": str(model)}, train=changes)


def adapter_of(config: PipelineConfig) -> Path:
    result = train(config)
    return config.run_root / "checkpoints" / result.key / "adapter"


def logits_in_plain_peft(config: PipelineConfig, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    assert config.model is not None
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        logits: torch.Tensor = loaded(input_ids=ids).logits
    return logits


@pytest.mark.parametrize(
    "modules", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"], ["norm"]], ids=str
)
@pytest.mark.parametrize("tie", [False, True], ids=["apart", "tied"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_what_is_saved_computes_in_plain_peft_what_was_trained(
    tmp_path: Path, modules: list[str], tie: bool
) -> None:
    config = run_of(tmp_path, modules, tie=tie)
    adapter = adapter_of(config)
    ids = torch.tensor([learnable_documents(1)[0].ids])
    assert config.model is not None
    ours = load_adapter(load_base_model(config.model, dtype=torch.float32), adapter).eval()
    batch = collate([example_of(learnable_documents(1)[0])])
    with torch.no_grad():
        losses = token_losses(ours, batch)
    logits = logits_in_plain_peft(config, adapter, ids)
    start = len(ids[0]) // 3
    expected = torch.nn.functional.cross_entropy(logits[0, start - 1 : -1], ids[0, start:], reduction="none")
    assert torch.allclose(losses, expected, atol=1e-5)
    saved = load_file(adapter / "adapter_model.safetensors")
    named = {HEAD: "lm_head" in modules, EMBEDDING: "embed_tokens" in modules}
    if tie and any(named.values()):
        named = dict.fromkeys(named, True)
        assert torch.equal(saved[HEAD], saved[EMBEDDING])
    assert {name: name in saved for name in named} == named
    original = load_file(Path(config.model.path) / "model.safetensors")
    for name in set(saved) & set(named):
        stored = original.get(name.removeprefix("base_model.model."), original["model.embed_tokens.weight"])
        assert not torch.equal(saved[name], stored)


def test_a_trained_head_gets_its_gradient(tmp_path: Path) -> None:
    """Judge: autograd through plain logits. The loss of a frozen head would leave it without one."""
    model = tiny_model()
    use_packed_attention(model)
    config = run_of(tmp_path, ["lm_head"], tie=False)
    wrapped = lora.apply(model, config.train)
    batch = collate([example_of(learnable_documents(1)[0])])
    token_losses(wrapped, batch).sum().backward()
    head = unwrapped(wrapped).get_output_embeddings().modules_to_save["default"].weight
    found = head.grad.clone()
    head.grad = None
    hidden = unwrapped(wrapped).model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        max_length_q=batch.max_seqlen,
    )
    logits = hidden.last_hidden_state[0, batch.target_positions] @ head.T
    torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum").backward()
    assert torch.allclose(found, head.grad, atol=1e-5)
    assert float(found.norm()) > 1e-3


@pytest.mark.parametrize("tie", [False, True], ids=["apart", "tied"])
def test_the_base_is_as_before_when_the_adapter_is_off(tmp_path: Path, tie: bool) -> None:
    """Evaluation loads the base once, for itself and all adapters."""
    config = run_of(tmp_path, ["lm_head"], tie=tie)
    adapter = adapter_of(config)
    assert config.model is not None
    base = load_base_model(config.model, dtype=torch.float32)
    batch = collate([example_of(learnable_documents(1)[0])])
    with torch.no_grad():
        before = token_losses(base, batch)
        adapted = load_adapter(base, adapter)
        assert not torch.equal(token_losses(adapted, batch), before)
        take_off_adapter(adapted)
        assert torch.equal(token_losses(base, batch), before)
    assert set(dict(base.named_parameters())) == set(dict(load_base_model(config.model).named_parameters()))


@pytest.mark.parametrize("tie", [False, True], ids=["apart", "tied"])
def test_a_resumed_training_gives_the_same_bytes(tmp_path: Path, tie: bool) -> None:
    modules = ["lm_head", "norm"]
    config = run_of(tmp_path, modules, tie=tie, max_steps=6, checkpoint_every_steps=3)
    whole = train(config)
    folder = plan_job(config).folder
    (folder / "training.json").unlink()
    newest = max(folder.glob("step-*"))
    for file in newest.iterdir():
        file.write_bytes(b"damaged")
    assert train(config).files == whole.files


def test_a_name_that_matches_nothing_is_refused_with_the_nearest(tmp_path: Path) -> None:
    config = run_of(tmp_path, ["lm_heat"], tie=False)
    with pytest.raises(ConfigError, match="'lm_heat' is the end of no module's name; nearest: lm_head"):
        train(config)


@pytest.mark.parametrize("tie", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["norm"]], ids=str)
def test_memory_counts_them(tmp_path: Path, modules: list[str], tie: bool) -> None:
    config = run_of(tmp_path, modules, tie=tie)
    assert config.model is not None
    wrapped = lora.apply(load_base_model(config.model, dtype=torch.float32), config.train)
    counted = num_trained_weights(read_shapes(Path(config.model.path)), config.train)
    assert counted == num_trainable_weights(wrapped)
