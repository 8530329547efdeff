"""FLOPs of a step against torch's own counter of what was really multiplied, and the table of peaks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from schemas.training_config import LoraConfig, TrainConfig
from tests.trainer.tiny_models import example_of, random_documents, tiny_model
from trainer import methods, nf4
from trainer.attention import unwrapped, use_packed_attention
from trainer.data import collate
from trainer.loss import summed_loss
from trainer.mfu import PEAK_TERAFLOPS, WorkCounts, count_work, peak_flops
from trainer.model import enable_gradient_checkpointing

LENGTHS = (40, 24, 7)
ATTENTION = ("aten.bmm", "aten.baddbmm")


def executed(model: torch.nn.Module, *, pad_to: int | None = None) -> tuple[int, int, int]:
    """Forward and backward of one packed row under torch's counter: FLOPs of products by weights, FLOPs inside
    attention, and how many tokens were trained.
    """
    use_packed_attention(model)
    batch = collate([example_of(d, row) for row, d in enumerate(random_documents(LENGTHS))], pad_to)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        summed_loss(model, batch).backward()
    by_operation = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    inside = sum(count for name, count in by_operation.items() if name in ATTENTION)
    return sum(by_operation.values()) - inside, inside, batch.num_trained_tokens


def lora(model: Any, **settings: Any) -> torch.nn.Module:
    return methods.lora.apply(model, TrainConfig(lora=LoraConfig(rank=4, **settings)))


def matrices_only(work: WorkCounts, num_trained_tokens: int) -> float:
    return work.per_token * sum(LENGTHS) + work.per_trained_token * num_trained_tokens


TINY: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    # Experts one by one: torch's counter does not know the product of all at once.
    "qwen3_moe": {
        "experts_implementation": "eager",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}


@pytest.mark.parametrize("family", list(TINY))
def test_lora_multiplies_what_is_counted(family: str) -> None:
    # PEFT's own LoRA of fused experts builds whole matrices and is not what a row of tokens meets.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if "moe" in family else "all-linear"
    model = lora(tiny_model(family, **TINY[family]), targets=targets)
    by_weights, inside, num_trained = executed(model)
    work = count_work(model)
    assert matrices_only(work, num_trained) == by_weights
    # The counter sees whole squares; half of each is masked and not counted.
    assert work.of(np.array(LENGTHS), num_trained) - by_weights == inside / 2


@pytest.mark.parametrize("targets", [["o_proj"], ["v_proj"], ["down_proj"], r".*layers\.1.*q_proj"])
def test_gradients_flow_no_further_than_they_are_needed(targets: Any) -> None:
    model = lora(tiny_model(), targets=targets)
    by_weights, _, num_trained = executed(model)
    assert matrices_only(count_work(model), num_trained) == by_weights


@pytest.mark.parametrize("family", list(TINY))
@pytest.mark.parametrize("is_tied", [False, True])
def test_full_tuning_multiplies_what_is_counted_and_the_head_once_more(family: str, is_tied: bool) -> None:
    model = methods.full.apply(tiny_model(family, tie_word_embeddings=is_tied, **TINY[family]), TrainConfig())
    by_weights, inside, num_trained = executed(model)
    work = count_work(model)
    head = model.get_output_embeddings().weight
    recomputed = 2 * head.numel() * num_trained  # a trained head is computed again backwards, to save memory
    assert matrices_only(work, num_trained) + recomputed == by_weights
    assert work.of(np.array(LENGTHS), num_trained) + recomputed - by_weights == inside / 2


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_module_that_a_lora_trains_whole_counts_once(saved: str) -> None:
    model = lora(tiny_model(), modules_to_save=[saved])
    by_weights, _, num_trained = executed(model)
    head = unwrapped(model).get_output_embeddings()
    recomputed = 2 * 320 * 32 * num_trained if head.weight.requires_grad else 0
    assert matrices_only(count_work(model), num_trained) + recomputed == by_weights


def test_a_base_of_four_bits_counts_as_one_of_sixteen() -> None:
    plain, quantised = tiny_model().requires_grad_(False), tiny_model().requires_grad_(False)
    nf4.replace_linear_layers(quantised)
    assert count_work(quantised) == count_work(plain)
    assert count_work(plain).per_token > 0


def test_recomputing_activations_counts_no_more() -> None:
    model = lora(tiny_model())
    enable_gradient_checkpointing(unwrapped(model))
    model.train()
    by_weights, _, num_trained = executed(model)
    assert matrices_only(count_work(model), num_trained) < 0.8 * by_weights


def test_padding_counts_nothing() -> None:
    model = lora(tiny_model())
    plain = executed(model)[0]
    padded, _, num_trained = executed(model, pad_to=128)
    assert padded > 1.3 * plain
    assert matrices_only(count_work(model), num_trained) == plain


def test_a_lora_counts_two_thirds_of_full_tuning_for_a_large_model() -> None:
    full = count_work(methods.full.apply(tiny_model(num_hidden_layers=24), TrainConfig()))
    thin = lora(tiny_model(num_hidden_layers=24))
    small = sum(p.numel() for p in thin.parameters() if p.requires_grad) * 6
    assert (count_work(thin).per_token - small) / full.per_token == pytest.approx(2 / 3, rel=0.02)


@pytest.mark.parametrize(
    ("family", "settings", "windows"),
    [
        ("llama", {}, [None, None]),
        ("mistral", {"sliding_window": 8}, [8, 8]),
        (
            "gemma3_text",
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            [8, None],
        ),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, [None, None]),
    ],
)
def test_a_window_cuts_the_pairs(family: str, settings: dict[str, Any], windows: list[int | None]) -> None:
    work = count_work(lora(tiny_model(family, **settings)))
    assert [window for window, _ in work.per_pair] == windows
    lengths = np.array(LENGTHS)
    seen = [[min(place + 1, window or 999) for n in LENGTHS for place in range(n)] for window in windows]
    pairs = sum(sum(layer) - len(layer) / 2 for layer in seen)  # the token itself counts half
    flops = {flops for _, flops in work.per_pair}
    assert len(flops) == 1
    expected = pairs * flops.pop()
    assert work.of(lengths, 0) - work.per_token * lengths.sum() == pytest.approx(expected, rel=0.06)


# Peaks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("A100-SXM4-40GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("Tesla V100-SXM3-32GB-H", 125.0),
        ("Tesla T4", 65.0),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, teraflops: float) -> None:
    assert peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100X",
        "NVIDIA L4000",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_a_gpu_that_is_not_in_the_table_gets_no_peak(name: str) -> None:
    assert peak_flops(name) is None


def test_no_name_has_two_peaks() -> None:
    names = [pattern for pattern, _ in PEAK_TERAFLOPS]
    assert len(names) == len(set(names))
