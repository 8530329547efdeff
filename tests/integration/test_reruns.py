"""Rows put into the middle of a file: only the parts that they fall into are worked on again, in every stage."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.show import follow, story
from pipelines.stage import run_stage
from schemas.config_file import load_config
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGE_FOLDERS, STAGES
from tests.conservation import check_run_root, rows_with_records
from tests.integration import toy

NUM_CHATS = 1000
NUM_ADDED = 10
PART_BYTES = 12_000  # a hundredth of the file, as a default part is of 100 MB
CONFIG = """
run_root: {run_root}
sources: [{{name: chats, path: chats.json}}]
merge: {{part_bytes: {part_bytes}}}
split: {{max_tokens: 256}}
model: {{path: model, dtype: float32}}
engine: {{workers: 1, min_free_gib: 0.1}}
"""


def write_chats(folder: Path, places: list[int]) -> None:
    """As many of the added chats at each place; a record that is broken stands at the end."""
    chats = [json.dumps(chat) for chat in toy.sharegpt_chats(NUM_CHATS)]
    added = [
        json.dumps(chat | {"id": f"added-{chat['id']}"})
        for chat in toy.sharegpt_chats(NUM_ADDED, seed=9)[:NUM_ADDED]
    ]
    for number, place in reversed(list(enumerate(places))):
        chats[place:place] = added[number :: len(places)]
    (folder / "chats.json").write_text(
        "[" + ",\n".join([*chats, '{"id": "broken", "conversations": 7}']) + "]"
    )


def config_of(folder: Path, run_root: str) -> PipelineConfig:
    path = folder / f"{run_root}.yaml"
    path.write_text(CONFIG.format(run_root=run_root, part_bytes=PART_BYTES))
    return load_config(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy.write_tokenizer(tmp_path / "model")
    return tmp_path


@pytest.mark.slow
def test_a_hundredth_of_rows_put_in_makes_few_rows_run_again_and_the_same_bytes(folder: Path) -> None:
    write_chats(folder, [])
    config = config_of(folder, "run")
    for stage in STAGES:
        result = run_stage(stage, config)
        assert result.num_rows_run == result.manifest.num_rows_in > 0, stage
    # 5 % and what the size of parts allows: more for each further place.
    for places, most in (([500], 0.05), ([200, 700], 0.08)):
        write_chats(folder, places)
        for stage in STAGES[:-1]:  # the plan of the last is of all rows
            result = run_stage(stage, config)
            num_rows = result.manifest.num_rows_in
            assert 0 < result.num_rows_run <= most * num_rows, stage
            assert result.num_rows_run + result.num_rows_reused >= num_rows, stage
            timing = json.loads((folder / "run" / STAGE_FOLDERS[stage] / "timing.json").read_text())
            assert (timing["rows_run"], timing["rows_reused"]) == (
                result.num_rows_run,
                result.num_rows_reused,
            )
    run_stage("pack", config)
    check_run_root(folder / "run")
    fresh = config_of(folder, "fresh")
    for stage in ("merge", "clean", "filter", "dedup"):
        run_stage(stage, fresh)
        name = STAGE_FOLDERS[stage]
        assert toy.folder_digests(folder / "run" / name) == toy.folder_digests(folder / "fresh" / name), name


def test_a_row_behind_the_added_ones_is_shown_with_its_new_number(folder: Path) -> None:
    config = config_of(folder, "run")
    numbers: list[dict[str, Any]] = []
    for places in ([], [500]):
        write_chats(folder, places)
        for stage in ("merge", "clean"):
            run_stage(stage, config)
        numbers.append(
            {
                row["row_id"]: row["record"]
                for row in rows_with_records(folder / "run/01_merged", "row_id", "record")
            }
        )
    broken = max(numbers[0], key=lambda row_id: numbers[0][row_id])
    assert numbers[1][broken] == numbers[0][broken] + NUM_ADDED
    told = list(story(follow(folder / "run", broken), broken))
    assert told[1] == f"from chats/chats.json, record {numbers[1][broken]}"
    moved = {row: number for row, number in numbers[0].items() if numbers[1][row] != number}
    assert min(moved.values()) == 500
    assert {numbers[1][row] - number for row, number in moved.items()} == {NUM_ADDED}
