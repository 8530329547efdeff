"""The benchmark's made data: drawn lengths, chats through the pipeline's own stages, tokens for other interpreters."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from flows.bench.options import BenchOptions, config_of
from pipelines.stage import run_stage
from schemas.run import STAGES
from trainer.bench.chats import LENGTHS, TRAINED_SHARE, draw_lengths, turn_words, write_dump
from trainer.bench.documents import export_documents
from trainer.bench.random_model import write_model
from trainer.bench.shapes import SHAPES
from trainer.bench.words import made_words, write_tokenizer

TOY = SHAPES["toy"]
STEPS, CAPACITY = 5, 512


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Lengths, and the config of a run root whose seven stages have run over chats of them."""
    folder = tmp_path_factory.mktemp("bench")
    options = BenchOptions(
        folder, shape="toy", tokens_per_step=CAPACITY, capacity=CAPACITY, num_steps=STEPS - 1, num_warm_up=1,
        dtype="float32", overrides=("engine.workers=1",),
    )  # fmt: skip
    config = config_of(options, max_steps=STEPS, checkpointing="none")
    assert config.model is not None
    write_tokenizer(Path(config.model.path), TOY.vocabulary_size)
    lengths = draw_lengths("alpaca", num_tokens=(STEPS + 1) * CAPACITY, num_chats=0, longest=CAPACITY)
    write_dump(Path(config.sources[0].path), lengths, vocabulary_size=TOY.vocabulary_size)
    for stage in STAGES:
        run_stage(stage, config)
    export_documents(config, folder / "documents.safetensors")
    return folder, lengths, config


@pytest.mark.parametrize(("kind", "mean"), [("alpaca", 110), ("long", 1080)])
def test_lengths_are_those_of_the_kind_and_the_same_each_time(kind: str, mean: int) -> None:
    drawn = draw_lengths(kind, num_tokens=0, num_chats=20_000, longest=16384)
    assert abs(drawn.mean() / mean - 1) < 0.03
    assert drawn.max() <= LENGTHS[kind].longest
    assert np.array_equal(drawn, draw_lengths(kind, num_tokens=0, num_chats=20_000, longest=16384))


def test_as_many_chats_are_drawn_as_the_tokens_need() -> None:
    drawn = draw_lengths("alpaca", num_tokens=100_000, num_chats=0, longest=8192)
    assert drawn.sum() >= 100_000 > drawn[:-1].sum()


@pytest.mark.parametrize("length", [16, 17, 99, 400, 799, 800, 16384])
def test_the_turns_of_a_chat_have_its_tokens_of_which_the_share_is_trained(length: int) -> None:
    turns = list(turn_words(length))
    assert sum(words + 2 for _, words in turns) == length  # each turn has two control tokens
    trained = sum(words + 1 for role, words in turns if role == "assistant")  # and its end is trained
    assert trained / length == pytest.approx(TRAINED_SHARE, abs=0.5 * len(turns) / length)
    assert all(words > 0 for _, words in turns)


def test_words_are_all_different() -> None:
    assert len(set(made_words(152064).tolist())) == 152064


def test_the_stages_give_each_chat_the_tokens_that_were_drawn(made: Any) -> None:
    _, lengths, config = made
    manifest = json.loads((config.run_root / "06_shards" / "manifest.json").read_bytes())
    assert (manifest["num_rows_out"], manifest["drops"]) == (len(lengths), {})
    assert manifest["counts"]["tokens"] == lengths.sum()
    assert manifest["counts"]["trained_tokens"] / lengths.sum() == pytest.approx(TRAINED_SHARE, abs=0.005)


def test_exported_documents_are_rendered_chats_whose_answers_are_labels(made: Any) -> None:
    folder, _, config = made
    columns = load_file(folder / "documents.safetensors")
    counts = json.loads((folder / "documents.json").read_bytes())
    borders, bins = columns["document_starts"], columns["bin_starts"]
    assert len(counts) == STEPS == len(bins) - 1
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    known = {
        tuple(tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False))
        for line in Path(config.sources[0].path).read_text().splitlines()
    }
    for first, end in itertools.pairwise(borders):
        ids, labels = columns["input_ids"][first:end], columns["labels"][first:end]
        assert tuple(ids.tolist()) in known
        answers = tokenizer.decode(ids).split("<|assistant|>")[1:]
        trained = "".join(answer.partition("<|end|>")[0] + "<|end|>" for answer in answers)
        assert tokenizer.decode(labels[labels >= 0]).split() == trained.split()
        assert set(np.flatnonzero((labels >= 0) & (labels != ids))) == set()
    for number, step in enumerate(counts):
        here = slice(borders[bins[number]], borders[bins[number + 1]])
        assert step["num_tokens"] == here.stop - here.start <= CAPACITY
        assert step["num_trained_tokens"] == (columns["labels"][here] >= 0).sum()


def test_a_model_is_written_in_files_that_transformers_loads_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.bench.random_model.FILE_BYTES", 50_000)
    write_model(TOY, tmp_path, device=torch.device("cpu"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    again = dict(model.named_parameters())
    write_model(TOY, tmp_path, device=torch.device("cpu"))
    for name, parameter in AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters():
        assert torch.equal(parameter, again[name]), name
        if parameter.dim() == 1:
            assert set(parameter.tolist()) == {1.0}, name
        else:
            assert parameter.detach().float().std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize(("name", "billions"), [("8b", 8.03), ("7b", 6.74), ("32b", 32.8)])
def test_shapes_have_as_many_weights_as_the_published_models(name: str, billions: float) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(shape.model_type, **shape.settings, tie_word_embeddings=False)
        )
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.002)
