"""Every strategy trains what one process trains: losses, gradient norms and weights, on 1, 2 and 4 processes.

A table: CASES are what is trained, VARIANTS how it is laid over processes. SHORT are the pairs that run by default,
on two processes; `make stress` runs the rest of BASIC and OTHERS on 2, BASIC on 4 and its LoRA on 1. One group of
processes runs all pairs of its size. Judges: strategy single, plain transformers and PEFT.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from schemas.pipeline_config import PipelineConfig
from tests.trainer import rank_groups, ranks_program
from tests.trainer.rank_groups import Finished, finished, train_with_processes
from tests.trainer.tiny_models import learnable_documents, tiny_run, write_model, write_plans
from trainer import stepping
from trainer.train import train

NUM_STEPS = 20
SETTINGS: dict[str, Any] = {
    "bins_per_step": 3,  # over two processes and over four, some compute a filler in each step
    "max_steps": NUM_STEPS,
    "checkpoint_every_steps": 10,
    "keep_checkpoints": 9,
}
LORA: dict[str, Any] = {"lora": {"dropout": 0.1}}
FULL: dict[str, Any] = {"method": "full", "weight_decay": 0.1, "learning_rate": 1e-3}
LOW_RANK: dict[str, Any] = {"low_rank": {"rank": 8, "every_updates": 7}}
WHOLE_EPOCHS: dict[str, Any] = {"bins_per_step": 1000}


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}


@dataclass(frozen=True)
class Case:
    """What is trained, and how much losses, norms and weights may differ from those of strategy single, relatively.

    `capacity` and `bins_per_micro_step` are those of the variants, where they differ from single's.
    """

    train: dict[str, Any]
    limit: float = 1e-5
    weights_limit: float = 1e-4
    dtype: str = "float32"
    model: str = "model"
    capacity: int | None = None
    bins_per_micro_step: int | None = None


CASES = {
    "lora": Case(LORA),
    "full": Case(FULL),
    "int8": Case(LORA | {"base": "int8"}, limit=1e-3, weights_limit=1e-2),
    "nf4": Case(LORA | {"base": "nf4"}),
    "checkpointing": Case(LORA | {"gradient_checkpointing": True}),
    "tied": Case(FULL, model="tied"),
    "tied lora": Case(LORA, model="tied"),
    # transformers puts experts together while it loads them: no rank can read its part from the files.
    "experts": Case(FULL, model="experts"),
    "bfloat16": Case(LORA, dtype="bfloat16", limit=2e-2, weights_limit=0.1),
    "bfloat16 full": Case(FULL, dtype="bfloat16", limit=2e-2, weights_limit=0.1),
    "bfloat16 nf4": Case({"base": "nf4"}, dtype="bfloat16", limit=2e-2, weights_limit=0.1),
    "measured bfloat16": Case(
        {"seed": ranks_program.MEASURED_SEED}, dtype="bfloat16", limit=2e-2, weights_limit=0.1
    ),
    "measured nf4": Case(
        {"base": "nf4", "seed": ranks_program.MEASURED_SEED}, dtype="bfloat16", limit=2e-2, weights_limit=0.1
    ),
    "measured full": Case(FULL | {"seed": ranks_program.MEASURED_SEED}),
    # The last bit of a gradient turns signs of Lion, codes of 8 bits, and singular vectors.
    "adamw_8bit": Case(FULL | {"optimizer": "adamw_8bit"}, limit=1e-3, weights_limit=1e-2),
    "adamw_bf16": Case(FULL | {"optimizer": "adamw_bf16"}, dtype="bfloat16", limit=2e-2, weights_limit=0.1),
    "lion": Case(LORA | {"optimizer": "lion", "learning_rate": 1e-4}, limit=1e-3, weights_limit=1e-2),
    "schedule_free": Case(
        LORA | {"optimizer": "schedule_free", "schedule": "constant", "neftune_alpha": 5.0}
    ),
    "muon": Case(
        FULL | {"optimizer": "muon", "ema_decay": 0.9, "label_smoothing": 0.1}, limit=1e-3, weights_limit=1e-2
    ),
    "galore": Case(FULL | LOW_RANK | {"optimizer": "galore"}, limit=1e-3, weights_limit=1e-2),
    "apollo": Case(FULL | LOW_RANK | {"optimizer": "apollo"}),
    "smoothed": Case(FULL | {"label_smoothing": 0.1, "neftune_alpha": 5.0}),
    "poisoned": Case({"seed": ranks_program.POISONED_SEED}),
    "unpacked": Case(LORA | {"batches": "unpacked"}),
    "prefix": Case({"method": "prefix", "learning_rate": 0.1}),
    "p_tuning": Case({"method": "p_tuning"}),
    "llama_adapter": Case({"method": "llama_adapter", "learning_rate": 0.1}),
    # Each step is a whole epoch: other bins and other micro-steps hold the same documents.
    "accumulation": Case(WHOLE_EPOCHS, bins_per_micro_step=3),
    "packing": Case(WHOLE_EPOCHS, capacity=100),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "fsdp2": {"strategy": "fsdp2", "shard_base": "always"},
    "fsdp2 whole base": {"strategy": "fsdp2", "shard_base": "never"},
    "fsdp2, optimizer on CPU": {"strategy": "fsdp2", "offload": "optimizer"},
    "fsdp2, all on CPU": {"strategy": "fsdp2", "offload": "all"},
    "zero3": {"strategy": "zero3"},  # by default in test_zero3.py
}
OPTIMIZERS = [case for case, what in CASES.items() if "optimizer" in what.train]
RESUMED = "resumed"
"""A variant goes on after step 10 of strategy single's LoRA."""
IMPOSSIBLE = {
    ("int8", variant) for variant, settings in VARIANTS.items() if settings["strategy"] in ("fsdp2", "zero3")
} | {("experts", "zero3")}
IMPOSSIBLE |= {(case, v) for case in OPTIMIZERS for v, what in VARIANTS.items() if what["strategy"] != "ddp"}
PADDED = ("unpacked", "prefix", "p_tuning", "llama_adapter")
IMPOSSIBLE |= {(case, variant) for case in PADDED for variant in VARIANTS if variant != "ddp"}
MEASURED = [case for case in CASES if case.startswith("measured")]
SHORT = [
    *(("lora", variant) for variant in ("ddp", "zero1", "zero2", "fsdp2", "fsdp2 whole base")),
    *(("full", variant) for variant in ("zero2", "fsdp2", "fsdp2, optimizer on CPU")),
    *((case, variant) for case in MEASURED for variant in ("ddp", "fsdp2")),
    *((case, variant) for case in (RESUMED, "poisoned") for variant in ("zero2", "fsdp2")),
    *((case, "fsdp2") for case in ("nf4", "tied", "experts", "checkpointing", "accumulation")),
    ("bfloat16 full", "fsdp2, all on CPU"),
    ("bfloat16", "zero2"),
    ("int8", "zero2"),
    ("packing", "ddp"),
    *((case, "ddp") for case in ("unpacked", "prefix", "llama_adapter")),
    ("smoothed", "fsdp2"),
    ("schedule_free", "ddp"),
]
BASIC = [
    (case, variant)
    for case in ("lora", "full", "int8", "nf4")
    for variant in ("ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2 whole base")
    if (case, variant) not in IMPOSSIBLE
]
"""On 2 and 4 processes, LoRA on 1 too."""
OTHERS = [
    *(
        (case, variant)
        for case in [*CASES, RESUMED]
        for variant in ("ddp", "zero2", "zero3", "fsdp2")
        if (case, variant) not in BASIC and (case, variant) not in IMPOSSIBLE and case not in MEASURED
    ),
    *((case, v) for case in ("lora", "full", "bfloat16") for v in VARIANTS if v.endswith("on CPU")),
]
"""On 2 processes."""
ON_ONE = [pair for pair in BASIC if pair[0] == "lora"]
WHOLE = {1: ON_ONE, 2: [pair for pair in BASIC + OTHERS if pair not in SHORT], 4: BASIC}


# Trainings --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainings:
    """Made when they are first asked for: strategy single's in this process, others with all of their group."""

    folder: Path
    single: Callable[[str], Finished]
    group: Callable[[int, bool], dict[tuple[str, str], Finished]]
    said: dict[tuple[int, bool], str]
    """By each group."""

    def variant(self, case: str, variant: str, count: int, *, is_short: bool) -> Finished:
        return self.group(count, is_short)[case, variant]


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    folder = tmp_path_factory.mktemp("same maths")
    write_model(folder / "model")
    write_model(folder / "tied", tie_word_embeddings=True)
    write_model(folder / "experts", "qwen3_moe", **EXPERTS)
    single = functools.cache(functools.partial(train_alone, folder))
    said: dict[tuple[int, bool], str] = {}
    group = functools.cache(functools.partial(train_in_group, folder, single, said))
    return Trainings(folder, single, group, said)


def run_of(folder: Path, place: str, case: Case, variant: dict[str, Any]) -> PipelineConfig:
    is_whole = case.train is WHOLE_EPOCHS
    is_single = variant["strategy"] == "single"
    settings = SETTINGS | case.train | variant
    if case.bins_per_micro_step is not None and not is_single:
        settings["bins_per_micro_step"] = case.bins_per_micro_step
    config = tiny_run(
        folder / place,
        epochs=NUM_STEPS if is_whole else 8,
        num_documents=10 if is_whole else 40,
        train=settings,
        model={"path": str(folder / case.model), "dtype": case.dtype},
    )
    if case.capacity is not None and not is_single:
        splits = {"train": learnable_documents(10), "validation": learnable_documents(6, seed=1)}
        write_plans(config.run_root, splits, epochs=NUM_STEPS, capacity=case.capacity)
    return config


def train_alone(folder: Path, name: str) -> Finished:
    config = run_of(folder, f"{name} single", CASES[name], {"strategy": "single"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "summed_loss", stepping.summed_loss)  # so that it is put back
        if name == "poisoned":
            ranks_program.poison_some_losses(config)
        return Finished(config, train(config))


def train_in_group(
    folder: Path, single: Callable[[str], Finished], said: dict[Any, str], count: int, is_short: bool
) -> dict[tuple[str, str], Finished]:
    """All pairs, in one group of processes."""
    assert (count, is_short) not in said, "this group of processes has failed before"
    said[count, is_short] = ""
    configs = {}
    for case, variant in SHORT if is_short else WHOLE[count]:
        settings = VARIANTS[variant] | {"num_processes": count}
        place = f"{case} {variant} {count} {is_short}"
        if case == RESUMED:
            configs[case, variant] = unfinished_after(10, single("lora"), folder, place, settings)
        else:
            configs[case, variant] = run_of(folder, place, CASES[case], settings)
    said[count, is_short] = train_with_processes(configs, folder / "extensions", count=count)
    return {pair: finished(config) for pair, config in configs.items()}


def unfinished_after(
    step: int, other: Finished, folder: Path, place: str, variant: dict[str, Any]
) -> PipelineConfig:
    """A LoRA run that stands where `other` stood after that step, to be gone on with by another strategy."""
    return rank_groups.unfinished_after(step, other, run_of(folder, place, CASES["lora"], variant))


# What is equal ----------------------------------------------------------------------------------------------


def rows(keep: Callable[[str, str], bool] = lambda case, variant: True) -> list[Any]:
    """Parameters case, variant, number of processes, is_short."""
    short = [
        pytest.param(*pair, 2, True, marks=pytest.mark.slow, id=" ".join(pair))
        for pair in SHORT
        if keep(*pair)
    ]
    whole = [
        pytest.param(*pair, count, False, marks=pytest.mark.stress, id=f"{' '.join(pair)} on {count}")
        for count, pairs in WHOLE.items()
        for pair in pairs
        if keep(*pair)
    ]
    return short + whole


ROW = ("case", "variant", "count", "is_short")


def both(trainings: Trainings, row: tuple[str, str, int, bool]) -> tuple[Finished, Finished, Case]:
    case, variant, count, is_short = row
    named = "lora" if case == RESUMED else case
    ours = trainings.variant(case, variant, count, is_short=is_short)
    return ours, trainings.single(named), CASES[named]


@pytest.mark.parametrize(ROW, rows())
def test_every_step_has_the_loss_and_gradient_norm_of_one_process(
    trainings: Trainings, case: str, variant: str, count: int, is_short: bool
) -> None:
    """Dropout is on: the draws are the same, whoever makes them. A step that is skipped is skipped by all."""
    ours, expected, limits = both(trainings, (case, variant, count, is_short))
    assert (ours.result.num_processes, ours.result.strategy) == (count, VARIANTS[variant]["strategy"])
    for name in ("loss", "grad_norm"):
        assert len(ours.numbers(name)) == NUM_STEPS
        # DeepSpeed names no norm for a step whose loss alone is not finite.
        is_number = np.isfinite(expected.numbers("loss"))
        found, right = ours.numbers(name)[is_number], expected.numbers(name)[is_number]
        np.testing.assert_allclose(found, right, rtol=limits.limit, err_msg=name)
    assert ours.result.validation_loss == pytest.approx(expected.result.validation_loss, rel=limits.limit)
    assert ours.result.num_updates == expected.result.num_updates
    accuracies = (run.numbers("token_accuracy") for run in (ours, expected))
    np.testing.assert_allclose(*accuracies, atol=limits.limit + 0.01)
    if limits.capacity is None and limits.bins_per_micro_step is None:
        assert ours.result.key == expected.result.key


@pytest.mark.parametrize(ROW, rows())
def test_the_weights_that_are_saved_are_those_of_one_process(
    trainings: Trainings, case: str, variant: str, count: int, is_short: bool
) -> None:
    ours, expected, limits = both(trainings, (case, variant, count, is_short))
    assert ours.weights.keys() == expected.weights.keys()
    for name, right in expected.weights.items():
        tensor = ours.weights[name]
        assert (tensor.shape, tensor.dtype) == (right.shape, right.dtype)
        assert tensor.abs().max() > 0, name
        difference = (tensor - right).float().norm() / right.float().norm()
        assert difference < limits.weights_limit, (name, float(difference))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's, not ours
@pytest.mark.parametrize(ROW, rows(lambda case, variant: case in ("lora", "int8", "nf4")))
def test_adapters_load_in_plain_peft_and_give_the_logits_of_one_process(
    trainings: Trainings, case: str, variant: str, count: int, is_short: bool
) -> None:
    ours, expected, _ = both(trainings, (case, variant, count, is_short))
    found = logits(trainings.folder / "model", ours.folder / "adapter")
    assert (found - logits(trainings.folder / "model", expected.folder / "adapter")).abs().max() < 1e-2
    assert (found - logits(trainings.folder / "model", None)).abs().max() > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_over_an_8_bit_base_says_the_same_over_transformers_own_8_bit_base(
    trainings: Trainings,
) -> None:
    ours, expected, _ = both(trainings, ("int8", "zero2", 2, True))
    in_8_bits = BitsAndBytesConfig(load_in_8bit=True)
    found, right = (
        logits(trainings.folder / "model", run.folder / "adapter", in_8_bits) for run in (ours, expected)
    )
    assert (found - right).abs().max() < 1e-2


def logits(model: Path, adapter: Path | None, quantisation: BitsAndBytesConfig | None = None) -> torch.Tensor:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, quantization_config=quantisation
    )
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    with torch.no_grad():
        found: torch.Tensor = loaded.eval()(input_ids=torch.arange(3, 40)[None]).logits
    return found


@pytest.mark.parametrize(ROW, rows(lambda case, variant: case == "poisoned"))
def test_a_loss_or_gradient_that_is_not_finite_on_one_process_skips_the_step_on_all(
    trainings: Trainings, case: str, variant: str, count: int, is_short: bool
) -> None:
    ours, _, _ = both(trainings, (case, variant, count, is_short))
    assert np.flatnonzero(np.isnan(ours.numbers("loss"))).tolist() == list(ranks_program.POISONED_STEPS)
    assert ours.result.num_updates == NUM_STEPS - len(ranks_program.POISONED_STEPS)


# Going on elsewhere -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ddp", "zero1", "zero2", "fsdp2", "fsdp2 whole base"])
def test_one_process_goes_on_where_two_have_stopped(trainings: Trainings, variant: str) -> None:
    unbroken = trainings.variant("lora", variant, 2, is_short=True)
    place = f"single after {variant}"
    config = unfinished_after(10, unbroken, trainings.folder, place, {"strategy": "single"})
    resumed = Finished(config, train(config))
    np.testing.assert_allclose(resumed.numbers("loss"), unbroken.numbers("loss"), rtol=1e-6)


@pytest.mark.stress
def test_a_training_goes_from_fsdp2_to_single_to_ddp(trainings: Trainings) -> None:
    sharded = trainings.variant("lora", "fsdp2", 4, is_short=False)
    variant = {"strategy": "single", "checkpoint_every_steps": 5}
    config = unfinished_after(10, sharded, trainings.folder, "chain single", variant)
    alone = Finished(config, train(config))
    variant = {"strategy": "ddp", "num_processes": 2}
    config = unfinished_after(15, alone, trainings.folder, "chain ddp", variant)
    train_with_processes({"chain": config}, trainings.folder / "extensions", count=2)
    last = finished(config)
    np.testing.assert_allclose(last.numbers("loss"), sharded.numbers("loss"), rtol=1e-6)
    assert last.result.strategy == "ddp"


# What the processes hold and say ----------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_is_compiled_and_nothing_warned_about(trainings: Trainings) -> None:
    trainings.group(2, True)
    assert not (trainings.folder / "extensions").exists()
    said = trainings.said[2, True]
    assert "arning" not in said
    assert "built" not in said
    assert "[INFO]" not in said
    assert said.count("trained weights in") == len(SHORT)  # the first process alone speaks


@pytest.mark.slow
@pytest.mark.parametrize("case", MEASURED)
def test_after_a_step_each_rank_holds_its_share_of_everything_and_no_weight_whole(
    trainings: Trainings, case: str
) -> None:
    whole = trainings.variant(case, "ddp", 2, is_short=True).measured
    assert whole[0]["whole"]  # so the absence of any says something
    # ddp's ranks share the writing of what each of them holds.
    states = sum(rank["all"] - rank["weights"] for rank in whole)
    # In bf16 it computes with copies of the masters: 2 bytes beside 4 + 8. FSDP2 casts what it gathers.
    copies = states / 6 if CASES[case].dtype == "bfloat16" else 0
    for rank in trainings.variant(case, "fsdp2", 2, is_short=True).measured:
        assert rank["all"] == pytest.approx((whole[0]["weights"] - copies + states) / 2, rel=0.02)
        assert rank["whole"] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", MEASURED)
def test_layers_compute_with_the_shapes_dtypes_and_4_bit_bytes_of_whole_ones(
    trainings: Trainings, case: str
) -> None:
    """The adapters beside 4-bit weights alone are gathered as fp32 masters, and cast by their layers."""
    whole = trainings.variant(case, "ddp", 2, is_short=True).measured[0]["seen"]
    assert sum("lora_A" in name for name in whole) == (0 if case == "measured full" else 14)
    assert sum("packed" in name for name in whole) == (14 if case == "measured nf4" else 0)
    for rank in trainings.variant(case, "fsdp2", 2, is_short=True).measured:
        assert rank["seen"].keys() == whole.keys()
        for name, seen in rank["seen"].items():
            if case == "measured nf4" and "lora_" in name:
                seen = seen.replace("float32", "bfloat16")
            assert seen == whole[name], name


@pytest.mark.slow
@pytest.mark.parametrize("case", MEASURED)
def test_all_ranks_together_read_each_byte_of_the_weights_once(trainings: Trainings, case: str) -> None:
    read = [rank["read"] for rank in trainings.variant(case, "fsdp2", 2, is_short=True).measured]
    with (trainings.folder / "model" / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    num_bytes = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    assert sum(read) == num_bytes
    assert max(read) < 0.52 * num_bytes
