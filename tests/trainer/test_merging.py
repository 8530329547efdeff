"""Merged models against PEFT's own merge in memory, against sums by hand, and against the model that was trained."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from schemas.errors import LimitError, RefusedError, TrainingError
from schemas.pipeline_config import PipelineConfig
from tests.trainer.tiny_models import tiny_model, tiny_tokenizer
from trainer.load_trained import load_with_adapter
from trainer.merge_check import LIMITS, Difference, check_difference, difference, merge_difference
from trainer.merging import write_merged
from trainer.model import needed_model, outdated_names_allowed
from trainer.safetensors_writer import write_sharded

CPU = torch.device("cpu")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, Any] = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=ALL),
    "rslora with patterns": LoraConfig(
        r=4,
        use_rslora=True,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"q_proj": 3},
    ),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "head and norms": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
}


def config_of(folder: Path, *, base: str = "plain", dtype: str = "float32") -> PipelineConfig:
    return PipelineConfig.model_validate(
        {
            "run_root": folder / "run",
            "sources": [{"name": "none", "path": "none.json"}],
            "model": {"path": str(folder / "base"), "device": "cpu", "dtype": dtype},
            "train": {"base": base},
        }
    )


def write_base(folder: Path, model_type: str = "llama", **settings: Any) -> None:
    tiny_model(model_type, **settings).save_pretrained(folder / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder / "base")


def write_adapter(folder: Path, settings: Any, *, dtype: torch.dtype = torch.float32) -> Path:
    """Random in all its weights, written by PEFT itself."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    with outdated_names_allowed():
        model: Any = get_peft_model(base, copy.deepcopy(settings), autocast_adapter_dtype=False)
    draws = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=draws).to(dtype)
            parameter.data = parameter.data + 0.1 * noise
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def adapted(folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with outdated_names_allowed():
        return PeftModel.from_pretrained(base, folder / "adapter").float()


def merged_by_peft(folder: Path) -> PreTrainedModel:
    merged: PreTrainedModel = adapted(folder).merge_and_unload()
    return merged


def merge(
    folder: Path, *, base: str = "plain", dtype: torch.dtype = torch.float32, **settings: Any
) -> PreTrainedModel:
    out = folder / "merged"
    out.mkdir()
    config = config_of(folder, base=base)
    write_merged(config, folder / "adapter", out, dtype=dtype, **{"trained_dtype": torch.float32} | settings)
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == dtype
    model: PreTrainedModel = loaded
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 43)[None]).logits
    return found


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore:.*(tie|tied|save_embedding_layers).*:UserWarning")
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_every_weight_is_what_peft_makes_of_it_in_memory(tmp_path: Path, kind: str, tied: bool) -> None:
    write_base(tmp_path, tie_word_embeddings=tied)
    write_adapter(tmp_path, ADAPTERS[kind])
    found = merge(tmp_path)
    expected = merged_by_peft(tmp_path)
    weights = dict(expected.named_parameters(remove_duplicate=False))
    for name, weight in found.named_parameters(remove_duplicate=False):
        if (kind, tied, name) != (
            "embedding",
            True,
            "lm_head.weight",
        ):  # there PEFT adds it to the head as well
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(logits(found), logits(adapted(tmp_path)), rtol=0, atol=1e-4)
    assert found.config.tie_word_embeddings == (tied and kind not in ("embedding", "head and norms"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(logits(found), logits(base), atol=1e-2)


def test_sums_are_made_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    """By hand, from the files: bf16(fp32(W) + scale * fp32(B) fp32(A)); not so PEFT's own merge in bf16."""
    write_base(tmp_path, dtype=torch.bfloat16)
    write_adapter(tmp_path, ADAPTERS["lora"], dtype=torch.bfloat16)
    merge(tmp_path, dtype=torch.bfloat16, trained_dtype=torch.bfloat16)
    base, adapter, merged = (
        load_file(tmp_path / name)
        for name in (
            "base/model.safetensors",
            "adapter/adapter_model.safetensors",
            "merged/model.safetensors",
        )
    )
    key = "model.layers.1.mlp.up_proj"
    down, up = (adapter[f"base_model.model.{key}.lora_{side}.weight"].float() for side in "AB")
    expected = (base[f"{key}.weight"].float() + 2 * (up @ down)).bfloat16()
    assert torch.equal(merged[f"{key}.weight"], expected)
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])


def test_several_files_hold_the_same_model_as_one(tmp_path: Path) -> None:
    write_base(tmp_path)
    write_adapter(tmp_path, ADAPTERS["lora"])
    expected = merged_by_peft(tmp_path)
    found = merge(tmp_path, max_shard_bytes=20_000)
    names = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=1e-5)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_bytes())
    sizes = [tensor.nbytes for name in names for tensor in load_file(tmp_path / "merged" / name).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(
    "model_type",
    ["mixtral", "gemma3_text", *(pytest.param(name, marks=pytest.mark.stress) for name in ("phi3", "qwen3"))],
)
def test_families_are_merged_whose_weights_the_library_puts_together_too(
    tmp_path: Path, model_type: str
) -> None:
    settings = {"num_local_experts": 2} if model_type == "mixtral" else {}
    write_base(tmp_path, model_type, **settings)
    write_adapter(tmp_path, LoraConfig(r=4, target_modules="all-linear"))
    expected = merged_by_peft(tmp_path)
    torch.testing.assert_close(logits(merge(tmp_path)), logits(expected), rtol=0, atol=1e-5)


# Quantised bases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("nf4", "float32"),
        *(
            pytest.param(*names, marks=pytest.mark.stress)
            for names in (("nf4", "bfloat16"), ("int8", "float32"), ("int8", "bfloat16"))
        ),
    ],
)
def test_an_adapter_over_few_bits_is_merged_into_what_the_bits_stand_for(
    tmp_path: Path, form: str, dtype: str
) -> None:
    write_base(tmp_path, hidden_size=64, intermediate_size=128)
    write_adapter(tmp_path, ADAPTERS["lora"])
    trained = torch.float32 if dtype == "float32" else torch.bfloat16
    merge(tmp_path, base=form, dtype=trained, trained_dtype=trained)
    config = config_of(tmp_path, base=form, dtype=dtype)
    arguments: dict[str, Any] = {"device": CPU, "dtype": trained}
    found = merge_difference(config, tmp_path / "adapter", tmp_path / "merged", **arguments)
    check_difference(found, LIMITS[form])
    (tmp_path / "merged").rename(tmp_path / "right")
    merge(tmp_path, base="plain", dtype=trained, trained_dtype=trained)
    naive = merge_difference(config, tmp_path / "adapter", tmp_path / "merged", **arguments)
    assert naive.relative > (3 if form == "nf4" else 1) * found.relative  # LLM.int8 rounds activations too
    if form == "nf4":
        with pytest.raises(LimitError, match="is not the trained one"):
            check_difference(naive, LIMITS[form])


def test_a_folder_that_is_quantised_already_is_merged_too(tmp_path: Path) -> None:
    write_base(tmp_path, hidden_size=64, intermediate_size=128)
    settings = needed_model(config_of(tmp_path))
    from transformers import BitsAndBytesConfig

    write_adapter(tmp_path, ADAPTERS["lora"])
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(settings.path, quantization_config=quantisation)
    quantised.save_pretrained(tmp_path / "quantised")
    (tmp_path / "base").rename(tmp_path / "original")
    (tmp_path / "quantised").rename(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = merge(tmp_path, base="nf4")
    trained = load_with_adapter(config_of(tmp_path, base="nf4"), tmp_path / "adapter")
    from trainer.attention import use_plain_attention

    use_plain_attention(trained)
    found = difference(logits(trained)[0], logits(model)[0])
    assert found.relative < 1e-4


# What can't be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "stand before each prompt"),
        (PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "stand before each prompt"),
        (AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"), "gated attention"),
    ],
)
def test_adapters_that_change_no_weight_are_refused(tmp_path: Path, settings: Any, reason: str) -> None:
    write_base(tmp_path)
    write_adapter(tmp_path, settings)
    with pytest.raises(RefusedError, match=reason):
        write_merged(
            config_of(tmp_path),
            tmp_path / "adapter",
            tmp_path,
            dtype=torch.float32,
            trained_dtype=torch.float32,
        )


def test_a_weight_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.tensor([1e6, 0.0])}
    with pytest.raises(TrainingError, match=r"b is not finite as torch\.float16"):
        write_sharded(tmp_path, {"a": (2,), "b": (2,)}, tensors.__getitem__, dtype=torch.float16)
    with pytest.raises(TrainingError, match=r"a is \(2,\), expected \(3,\)"):
        write_sharded(tmp_path, {"a": (3,)}, tensors.__getitem__, dtype=torch.float32)


def test_the_difference_of_logits_is_blind_to_a_shift_and_sees_the_rest() -> None:
    draws = torch.Generator().manual_seed(0)
    one = torch.randn(50, 30, generator=draws)
    assert difference(one, one + 3) == Difference(
        50, pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-6), 1.0
    )  # type: ignore[arg-type]
    off = difference(one, one + 0.1 * torch.randn(50, 30, generator=draws))
    assert 0.08 < off.relative < 0.12
    shares = one.softmax(-1)
    other = (one * 1.1).softmax(-1)
    by_hand = (shares * (shares / other).log()).sum(-1).mean()
    assert difference(one, one * 1.1).divergence == pytest.approx(float(by_hand), rel=1e-4)
    with pytest.raises(LimitError, match=r"at most 5\.00% is allowed"):
        check_difference(off, 0.05)
    with pytest.raises(LimitError):
        check_difference(difference(one, one * float("nan")), 0.05)
