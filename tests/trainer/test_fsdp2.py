"""What FSDP2 needs beside equal maths (test_same_maths.py): weights read in parts, models without memory, refusals."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.errors import InputError, TrainingError
from schemas.training_config import ModelConfig, TrainConfig
from tests.trainer.tiny_models import tiny_model, tiny_run, write_model
from trainer import methods
from trainer.job import plan_job
from trainer.memory import memory_need
from trainer.model import load_base_model
from trainer.ranks import ALONE
from trainer.stand_ins import is_stand_in
from trainer.strategies import STRATEGIES, fsdp2, single
from trainer.train import train
from trainer.weights import WeightFiles, model_without_weights, name_in_files

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT's, not ours


# Files ------------------------------------------------------------------------------------------------------


def test_any_range_of_any_tensor_is_read_from_several_files(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    num_bytes = 0
    with WeightFiles(tmp_path) as files:
        for name, parameter in model.named_parameters():
            flat = parameter.detach().flatten()
            assert files.tensors[name].shape == tuple(parameter.shape)
            for start, end in ((0, len(flat)), (3, len(flat) - 5), (7, 7)):
                found = files.read(name, start, end)
                assert found.dtype == torch.bfloat16
                assert torch.equal(found, flat[start:end])
                num_bytes += 2 * (end - start)
        assert files.num_bytes_read == num_bytes


def test_files_that_are_cut_off_or_lie_about_themselves_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with WeightFiles(tmp_path) as files:
        last = max(files.tensors, key=lambda name: files.tensors[name].offset)
        with pytest.raises(InputError, match=f"ends at byte .* inside {last}; download the model again"):
            files.read(last, 0, math.prod(files.tensors[last].shape))
    path.write_bytes(whole.replace(b'"shape":[32]', b'"shape":[33]', 1))
    with pytest.raises(InputError, match="has 128 bytes, expected"):
        WeightFiles(tmp_path)
    path.write_bytes(b"\x00" * 3)
    with pytest.raises(InputError, match="no readable safetensors file"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.norm.weight", "model.norm.weight"),
        (
            "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
            "model.layers.0.mlp.up_proj.weight",
        ),
        ("base_model.model.lm_head.original_module.weight", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
    ],
)
def test_a_wrapped_parameter_has_the_name_of_its_file(name: str, expected: str) -> None:
    assert name_in_files(name) == expected


# Models without memory --------------------------------------------------------------------------------------


def test_a_model_without_weights_takes_no_memory_and_gets_the_adapters_of_a_loaded_one(
    tmp_path: Path,
) -> None:
    config = ModelConfig(path=str(write_model(tmp_path)), device="cpu")
    empty = model_without_weights(config, dtype=torch.bfloat16)
    assert empty is not None
    for name, parameter in empty.named_parameters():
        assert is_stand_in(parameter), name
        assert parameter.untyped_storage().nbytes() == 2
    loaded = load_base_model(config, dtype=torch.bfloat16)
    for (name, ours), (expected_name, expected) in zip(
        empty.named_buffers(), loaded.named_buffers(), strict=True
    ):
        assert name == expected_name
        assert torch.equal(ours, expected)
    adapters = [
        {
            name: p
            for name, p in methods.lora.apply(model, TrainConfig()).named_parameters()
            if "lora_" in name
        }
        for model in (empty, loaded)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    assert len(adapters[0]) == 28
    for name, ours in adapters[0].items():
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, adapters[1][name]), name


def test_a_family_whose_files_are_laid_out_otherwise_is_not_read_in_parts(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    write_model(tmp_path, "qwen3_moe", **experts)
    assert model_without_weights(ModelConfig(path=str(tmp_path), device="cpu"), dtype=torch.float32) is None


@pytest.mark.parametrize(("free_bytes", "is_cut"), [(10**9, False), (10**5, True)])
def test_a_frozen_base_is_cut_where_it_would_take_over_half_of_the_free_memory(
    free_bytes: int, is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = methods.lora.apply(tiny_model(), TrainConfig())
    monkeypatch.setattr(fsdp2, "_free_bytes", lambda device, ranks: free_bytes)
    assert fsdp2._is_base_cut(model, CPU, ALONE, TrainConfig(strategy="fsdp2")) is is_cut
    for choice in ("always", "never"):
        settings = TrainConfig(strategy="fsdp2", shard_base=choice)
        assert fsdp2._is_base_cut(model, CPU, ALONE, settings) is (choice == "always")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 1,000,000 frozen weights of 2 bytes; LoRA of rank 16 trains 16 x 2,000 with 16 bytes each.
        ({"shard_base": "never"}, 2_000_000 + 32_000 * 16 // 4),
        ({}, 2_000_000 // 4 + 32_000 * 16 // 4),
        ({"offload": "optimizer"}, 2_000_000 // 4 + 32_000 * 8 // 4),
        ({"offload": "all"}, 32_000 * 4 // 4),
        ({"method": "full"}, 1_000_000 * 16 // 4),
    ],
)
def test_memory_that_must_be_there_on_each_of_four(
    settings: dict[str, str], expected: int, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path, train={"strategy": "fsdp2", **settings})
    shapes = {"model.layers.0.mlp.up_proj.weight": (1000, 1000)}
    assert memory_need(config, shapes, {}, bytes_per_weight=2, num_processes=4).floor == expected


# What is saved ----------------------------------------------------------------------------------------------

Spoil = Callable[[torch.Tensor], torch.Tensor | None]
SPOILT: dict[str, tuple[Spoil, str]] = {
    "empty": (lambda tensor: torch.empty(0), "the weights to save are incomplete: first odd tensor"),
    "misshapen": (lambda tensor: tensor.flatten(), "the weights to save are incomplete: first odd tensor"),
    "missing": (lambda tensor: None, "the weights to save are incomplete: first odd tensor"),
    "not finite": (lambda tensor: tensor * torch.inf, "is empty or not finite; not saved"),
}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("flaw", SPOILT)
def test_weights_that_are_not_whole_are_refused_before_anything_has_its_name(
    flaw: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, said = SPOILT[flaw]

    def spoilt_weights(model: torch.nn.Module, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, tensor) in enumerate(single.full_weights(model, names)):
            spoilt = spoil(tensor) if number == 3 else tensor
            if spoilt is not None:
                yield name, spoilt

    monkeypatch.setitem(STRATEGIES, "single", STRATEGIES["single"]._replace(full_weights=spoilt_weights))
    config = tiny_run(tmp_path, train={"max_steps": 1, "method": method})
    with pytest.raises(TrainingError, match=said):
        train(config)
    folder = plan_job(config).folder
    assert not (folder / "training.json").exists()
    assert not (folder / methods.METHODS[method].OUTPUT_FOLDER).exists()
    assert not list(folder.glob(".*adapter")) + list(folder.glob(".*model"))


def test_the_saved_files_are_the_models(tmp_path: Path) -> None:
    """save_pretrained gets tensors and names from us: none is lost, persistent buffers neither."""
    model = tiny_model()
    model.register_buffer("kept", torch.arange(3.0))
    weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    methods.full.save(model, tmp_path, ModelConfig(path=str(write_model(tmp_path / "base"))), weights)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "expected"
    )
    found, expected = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
