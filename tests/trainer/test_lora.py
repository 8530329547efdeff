"""LoRA's variants. Judges: PEFT's own DoRA and LoRA+, the base model itself. On five families: test_methods.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import LoraConfig as OurLoraConfig
from schemas.training_config import TrainConfig
from tests.trainer.tiny_models import learnable_documents, tiny_model, tiny_run
from trainer.attention import use_plain_attention
from trainer.load_trained import load_with_adapter
from trainer.lora_targets import check_targets
from trainer.methods import lora
from trainer.optimizers import MasterOptimizer, trained_parameters
from trainer.train import train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = torch.tensor([learnable_documents(1)[0].ids])


# Targets and ranks ------------------------------------------------------------------------------------------


def wrapped(**settings: Any) -> Any:
    return lora.apply(tiny_model(), TrainConfig(lora=OurLoraConfig(rank=4, **settings)))


def layers_with_matrices(model: torch.nn.Module) -> set[str]:
    names = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    return {name.removeprefix("base_model.model.model.layers.") for name in names}


def test_targets_are_names_patterns_or_all_layers_but_the_head() -> None:
    assert layers_with_matrices(wrapped(targets=["q_proj", "mlp.up_proj"])) == {
        *("0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj", "1.mlp.up_proj")
    }
    assert layers_with_matrices(wrapped(targets=r".*layers\.1\.self_attn\.[qv]_proj")) == {
        *("1.self_attn.q_proj", "1.self_attn.v_proj")
    }
    assert len(layers_with_matrices(wrapped())) == 14


def test_a_pattern_may_match_norms_and_whole_blocks_too() -> None:
    """PEFT ends with an error at the first of them that is no linear layer."""
    model = lora.apply(tiny_model("qwen3"), TrainConfig(lora=OurLoraConfig(rank=4, targets=r".*layers\.0.*")))
    assert len(layers_with_matrices(model)) == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "*_proj"}, r"'\*_proj' is no regular expression .* names of modules stand in a list"),
        ({"targets": ["q_prj"]}, "'q_prj' matches no linear layer; nearest: q_proj"),
        (
            {"rank": 17},
            r"rank is 17, model\.layers\.0\.self_attn\.k_proj is a matrix of 16 x 32: .*at most 16",
        ),
        ({"modules_to_save": ["lm_heat"]}, "'lm_heat' is the end of no module's name; nearest: lm_head"),
    ],
)
def test_what_does_not_fit_is_told_by_names_and_shapes_alone(settings: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        model = tiny_model()
    with pytest.raises(ConfigError, match=message):
        check_targets(model, OurLoraConfig(**settings))


def test_a_rank_that_is_too_high_for_other_layers_is_none_for_the_targets() -> None:
    check_targets(tiny_model(), OurLoraConfig(rank=17, targets=["q_proj"]))


# DoRA -------------------------------------------------------------------------------------------------------


def test_dora_computes_what_peft_computes_and_its_gradients() -> None:
    """In fp32, where PEFT rounds nothing."""
    theirs: Any = get_peft_model(
        tiny_model(), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_dora=True)
    )
    ours = wrapped(alpha=6, dora=True)
    names = [name for name, _ in trained_parameters(ours)]
    assert sum("magnitude" in name for name in names) == 14
    draws = torch.Generator().manual_seed(0)
    for name in names:
        mine, right = ours.get_parameter(name), theirs.get_parameter(name)
        with torch.no_grad():
            mine += 0.1 * torch.randn(mine.shape, generator=draws)
            right.copy_(mine)
    losses = []
    for model in (ours, theirs):
        use_plain_attention(model)
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for name in names:
        mine, right = (model.get_parameter(name).grad for model in (ours, theirs))
        assert torch.allclose(mine, right, rtol=1e-3, atol=1e-6), name


def bfloat16_run(folder: Path, **settings: Any) -> PipelineConfig:
    return tiny_run(
        folder,
        model={"dtype": "bfloat16"},
        train={"max_steps": 6, "trackers": [], "lora": {"rank": 4, "dora": True}, **settings},
        num_documents=24,
    )


def test_dora_in_bfloat16_begins_as_the_base(tmp_path: Path) -> None:
    config = bfloat16_run(tmp_path)
    assert config.model is not None
    base: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.bfloat16)
    expected = base(input_ids=IDS).logits
    model = lora.apply(base, config.train)
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_magnitudes_stay_fp32_from_training_to_the_model_in_service(tmp_path: Path) -> None:
    """Their updates are smaller than what bf16 can tell apart."""
    config = bfloat16_run(tmp_path, learning_rate=1e-3)
    result = train(config)
    output = config.run_root / "checkpoints" / result.key / result.output
    saved = load_file(output / "adapter_model.safetensors")
    begun = wrapped_over(config)
    served = load_with_adapter(config, output)
    use_plain_attention(served)
    rounded_away = 0
    for name, parameter in served.named_parameters():
        if "magnitude" not in name:
            assert parameter.dtype == torch.bfloat16
            continue
        key = name.replace(".default.weight", "")
        assert parameter.dtype == saved[key].dtype == torch.float32
        assert torch.equal(parameter, saved[key])
        before = begun.get_parameter(name)
        rounded_away += int(((parameter != before) & (parameter.bfloat16() == before.bfloat16())).sum())
    assert rounded_away > 100


def wrapped_over(config: PipelineConfig) -> Any:
    assert config.model is not None
    base: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.bfloat16)
    return lora.apply(base, config.train)


# LoRA+ ------------------------------------------------------------------------------------------------------


def test_lora_plus_updates_as_peft_does_for_ten_steps() -> None:
    settings = TrainConfig(
        learning_rate=1e-3, weight_decay=0.1, lora=OurLoraConfig(rank=4, learning_rate_ratio=16)
    )
    ours, theirs = (lora.apply(tiny_model(), settings) for _ in range(2))
    optimizer = MasterOptimizer(trained_parameters(ours), settings)
    expected = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    for step in range(10):
        ids = torch.tensor([learnable_documents(1, seed=step)[0].ids])
        for model in (ours, theirs):
            use_plain_attention(model)
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.collect_gradients()
        optimizer.step(1e-3)
        expected.step()
        expected.zero_grad()
    for name, parameter in trained_parameters(ours):
        assert torch.allclose(parameter, theirs.get_parameter(name), atol=1e-6), name


# IA3 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["plain", "nf4"])
def test_vectors_of_ia3_are_fp32_and_served_as_they_were_trained(tmp_path: Path, base: str) -> None:
    config = bfloat16_run(tmp_path, method="ia3", base=base, lora={}, learning_rate=0.05)
    result = train(config)
    output = config.run_root / "checkpoints" / result.key / result.output
    saved = load_file(output / "adapter_model.safetensors")
    assert len(saved) == 6  # keys, values and the last of the MLP, in two layers
    served = load_with_adapter(config, output)
    for name, tensor in saved.items():
        parameter = served.get_parameter(f"{name}.default")
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, tensor)
        assert not torch.equal(tensor, torch.ones_like(tensor))


def test_layers_that_ia3_does_not_find_are_named(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"method": "ia3", "ia3": {"targets": ["w_key"]}})
    with pytest.raises(ConfigError, match=r"train\.ia3\.targets: 'w_key' matches no linear layer; known: "):
        train(config)
