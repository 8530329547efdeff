"""The report: its numbers against a plain loop, its bytes, and what it refuses. Trains tiny models for real."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines import storage
from schemas.errors import InputError, IntegrityError, LimitError, TrainingError
from schemas.evaluation import EVALUATION_EXAMPLES, EVALUATION_EXAMPLES_NAME, Evaluation
from schemas.pipeline_config import PipelineConfig
from schemas.run import CHECKPOINTS_FOLDER, EVALUATION_NAME
from tests.trainer.tiny_models import (
    Document,
    learnable_documents,
    tiny_model,
    tiny_run,
    write_plans,
    write_shards,
)
from trainer.evaluation import evaluate, run_evaluate
from trainer.promotion import promote
from trainer.service import find_candidate
from trainer.train import train

# PEFT, called by hand in these tests, asks transformers for a name of yesterday.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

QUESTIONS = ["red blue?", "the cat runs"]
SPLITS = {
    "train": learnable_documents(60),
    "validation": learnable_documents(6, seed=1),
    "test": [
        *learnable_documents(9, seed=2),
        Document([5, 9, 14, 3, 44, 21, 8], [(0, 2, 0.25), (4, 7, 2.0)], source="other/deep/file.json"),
        Document([7, 8, 9], [], source="other/deep/file.json"),
    ],
}
"""Held out: spans with weights, one that begins at the first token, and an example that trains nothing."""


def prepared_run(folder: Path, **sections: Any) -> PipelineConfig:
    evaluation = {"questions": QUESTIONS, "max_new_tokens": 8, **sections.pop("evaluate", {})}
    config = tiny_run(folder, evaluate=evaluation, promote={"bootstrap_samples": 200}, **sections)
    write_shards(config.run_root, SPLITS)
    write_plans(config.run_root, SPLITS, epochs=2)
    return config


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """A LoRA run that is trained and evaluated; tests that change files take a copy of it."""
    config = prepared_run(tmp_path_factory.mktemp("finished"), epochs=2)
    train(config)
    evaluate(config)
    return config


@pytest.fixture
def run_copy(finished_run: PipelineConfig, tmp_path: Path) -> PipelineConfig:
    run_root = tmp_path / "run"
    shutil.copytree(finished_run.run_root, run_root)
    return finished_run.model_copy(update={"run_root": run_root})


def read_report(config: PipelineConfig) -> Evaluation:
    return Evaluation.model_validate(storage.read_record(config.run_root / EVALUATION_NAME))


# The numbers ------------------------------------------------------------------------------------------------


def plain_nats(model: Any, documents: list[Document]) -> list[tuple[float, int]]:
    """The outside judge: one document at a time through transformers' own loss with labels of -100."""
    found = []
    for document in documents:
        labels = torch.full((1, len(document.ids)), -100)
        for start, end, _ in document.spans:
            labels[0, start:end] = torch.tensor(document.ids[start:end])
        num_targets = int((labels[0, 1:] != -100).sum())
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([document.ids]), labels=labels).loss
        found.append((float(loss) * num_targets if num_targets else 0.0, num_targets))
    return found


def reference_models(config: PipelineConfig) -> dict[str, Any]:
    assert config.model is not None
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
    again = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    folder = config.run_root / find_candidate(config.run_root).path
    if folder.name == "model":
        return {"base": base, "candidate": AutoModelForCausalLM.from_pretrained(folder).eval()}
    return {"base": base, "candidate": PeftModel.from_pretrained(again, folder).eval()}


def check_against_plain_loop(config: PipelineConfig) -> None:
    documents = SPLITS["test"]
    sources = np.array([document.source.partition("/")[0] for document in documents])
    num_bytes = np.array([3 * sum(end - start for start, end, _ in d.spans) for d in documents])
    models = reference_models(config)
    reports = {str(report.label): report for report in read_report(config).models}
    assert set(reports) == set(models)
    for label, model in models.items():
        nats, num_targets = (np.array(values) for values in zip(*plain_nats(model, documents), strict=True))
        for name, found in [("", reports[label].total), *reports[label].by_source.items()]:
            chosen = np.ones(len(documents), bool) if name == "" else sources == name
            assert found.num_examples == chosen.sum()
            assert found.num_trained_tokens == num_targets[chosen].sum()
            assert found.num_trained_bytes == num_bytes[chosen].sum()
            assert found.loss == pytest.approx(nats[chosen].sum() / num_targets[chosen].sum(), rel=1e-5)
            bits = nats[chosen].sum() / math.log(2) / num_bytes[chosen].sum()
            assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)
        assert reports[label].by_language["en"] == reports[label].total


def test_losses_of_base_and_adapter_equal_a_plain_loop_over_single_examples(
    finished_run: PipelineConfig,
) -> None:
    check_against_plain_loop(finished_run)


def test_losses_of_a_fully_tuned_model_equal_a_plain_loop(tmp_path: Path) -> None:
    config = prepared_run(tmp_path, train={"method": "full", "learning_rate": 1e-3})
    train(config)
    evaluation = evaluate(config)
    assert evaluation.candidate.kind == "model"
    check_against_plain_loop(config)


def test_example_losses_add_up_to_the_report_and_name_their_chats(finished_run: PipelineConfig) -> None:
    report = read_report(finished_run)
    table = storage.read_arrow(finished_run.run_root / EVALUATION_EXAMPLES_NAME)
    assert table.schema.equals(EVALUATION_EXAMPLES)
    assert table.column("example").to_pylist() == list(range(len(SPLITS["test"])))
    assert table.column("row_id")[3].as_py() == f"{3:032x}"
    assert table.column("nats_incumbent").null_count == table.num_rows
    for model in report.models:
        nats = sum(table.column(f"nats_{model.label}").to_pylist())
        assert model.total.loss == pytest.approx(nats / model.total.num_trained_tokens, rel=1e-12)


def test_training_lowered_the_held_out_loss_and_the_gate_agrees(run_copy: PipelineConfig) -> None:
    base, candidate = read_report(run_copy).models
    assert candidate.total.bits_per_byte is not None
    assert base.total.bits_per_byte is not None
    assert candidate.total.bits_per_byte < 0.8 * base.total.bits_per_byte
    promotion = promote(run_copy)
    assert promotion.outcome == "promoted"
    assert promotion.decision is not None
    assert promotion.decision.candidate_bits_per_byte == pytest.approx(candidate.total.bits_per_byte)
    assert promotion.decision.incumbent_bits_per_byte == pytest.approx(base.total.bits_per_byte)


# Answers ----------------------------------------------------------------------------------------------------


def test_answers_are_what_generate_gives_by_hand(finished_run: PipelineConfig) -> None:
    assert finished_run.model is not None
    tokenizer = AutoTokenizer.from_pretrained(finished_run.model.path)
    models = reference_models(finished_run)
    for answers in read_report(finished_run).answers:
        prompt: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": answers.question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        for label, found in (("base", answers.base), ("candidate", answers.candidate)):
            made = models[label].generate(
                **prompt, do_sample=False, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id
            )
            new_ids = made[0, prompt["input_ids"].shape[1] :]
            assert found == tokenizer.decode(new_ids, skip_special_tokens=True)
    assert [answers.question for answers in read_report(finished_run).answers] == QUESTIONS


# Equal work -------------------------------------------------------------------------------------------------


def report_bytes(config: PipelineConfig) -> dict[str, bytes]:
    return {
        name: (config.run_root / name).read_bytes() for name in (EVALUATION_NAME, EVALUATION_EXAMPLES_NAME)
    }


def test_equal_work_gives_the_same_bytes(run_copy: PipelineConfig) -> None:
    before = report_bytes(run_copy)
    for name in before:
        (run_copy.run_root / name).unlink()
    evaluate(run_copy)
    assert report_bytes(run_copy) == before


def test_micro_steps_of_training_do_not_move_the_numbers(run_copy: PipelineConfig) -> None:
    before = report_bytes(run_copy)
    (run_copy.run_root / EVALUATION_NAME).unlink()
    cut = run_copy.train.model_copy(update={"bins_per_micro_step": 2})
    evaluate(run_copy.model_copy(update={"train": cut}))
    assert report_bytes(run_copy) == before


def test_finished_work_is_not_done_again(
    run_copy: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [run_copy.run_root / EVALUATION_NAME, run_copy.run_root / EVALUATION_EXAMPLES_NAME]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files]
    found = evaluate(run_copy)
    assert found == read_report(run_copy)
    assert "nothing to do" in capsys.readouterr().err
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files] == before


def test_promoting_the_candidate_does_not_change_its_evaluation(run_copy: PipelineConfig) -> None:
    before = report_bytes(run_copy)
    assert promote(run_copy).outcome == "promoted"
    assert evaluate(run_copy).incumbent is None
    assert report_bytes(run_copy) == before
    assert promote(run_copy).outcome == "unchanged"


@pytest.mark.parametrize("change", [{"split": "validation"}, {"questions": []}, {"max_new_tokens": 3}])
def test_another_setting_is_other_work(run_copy: PipelineConfig, change: dict[str, Any]) -> None:
    before = read_report(run_copy)
    other = run_copy.evaluate.model_copy(update=change)
    found = evaluate(run_copy.model_copy(update={"evaluate": other}))
    assert found.key != before.key
    assert len(found.answers) == len(other.questions)
    assert found.models[0].total.num_examples == len(SPLITS[other.split])


@pytest.mark.parametrize("name", [EVALUATION_NAME, EVALUATION_EXAMPLES_NAME])
def test_a_damaged_report_is_made_again(run_copy: PipelineConfig, name: str) -> None:
    before = report_bytes(run_copy)
    (run_copy.run_root / name).write_bytes(before[name][:-20])
    evaluate(run_copy)
    assert report_bytes(run_copy) == before


# An incumbent -----------------------------------------------------------------------------------------------


def train_again(config: PipelineConfig, **train_settings: Any) -> PipelineConfig:
    changed = config.model_copy(update={"train": config.train.model_copy(update=train_settings)})
    train(changed)
    return changed


def test_the_next_candidate_is_compared_with_the_model_in_service(run_copy: PipelineConfig) -> None:
    first = read_report(run_copy)
    promote(run_copy)
    again = train_again(run_copy, learning_rate=1e-6)
    found = evaluate(again)
    assert [model.label for model in found.models] == ["base", "incumbent", "candidate"]
    assert found.incumbent == first.candidate
    assert found.models[0].total == first.models[0].total
    assert found.models[1].total == first.models[1].total
    promotion = promote(again)
    assert (promotion.outcome, promotion.model) == ("refused", found.candidate)
    assert promotion.decision is not None
    assert promotion.decision.improvement is not None
    assert promotion.decision.improvement < 0


def test_a_whole_model_meets_an_adapter_in_service(run_copy: PipelineConfig) -> None:
    first = read_report(run_copy)
    promote(run_copy)
    again = train_again(run_copy, method="full", learning_rate=1e-3)
    found = evaluate(again)
    assert found.candidate.kind == "model"
    assert found.models[1].total == first.models[1].total
    models = reference_models(again)
    nats = sum(nats for nats, _ in plain_nats(models["candidate"], SPLITS["test"]))
    assert found.models[2].total.loss == pytest.approx(
        nats / found.models[2].total.num_trained_tokens, rel=1e-5
    )


# Refusals ---------------------------------------------------------------------------------------------------


def adapter_file(config: PipelineConfig) -> Path:
    return config.run_root / find_candidate(config.run_root).path / "adapter_model.safetensors"


def test_a_flipped_bit_in_the_adapter_is_found_though_the_report_is_there(run_copy: PipelineConfig) -> None:
    path = adapter_file(run_copy)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        evaluate(run_copy)


def test_an_adapter_of_another_base_model_is_refused(run_copy: PipelineConfig, tmp_path: Path) -> None:
    assert run_copy.model is not None
    other = tmp_path / "other-model"
    shutil.copytree(run_copy.model.path, other)
    tiny_model(seed=1).save_pretrained(other)
    changed = run_copy.model.model_copy(update={"path": str(other)})
    with pytest.raises(InputError, match="was trained on another base model"):
        evaluate(run_copy.model_copy(update={"model": changed}))


def test_a_base_model_that_only_moved_is_the_same(run_copy: PipelineConfig, tmp_path: Path) -> None:
    assert run_copy.model is not None
    moved = tmp_path / "moved"
    shutil.copytree(run_copy.model.path, moved)
    before = report_bytes(run_copy)
    (run_copy.run_root / EVALUATION_NAME).unlink()
    evaluate(run_copy.model_copy(update={"model": run_copy.model.model_copy(update={"path": str(moved)})}))
    assert report_bytes(run_copy) == before


@pytest.mark.parametrize("documents", [[], [Document([5, 6, 7], [])]])
def test_a_side_without_trained_text_is_refused_with_what_to_do(
    run_copy: PipelineConfig, documents: list[Document]
) -> None:
    splits = SPLITS | {"test": documents}
    write_shards(run_copy.run_root, splits)
    write_plans(run_copy.run_root, splits)
    with pytest.raises(LimitError, match=r"raise holdout\.test"):
        evaluate(run_copy)


def test_without_a_training_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training is finished"):
        evaluate(prepared_run(tmp_path))


def test_a_plan_that_leaves_examples_out_is_refused(run_copy: PipelineConfig) -> None:
    write_plans(run_copy.run_root, SPLITS | {"test": SPLITS["test"][:-2]})
    with pytest.raises(IntegrityError, match="run 'pack' again"):
        evaluate(run_copy)


def test_a_model_whose_loss_is_no_number_fails_and_is_named(tmp_path: Path) -> None:
    config = prepared_run(tmp_path, evaluate={"questions": []}, train={"max_steps": 1})
    assert config.model is not None
    train(config)
    broken = AutoModelForCausalLM.from_pretrained(config.model.path)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.inf)
    broken.save_pretrained(config.model.path)
    # The same identity, so that the loss itself is what is looked at.
    forge_base(config)
    with pytest.raises(TrainingError, match=r"the base's loss on example 0 \(row 0+\) is (nan|inf)"):
        evaluate(config)


def forge_base(config: PipelineConfig) -> None:
    from trainer.model_files import model_digest

    assert config.model is not None
    path = (
        config.run_root / CHECKPOINTS_FOLDER / find_candidate(config.run_root).training_key / "training.json"
    )
    result = storage.read_record(path)
    result["inputs"]["model"] = model_digest(Path(config.model.path))
    storage.write_record(path, result)


# The command ------------------------------------------------------------------------------------------------


def test_answers_before_and_after_stand_beside_the_training_too_and_come_back(
    run_copy: PipelineConfig,
) -> None:
    key = find_candidate(run_copy.run_root).training_key
    path = run_copy.run_root / CHECKPOINTS_FOLDER / key / "answers.json"
    expected = [answers.model_dump() for answers in read_report(run_copy).answers]
    assert json.loads(path.read_bytes()) == expected
    assert [list(answers) for answers in expected] == [["question", "base", "candidate"]] * len(QUESTIONS)
    path.unlink()
    evaluate(run_copy)
    assert json.loads(path.read_bytes()) == expected


def test_the_command_compares_sources_and_languages_where_there_are_several(
    run_copy: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run_evaluate(run_copy)
    lines = capsys.readouterr().out.splitlines()
    base, candidate = read_report(run_copy).models
    assert len(base.by_source) > 1
    for name, loss in base.by_source.items():
        after = candidate.by_source[name].bits_per_byte
        assert f"source {name}: base {loss.bits_per_byte:.4f}, candidate {after:.4f}" in lines
    assert not any(line.startswith("language ") for line in lines)  # all are of one


@pytest.fixture
def hostile_report(run_copy: PipelineConfig) -> PipelineConfig:
    report = storage.read_record(run_copy.run_root / EVALUATION_NAME)
    report["answers"][0]["candidate"] = "\x1b[2Jgone\u202e"
    storage.write_record(run_copy.run_root / EVALUATION_NAME, report)
    return run_copy


def test_the_command_prints_the_numbers_and_nothing_that_steers_a_terminal(
    hostile_report: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run_evaluate(hostile_report)
    out = capsys.readouterr().out
    lines = out.splitlines()
    total = read_report(hostile_report).models[1].total
    assert lines[1].startswith(f"candidate  {total.bits_per_byte:.4f} bits per byte  {total.loss:.4f} nats")
    assert lines[-1] == str(hostile_report.run_root / EVALUATION_NAME)
    assert "gone" in out
    assert not set("\x1b\u202e") & set(out)
