"""The table of rules: each one fires, says what to do, and the whole cross product of settings has an answer."""

import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import InputError, RefusedError
from schemas.pipeline_config import PipelineConfig
from trainer.support import RULES, check_supported, model_folder, refusals

ROOT = Path(__file__).parent.parent.parent
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LLAMA = {"model_type": "llama", "max_position_embeddings": 4096}


def config_of(
    folder: Path,
    architecture: dict[str, Any] | None = None,
    *,
    model_settings: dict[str, Any] | None = None,
    weights: dict[str, list[int]] | None = None,
    adapter: dict[str, Any] | None = None,
    adapter_weights: dict[str, list[int]] | None = None,
    trained_over: str | None = None,
    **sections: Any,
) -> PipelineConfig:
    """`weights` and `adapter_weights` are shapes: files of a header and no numbers, so that nothing can be loaded."""
    model_folder = folder / "model"
    model_folder.mkdir(exist_ok=True)
    (model_folder / "config.json").write_text(json.dumps(architecture or LLAMA))
    if weights is not None:
        write_header(model_folder / "model.safetensors", weights)
    if adapter is not None:
        place = folder / "training" / "adapter"
        place.mkdir(parents=True)
        model_settings = {"adapter": str(place), **(model_settings or {})}
        plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        (place / "adapter_config.json").write_text(json.dumps(plain | adapter))
        write_header(place / "adapter_model.safetensors", adapter_weights or {})
    if trained_over is not None:
        record = {"inputs": {"model": trained_over}}
        (folder / "training" / "training.json").write_text(json.dumps(record))
    return PipelineConfig.model_validate(
        {
            "run_root": folder / "run",
            "sources": [{"name": "tiny", "path": "chats.json"}],
            "model": {"path": str(model_folder), **(model_settings or {})},
            **sections,
        }
    )


def write_header(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file that ends where its numbers would begin."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def test_defaults_are_supported(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert refusals(config) == []
    check_supported(config)


MERGE = {"adapter_use": "merge"}
DORA = {"dora": True}
YARN = {"rope_scaling": {"type": "yarn", "factor": 4}}
TOKENS = {"new_tokens": ["<|tool|>"]}
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 4}}
EMBEDDING = {"model.embed_tokens.weight": [320, 32]}
QUERIES = {"model.layers.0.self_attn.q_proj.weight": [32, 32]}
THEIR_QUERIES = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": [4, 64],
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": [64, 4],
}
BROKEN: dict[str, dict[str, Any]] = {
    "model": {"model": None},
    "capacity": {"pack": {"capacity": 1024}, "split": {"max_tokens": 2048}},
    "positions": {"split": {"max_tokens": 8192}},
    "quantised-base": {"architecture": {**LLAMA, "quantization_config": {"quant_method": "gptq"}}},
    "quantised-form": {"architecture": {**LLAMA, "quantization_config": NF4}, "train": {"base": "int8"}},
    "rope-twice": {
        "architecture": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}},
        "model_settings": YARN,
    },
    "rope-phi3": {"architecture": {**LLAMA, "model_type": "phi3"}, "model_settings": YARN},
    "rope-row": {"model_settings": DYNAMIC, "split": {"max_tokens": 8192}},
    "random": {"model_settings": {"init": "random"}, "train": {"strategy": "pipeline"}},
    "new-tokens-method": {"model_settings": TOKENS, "train": {"method": "expand"}},
    "new-tokens-sharded": {"model_settings": TOKENS, "train": {"strategy": "fsdp2"}},
    "new-tokens-beside": {"model_settings": TOKENS, "train": {"lora": {"targets": ["lm_head"]}}},
    "encoder-decoder": {"architecture": {"model_type": "t5", "is_encoder_decoder": True}},
    "recurrent-layers": {"architecture": {"model_type": "jamba"}},
    "attention-sinks": {"architecture": {"model_type": "gpt_oss"}},
    "experts-zero3": {"architecture": {**LLAMA, "num_experts": 4}, "train": {"strategy": "zero3"}},
    "warm-up": {"train": {"warmup_steps": 10, "max_steps": 10}},
    "micro-step": {"train": {"bins_per_step": 2, "bins_per_micro_step": 4}},
    "int8-sharded": {"train": {"base": "int8", "strategy": "zero3"}},
    "float16-strategy": {"model_settings": {"dtype": "float16"}, "train": {"strategy": "zero2"}},
    "adapter": {"model_settings": {"adapter": "/no/such/folder"}},
    "adapter-kind": {"adapter": {"peft_type": "IA3"}},
    "adapter-contradiction": {"adapter": {}, "train": {"lora": {"rank": 8}}},
    "adapter-full": {"adapter": {}, "train": {"method": "full"}},
    "adapter-merge-bits": {"adapter": {}, "model_settings": MERGE, "train": {"base": "int8"}},
    "adapter-sharded": {"adapter": {}, "model_settings": MERGE, "train": {"strategy": "fsdp2"}},
    "whole-modules-sharded": {"train": {"strategy": "fsdp2", "lora": {"modules_to_save": ["norm"]}}},
    "saved-target": {"train": {"lora": {"targets": ["lm_head"], "modules_to_save": ["lm_head"]}}},
    "dora-strategy": {"train": {"strategy": "zero2", "lora": DORA}},
    "dora-compile": {"train": {"compile": True, "lora": DORA}},
    "dora-int8": {"train": {"base": "int8", "lora": DORA}},
    "dora-adapter": {"adapter": {}, "model_settings": MERGE, "train": {"lora": DORA}},
    "ia3-strategy": {"train": {"method": "ia3", "strategy": "fsdp2"}},
    "ia3-int8": {"train": {"method": "ia3", "base": "int8"}},
    "ia3-adapter": {"adapter": {}, "model_settings": MERGE, "train": {"method": "ia3"}},
    "lora-init-strategy": {"train": {"strategy": "fsdp2", "lora": {"init": "eva"}}},
    "lora-init-bits": {"train": {"base": "nf4", "lora": {"init": "pissa"}}},
    "lora-init-dora": {"train": {"lora": {"init": "olora", **DORA}}},
    "lora-plus-strategy": {"train": {"strategy": "zero2", "lora": {"learning_rate_ratio": 16}}},
    "lora-init-tokens": {"model_settings": TOKENS, "train": {"lora": {"init": "eva"}}},
    "lora-init-adapter": {"adapter": {}, "train": {"lora": {"init": "pissa"}}},
    "lora-init-rows": {"train": {"base": "int8_rows", "lora": {"init": "eva"}}},
    "loftq-plain": {"train": {"lora": {"init": "loftq"}}},
    "loftq-quantised": {
        "architecture": {**LLAMA, "quantization_config": NF4},
        "train": {"base": "nf4", "lora": {"init": "loftq"}},
    },
    "offload": {"train": {"offload": "all", "strategy": "zero2"}},
    "early-stopping": {"train": {"early_stopping_evaluations": 2}},
    "spikes-zero": {"train": {"max_loss_spike": 3.0, "strategy": "zero2"}},
    "layers": {"train": {"kernels": "layers", "strategy": "zero2"}},
    "offload-checkpoints": {"train": {"offload_checkpoints": True}},
    "compile-bits": {"train": {"compile": True, "base": "int8"}},
    "unpacked-strategy": {"train": {"batches": "unpacked", "strategy": "zero2"}},
    "unpacked-compile": {"train": {"method": "prompt", "compile": True}},
    "virtual-tokens-packed": {"train": {"method": "p_tuning", "batches": "packed"}},
    "virtual-tokens-merge": {"adapter": {}, "model_settings": MERGE, "train": {"method": "prompt"}},
    "virtual-positions": {"split": {"max_tokens": 4090}, "train": {"method": "prompt"}},
    "virtual-tokens-layer-inputs": {
        "architecture": {**LLAMA, "hidden_size_per_layer_input": 16},
        "train": {"method": "p_tuning"},
    },
    "prefix-checkpointing": {"train": {"method": "prefix", "gradient_checkpointing": True}},
    "prefix-latent": {"architecture": {**LLAMA, "kv_lora_rank": 8}, "train": {"method": "prefix"}},
    "llama-adapter-family": {"architecture": {"model_type": "qwen3"}, "train": {"method": "llama_adapter"}},
    "llama-adapter-heads": {
        "architecture": {**LLAMA, "num_attention_heads": 4, "head_dim": 16, "hidden_size": 32},
        "train": {"method": "llama_adapter"},
    },
    "llama-adapter-layers": {
        "architecture": {**LLAMA, "num_hidden_layers": 2},
        "train": {"method": "llama_adapter", "virtual_tokens": {"layers": 3}},
    },
    "compile-strategy": {"train": {"compile": True, "strategy": "zero3"}},
    "compile-checkpointing": {
        "train": {"compile": True, "gradient_checkpointing": True, "strategy": "zero2"}
    },
    "compile-dropout": {"train": {"compile": True, "lora": {"dropout": 0.1}}},
    "compiler": {"train": {"compile": True}},
    "optimizer-strategy": {"train": {"optimizer": "lion", "strategy": "fsdp2"}},
    "ema-strategy": {"train": {"ema_decay": 0.99, "strategy": "fsdp2"}},
    "optimizer-method": {"train": {"optimizer": "muon"}},
    "schedule-free-schedule": {"train": {"optimizer": "schedule_free"}},
    "schedule-free-ema": {"train": {"optimizer": "schedule_free", "schedule": "constant", "ema_decay": 0.99}},
    "adamw-bf16-dtype": {
        "model_settings": {"dtype": "float32"},
        "train": {"optimizer": "adamw_bf16"},
    },
    "int8-full": {"train": {"base": "int8", "method": "full"}},
    "nf4-full": {"train": {"base": "nf4", "method": "full"}},
    "freeze-nothing": {"train": {"method": "freeze"}},
    "whole-model-bits": {"train": {"method": "expand", "base": "nf4"}},
    "processes": {"train": {"num_processes": 2}},
    "deepspeed": {"train": {"strategy": "zero2"}},
    "bitsandbytes": {"train": {"base": "int8"}},
    "wandb": {"train": {"trackers": ["wandb"]}},
    "quantised-tensors": {"weights": {"model.layers.0.self_attn.q_proj.qweight": [4, 32]}},
    "vocabulary": {"architecture": {**LLAMA, "vocab_size": 321}, "weights": EMBEDDING},
    "head": {"architecture": {**LLAMA, "tie_word_embeddings": False}, "weights": EMBEDDING},
    "two-heads": {
        "architecture": {**LLAMA, "tie_word_embeddings": True},
        "weights": {**EMBEDDING, "lm_head.weight": [319, 32]},
    },
    "lora-targets": {"weights": QUERIES, "train": {"lora": {"targets": ["q_porj"]}}},
    "lora-rank": {"weights": QUERIES, "train": {"lora": {"rank": 33}}},
    "adapter-base": {"weights": QUERIES, "adapter": {}, "trained_over": "0" * 32},
    "adapter-shapes": {"weights": QUERIES, "adapter": {}, "adapter_weights": THEIR_QUERIES},
}
PACKAGES = ("deepspeed", "bitsandbytes", "wandb", "compiler")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rule asks for is there, whatever this machine has."""
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, sys.modules[__name__])


def uninstall(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if package == "compiler":
        monkeypatch.setenv("PATH", "/nowhere")
        return
    monkeypatch.setitem(sys.modules, package, None)


def test_every_rule_has_a_case_here() -> None:
    assert set(BROKEN) == {rule.id for rule in RULES}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_named_alone_with_what_to_do(
    tmp_path: Path, rule: str, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rule in PACKAGES:
        uninstall(rule, monkeypatch)
    config = config_of(tmp_path, **BROKEN[rule])
    problems = refusals(config)
    assert [problem.split(":")[0] for problem in problems] == [rule]
    with pytest.raises(RefusedError, match=re.escape(problems[0])):
        check_supported(config)
    alternative = next(known.alternative for known in RULES if known.id == rule)
    assert problems[0].endswith(alternative)
    assert "\n" not in problems[0]


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
        {"model_type": "gemma3", "text_config": {"model_type": "mamba2"}},
    ],
)
def test_recurrent_layers_are_found_in_hybrids_and_one_level_down(
    tmp_path: Path, architecture: dict[str, Any]
) -> None:
    assert refusals(config_of(tmp_path, architecture))[0].startswith("recurrent-layers")


def test_sliding_windows_are_no_recurrence(tmp_path: Path) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    assert refusals(config_of(tmp_path, {**LLAMA, **layers})) == []


def test_several_broken_rules_are_all_named_at_once(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"model_type": "jamba", "quantization_config": {}}, **BROKEN["warm-up"])
    assert [problem.split(":")[0] for problem in refusals(config)] == [
        "quantised-base",
        "recurrent-layers",
        "warm-up",
    ]


def test_a_model_that_is_not_here_is_no_broken_rule_but_loading_it_says_so(tmp_path: Path) -> None:
    config = config_of(tmp_path, model={"path": "no-such-org/no-such-model"})
    assert refusals(config) == []
    with pytest.raises(InputError, match="neither a folder nor in the local hub cache"):
        model_folder("no-such-org/no-such-model")
    with pytest.raises(InputError, match="neither a folder"):
        model_folder("/no/such/folder")


def test_a_damaged_config_json_is_named(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        refusals(config)


def test_asking_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(config_of(tmp_path).model_dump_json())
    program = (
        "import sys; from pathlib import Path; from schemas.pipeline_config import PipelineConfig;"
        "from trainer.support import refusals;"
        "config = PipelineConfig.model_validate_json(Path(sys.argv[1]).read_bytes());"
        "assert refusals(config) == [];"
        "print(sorted({'torch', 'transformers', 'peft', 'polars', 'prefect'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
