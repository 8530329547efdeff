"""Every kind of source in one run through all stages: each record accounted for, the same bytes from two workers."""

import csv
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.conservation import check_run_root, rows_with_records
from tests.integration import toy
from tests.integration.test_etl import run_well, stage_digests

pytestmark = pytest.mark.slow

CONFIG = """
run_root: {run_root}
sources:
  - {{name: me, identity: {{name: Ada, maker: Lovelace & Co, languages: [en, de, zh, ja]}}}}
  - {{name: export, path: export.zip}}
  - {{name: trees, path: trees.jsonl}}
  - {{name: table, path: table.csv, encoding: cp1252}}
  - {{name: talks, path: talks.json, assistant_side: second}}
  - {{name: papers, path: papers, format: text}}
  - {{name: odd, path: odd.jsonl, format: custom, fields: {{prompt: [a.q], answer: a.b, id: nr}}}}
  - {{name: capped, path: capped.json}}
merge: {{part_bytes: 20000}}
dedup: {{caps: {{capped: 30}}}}
holdout: {{validation: 0.1, test: 0.1}}
split: {{max_tokens: 512}}
model: {{path: model}}
engine: {{workers: 1, min_free_gib: 0.1}}
"""


def reply(text: str, *replies: Any) -> dict[str, Any]:
    return {"text": text, "role": "assistant" if text[0] == "A" else "prompter", "replies": list(replies)}


def export(number: int) -> dict[str, Any]:
    """A chat whose first question was edited: two branches, two first user turns."""
    says = {
        "u1": ("user", "root", f"What is the river number {number}?"),
        "u2": ("user", "root", f"Name the river number {number} and its bridges, please."),
        "a1": ("assistant", "u1", f"The river number {number} is the long one near the silver mountain."),
        "a2": ("assistant", "u2", f"The river number {number} has three bridges, says the market letter."),
    }
    mapping: dict[str, Any] = {"root": {"message": None, "parent": None, "children": ["u1", "u2"]}}
    for key, (role, parent, text) in says.items():
        message = {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}}
        children = [child for child, (_, above, _) in says.items() if above == key]
        mapping[key] = {"message": message, "parent": parent, "children": children}
    return {"conversation_id": f"c{number}", "mapping": mapping, "current_node": "a2"}


def write_sources(folder: Path) -> None:
    with zipfile.ZipFile(folder / "export.zip", "w") as archive:
        archive.writestr("conversations.json", json.dumps([export(n) for n in range(40)]))
        archive.writestr("chat.html", "<p>")
    trees = [
        {"prompt": reply(f"q{n}: why is the candle {n}?", reply(f"A{n} burns", reply(f"and {n}?", reply(f"A{n} too")), reply(f"so {n}?", reply(f"A{n} so"))))}
        for n in range(20)
    ]  # fmt: skip
    (folder / "trees.jsonl").write_text("\n".join(map(json.dumps, trees)))
    with (folder / "table.csv").open("w", encoding="cp1252", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer"])
        writer.writerows(
            [f"Wer fährt über Brücke {n}?", f"Fräulein “{n}” fährt über die Brücke, dann nach Köln."]
            for n in range(30)
        )
        file.write("broken\n")
    talks = {
        f"t{n}": {
            "messages": [{"sender": "a", "text": f"hi {n} there"}, {"sender": "b", "text": f"ho {n} you"}]
        }
        for n in range(25)
    }
    (folder / "talks.json").write_text(json.dumps(talks))
    (folder / "papers").mkdir()
    for n in range(5):
        sections = "".join(
            f"# Section {n}.{k}\n\n{f'The engine {n} {k} answers the harbour. ' * 30}\n\n" for k in range(6)
        )
        (folder / "papers" / f"p{n}.md").write_text(sections)
    odd = [
        {"nr": n, "a": {"q": f"What follows the window {n}?", "b": f"The garden {n * 7}."}} for n in range(20)
    ]
    (folder / "odd.jsonl").write_text("\n".join(map(json.dumps, odd)) + '\n{"nr": 99}\n')
    (folder / "capped.json").write_text(json.dumps(toy.alpaca_records(100)))
    toy.write_tokenizer(folder / "model")


@pytest.fixture(scope="module")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    (folder / "run.yaml").write_text(CONFIG.format(run_root="run"))
    run_well(folder / "run.yaml")
    return folder / "run"


def column(folder: Path, pattern: str, name: str) -> list[Any]:
    return [
        value for path in sorted(folder.rglob(pattern)) for value in pq.read_table(path)[name].to_pylist()
    ]


def test_every_record_of_every_source_is_accounted_for(run_root: Path) -> None:
    counts = check_run_root(run_root)
    assert counts["01_merged"]["pieces_cut"] == 40 + 20
    dropped = Counter(column(run_root / "01_merged", "dropped-*.parquet", "reason"))
    assert dropped == {"invalid_csv": 1, "missing_field": 1}
    kept = Counter(
        source.split("/")[0] for source in column(run_root / "01_merged", "part-*.parquet", "source")
    )
    assert kept.pop("me") > 200
    assert kept == {
        "export": 80,
        "trees": 40,
        "table": 30,
        "talks": 25,
        "papers": 5,
        "odd": 20,
        "capped": 100,
    }


def test_a_cap_is_kept_after_dedup(run_root: Path) -> None:
    sources = Counter(
        s.split("/")[0] for s in column(run_root / "04_deduplicated", "part-*.parquet", "source")
    )
    assert sources["capped"] == 30
    reasons = Counter(column(run_root / "04_deduplicated", "dropped-*.parquet", "reason"))
    merged = dict(
        zip(
            *(column(run_root / "01_merged", "part-*.parquet", name) for name in ("row_id", "source")),
            strict=True,
        )
    )
    assert reasons["over_cap"] > 20
    left = sorted(
        row
        for row in column(run_root / "04_deduplicated", "*.parquet", "row_id")
        if merged[row].startswith("capped")
    )
    near = set(column(run_root / "04_deduplicated", "dropped-*.parquet", "row_id"))
    kept = sorted(set(left) - near)
    over = [
        row
        for row, reason in zip(
            *(column(run_root / "04_deduplicated", "dropped-*.parquet", n) for n in ("row_id", "reason")),
            strict=True,
        )
        if reason == "over_cap"
    ]
    assert max(kept) < min(over)


def test_identity_rows_are_all_trained_and_none_is_held_out_or_dropped(run_root: Path) -> None:
    merged = [s for s in column(run_root / "01_merged", "part-*.parquet", "source") if s.startswith("me/")]
    train = [
        s
        for s in column(run_root / "05_held_out" / "train", "part-*.parquet", "source")
        if s.startswith("me/")
    ]
    assert len(train) == len(merged)


def test_the_branches_of_one_chat_are_on_one_side(run_root: Path) -> None:
    sides: dict[int, set[str]] = {}
    ids = {
        side: set(column(run_root / "05_held_out" / side, "part-*.parquet", "row_id"))
        for side in ("train", "validation", "test")
    }
    for row in rows_with_records(run_root / "01_merged", "row_id", "source", "record"):
        found = {side for side in ids if row["row_id"] in ids[side]}
        if found and row["source"].startswith("export/"):
            sides.setdefault(row["record"], set()).update(found)
    assert len(sides) == 40
    assert all(len(found) == 1 for found in sides.values())
    assert {side for found in sides.values() for side in found} == {"train", "validation", "test"}


def test_two_workers_write_the_same_bytes(run_root: Path) -> None:
    config = run_root.parent / "two.yaml"
    config.write_text(CONFIG.format(run_root="two"))
    run_well(config, "engine.workers=2")
    assert stage_digests(run_root.parent / "two", "merge") == stage_digests(run_root, "merge")
