"""Exports of a tiny training: the folders answer as what was trained, and the hub can read their cards."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipelines import storage
from schemas.errors import ConfigError, InputError, LimitError
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGE_FOLDERS
from tests.trainer.tiny_models import tiny_run, write_model
from trainer.answer import Sampling, answer
from trainer.data_summary import DataSummary, SourceSummary, source_license, summarise
from trainer.evaluation import evaluate
from trainer.export import MergeSettings, export
from trainer.harness import HarnessSettings, read_scores, run_harness
from trainer.load_trained import load_for_generation
from trainer.merge_check import Difference
from trainer.model import outdated_names_allowed
from trainer.model_card import CardFacts, HarnessScore, card_text
from trainer.service import find_candidate, read_evaluation, read_training
from trainer.train import train

SETTINGS = {"evaluate": {"max_new_tokens": 6}}


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    config = tiny_run(tmp_path_factory.mktemp("lora"), **SETTINGS)
    train(config)
    evaluate(config)
    return config


def trained_folder(config: PipelineConfig) -> Path:
    return config.run_root / find_candidate(config.run_root).path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 40)[None]).logits
    return found


def plain_adapter(config: PipelineConfig, folder: Path) -> Any:
    """By PEFT alone."""
    assert config.model is not None
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    with outdated_names_allowed():
        return PeftModel.from_pretrained(base, folder)


# Folders ----------------------------------------------------------------------------------------------------


def test_an_adapter_is_exported_with_tokenizer_and_card(lora_run: PipelineConfig, tmp_path: Path) -> None:
    out = export(lora_run, tmp_path / "adapter", adapter="current")
    trained = trained_folder(lora_run)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (trained / name).read_bytes()
    template = AutoTokenizer.from_pretrained(out).chat_template
    assert template == AutoTokenizer.from_pretrained(trained).chat_template
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft"
    assert torch.equal(logits(plain_adapter(lora_run, out)), logits(plain_adapter(lora_run, trained)))


def test_a_merged_export_is_a_model_that_plain_transformers_loads(
    lora_run: PipelineConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = MergeSettings(max_shard_bytes=40_000)
    out = export(lora_run, tmp_path / "merged", form="merged", adapter="current", merge=merge)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(list(out.glob("*.safetensors"))) > 1
    expected = logits(plain_adapter(lora_run, trained_folder(lora_run)))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    assert "merged: logits of" in capsys.readouterr().err
    text = (out / "README.md").read_text()
    assert "Beside base and adapter as they were trained, logits of" in text
    messages = [{"role": "user", "content": "red"}]
    said = [
        answer(loaded.model, loaded.tokenizer, messages, Sampling(6))
        for loaded in (load_for_generation(lora_run, name) for name in ("current", str(out)))
    ]
    assert said[0] == said[1]
    assert not list(tmp_path.glob(".tmp-*"))


def test_end_tokens_of_the_template_stop_an_exported_model(tmp_path: Path) -> None:
    """The base's own generation settings know nothing of them."""
    config = tiny_run(tmp_path)
    assert config.model is not None
    base = Path(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(base)
    GenerationConfig(eos_token_id=2, top_k=7, do_sample=True).save_pretrained(base)
    train(config)
    out = export(config, tmp_path / "out", form="merged", adapter="current")
    found = GenerationConfig.from_pretrained(out)
    assert found.eos_token_id == [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert found.top_k == 7


def test_a_model_that_was_trained_whole_is_exported_as_it_is(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"method": "full", "learning_rate": 1e-3})
    train(config)
    out = export(config, tmp_path / "whole", adapter="current")
    expected = load_file(trained_folder(config) / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert metadata_load(out / "README.md")["library_name"] == "transformers"
    with pytest.raises(ConfigError, match="use model"):
        export(config, tmp_path / "merged", form="merged", adapter="current")
    best = export(config, tmp_path / "step", checkpoint="latest")
    consolidated = load_file(best / "model.safetensors")
    assert all(torch.equal(consolidated[name], expected[name]) for name in expected)
    assert not (best / ".checkpoint").exists()


@pytest.mark.stress
def test_a_checkpoint_is_merged_as_well(lora_run: PipelineConfig, tmp_path: Path) -> None:
    out = export(lora_run, tmp_path / "step", form="merged", checkpoint="latest")
    expected = logits(plain_adapter(lora_run, trained_folder(lora_run)))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, rtol=0, atol=1e-4)


@pytest.mark.stress
def test_an_adapter_over_four_bits_is_exported_with_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"base": "nf4"})
    train(config)
    out = export(config, tmp_path / "merged", form="merged", adapter="current")
    plain = config.model_copy(update={"train": config.train.model_copy(update={"base": "plain"})})
    loaded = load_for_generation(config, "current")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out)), logits(loaded.model), rtol=0, atol=1e-3
    )
    naive = export(plain, tmp_path / "naive", form="merged", adapter="current")
    assert not torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(naive)), logits(loaded.model), atol=1e-2
    )


@pytest.mark.stress
def test_new_tokens_and_longer_positions_are_part_of_a_merged_model(tmp_path: Path) -> None:
    """The comparison with base and adapter is made inside; here the folder is loaded by transformers alone."""
    changes = {"new_tokens": ["<|tool|>"], "rope_scaling": {"type": "linear", "factor": 4}}
    write_model(tmp_path / "model-llama", vocab_size=300)
    config = tiny_run(tmp_path, model=changes)
    train(config)
    out = export(config, tmp_path / "merged", form="merged", adapter="current")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.get_input_embeddings().weight.shape[0] > AutoTokenizer.from_pretrained(
        out
    ).convert_tokens_to_ids("<|tool|>")
    loaded = load_for_generation(config, "current")
    torch.testing.assert_close(logits(model), logits(loaded.model), rtol=0, atol=1e-4)


def test_what_can_not_be_exported_is_refused_and_leaves_nothing(
    lora_run: PipelineConfig, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="nothing to export"):
        export(lora_run, out, adapter="none")
    with pytest.raises(ConfigError, match="use adapter or merged"):
        export(lora_run, out, form="model", adapter="current")
    merge = MergeSettings(dtype="float16", max_difference=1e-9)
    with pytest.raises(LimitError, match="is not the trained one"):
        export(lora_run, out, form="merged", adapter="current", merge=merge)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    with pytest.raises(InputError, match="is there already"):
        export(lora_run, out, adapter="current")


@pytest.mark.stress
def test_equal_work_gives_equal_bytes(lora_run: PipelineConfig, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    folders = [
        export(lora_run, folder / "same", form="merged", adapter="current")
        for folder in (tmp_path, tmp_path / "other")
    ]
    first, second = (
        {path.name: storage.file_sha256(path) for path in folder.iterdir()} for folder in folders
    )
    assert first == second


# Cards ------------------------------------------------------------------------------------------------------


def test_a_card_tells_what_the_records_of_the_run_say(lora_run: PipelineConfig, tmp_path: Path) -> None:
    out = export(lora_run, tmp_path / "my-adapter", adapter="current")
    card = ModelCard.load(out / "README.md")
    total = next(m.total for m in read_evaluation(lora_run.run_root).models if m.label == "candidate")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results or ()}
    assert found == {"bits_per_byte": total.bits_per_byte, "loss": total.loss}
    assert card.data.model_name == "my-adapter"
    result = read_training(trained_folder(lora_run).parent)
    for expected in (
        f"| Tokens read | {result.num_tokens:,} |",
        f"| Of these trained | {result.num_trained_tokens:,} |",
        f"torch {result.versions['torch']}",
        '"learning_rate": 0.01',
        f"Training {result.key}",
        "| tiny | 0 | 0 | 40 |",
    ):
        assert expected in card.text
    assert f"{total.bits_per_byte:.4f} |" in card.text


def full_facts() -> CardFacts:
    return CardFacts(
        name="my|model",
        form="merged",
        method="lora",
        base="/models/a",
        base_id="owner/name",
        license={"license": "other", "license_name": "own", "license_link": "https://x.y/z"},
        dtype="bfloat16",
        data=DataSummary((SourceSummary("chats", 10, 9, 8, 7000, "mit"),), ("en", "zh-Hans", "de")),
        difference=Difference(64, 0.004, 0.1, 1e-5, 0.99),
        harness=[HarnessScore("own_task", "acc", 0.5, 0.1, 12)],
    )


def test_the_hub_reads_every_part_of_the_front_matter(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card_text(full_facts()))
    card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    data = card.data.to_dict()
    assert data["base_model"] == "owner/name"
    assert data["base_model_relation"] == "finetune"
    assert data["license_link"] == "https://x.y/z"
    assert data["language"] == ["en", "de"]
    (score,) = card.data.eval_results or ()
    assert (score.dataset_name, score.metric_type, score.metric_value) == ("own_task", "acc", 0.5)
    assert "| chats | 10 | 9 | 8 | 7,000 | mit |" in card.text
    assert "| own\\_task | acc | 0.5000 | 0.1000 | 12 |" in card.text
    assert "# my\\|model" in card.text


def test_a_card_of_what_nobody_recorded_claims_nothing(tmp_path: Path) -> None:
    facts = CardFacts(name="x", form="adapter", method="lora", base="/models/a")
    (tmp_path / "README.md").write_text(card_text(facts))
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "## Data" not in card_text(facts)


def test_licences_come_from_the_card_beside_a_source_and_data_that_changed_is_not_told(
    lora_run: PipelineConfig, tmp_path: Path
) -> None:
    source = lora_run.sources[0].model_copy(update={"path": str(tmp_path / "data" / "*.json")})
    assert source_license(source) is None
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n\n# Chats\n")
    assert source_license(source) == "cc-by-4.0"
    (tmp_path / "data" / "README.md").write_text("---\nlicense: [\n---\n")
    assert source_license(source) is None
    assert source_license(source.model_copy(update={"path": "hf://datasets/a/b"})) is None
    training = read_training(trained_folder(lora_run).parent)
    assert summarise(lora_run, training) is not None
    moved = lora_run.model_copy(update={"run_root": tmp_path / "run"})
    shutil.copytree(lora_run.run_root / STAGE_FOLDERS["split"], tmp_path / "run" / STAGE_FOLDERS["split"])
    (tmp_path / "run" / STAGE_FOLDERS["split"] / "manifest.json").write_text("{}")
    assert summarise(moved, training) is None


# lm-evaluation-harness --------------------------------------------------------------------------------------

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is absent: the extra lm-eval"
)


def write_task(folder: Path) -> None:
    folder.mkdir()
    rows = [{"question": text, "good": "blue", "bad": "red"} for text in ("sky", "sea", "ice")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "colours.yaml").write_text(
        f"task: colours\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: 0\n"
        "doc_to_choice: '{{[good, bad]}}'\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )


@needs_harness
@pytest.mark.stress
@pytest.mark.filterwarnings("ignore")
def test_a_local_task_is_measured_offline_and_stands_in_the_card(
    lora_run: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its accuracy is counted here by hand: the likelier of two continuations."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path / "tasks")
    run_root = tmp_path / "run"
    shutil.copytree(lora_run.run_root, run_root)
    config = lora_run.model_copy(update={"run_root": run_root})
    settings = HarnessSettings(task_folder=tmp_path / "tasks", use_chat_template=False)
    (score,) = run_harness(config, ["colours"], settings, adapter="current", device="cpu")
    loaded = load_for_generation(config, "current")

    def likelihood(question: str, choice: str) -> float:
        ids, start = (loaded.tokenizer.encode(text) for text in (f"{question} {choice}", question))
        with torch.no_grad():
            shares = loaded.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(shares[place - 1, ids[place]]) for place in range(len(start), len(ids)))

    right = [likelihood(text, "blue") > likelihood(text, "red") for text in ("sky", "sea", "ice")]
    assert (score.task, score.metric, score.num_examples) == ("colours", "acc", 3)
    assert score.value == pytest.approx(sum(right) / 3)
    assert read_scores(trained_folder(config).parent) == (score,)
    out = export(config, tmp_path / "out", adapter="current")
    assert f"| colours | acc | {score.value:.4f} |" in (out / "README.md").read_text()
    with pytest.raises(ConfigError, match="no task shapes; there are colours"):
        run_harness(config, ["shapes"], settings, adapter="current")


def test_without_the_library_the_extra_is_named(
    lora_run: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.harness.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sft-pipeline\[lm-eval\]"):
        run_harness(lora_run, ["colours"], HarnessSettings(), adapter="current")
