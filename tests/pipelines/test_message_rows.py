"""Trees as flat rows: the chats of the nested form, wherever rows stand, and no row lost in silence."""

import csv
import gzip
import io
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.look import look_at
from pipelines.merge import iter_parts, read_part
from pipelines.stage import run_stage
from schemas.conversation import Conversation, Drop
from schemas.pipeline_config import EngineConfig, MergeConfig, PipelineConfig
from schemas.source_config import SourceConfig
from tests.conservation import check_rows
from tests.pipelines.test_format_trees import oasst, reply, shown

MESSY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def config_of(
    path: Path, max_record_bytes: int = 1 << 20, part_bytes: int = 4096, **source: Any
) -> PipelineConfig:
    return PipelineConfig(
        run_root=path.parent / "run",
        sources=[SourceConfig(name="s", path=str(path), **source)],
        merge=MergeConfig(part_bytes=part_bytes, max_record_bytes=max_record_bytes),
        engine=EngineConfig(workers=1),
    )


def rows_of(path: Path, **settings_: Any) -> list[tuple[Conversation, Drop | None]]:
    config = config_of(path, **settings_)
    parts = iter_parts(config.sources, config=config, spool_folder=path.parent / "spool")
    return [row for part in parts for row in read_part(part, config)]


def forest(draw: random.Random, num_trees: int, size: int) -> list[dict[str, Any]]:
    """Trees whose messages all have ids, texts and ranks of their own."""
    trees = []
    for tree in range(num_trees):
        nodes = [reply(f"q{tree}", message_id=f"m{tree}.0")]
        for number in range(1, draw.randrange(size)):
            parent = draw.choice(nodes)
            letter = "A" if parent["role"] == "prompter" else "a"
            node = reply(f"{letter}{tree}.{number}", message_id=f"m{tree}.{number}", rank=number)
            parent["replies"].append(node)
            nodes.append(node)
        trees.append({"message_tree_id": f"t{tree}", "tree_state": "ready_for_export", "prompt": nodes[0]})
    return trees


def flat(trees: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As OpenAssistant's export writes its messages: a root has no parent_id."""

    def walk(message: dict[str, Any], **more: Any) -> Iterator[dict[str, Any]]:
        yield {key: value for key, value in message.items() if key != "replies"} | more
        for child in message["replies"]:
            yield from walk(child, **more | {"parent_id": message["message_id"]})

    return [row for tree in trees for row in walk(tree["prompt"], message_tree_id=tree["message_tree_id"])]


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def csv_bytes(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    names = ["message_id", "parent_id", "message_tree_id", "text", "role", "rank", "deleted"]
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([{"parent_id": None, "rank": None} | row for row in rows])


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(table_of(rows), path, row_group_size=7)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "a.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "b.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "c.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "d.parquet": write_parquet,
    "e.arrow": lambda path, rows: write_arrow(path, rows),
}


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    table = table_of(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def told(rows: list[tuple[Conversation, Drop | None]]) -> Counter[str]:
    """What rows say, whatever order their trees stand in."""
    return Counter(
        json.dumps(
            [row.row_id, shown((row.messages, drop)), row.meta.get("id"), row.meta.get("repairs")],
            default=str,
        )
        for row, drop in rows
    )


@pytest.mark.parametrize("tree_paths", ["all", "best"])
@pytest.mark.parametrize("name", WRITERS)
def test_shuffled_rows_are_the_chats_of_the_nested_trees(name: str, tree_paths: str, tmp_path: Path) -> None:
    draw = random.Random(name)
    trees = forest(draw, 40, 9)
    (tmp_path / "trees.jsonl").write_bytes(lines(trees))
    rows = flat(trees)
    draw.shuffle(rows)
    WRITERS[name](tmp_path / name, rows)
    found = rows_of(tmp_path / name, tree_paths=tree_paths)
    assert told(found) == told(rows_of(tmp_path / "trees.jsonl", tree_paths=tree_paths))
    assert {row.meta["format"] for row, _ in found} == {"oasst"}


def test_texts_of_csv_are_rows_too(tmp_path: Path) -> None:
    replies = [reply("A", rank=10, deleted=False), reply("B", rank=9.0), reply("C", rank=0, deleted=True)]
    trees = [oasst(reply("q", *replies, deleted="false"))]
    (tmp_path / "a.csv").write_bytes(csv_bytes(flat(trees)))
    found = rows_of(tmp_path / "a.csv")
    assert [shown((row.messages, drop)) for row, drop in found] == ["q B", "q A"]
    assert found[0][0].meta["repairs"] == {"deleted_messages": 1}


@MESSY
@given(seed=st.integers(0, 10**6), num_files=st.integers(1, 5))
def test_rows_of_a_tree_in_several_files_come_together(
    seed: int, num_files: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, draw = tmp_path_factory.mktemp("files"), random.Random(seed)
    trees = forest(draw, draw.randrange(1, 6), 12)
    rows = flat(trees)
    draw.shuffle(rows)
    names = draw.sample(sorted(WRITERS), num_files)
    (folder / "dump").mkdir()
    for number, name in enumerate(names):
        if rows[number::num_files]:
            WRITERS[name](folder / "dump" / name, rows[number::num_files])
    (folder / "trees.jsonl").write_bytes(lines(trees))
    assert told(rows_of(folder / "dump")) == told(rows_of(folder / "trees.jsonl"))


def damaged(draw: random.Random, rows: list[dict[str, Any]]) -> list[Any]:
    """Rows deleted, lost, doubled, in circles; other records and broken lines between them."""
    damaged_rows: list[Any] = []
    for row in rows:
        fate = draw.randrange(12)
        if fate == 0:
            continue
        damaged_rows.append(row | {"deleted": fate == 1})
        if fate == 2:
            damaged_rows.append(row | {"text": f"again {row['text']}"})
        if fate == 3:
            damaged_rows.append({"prompt": "x", "completion": "y"})
    damaged_rows += [
        {"message_id": f"c{n}", "parent_id": f"c{(n + 1) % 3}", "role": "assistant", "text": f"circle {n}"}
        for n in range(3)
    ]
    draw.shuffle(damaged_rows)
    return damaged_rows


def fates(records: list[dict[str, Any]]) -> Counter[str]:
    """What must become of each record: a plain reading of the rules, in memory."""
    fate: Counter[str] = Counter()
    by_id: dict[str, dict[str, Any]] = {}
    for record in records:
        if "message_id" not in record:
            fate["others"] += 1
        elif record["message_id"] in by_id:
            fate["duplicate_message"] += 1
        else:
            by_id[record["message_id"]] = record
    for row in by_id.values():
        above, seen = [row], {row["message_id"]}
        while (parent := above[-1].get("parent_id")) in by_id and parent not in seen:
            above.append(by_id[parent])
            seen.add(parent)
        if above[-1].get("parent_id"):
            fate["orphan_message"] += 1
        elif any(one.get("deleted") for one in above[1:]):
            fate["behind"] += 1
        else:
            fate["deleted" if row.get("deleted") else "in a chat"] += 1
    return fate


@MESSY
@given(seed=st.integers(0, 10**6))
def test_every_row_is_in_a_chat_or_counted_with_its_reason(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, draw = tmp_path_factory.mktemp("rows") / "a.jsonl", random.Random(seed)
    records = damaged(draw, flat(forest(draw, 5, 10)))
    path.write_bytes(lines(records) + b"{broken\n")
    found: Counter[str] = Counter()
    said: set[tuple[str, ...]] = set()
    for row, drop in rows_of(path, format="auto"):
        repairs = row.meta.get("repairs", {})
        found["deleted"] += repairs.get("deleted_messages", 0)
        found["behind"] += repairs.get("behind_deleted_messages", 0)
        if row.meta.get("format") == "prompt":
            found["others"] += 1
        elif drop is None or drop.reason == "path_adds_no_answer":
            said |= {(row.meta["id"], message.content) for message in row.messages}
        elif drop.reason == "no_messages":
            rows = json.loads(row.meta["raw"])["message_rows"]
            found["deleted"] += 1
            found["behind"] += len(rows) - 1
        else:
            found[drop.reason] += 1
    found["in a chat"] = len(said)
    assert found.pop("invalid_json") == 1
    assert +found == +fates(records)


def test_a_row_that_is_left_out_says_why(tmp_path: Path) -> None:
    rows = [
        *flat([oasst(reply("q", reply("A")))]),
        reply("B", parent_id="lost"),
        reply("q", message_tree_id="t1"),
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    found = [str(drop.detail) for _, drop in rows_of(tmp_path / "a.jsonl") if drop]
    assert found == [
        "no message that a root leads to has the id 'lost', its parent_id",
        "an earlier row of the source has its message_id 'q'",
    ]


def test_a_tree_above_the_limit_of_a_record_is_a_drop_for_each_of_its_rows(tmp_path: Path) -> None:
    trees = [
        oasst(reply("q", *(reply(f"A{n}" + "x" * 100) for n in range(30)))),
        oasst(reply("p", reply("B"))),
    ]
    trees[1]["message_tree_id"] = "t2"
    (tmp_path / "a.jsonl").write_bytes(lines(flat(trees)))
    found = rows_of(tmp_path / "a.jsonl", max_record_bytes=2000)
    assert Counter(drop.reason if drop else "" for _, drop in found) == {"tree_too_large": 31, "": 1}


def test_a_row_between_records_of_another_kind_is_no_text_to_train_on(tmp_path: Path) -> None:
    records = [{"prompt": "x", "completion": "y"}] * 30 + flat([oasst(reply("q", reply("A")))])
    (tmp_path / "a.jsonl").write_bytes(lines(records))
    found = [drop.reason for _, drop in rows_of(tmp_path / "a.jsonl") if drop]
    assert found == ["lone_message"] * 2
    found = [shown((row.messages, drop)) for row, drop in rows_of(tmp_path / "a.jsonl", format="oasst")]
    assert found[30:] == ["q A"]


def test_a_run_over_rows_is_the_same_again_and_counts_every_record(tmp_path: Path) -> None:
    draw = random.Random(5)
    (tmp_path / "dump").mkdir()
    rows = flat(forest(draw, 60, 12))
    draw.shuffle(rows)
    write_parquet(tmp_path / "dump" / "a.parquet", rows[::2])
    (tmp_path / "dump" / "b.jsonl").write_bytes(lines(rows[1::2]))
    (tmp_path / "dump" / "c.jsonl").write_bytes(lines([{"prompt": "x", "completion": "y"}]))
    config = config_of(tmp_path / "dump")
    result = run_stage("merge", config)
    counts, _ = check_rows(tmp_path / "run", ["01_merged"])
    assert counts["01_merged"]["kept"] == result.manifest.num_rows_out > 60
    assert run_stage("merge", config).skipped
    rows[0]["text"] += " more"
    write_parquet(tmp_path / "dump" / "a.parquet", rows[::2])
    assert 0 < run_stage("merge", config).num_parts_run <= 2


def test_init_sees_trees_in_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(flat(forest(random.Random(1), 20, 9))))
    look = look_at(tmp_path / "a.jsonl")
    assert set(look.formats) == {"oasst"}
    assert "lone_message" not in look.drops


PEAK = """
import resource, sys
from pathlib import Path
from tests.pipelines.test_message_rows import rows_of_big_file
print(rows_of_big_file(Path(sys.argv[1]), int(sys.argv[2])), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def rows_of_big_file(path: Path, num_trees: int) -> int:
    """Rows of a tree lie as far apart as can be: all roots, then all first replies, ..."""
    with path.open("w") as file:
        for level in range(5):
            for tree in range(num_trees):
                row = {
                    "message_id": f"{tree}.{level}",
                    "text": f"{tree} " * 200,
                    "message_tree_id": str(tree),
                }
                row |= {"role": "assistant" if level % 2 else "prompter"}
                file.write(json.dumps(row | ({"parent_id": f"{tree}.{level - 1}"} if level else {})) + "\n")
    config = config_of(path, part_bytes=1 << 20)
    parts = list(iter_parts(config.sources, config=config, spool_folder=path.parent / "spool"))
    return sum(part.num_records for part in parts)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    peaks = []
    for num_trees in (2_000, 10_000):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "a.jsonl"), str(num_trees)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        num_found, kib = map(int, result.stdout.split())
        assert num_found == num_trees
        peaks.append(kib / 1024)
    # 40,000 further rows with 50 MB: their links may fill SQLite's cache, their texts are never held.
    assert peaks[1] - peaks[0] < 25, peaks
