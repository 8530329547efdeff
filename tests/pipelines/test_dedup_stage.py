"""Stage 4 on files: the report of the largest clusters, counts, and runs against earlier runs."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipelines.parts import StageResult
from pipelines.stage import plan_stages, run_stage
from pipelines.storage import check_file, file_sha256, read_manifest, read_rows, write_rows
from schemas.config_file import load_config
from schemas.errors import InputError

CONFIG = """
run_root: {root}
sources: [{{name: chats, path: {file}}}]
merge: {{part_bytes: 2000}}
engine: {{workers: 1, min_free_gib: 0.1}}
"""
STAGES = ("merge", "clean", "filter", "dedup")


def words(seed: int, number: int = 30) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(10**4)}" for _ in range(number))


def write_project(folder: Path, rounds: list[tuple[str, str]], name: str = "run") -> Path:
    lines = [json.dumps({"instruction": asked, "input": "", "output": said}) for asked, said in rounds]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / f"{name}.yaml").write_text(CONFIG.format(root=name, file=f"{name}.jsonl"))
    return folder / f"{name}.yaml"


def run_to_dedup(config: Path, *overrides: str) -> StageResult:
    loaded = load_config(config, overrides)
    return [run_stage(stage, loaded) for stage in STAGES][-1]


def clusters_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "04_deduplicated").glob("clusters-*.json")
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_the_twenty_largest_clusters_are_told_with_bounded_texts(tmp_path: Path) -> None:
    rounds = [
        (words(cluster, 300), f"answer {copy}") for cluster in range(25) for copy in range(2 + cluster % 5)
    ]
    result = run_to_dedup(write_project(tmp_path, rounds))
    clusters = clusters_of(tmp_path / "run")
    sizes = sorted((2 + cluster % 5 for cluster in range(25)), reverse=True)[:20]
    assert [cluster["num_rows_dropped"] + 1 for cluster in clusters] == sizes
    counts = result.manifest.counts
    assert [counts[f"cluster_{n:02}_rows"] for n in range(1, 21)] == sizes
    assert counts["near_largest_bucket_rows"] == 6
    for cluster in clusters:
        assert cluster["reasons"] == {"near_duplicate": cluster["num_rows_dropped"]}
        texts = [row["text"] for row in cluster["rows"]]
        assert len(texts) == min(3, cluster["num_rows_dropped"] + 1)
        assert {len(text) for text in texts} == {400}
        assert {text[:300] for text in texts} == {texts[0][:300]}
        assert cluster["rows"][0]["row_id"] == cluster["survivor"]
        assert all(row["detail"].startswith("Jaccard 0.9") for row in cluster["rows"][1:])


def test_rows_of_an_earlier_run_are_not_taken_again(tmp_path: Path) -> None:
    first = [(words(n), "yes") for n in range(10)]
    run_to_dedup(write_project(tmp_path, first, "first"))
    second = [(words(n), "yes!") for n in range(5, 15)] + [(words(7), "yes")]
    config = write_project(tmp_path, second, "second")
    assert run_to_dedup(config).manifest.drops == {"near_duplicate": 1}
    manifest = run_to_dedup(config, "earlier_runs=[first]").manifest
    assert manifest.drops == {"duplicate": 1, "near_duplicate": 5}
    assert manifest.num_rows_out == 5
    survivors = [cluster["rows"][0] for cluster in clusters_of(tmp_path / "second")]
    # The record that stands in both runs has one id, and is its own survivor.
    assert sorted(row["text"] == "a row of an earlier run" for row in survivors) == [
        False,
        True,
        True,
        True,
        True,
    ]
    assert run_to_dedup(config, "earlier_runs=[first]").skipped
    (tmp_path / "first").rename(tmp_path / "moved")
    assert run_to_dedup(config, "earlier_runs=[moved]").skipped


def test_a_part_of_which_every_row_stays_is_copied_to_the_bytes_of_its_rows_written_again(
    tmp_path: Path,
) -> None:
    again = (words(0), "answer 0")
    rounds = [(words(n), f"answer {n}") for n in range(40)]
    config = write_project(tmp_path, [*rounds, *(again for _ in range(3))])
    manifest = run_to_dedup(config).manifest
    before = read_manifest(tmp_path / "run/03_filtered")
    assert before is not None
    assert manifest.drops == {"duplicate": 3}
    num_copied = 0
    for part, part_before in zip(manifest.parts, before.parts, strict=True):
        file = part.kept[0]
        rows = list(read_rows(check_file(tmp_path / "run/04_deduplicated", file)))
        assert len(rows) == file.num_rows
        write_rows(tmp_path / "again.parquet", rows)
        assert file_sha256(tmp_path / "again.parquet") == file.sha256
        num_copied += file.sha256 == part_before.kept[0].sha256
    assert 0 < num_copied < len(before.parts)


@pytest.mark.parametrize(
    ("roots", "overrides", "said"),
    [
        ("[run]", (), "the run_root of this run"),
        ("[nothing]", (), "run the stage 'dedup' first"),
        ("[other]", ("dedup.near=false",), "was made with dedup.near: false"),
    ],
)
def test_an_earlier_run_that_does_not_fit_is_refused(
    tmp_path: Path, roots: str, overrides: tuple[str, ...], said: str
) -> None:
    run_to_dedup(write_project(tmp_path, [("one", "two")], "other"), *overrides)
    with pytest.raises(InputError, match=said):
        run_to_dedup(write_project(tmp_path, [("three", "four")]), f"earlier_runs={roots}")


def test_the_plan_says_when_an_earlier_run_has_grown(tmp_path: Path) -> None:
    config = write_project(tmp_path, [("three", "four")])
    other = write_project(tmp_path, [("one", "two")], "other")
    run_to_dedup(other)
    run_to_dedup(config, "earlier_runs=[other]")
    loaded = load_config(config, ["earlier_runs=[other]"])
    assert dict(plan_stages(["dedup"], loaded))["dedup"] == "unchanged, would be skipped"
    run_to_dedup(write_project(tmp_path, [("one", "two"), ("three", "four, too")], "other"))
    assert dict(plan_stages(["dedup"], loaded))["dedup"].startswith("runs: ")
