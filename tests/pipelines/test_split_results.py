"""A row that comes again in stage 6 is taken over, examples and counts, and nothing is encoded twice."""

import json
from pathlib import Path

import pytest

from pipelines import split
from pipelines.split_results import known_results, result_key
from pipelines.stage import run_stage
from pipelines.storage import read_manifest
from schemas.config_file import load_config
from schemas.conversation import Conversation, Message
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGE_FOLDERS, Manifest
from tests.integration import toy

BEFORE_SPLIT = ("merge", "clean", "filter", "dedup", "holdout")


@pytest.fixture
def dumps(tmp_path: Path) -> Path:
    toy.write_dumps(tmp_path / "dumps", num_chats=30, num_records=20)
    toy.write_tokenizer(tmp_path / "model")
    return tmp_path


def config_of(folder: Path, run_root: Path, **filter_settings: object) -> PipelineConfig:
    config = load_config(toy.write_config(folder))
    filters = config.filter.model_copy(update=filter_settings)
    engine = config.engine.model_copy(update={"workers": 1})
    return config.model_copy(update={"run_root": run_root, "filter": filters, "engine": engine})


def split_after(config: PipelineConfig) -> Manifest:
    for stage in BEFORE_SPLIT:
        run_stage(stage, config)
    return run_stage("split", config).manifest


def shard_digests(manifest: Manifest) -> dict[str, str]:
    return {file.path: file.sha256 for file in manifest.files}


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: PipelineConfig) -> None:
        raise AssertionError("the tokenizer was loaded")

    monkeypatch.setattr("pipelines.work._prepared", {})
    monkeypatch.setattr(split, "prepare", refuse)


def test_a_new_threshold_of_a_filter_encodes_nothing_twice(
    dumps: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    first = split_after(config_of(dumps, tmp_path / "run"))
    fresh = split_after(config_of(dumps, tmp_path / "fresh", max_turns=4))
    request.getfixturevalue("no_encoder")
    again = split_after(config_of(dumps, tmp_path / "run", max_turns=4))
    assert first.num_rows_in > again.num_rows_in > 0
    assert shard_digests(again) == shard_digests(fresh)
    assert (again.counts, again.drops, again.key) == (fresh.counts, fresh.drops, fresh.key)


def test_rows_that_are_new_are_encoded_and_the_others_are_not(
    dumps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = split_after(config_of(dumps, tmp_path / "run", max_turns=4))
    encoded: list[str] = []
    original = split.split_chat
    monkeypatch.setattr(
        split,
        "split_chat",
        lambda encoder, config, row: encoded.append(row.row_id) or original(encoder, config, row),  # type: ignore[func-returns-value]
    )
    all_of_them = split_after(config_of(dumps, tmp_path / "run"))
    assert len(encoded) == len(set(encoded)) > 0
    assert len(encoded) == all_of_them.num_rows_in - few.num_rows_in
    assert shard_digests(all_of_them) == shard_digests(split_after(config_of(dumps, tmp_path / "fresh")))


@pytest.mark.parametrize("what", ["settings", "damage"])
def test_what_was_made_otherwise_or_is_damaged_is_not_taken_over(
    dumps: Path, tmp_path: Path, what: str
) -> None:
    config = config_of(dumps, tmp_path / "run")
    split_after(config)
    changed = config_of(dumps, tmp_path / "run", max_turns=4)
    fresh = config_of(dumps, tmp_path / "fresh", max_turns=4)
    if what == "settings":
        changed, fresh = (
            c.model_copy(update={"split": c.split.model_copy(update={"max_tokens": 96})})
            for c in (changed, fresh)
        )
    else:
        for path in (tmp_path / "run" / STAGE_FOLDERS["split"] / "parts").glob("*-rows.arrow"):
            path.write_bytes(path.read_bytes()[:-9])
    assert shard_digests(split_after(changed)) == shard_digests(split_after(fresh))


def test_every_part_of_a_row_that_shapes_examples_is_in_its_key() -> None:
    def row(**changes: object) -> Conversation:
        values = {"row_id": "0" * 32, "source": "s/f", "record": 1, "meta": {"language": [["en", 1.0]]}}
        messages = [Message("user", "q"), Message("assistant", "a", {"weight": 1})]
        return Conversation(**{**values, "messages": messages, **changes})  # type: ignore[arg-type]

    changes: list[dict[str, object]] = [
        {"row_id": "1" * 32},
        {"source": "s/g"},
        {"meta": {}},
        {"messages": [Message("user", "q"), Message("assistant", "b", {"weight": 1})]},
        {"messages": [Message("user", "q"), Message("tool", "a", {"weight": 1})]},
        {"messages": [Message("user", "q"), Message("assistant", "a", {"weight": 0})]},
    ]
    assert len({result_key(row(**change)) for change in [{}, *changes]}) == len(changes) + 1
    assert result_key(row()) == result_key(row(record=7)), "where it stands in its file is not trained"


def test_examples_come_back_as_they_were(dumps: Path, tmp_path: Path) -> None:
    config = config_of(dumps, tmp_path / "run")
    manifest = split_after(config)
    folder = config.run_root / STAGE_FOLDERS["split"]
    assert read_manifest(folder) == manifest
    found = [known_results(folder, part) for part in manifest.parts]
    assert sum(map(len, found)) == manifest.num_rows_in
    step = split.prepare(config)
    from pipelines.storage import check_file, read_rows

    held_out = read_manifest(config.run_root / STAGE_FOLDERS["holdout"])
    assert held_out is not None
    known = {key: result for results in found for key, result in results.items()}
    for part in held_out.parts:
        for file in part.kept:
            if not file.num_rows:
                continue
            for row in read_rows(check_file(config.run_root / STAGE_FOLDERS["holdout"], file)):
                assert described(known[result_key(row)]) == described(step(row))


def described(result: object) -> str:
    if not isinstance(result, split.SplitResult):
        return repr(result)
    examples = [
        {
            name: getattr(value := getattr(example, name), "tolist", lambda v=value: v)()
            for name in example.__slots__
        }
        for example in result.examples
    ]
    return json.dumps([examples, sorted(result.counts.items())])
