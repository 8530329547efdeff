"""LoRA that begins elsewhere: what training starts from, what it leaves, and what a resume takes up again.

Judges: the base model itself, numpy's singular values, plain PEFT. Each on five families: test_methods.py.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigError, IntegrityError
from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TrainingResult
from tests.trainer.tiny_models import learnable_documents, tiny_run, write_model
from trainer.attention import use_plain_attention
from trainer.building import apply_method, build_optimizer, load_model, place
from trainer.checkpoint import step_name
from trainer.consolidate import consolidate
from trainer.initial_adapter import FOLDER_NAME, OVER_UNQUANTISED_BASE
from trainer.job import plan_job
from trainer.load_trained import load_with_adapter
from trainer.model import load_base_model
from trainer.train import restore, train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = torch.tensor([learnable_documents(1)[0].ids])
RANK = 4
SETTINGS: dict[str, Any] = {"max_steps": 4, "checkpoint_every_steps": 2, "trackers": []}


def run_of(
    folder: Path, init: str, *, dtype: str = "float32", lora: dict[str, Any] | None = None, **settings: Any
) -> PipelineConfig:
    """A scale that is no power of two, so that it can't hide a factor."""
    chosen = {"rank": RANK, "alpha": 6, "init": init, **(lora or {})}
    return tiny_run(
        folder, model={"dtype": dtype}, train={**SETTINGS, "lora": chosen, **settings}, num_documents=24
    )


def output_of(config: PipelineConfig) -> tuple[TrainingResult, Path]:
    result = train(config)
    return result, config.run_root / "checkpoints" / result.key / result.output


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found.float()


def base_of(config: PipelineConfig, dtype: torch.dtype = torch.float32) -> Any:
    assert config.model is not None
    return AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype)


def as_it_trains(config: PipelineConfig) -> torch.nn.Module:
    """The model as the next step would find it: after the newest checkpoint, if there is one."""
    job = plan_job(config)
    model = place(job, apply_method(job, load_model(job)))
    restore(job, build_optimizer(job, model))
    use_plain_attention(model)
    return model


INITS = ("pissa", "olora", "eva")


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_training_begins_with_what_the_base_computes(
    tmp_path: Path, init: str, dtype: str, limit: float
) -> None:
    """In bf16 what is left of the base is rounded once more: that much, of the logits' norm, and no more."""
    config = run_of(tmp_path, init, dtype=dtype)
    expected = logits(base_of(config, getattr(torch, dtype)))
    found = logits(as_it_trains(config))
    assert (found - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_what_is_published_is_plain_lora_over_the_base_as_it_is(
    tmp_path: Path, init: str, dtype: str, limit: float
) -> None:
    config = run_of(tmp_path, init, dtype=dtype, lora={"rslora": True})
    _, output = output_of(config)
    expected = logits(as_it_trains(config))
    found = logits(PeftModel.from_pretrained(base_of(config, getattr(torch, dtype)), output))
    assert (found - expected).norm() < limit * expected.norm()
    base = logits(base_of(config, getattr(torch, dtype)))
    assert (base - expected).norm() > 10 * limit * expected.norm()
    settings = json.loads((output / "adapter_config.json").read_text())
    assert settings["r"] == (RANK if init == "eva" else 2 * RANK)
    assert settings["init_lora_weights"] is True


def test_ranks_of_eva_differ_and_add_up(tmp_path: Path) -> None:
    config = run_of(tmp_path, "eva", lora={"eva_rho": 2.0})
    _, output = output_of(config)
    ranks = [len(t) for n, t in load_file(output / "adapter_model.safetensors").items() if "lora_A" in n]
    assert max(ranks) > RANK > min(ranks)
    assert max(ranks) <= 2 * RANK
    assert sum(ranks) == RANK * 14


def test_ranks_of_eva_are_equal_where_the_config_says_so(tmp_path: Path) -> None:
    _, output = output_of(run_of(tmp_path, "eva", lora={"eva_rho": 1.0}, max_steps=1))
    tensors = load_file(output / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {RANK}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_whole_modules_pass_through(tmp_path: Path, init: str) -> None:
    config = run_of(tmp_path, init, lora={"modules_to_save": ["lm_head"]})
    _, output = output_of(config)
    found = logits(PeftModel.from_pretrained(base_of(config), output))
    assert torch.allclose(found, logits(as_it_trains(config)), atol=1e-4)
    saved = load_file(output / "adapter_model.safetensors")
    assert not torch.equal(saved["base_model.model.lm_head.weight"], base_of(config).lm_head.weight)


def test_a_head_that_is_the_embedding_too_is_not_taken_apart(tmp_path: Path) -> None:
    write_model(tmp_path / "tied", tie_word_embeddings=True)
    config = tiny_run(
        tmp_path,
        model={"path": str(tmp_path / "tied")},
        train={**SETTINGS, "lora": {"rank": RANK, "init": "pissa", "targets": ["q_proj", "lm_head"]}},
    )
    with pytest.raises(ConfigError, match=r"lm_head.*is the embedding too.*train\.lora\.targets"):
        train(config)


# Over a quantised base --------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_loftq_brings_the_quantised_weights_as_near_as_its_rank_can(tmp_path: Path, base: str) -> None:
    config = run_of(tmp_path, "loftq", base=base)
    weights = dict(base_of(config).named_parameters())
    model = as_it_trains(config)
    held = quantised_weights(config)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == 14
    for name, layer in layers.items():
        key = f"{name.removeprefix('base_model.model.')}.weight"
        lost = (weights[key] - held[key]).detach().numpy().astype(np.float64)
        product = 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        left, values, right = np.linalg.svd(lost)
        best = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
        # bitsandbytes multiplies in 8 bits, so what its layers stand for is seen through some noise.
        limit = 1e-4 if base == "nf4" else 0.05
        assert np.linalg.norm(product.detach().numpy() - best) < limit * np.linalg.norm(best)


def quantised_weights(config: PipelineConfig) -> dict[str, torch.Tensor]:
    """What the quantised layers stand for, told by what they do to the unit vectors: no library unpacks them here."""
    assert config.model is not None
    model = load_base_model(config.model, base=config.train.base)
    found = {}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                found[f"{name}.weight"] = layer(torch.eye(layer.in_features)).T
    return found


@pytest.mark.parametrize(("base", "limit"), [("nf4", 1e-5), ("int8", 0.02)])
def test_an_adapter_of_loftq_is_right_over_the_quantised_base(
    tmp_path: Path, base: str, limit: float
) -> None:
    config = run_of(tmp_path, "loftq", base=base)
    _, output = output_of(config)
    expected = logits(as_it_trains(config))
    loaded = load_with_adapter(config, output)
    use_plain_attention(loaded)
    assert (logits(loaded) - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_over_the_unquantised_base_what_loftq_began_with_is_taken_away(tmp_path: Path, base: str) -> None:
    config = run_of(tmp_path, "loftq", base=base)
    _, output = output_of(config)
    trained, begun = (
        load_file(folder / "adapter_model.safetensors") for folder in (output, output.parent / FOLDER_NAME)
    )
    expected = base_of(config)
    with torch.no_grad():
        for name in trained:
            if name.endswith("lora_A.weight"):
                up = name.replace("lora_A", "lora_B")
                weight = expected.get_parameter(name[len("base_model.model.") :].replace("lora_A.", ""))
                weight += 1.5 * (trained[up] @ trained[name] - begun[up] @ begun[name])
    found = logits(PeftModel.from_pretrained(base_of(config), output / OVER_UNQUANTISED_BASE))
    assert torch.allclose(found, logits(expected), atol=1e-4)
    # It is what was trained, but for what four ranks could not make up for.
    as_trained = logits(as_it_trains(config))
    without = logits(PeftModel.from_pretrained(base_of(config), output))
    assert (found - as_trained).norm() < (without - as_trained).norm() or base == "int8"


# Going on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [*INITS, "loftq"])
def test_a_resumed_training_goes_on_over_the_same_base_to_the_same_bytes(tmp_path: Path, init: str) -> None:
    config = run_of(tmp_path, init, dtype="bfloat16", base="nf4" if init == "loftq" else "plain")
    result, output = output_of(config)
    began = (output.parent / FOLDER_NAME / "adapter_model.safetensors").stat().st_mtime_ns
    (output.parent / "training.json").unlink()
    shutil.rmtree(output)
    shutil.rmtree(output.parent / step_name(4))
    assert train(config) == result  # names every output file with its sha256
    assert (output.parent / FOLDER_NAME / "adapter_model.safetensors").stat().st_mtime_ns == began


def test_an_initial_adapter_that_is_gone_or_damaged_ends_the_training(tmp_path: Path) -> None:
    config = run_of(tmp_path, "pissa")
    _, output = output_of(config)
    (output.parent / "training.json").unlink()
    path = output.parent / FOLDER_NAME / "adapter_model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match=r"adapter_model.safetensors.*put it back, or delete"):
        train(config)
    shutil.rmtree(path.parent)
    with pytest.raises(IntegrityError, match="initial_adapter is gone, and the checkpoints beside it"):
        train(config)


def test_a_kill_while_it_is_made_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(tmp_path, "eva")
    expected, output = output_of(config)
    shutil.rmtree(output.parent)

    class Crash(BaseException):
        """The process ends here, as far as training can see."""

    def crash(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("trainer.initial_adapter.take_off_adapter", crash)
        with pytest.raises(Crash):
            train(config)
    assert train(config) == expected


@pytest.mark.parametrize("init", INITS)
def test_a_checkpoint_is_consolidated_as_the_training_publishes_it(tmp_path: Path, init: str) -> None:
    config = run_of(tmp_path, init)
    _, output = output_of(config)
    found = consolidate(config, out=tmp_path / "consolidated")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (found / name).read_bytes() == (output / name).read_bytes()
