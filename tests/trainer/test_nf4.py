"""The 4-bit base computes what bitsandbytes' own 4-bit layers compute, and an adapter over it trains as PEFT's does."""

import copy
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from schemas.errors import ConfigError, InputError, RefusedError, TrainingError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import LoraConfig, ModelConfig, TrainConfig
from schemas.training_result import TrainingResult
from tests.trainer import shards_program
from tests.trainer.tiny_models import tiny_lora, tiny_model, tiny_run, write_model
from trainer import nf4
from trainer.attention import use_plain_attention
from trainer.data import micro_batch
from trainer.dtypes import check_dtypes
from trainer.job import plan_job
from trainer.kernels import use_fast_kernels
from trainer.load_trained import load_with_adapter
from trainer.memory import memory_need, num_trained_weights, read_shapes
from trainer.methods import lora
from trainer.model import load_base_model
from trainer.nf4 import NF4Linear
from trainer.optimizers import MasterOptimizer
from trainer.output import num_trainable_weights
from trainer.train import train

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT's, not ours

# Layers -----------------------------------------------------------------------------------------------------


def bitsandbytes_layer(linear: torch.nn.Linear, *, is_nested: bool = False) -> Any:
    layer = Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4",
        compress_statistics=is_nested,
    )  # fmt: skip
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").requires_grad_(False)


def our_layer(linear: torch.nn.Linear) -> NF4Linear:
    shape = (linear.out_features, linear.in_features)
    return NF4Linear(
        nf4.quantise(linear.weight.detach()), shape=shape, bias=linear.bias, dtype=linear.weight.dtype
    )


def random_linear(shape: tuple[int, int], dtype: torch.dtype, *, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)


SHAPES = [(128, 64), (64, 256), (40, 24), (33, 50), (7, 9)]
"""The third has blocks over the ends of rows, the fourth a last block that is not full, the fifth half a byte."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
def test_outputs_and_gradients_are_bitsandbytes_own_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype, bias: bool
) -> None:
    linear = random_linear(shape, dtype, bias=bias)
    ours, theirs = our_layer(linear), bitsandbytes_layer(linear)
    packed = theirs.weight.data.flatten()
    assert torch.equal(ours.packed[: len(packed)], packed)
    assert torch.equal(ours.absmax, theirs.weight.quant_state.absmax)
    x = torch.randn(3, 11, shape[1], dtype=dtype)
    gradient = torch.randn(3, 11, shape[0], dtype=dtype)
    found: list[tuple[Any, Any]] = []
    for layer in (ours, theirs):
        own = x.clone().requires_grad_()
        output = layer(own)
        output.backward(gradient)
        with torch.no_grad():
            assert torch.equal(layer(own), output)
        found.append((output, own.grad))
    assert found[0][0].dtype == dtype
    for of_ours, of_theirs in zip(*found, strict=True):
        assert torch.equal(of_ours, of_theirs)
    assert not torch.equal(found[0][0], linear(x)), "it is quantised"


def test_the_bytes_of_a_layer_of_bitsandbytes_are_taken_over_where_they_lie() -> None:
    model = torch.nn.Sequential(bitsandbytes_layer(random_linear((128, 64), torch.bfloat16)))
    place = model[0].weight.data_ptr()
    model.config = SimpleNamespace()  # type: ignore[assignment]
    nf4.take_over(model, torch.bfloat16)  # type: ignore[arg-type]
    assert isinstance(model[0], NF4Linear)
    assert model[0].packed.data_ptr() == place


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_takes_half_a_byte_and_a_sixteenth_a_weight_and_keeps_no_unpacked_one(
    shape: tuple[int, int],
) -> None:
    layer = our_layer(random_linear(shape, torch.float32))
    num_weights = math.prod(shape)
    assert layer.packed.nbytes - num_weights / 2 < nf4.PACKED_MULTIPLE
    assert layer.absmax.nbytes == 4 * math.ceil(num_weights / 64)
    kept: list[int] = []
    x = torch.randn(5, shape[1], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(x)
    assert sum(kept) == layer.packed.nbytes + layer.absmax.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_the_same_bytes_stored_as_another_dtype_compute_the_same(dtype: torch.dtype) -> None:
    layer = our_layer(random_linear((40, 24), torch.float32))
    other = copy.deepcopy(layer)
    nf4.store_as(other, dtype)
    assert other.packed.dtype == dtype
    assert torch.equal(other.packed.view(torch.uint8), layer.packed)
    x = torch.randn(3, 24)
    assert torch.equal(other(x), layer(x))


@pytest.mark.slow
def test_two_ranks_keep_half_the_bytes_each_and_gather_and_compute_what_was_cut() -> None:
    """Under torch's own fully_shard, stored as bytes and as float32, bytes that are no numbers among them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.shards_program"],
            cwd=ROOT,
            env=os.environ | place | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    of_ranks = [json.loads(line) for line in said]
    for storage in ("torch.uint8", "torch.float32"):
        found = [rank[storage] for rank in of_ranks]
        for layer, shape in enumerate(shards_program.SHAPES):
            num_weights = math.prod(shape)
            packed, absmax = (sum(rank["bytes"][layer][kind] for rank in found) for kind in (0, 1))
            assert packed == 4 * math.ceil(num_weights / 2 / 4)
            assert absmax == 4 * math.ceil(num_weights / 64)
            for kept, whole in zip(found[0]["bytes"][layer], (packed, absmax), strict=True):
                assert abs(kept - whole / 2) <= 4
        assert all(all(rank["gathered"]) and all(rank["computed"]) for rank in found)


# Models -----------------------------------------------------------------------------------------------------

QUANTISED = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def of_bitsandbytes(folder: Path | str, dtype: torch.dtype, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **settings).train()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_a_model_is_quantised_where_bitsandbytes_would_and_computes_its_logits(
    tmp_path: Path, family: str, tied: bool
) -> None:
    folder = write_model(tmp_path / "model", family, tie_word_embeddings=tied)
    theirs = of_bitsandbytes(folder, torch.float32, quantization_config=QUANTISED)
    ours = load_base_model(ModelConfig(path=str(folder), device="cpu", dtype="float32"), base="nf4").train()
    use_plain_attention(ours)
    names = {name for name, layer in ours.named_modules() if isinstance(layer, NF4Linear)}
    assert names == {name for name, layer in theirs.named_modules() if isinstance(layer, Linear4bit)}
    assert type(ours.get_output_embeddings()) is torch.nn.Linear
    ids = torch.arange(3, 40)[None]
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert not any(parameter.requires_grad for name, parameter in ours.named_parameters() if "proj" in name)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_model_without_weights_gets_the_same_layers_to_be_filled(tmp_path: Path, family: str) -> None:
    folder = write_model(tmp_path / "model", family)
    loaded = load_base_model(ModelConfig(path=str(folder), device="cpu", dtype="bfloat16"), base="nf4")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    nf4.replace_linear_layers(empty)
    shapes = [
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        for model in (empty, loaded)
    ]
    assert shapes[0] == shapes[1]
    assert sum(name.endswith(".packed") for name in shapes[0]) == 14
    weight = load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].to(torch.bfloat16)
    for name, tensor in nf4.quantise(weight).items():
        assert torch.equal(tensor, loaded.get_parameter(f"model.layers.1.mlp.down_proj.{name}"))


@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_lora_over_4_bits_gives_pefts_outputs_and_gradients(bias: bool, dtype: torch.dtype) -> None:
    ours = tiny_model(dtype=dtype, attention_bias=bias, mlp_bias=bias)
    theirs = copy.deepcopy(ours)
    for model, build in ((ours, our_layer), (theirs, bitsandbytes_layer)):
        for name, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                model.set_submodule(name, build(layer))
    results = []
    for model in (tiny_lora(ours), tiny_lora(theirs)):
        is_fused = model.base_model.model is ours
        fused = use_fast_kernels(model, TrainConfig(), device=CPU).num_fused_lora_layers
        assert fused == (14 if is_fused else 0)
        loss = model.train()(input_ids=torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss
        loss.backward()
        gradients = [p.grad.flatten().double() for _, p in model.named_parameters() if p.grad is not None]
        results.append((float(loss.detach()), torch.cat(gradients)))
    (loss, gradient), (expected_loss, expected) = results
    limit = 1e-6 if dtype == torch.float32 else 0.05
    assert loss == pytest.approx(expected_loss, rel=limit)
    assert float((gradient - expected).norm() / expected.norm()) < limit


# Training ---------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "base": "nf4",
    "max_steps": 20,
    "schedule": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "learning_rate": 5e-3,
}


def folder_of(config: PipelineConfig, result: TrainingResult) -> Path:
    return config.run_root / "checkpoints" / result.key


def losses_of(config: PipelineConfig, result: TrainingResult) -> list[float]:
    lines = [
        json.loads(line) for line in (folder_of(config, result) / "metrics.jsonl").read_text().splitlines()
    ]
    return [line["loss"] for line in lines if "loss" in line]


def qlora_of_peft_and_bitsandbytes(config: PipelineConfig) -> tuple[Any, list[float]]:
    """Their own 4-bit layers and adapters, torch's AdamW, and each document alone."""
    assert config.model is not None
    model = of_bitsandbytes(config.model.path, torch.float32, quantization_config=QUANTISED)
    torch.manual_seed(0)
    settings = PeftLoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    job, losses = plan_job(config), []
    for step in job.steps:
        batch = micro_batch(job.plans[step.epoch], job.reader, step.first_bin, step.end_bin)
        starts = (batch.position_ids[0] == 0).nonzero().flatten().tolist()
        total = torch.zeros(())
        for start, end in zip(starts, [*starts[1:], batch.input_ids.shape[1]], strict=True):
            inside = (batch.target_positions >= start) & (batch.target_positions < end)
            logits = model(input_ids=batch.input_ids[:, start:end]).logits[
                0, batch.target_positions[inside] - start
            ]
            nats = F.cross_entropy(logits, batch.targets[inside], reduction="none")
            total = total + (nats * batch.weights[inside]).sum()
        loss = total / step.weight_sum
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return model, losses


def test_twenty_steps_are_those_of_pefts_and_bitsandbytes_own_qlora(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train=SETTINGS, epochs=2)
    result = train(config)
    model, expected = qlora_of_peft_and_bitsandbytes(config)
    assert len(expected) == 20
    np.testing.assert_allclose(losses_of(config, result), expected, atol=1e-5)
    assert expected[-1] < 0.8 * expected[0]
    adapter = load_file(folder_of(config, result) / "adapter" / "adapter_model.safetensors")
    theirs = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert adapter.keys() == theirs.keys()
    for name, tensor in adapter.items():
        assert float((tensor - theirs[name]).detach().norm() / theirs[name].detach().norm()) < 1e-3, name


def test_the_adapter_is_plain_pefts_over_the_plain_base_and_the_quantised_one(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train=SETTINGS)
    folder = folder_of(config, train(config)) / "adapter"
    assert config.model is not None
    ids = torch.arange(3, 40)[None]

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = PeftModel.from_pretrained(model, folder).train()(input_ids=ids).logits
        return found

    ours = load_with_adapter(config, folder).eval()  # as evaluate, promote and generate do
    assert sum(isinstance(layer, NF4Linear) for layer in ours.modules()) == 14
    use_plain_attention(ours)
    with torch.no_grad():
        of_ours = ours(input_ids=ids).logits
    quantised = of_bitsandbytes(config.model.path, torch.float32, quantization_config=QUANTISED)
    assert torch.allclose(of_ours, logits(quantised), atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    untrained = plain(input_ids=ids).logits.detach()
    assert (logits(plain) - untrained).abs().max() > 1


@pytest.mark.parametrize("base", ["plain", "int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_norms_and_head_have_the_dtype_that_computes(tmp_path: Path, base: Any, dtype: str) -> None:
    folder = write_model(tmp_path / "model", "qwen2")  # it has biases
    model = load_base_model(ModelConfig(path=str(folder), device="cpu", dtype=dtype), base=base)  # type: ignore[arg-type]
    trained = lora.apply(model, TrainConfig(base=base))
    expected = getattr(torch, dtype)
    check_dtypes(trained, expected)
    found = {
        part: {p.dtype for name, p in trained.named_parameters() if part in name}
        for part in ("lora_A", "lora_B", "bias", "norm", "lm_head", "embed_tokens")
    }
    assert set().union(*found.values()) == {expected}
    assert all(found.values())
    model.model.norm.weight.data = model.model.norm.weight.data.half()
    with pytest.raises(TrainingError, match=r"norm\.weight is torch\.float16, expected"):
        check_dtypes(trained, expected)


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_quantised_module_is_not_trained_whole(tmp_path: Path, base: Any) -> None:
    folder = write_model(tmp_path / "model")
    model = load_base_model(ModelConfig(path=str(folder), device="cpu"), base=base)
    settings = LoraConfig(targets=["k_proj"], modules_to_save=["mlp.up_proj"])
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj is quantised and has no gradient"):
        lora.apply(model, TrainConfig(base=base, lora=settings))


def test_the_memory_told_is_what_a_4_bit_model_and_its_optimiser_hold(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = tiny_run(tmp_path, model={"path": str(folder)}, train={"base": "nf4"})
    model = lora.apply(load_base_model(ModelConfig(path=str(folder), device="cpu"), base="nf4"), config.train)
    need = memory_need(config, read_shapes(folder), {}, bytes_per_weight=2)
    assert num_trained_weights(read_shapes(folder), config.train) == num_trainable_weights(model)
    assert need.weights == sum(p.nbytes for p in model.parameters())
    optimizer = MasterOptimizer(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], config.train
    )
    assert need.states == 4 * 4 * sum(master.numel() for master in optimizer.masters.values())


# Model folders that are quantised already -------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model, as plain transformers and bitsandbytes write it."""
    folder = tmp_path_factory.mktemp("quantised")
    plain = write_model(folder / "plain")
    settings = {
        "nf4": QUANTISED,
        "nested": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    found = {"plain": plain}
    for name, quantisation in settings.items():
        found[name] = write_model(folder / name)
        of_bitsandbytes(plain, torch.bfloat16, quantization_config=quantisation).save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", ["nf4", "nested"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_4_bit_folder_is_loaded_byte_by_byte_and_computes_bitsandbytes_logits(
    folders: dict[str, Path], name: str, dtype: Any
) -> None:
    ours = load_base_model(
        ModelConfig(path=str(folders[name]), device="cpu", dtype=dtype), base="nf4"
    ).train()
    saved = load_file(folders[name] / "model.safetensors")
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, NF4Linear)}
    assert len(layers) == 14
    for place, layer in layers.items():
        assert torch.equal(layer.packed, saved[f"{place}.weight"].flatten())
        assert (name == "nested") == (saved[f"{place}.weight.absmax"].dtype == torch.uint8)
    use_plain_attention(ours)
    theirs = of_bitsandbytes(folders[name], getattr(torch, dtype))
    for layer in theirs.modules():  # it takes the dtypes of the file
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = getattr(torch, dtype)
        elif parameters := dict(layer.named_parameters(recurse=False)):
            for parameter in parameters.values():
                parameter.data = parameter.data.to(getattr(torch, dtype))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["nf4", "nested", "int8"])
def test_the_shapes_of_a_quantised_folder_are_those_of_the_model(folders: dict[str, Path], name: str) -> None:
    assert read_shapes(folders[name]) == read_shapes(folders["plain"])


@pytest.mark.parametrize(("name", "base"), [("nf4", "nf4"), ("nested", "nf4"), ("int8", "int8")])
def test_over_a_quantised_folder_is_trained_what_is_trained_over_the_plain_one(
    folders: dict[str, Path], tmp_path: Path, name: str, base: str
) -> None:
    losses = []
    for place in ("plain", name):
        config = tiny_run(
            tmp_path / place,
            model={"path": str(folders[place]), "dtype": "bfloat16"},
            train=SETTINGS | {"base": base, "max_steps": 4},
        )
        losses.append(losses_of(config, train(config)))
    np.testing.assert_allclose(losses[1], losses[0], atol=0.0 if name != "nested" else 0.02)


@pytest.mark.parametrize(
    ("name", "base", "rule"),
    [
        ("nf4", "plain", "quantised-form"),
        ("nf4", "int8", "quantised-form"),
        ("int8", "nf4", "quantised-form"),
        ("fp4", "nf4", "quantised-base"),
    ],
)
def test_a_folder_of_another_form_is_refused_before_it_is_read(
    folders: dict[str, Path], tmp_path: Path, name: str, base: str, rule: str
) -> None:
    config = tiny_run(tmp_path, model={"path": str(folders[name])}, train={"base": base})
    with pytest.raises(RefusedError, match=f"^{rule}: "):
        plan_job(config)


def test_other_4_bits_are_named_when_they_come_unseen(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="is held as fp4 in blocks of 64, expected nf4"):
        load_base_model(ModelConfig(path=str(folders["fp4"]), device="cpu"), base="nf4")
