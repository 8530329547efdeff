"""ZeRO 3 and what it leaves in the CPU's memory. Judges: strategy single, plain transformers and PEFT, storages."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.trainer import ranks_program
from tests.trainer.rank_groups import (
    FULL,
    POISONED,
    Finished,
    finished,
    run_of,
    train_with_two_processes,
    unfinished_after,
)
from trainer import stepping
from trainer.train import train

FUSED: dict[str, Any] = {"lora": {"dropout": 0.0}, "max_steps": 4}
WHAT: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {**FULL, "max_steps": 4},
    "fused": {**FUSED, "gradient_checkpointing": True},
    "bfloat16": {**FUSED, "dtype": "bfloat16"},
    "nf4": {"base": "nf4", **FUSED},
    "poisoned": POISONED,
    "measured": {**FUSED, "dtype": "bfloat16", "max_steps": 1, "seed": ranks_program.MEASURED_SEED},
}
LAID_OUT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"strategy": "zero3"}),
    "lora, optimizer on CPU": ("fused", {"strategy": "zero3", "offload": "optimizer"}),
    "lora, all on CPU": ("fused", {"strategy": "zero3", "offload": "all"}),
    "full": ("full", {"strategy": "zero3"}),
    "full with checkpointing, all on CPU": (
        "full",
        {"strategy": "zero3", "offload": "all", "gradient_checkpointing": True},
    ),
    "nf4": ("nf4", {"strategy": "zero3"}),
    "bfloat16": ("bfloat16", {"strategy": "zero3"}),
    "poisoned": ("poisoned", {"strategy": "zero3"}),
    "measured": ("measured", {"strategy": "zero3"}),
    "measured whole": ("measured", {"strategy": "ddp"}),
    "zero1, optimizer on CPU": ("full", {"strategy": "zero1", "offload": "optimizer"}),
    "zero2, optimizer on CPU": ("fused", {"strategy": "zero2", "offload": "optimizer"}),
}
"""Name -> what two processes train, and how. One and four of them: test_same_maths.py."""
EXACT = [name for name, (what, _) in LAID_OUT.items() if what in ("lora", "fused", "full", "nf4")]


@dataclass(frozen=True)
class Trainings:
    alone: dict[str, Finished]
    laid_out: dict[str, Finished]
    resumed: Finished
    said: str


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    folder = tmp_path_factory.mktemp("zero3")
    alone: dict[str, Finished] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "summed_loss", stepping.summed_loss)  # so that it is put back
        for what, settings in WHAT.items():
            if what != "measured":
                config = run_of(folder / f"alone {what}", **settings, strategy="single")
                if what == "poisoned":
                    ranks_program.poison_some_losses(config)
                alone[what] = Finished(config, train(config))
    configs = {name: run_of(folder / name, **WHAT[what] | how) for name, (what, how) in LAID_OUT.items()}
    configs["resumed"] = unfinished_after(10, alone["lora"], run_of(folder / "resumed", strategy="zero3"))
    said = train_with_two_processes(configs, folder / "extensions")
    laid_out = {name: finished(config) for name, config in configs.items()}
    assert not (folder / "extensions").exists(), "something was compiled"
    return Trainings(alone, laid_out, laid_out.pop("resumed"), said)


slow = pytest.mark.slow


@slow
@pytest.mark.parametrize("name", EXACT)
def test_each_step_has_the_loss_and_the_gradient_of_one_process(trainings: Trainings, name: str) -> None:
    ours, expected = trainings.laid_out[name], trainings.alone[LAID_OUT[name][0]]
    assert ours.result.num_processes == 2
    assert ours.result.strategy == LAID_OUT[name][1]["strategy"]
    assert ours.result.num_trainable_weights == expected.result.num_trainable_weights
    for what in ("loss", "grad_norm"):
        np.testing.assert_allclose(ours.numbers(what), expected.numbers(what), rtol=1e-5, err_msg=what)
    assert ours.result.validation_loss == pytest.approx(expected.result.validation_loss, rel=1e-5)
    assert ours.weights.keys() == expected.weights.keys()
    for tensor_name, tensor in ours.weights.items():
        difference = (tensor - expected.weights[tensor_name]).norm() / expected.weights[tensor_name].norm()
        assert difference < 1e-4, (tensor_name, float(difference))


@slow
def test_bfloat16_has_the_loss_of_one_process_within_its_rounding(trainings: Trainings) -> None:
    ours, expected = (side["bfloat16"] for side in (trainings.laid_out, trainings.alone))
    np.testing.assert_allclose(ours.numbers("loss"), expected.numbers("loss"), atol=2e-2)
    assert {tensor.dtype for tensor in ours.weights.values()} == {torch.bfloat16}


@slow
def test_a_loss_or_gradient_that_is_not_finite_skips_the_step(trainings: Trainings) -> None:
    ours, expected = (side["poisoned"] for side in (trainings.laid_out, trainings.alone))
    assert [number for number, loss in enumerate(ours.losses) if loss is None] == [2, 5]
    assert (ours.result.num_steps, ours.result.num_updates) == (8, 6)
    np.testing.assert_allclose(ours.numbers("loss"), expected.numbers("loss"), rtol=1e-5)


@slow
def test_a_rank_reads_and_holds_its_share_of_the_frozen_weights_too_and_none_of_them_whole(
    trainings: Trainings,
) -> None:
    whole = trainings.laid_out["measured whole"].measured
    assert whole[0]["whole"]  # so the absence of any says something
    # ddp's ranks share the writing of what each of them holds.
    states = sum(rank["all"] - rank["weights"] for rank in whole)
    ranks = trainings.laid_out["measured"].measured
    for rank in ranks:
        assert rank["weights"] == pytest.approx(whole[0]["weights"] / 2, rel=0.02)
        assert rank["all"] == pytest.approx((whole[0]["weights"] + states) / 2, rel=0.02)
        assert rank["whole"] == []
    settings = trainings.alone["lora"].config.model
    assert settings is not None
    weights = load_file(Path(settings.path) / "model.safetensors").values()
    num_bytes = sum(tensor.nbytes for tensor in weights)
    assert sum(rank["read"] for rank in ranks) == num_bytes
    assert max(rank["read"] for rank in ranks) < 0.52 * num_bytes


@slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's, not ours
@pytest.mark.parametrize("name", ["lora", "full"])
def test_what_is_saved_loads_in_plain_libraries_and_says_what_one_process_says(
    trainings: Trainings, name: str
) -> None:
    def logits(training: Finished | None) -> torch.Tensor:
        settings = trainings.alone[name].config.model
        assert settings is not None
        path = settings.path if training is None or name == "lora" else training.folder / "model"
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if training is not None and name == "lora":
            model = PeftModel.from_pretrained(model, training.folder / "adapter")
        with torch.no_grad():
            found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 40)[None]).logits
        return found

    ours, expected = logits(trainings.laid_out[name]), logits(trainings.alone[name])
    assert (ours - expected).abs().max() < 1e-3
    assert (ours - logits(None)).abs().max() > 0.1


@slow
def test_it_goes_on_where_one_process_stopped(trainings: Trainings) -> None:
    expected = trainings.alone["lora"].numbers("loss")
    np.testing.assert_allclose(trainings.resumed.numbers("loss")[:11], expected[:11], rtol=1e-6)
    np.testing.assert_allclose(trainings.resumed.numbers("loss"), expected, rtol=1e-5)


@slow
def test_one_process_goes_on_where_it_stopped(
    trainings: Trainings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken = trainings.laid_out["lora"]
    shutil.copytree(unbroken.config.run_root.parent.parent / "model", tmp_path / "model")
    config = unfinished_after(10, unbroken, run_of(tmp_path / "single", strategy="single"))
    resumed = Finished(config, train(config))
    assert "going on after step 10" in capsys.readouterr().err
    np.testing.assert_allclose(resumed.numbers("loss")[:11], unbroken.numbers("loss")[:11], rtol=1e-6)
    np.testing.assert_allclose(resumed.numbers("loss"), unbroken.numbers("loss"), rtol=1e-5)


@slow
def test_nothing_is_warned_about(trainings: Trainings) -> None:
    assert "arning" not in trainings.said
    assert "built" not in trainings.said
    assert "[INFO]" not in trainings.said
