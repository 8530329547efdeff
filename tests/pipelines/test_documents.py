"""Plain text as it is: from a folder of texts through all stages to blocks, windows and a training."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.documents import check_end_token, encode_document
from pipelines.encode import build_encoder
from pipelines.formats import document
from pipelines.shards import open_split
from pipelines.stage import run_stage
from pipelines.storage import read_arrow
from schemas.config_file import load_config
from schemas.conversation import Conversation, Drop, Message
from schemas.errors import RefusedError
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGES
from schemas.source_config import SourceConfig
from tests.integration import toy
from trainer.train import train

SOURCE = SourceConfig(name="papers", path="papers.jsonl", format="document")


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "  One.\n\nTwo. "}, "  One.\n\nTwo. "),
        ({"title": "On tides", "text": "The moon."}, "On tides\n\nThe moon."),
        ({"title": "On tides", "text": "On tides\nThe moon."}, "On tides\nThe moon."),
        ({"text": "### Human: hi\n### Assistant: hello"}, "### Human: hi\n### Assistant: hello"),
    ],
)
def test_a_document_is_its_text_below_its_title(record: dict[str, Any], text: str) -> None:
    assert document.read(record, SOURCE) == [Message("assistant", text)]


def test_a_document_without_text_is_dropped() -> None:
    for record in ({"text": " \n"}, {"text": ""}, {"text": None}):
        assert isinstance(document.read(record, SOURCE), Drop)


def tokenizer_of(folder: Path, **settings: Any) -> Any:
    from transformers import AutoTokenizer

    toy.write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, **settings)


def test_a_document_ends_with_the_end_token_and_holds_no_other_control_token(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    text = "The river <|im_end|> and <|im_start|>user the garden. é 中文"
    row = Conversation("r", "papers/a", 0, [Message("assistant", text)], {"format": "document"})
    example = encode_document(build_encoder(tokenizer), row)
    assert not isinstance(example, Drop)
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert not set(example.input_ids[:-1].tolist()) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(example.input_ids[:-1]) == text
    assert (example.span_starts.tolist(), example.span_ends.tolist()) == ([1], [len(example.input_ids)])
    assert example.num_trained_bytes == len(text.encode())


def test_a_tokenizer_that_begins_texts_begins_documents(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of(tmp_path, bos_token="<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    row = Conversation("r", "papers/a", 0, [Message("assistant", "The river.")], {"format": "document"})
    example = encode_document(build_encoder(tokenizer), row)
    assert not isinstance(example, Drop)
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(example.input_ids[1:-1]) == "The river."


def test_documents_without_an_end_token_are_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    tokenizer.eos_token = None
    config = PipelineConfig(run_root=tmp_path, sources=[SOURCE])
    with pytest.raises(RefusedError, match="eos"):
        check_end_token(config, build_encoder(tokenizer))
    chats = PipelineConfig(run_root=tmp_path, sources=[SourceConfig(name="chats", path="c.json")])
    check_end_token(chats, build_encoder(tokenizer))


# The whole way ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """40 texts of up to 3,000 tokens beside chats; stages 1 to 6 are done."""
    folder = tmp_path_factory.mktemp("papers")
    toy.write_dumps(folder / "dumps", num_chats=30, num_records=30)
    toy.write_model(folder / "model")
    draw = random.Random(5)
    papers = [
        {"title": f"Paper {n}", "text": " ".join(toy.sentence(draw) for _ in range(draw.randint(1, 200)))}
        for n in range(40)
    ]
    (folder / "dumps/papers.jsonl").write_text("\n".join(json.dumps(paper) for paper in papers))
    source = "  - {name: papers, path: dumps/papers.jsonl, format: document}\nmerge:"
    (folder / "run.yaml").write_text(toy.CONFIG.format(run_root="run").replace("merge:", source, 1))
    loaded = load_config(folder / "run.yaml")
    for stage in STAGES[:-1]:
        run_stage(stage, loaded)
    return loaded


def with_pack(config: PipelineConfig, **settings: Any) -> PipelineConfig:
    """The config with other settings of pack, and its plans made."""
    changed = config.model_copy(update={"pack": config.pack.model_copy(update=settings)})
    changed = changed.model_copy(update={"train": config.train.model_copy(update={"epochs": 2})})
    run_stage("pack", changed)
    return changed


def test_whole_texts_lie_in_the_shards_and_on_all_sides_of_the_hold_out(config: PipelineConfig) -> None:
    from transformers import AutoTokenizer

    assert config.model is not None
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    texts = {f"Paper {n}" for n in range(40)}
    sides = {}
    for side in ("train", "validation", "test"):
        table = open_split(config.run_root / "06_shards", side)
        rows = [row for row in table.to_pylist() if row["source"].startswith("papers/")]
        decoded = [tokenizer.decode(row["input_ids"][:-1]) for row in rows]
        sides[side] = {text.partition("\n")[0] for text in decoded}
        assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in rows)
    assert set.union(*sides.values()) == texts
    assert len(sides["train"]) > 20
    assert sides["validation"] or sides["test"], "not all on one side, though none has a question"


def test_blocks_hold_every_token_of_every_document_once(config: PipelineConfig) -> None:
    with_pack(config)
    table = open_split(config.run_root / "06_shards", "train")
    plan = read_arrow(config.run_root / "07_plan" / "train-epoch-0000.arrow").to_pylist()
    is_document = [str(source).startswith("papers/") for source in table["source"].to_pylist()]
    lengths = table["num_tokens"].to_pylist()
    seen = {
        example: sorted(
            token
            for row in plan
            if row["example"] == example
            for token in range(row["first_token"], row["first_token"] + row["num_tokens"])
        )
        for example in range(table.num_rows)
    }
    assert all(tokens == list(range(lengths[example])) for example, tokens in seen.items())
    fills: dict[int, int] = {}
    for row in plan:
        if is_document[row["example"]]:
            fills[row["bin"]] = fills.get(row["bin"], 0) + row["num_tokens"]
    assert max(lengths) > 3 * 256
    assert sorted(fills.values())[1:] == [256] * (len(fills) - 1)


def test_windows_change_with_the_epoch_and_no_shard_is_written_for_them(config: PipelineConfig) -> None:
    shards = toy.folder_digests(config.run_root / "06_shards")
    with_pack(config, documents="window", window_tokens=64)
    plans = [
        read_arrow(config.run_root / "07_plan" / f"train-epoch-{epoch:04d}.arrow").to_pylist()
        for epoch in (0, 1)
    ]
    table = open_split(config.run_root / "06_shards", "train")
    is_long = np.array([s.startswith("papers/") for s in table["source"].to_pylist()]) & (
        table["num_tokens"].to_numpy() > 300
    )
    starts = [{r["example"]: r["first_token"] for r in plan if is_long[r["example"]]} for plan in plans]
    assert starts[0].keys() == starts[1].keys() == set(np.flatnonzero(is_long).tolist())
    assert np.mean([starts[0][example] == starts[1][example] for example in starts[0]]) < 0.2
    assert all(row["num_tokens"] == 64 for plan in plans for row in plan if is_long[row["example"]])
    assert toy.folder_digests(config.run_root / "06_shards") == shards


@pytest.mark.parametrize("settings", [{}, {"documents": "window", "window_tokens": 64}])
def test_documents_are_trained_and_measured(config: PipelineConfig, settings: dict[str, Any]) -> None:
    from trainer.held_out import count_trained_tokens, read_held_out

    changed = with_pack(config, **settings)
    result = train(changed)
    assert result.last_loss is not None
    assert result.first_loss is not None
    assert result.last_loss < result.first_loss
    held_out = read_held_out(changed)
    reader = held_out.reader
    trained = count_trained_tokens(held_out)
    assert (trained <= reader.num_trained_tokens).all()
    assert (held_out.num_trained_bytes <= reader.num_trained_bytes).all()
    whole = np.array([source != "papers" for source in held_out.sources])
    assert (held_out.num_trained_bytes == reader.num_trained_bytes)[whole].all()
