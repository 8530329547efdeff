"""Layers over several devices of one process. Judges: brute force for the cut, strategy single for the training."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.trainer.tiny_models import tiny_lora, tiny_model, tiny_run
from trainer.job import plan_job
from trainer.ranks import ALONE
from trainer.strategies import pipeline
from trainer.train import train

CPU, META = torch.device("cpu"), torch.device("meta")


def fullest(sizes: list[int], rest: int, numbers: list[int], num_devices: int) -> int:
    """What the fullest device holds of the layers, and the first one of the rest, where it has a layer as well."""
    held = [sum(size for size, at in zip(sizes, numbers, strict=True) if at == n) for n in range(num_devices)]
    return max(held[0] + rest if held[0] else 0, *held[1:], 0)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    rest=st.integers(0, 20),
    num_devices=st.integers(1, 4),
)
def test_the_fullest_device_holds_as_little_as_it_can(sizes: list[int], rest: int, num_devices: int) -> None:
    numbers = pipeline.cut(sizes, rest, num_devices)
    assert len(numbers) == len(sizes)
    assert numbers == sorted(numbers)
    assert set(numbers) <= set(range(num_devices))
    every_way = itertools.combinations_with_replacement(range(num_devices), len(sizes))
    best = min(fullest(sizes, rest, list(way), num_devices) for way in every_way)
    assert fullest(sizes, rest, numbers, num_devices) == best


@pytest.mark.parametrize("wrap", [lambda model: model, tiny_lora])
def test_layers_are_laid_out_in_order_and_all_else_on_the_first_device(wrap: Any) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    model = tiny_model(num_hidden_layers=4, vocab_size=64)
    names = [name for name, _ in model.named_parameters()]
    found = pipeline.device_map(wrap(model), [first, second])
    for name in names:  # each stands in one place
        assert sum(name.startswith(f"{place}.") for place in found) == 1, name
    layers = [found.pop(f"model.layers.{layer}") for layer in range(4)]
    assert set(found.values()) == {first}
    assert layers == [first, first, second, second]


def test_an_8_bit_base_counts_as_half_of_a_16_bit_one() -> None:
    model = tiny_model(num_hidden_layers=6, vocab_size=640, dtype=torch.bfloat16)
    sizes = {base: pipeline._num_bytes(model.model.layers[0], base) for base in ("plain", "int8")}
    assert sizes["int8"] == pytest.approx(sizes["plain"] / 2, rel=0.02)


def test_hidden_states_rotations_and_borders_follow_the_layers() -> None:
    """The second half lies on a device without memory: it takes tensors there alone, and computes their shapes."""
    model = tiny_model(num_hidden_layers=4)
    for layer in model.model.layers[2:]:
        layer.to(META)
    pipeline.place(model, CPU, ALONE, None)  # type: ignore[arg-type]
    seen: list[torch.device] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *found: seen.append(found[-1].device))
    with pytest.raises(NotImplementedError, match="no data"):  # on the way back, which is the last step
        model.model(input_ids=torch.arange(3, 9)[None], use_cache=False)
    assert seen == [CPU, CPU, META, META]


CASES: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"dropout": 0.1}},
    "full": {"method": "full", "learning_rate": 1e-3, "gradient_checkpointing": True},
    "int8": {"base": "int8"},
    "nf4": {"base": "nf4"},
}


@pytest.mark.parametrize("what", CASES)
def test_a_training_over_several_devices_is_that_of_one_bit_for_bit(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "visible_devices", lambda device: [device] * 3)
    weights = {}
    for strategy in ("single", "pipeline"):
        config = tiny_run(tmp_path, train={**CASES[what], "strategy": strategy, "max_steps": 4})
        config = config.model_copy(update={"run_root": tmp_path / strategy})
        (tmp_path / "run").rename(tmp_path / strategy)
        result = train(config)
        assert result.strategy == strategy
        (path,) = (plan_job(config).folder / result.output).glob("*.safetensors")
        weights[strategy] = load_file(path)
    assert weights["single"].keys() == weights["pipeline"].keys()
    for name, tensor in weights["single"].items():
        assert torch.equal(tensor, weights["pipeline"][name]), name
