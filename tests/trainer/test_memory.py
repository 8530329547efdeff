"""What a model needs in memory, told from its files, against what torch and PEFT really make of it."""

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import OptimizerName
from tests.integration import toy
from trainer.memory import memory_need, num_trained_weights, on_gpu, read_shapes
from trainer.methods import METHODS
from trainer.optimizers import MasterOptimizer
from trainer.output import num_trainable_weights
from trainer.support import model_architecture

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT's, not ours


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    toy.write_model(path)
    return path


def config_of(folder: Path, **train: Any) -> PipelineConfig:
    return PipelineConfig.model_validate(
        {
            "run_root": "run",
            "sources": [{"name": "a", "path": "a.json"}],
            "model": {"path": str(folder)},
            "train": train,
        }
    )


METHODS_AND_TARGETS = [
    {"method": "full"},
    {"lora": {"rank": 4}},
    {"lora": {"rank": 16, "targets": ["q_proj", "v_proj"]}},
    {"lora": {"rank": 2, "targets": r".*layers\.1\..*down_proj"}},
    {"method": "freeze", "freeze": {"last_layers": 1, "head": True, "parameters": [r".*norm\.weight"]}},
    {"method": "expand", "expand": {"new_layers": 2}},
]


@pytest.mark.parametrize("train", METHODS_AND_TARGETS)
def test_the_number_of_trained_weights_is_what_the_method_trains(folder: Path, train: dict[str, Any]) -> None:
    config = config_of(folder, **train)
    model = METHODS[config.train.method].apply(AutoModelForCausalLM.from_pretrained(folder), config.train)
    assert num_trained_weights(read_shapes(folder), config.train) == num_trainable_weights(model)


OPTIMIZERS = [
    {"method": "full", "optimizer": name, "low_rank": {"rank": 8}, "schedule": "constant"}
    for name in get_args(OptimizerName)
    if name != "adamw"
]


@pytest.mark.parametrize("train", [*METHODS_AND_TARGETS, *OPTIMIZERS, {"ema_decay": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_is_what_weights_and_optimiser_really_hold(
    folder: Path, train: dict[str, Any], dtype: torch.dtype
) -> None:
    if (train.get("optimizer"), dtype) == ("adamw_bf16", torch.float32):
        return  # refused
    config = config_of(folder, **train)
    model = METHODS[config.train.method].apply(
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), config.train
    )
    optimizer = MasterOptimizer(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], config.train
    )
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.ones_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)
    optimizer.collect_gradients()
    gradients = [master.grad for master in optimizer.masters.values()]
    optimizer._update.step(1e-3)
    moments = [piece.values for piece in optimizer.pieces() if piece.kind not in ("weight", "weight_sum")]
    held = {*model.parameters(), *optimizer.masters.values(), *gradients, *moments}
    need = memory_need(
        config, read_shapes(folder), model_architecture(config), bytes_per_weight=dtype.itemsize
    )
    assert need.floor == sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert need.likely > need.floor


def test_a_quantised_base_and_shared_states_need_less(folder: Path) -> None:
    shapes = read_shapes(folder)
    plain = memory_need(config_of(folder), shapes, {}, bytes_per_weight=2)
    small = memory_need(config_of(folder, base="int8"), shapes, {}, bytes_per_weight=2)
    smallest = memory_need(config_of(folder, base="nf4"), shapes, {}, bytes_per_weight=2)
    linear = sum(math.prod(shape) for name, shape in shapes.items() if "_proj" in name)
    assert plain.weights - small.weights == linear
    assert plain.weights - smallest.weights == linear * (2 - 1 / 2 - 4 / 64)
    states = [
        memory_need(config_of(folder, strategy=name), shapes, {}, bytes_per_weight=2, num_processes=4).states
        for name in ("ddp", "zero1", "zero2", "zero3")
    ]
    assert [share / plain.states for share in states] == [1, 7 / 16, 1 / 4, 1 / 4]
    for offload, left in (("optimizer", (plain.weights, 0)), ("all", (0, 0))):
        small = on_gpu(plain, config_of(folder, offload=offload).train)
        assert (small.weights, small.states) == left
    cut = memory_need(config_of(folder, strategy="zero3"), shapes, {}, bytes_per_weight=2, num_processes=4)
    assert cut.weights == math.ceil(plain.weights / 4)
    assert plain.activations == 0, "no shape is known"


def test_sharded_weights_are_read_from_all_their_files(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="50kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert read_shapes(tmp_path) == read_shapes(folder)
    for path in tmp_path.glob("model-00002*"):
        path.unlink()
    with pytest.raises(InputError, match="model-00002"):
        read_shapes(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\x09\x00\x00\x00\x00\x00\x00\x00{notjson}", b"\x02" + b"\x00" * 7 + b"[]"]
)
def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="no readable safetensors"):
        read_shapes(tmp_path)
