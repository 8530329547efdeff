"""Files to rows: every record is a row or a drop, with ids that hang on what was said and not on where it stood."""

import gzip
import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import dedup, merge
from pipelines.executors import close_workers
from pipelines.merge import plan_source, read_part, resolve_ordinals
from pipelines.parse import iso_date, parse_record
from pipelines.part_ranges import PartRange
from pipelines.storage import read_rows, write_drops, write_rows
from schemas.conversation import Conversation, Drop, Message, blake2b_128, content_id, holdout_key, row_id
from schemas.errors import InputError
from schemas.pipeline_config import EngineConfig, MergeConfig, PipelineConfig
from schemas.source_config import SourceConfig

Row = tuple[Conversation, Drop | None]


def config(path: Path | str, *, part_bytes: int = 1 << 20, **source: Any) -> PipelineConfig:
    return PipelineConfig(
        run_root=Path("run"),
        sources=[SourceConfig(**{"name": "src", "path": str(path)} | source)],
        merge=MergeConfig(part_bytes=part_bytes),
    )


def plan(wanted: PipelineConfig, spool: Path) -> list[PartRange]:
    return merge.plan_parts(wanted.sources[0], config=wanted, spool_folder=spool)


def read(wanted: PipelineConfig, spool: Path) -> list[Row]:
    """All rows, ids numbered over the parts of each file as the stage does it, and records too, for people."""
    parts = plan(wanted, spool)
    rows = [list(read_part(part, wanted)) for part in parts]
    for file in {part.file for part in parts}:
        numbers = [n for n, part in enumerate(parts) if part.file == file]
        offsets = resolve_ordinals([[row.row_id for row, _ in rows[n]] for n in numbers])
        for n, offset in zip(numbers, offsets, strict=True):
            if offset:
                rows[n] = list(read_part(parts[n], wanted, ordinal_offsets=offset))
    for n, part in enumerate(parts):
        for row, _ in rows[n]:
            row.record += part.first_record
    return [row for part in rows for row in part]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records))
    return path


def alpaca(question: str, **more: Any) -> dict[str, Any]:
    return {"instruction": question, "input": "", "output": f"answer to {question}"} | more


# Rows -------------------------------------------------------------------------------------------------------


def test_a_row_carries_its_place_its_hash_and_its_ids(tmp_path: Path) -> None:
    raw = '{"id": 7, "model": "gpt-4", "conversations": [{"from": "human", "value": " Hi \\n you"}, {"from": "gpt", "value": "Yo"}], "created_at": "2023-05-10T02:26:06+02:00", "tools": "[]"}'
    (tmp_path / "a.json").write_text(f'[{{"instruction": "x", "output": "y"}}, {raw}]')
    row, drop = read(config(tmp_path / "a.json"), tmp_path)[1]
    messages = [Message("user", " Hi \n you"), Message("assistant", "Yo")]
    assert drop is None
    assert row.messages == messages
    assert (row.source, row.record) == ("src/a.json", 1)
    assert row.row_id == row_id(content_id(messages), "src", "7", 0)
    assert row.meta == {
        "format": "sharegpt",
        "id": "7",
        "record_hash": blake2b_128(raw.encode()),
        "content_id": content_id(messages),
        "holdout_key": holdout_key([Message("user", "Hi you")]),
        "date": "2023-05-10T00:26:06+00:00",
        "model": "gpt-4",
        "tools": "[]",
    }


def test_a_source_may_fix_the_format_the_answers_and_the_side(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [alpaca("x"), {"messages": [{"role": "user", "content": "hi"}]}])
    (first, _), (second, drop) = read(config(path, format="alpaca", answers="html", set="train"), tmp_path)
    assert (first.meta["format"], first.meta["answers"], first.meta["set"]) == ("alpaca", "html", "train")
    assert drop == Drop("unknown_format", "not alpaca; keys: 'messages'")
    assert second.meta["set"] == "train"
    (first, _), (second, drop) = read(config(path), tmp_path)
    assert {"answers", "set"}.isdisjoint(first.meta)
    assert (drop, second.meta["format"]) == (None, "messages")


def test_a_record_may_fix_its_side_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [alpaca("x", set="train"), alpaca("y", set="test"), alpaca("z")])
    assert [row.meta.get("set") for row, _ in read(config(path), tmp_path)] == ["train", None, None]


DROPPED: dict[str, tuple[bytes, str, str]] = {
    "text": (b"{not json", "invalid_json", "char 1"),
    "two objects": (b'{"a": 1} {"b": 2}', "invalid_json", "char 9"),
    "number": (b"17", "not_an_object", "int"),
    "array": (b'["a"]', "not_an_object", "list"),
    "null": (b"null", "not_an_object", "NoneType"),
    "other keys": (json.dumps({f"k{n}": n for n in range(20)}).encode(), "unknown_format", "'k9'"),
    "no turns": (b'{"conversations": []}', "no_messages", "sharegpt"),
    "role": (b'{"messages": [{"role": "x", "content": ""}]}', "unknown_role", "'x'"),
    "bad bytes": (b'{"instruction": "\xff\xfe", "output": "b"}', "invalid_utf8", "byte 17"),
    "control": (b'{"instruction": "\x01", "output": "b"}', "invalid_json", "char 17"),
    "deep": (b'{"a":' * 2000 + b"1" + b"}" * 2000, "invalid_json", "1,024"),
    "deep and in need of repair": (b'{"a":NaN,"b":' * 990 + b"1" + b"}" * 990, "invalid_json", ""),
    "truncated": (b'{"instruction": "a", "out', "truncated_file", "byte "),
    "large": (b'{"instruction": "' + b"x" * 70_000 + b'", "output": "b"}', "record_too_large", "66000"),
}


def test_a_record_that_can_not_be_read_is_a_drop_with_its_first_bytes(tmp_path: Path) -> None:
    good = [json.dumps(alpaca(str(n))).encode() for n in range(len(DROPPED))]
    lines = [line for n, (raw, _, _) in enumerate(DROPPED.values()) for line in (good[n], raw)]
    lines[-3:] = [lines[-1], lines[-2], lines[-3]]  # what is cut off stands last
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    wanted = config(tmp_path / "a.jsonl").model_copy(update={"merge": MergeConfig(max_record_bytes=66_000)})
    rows = read(wanted, tmp_path)
    assert [row.record for row, _ in rows] == list(range(len(lines)))
    found = {line: (row, drop) for line, (row, drop) in zip(lines, rows, strict=True)}
    assert all(found[line][1] is None for line in good)
    for name, (raw, reason, detail) in DROPPED.items():
        row, drop = found[raw]
        assert drop is not None, name
        assert (drop.reason, row.messages) == (reason, []), name
        assert detail in drop.detail, name
        assert row.meta["raw"] == raw[: 64 << 10].decode("utf-8", "replace"), name
        assert row.meta["content_id"] == row.meta["record_hash"] == blake2b_128(raw), name
    assert len({row.row_id for row, _ in rows}) == len(rows)


def test_rows_and_drops_can_be_written_and_read_back(tmp_path: Path) -> None:
    lines = [
        b'{"instruction": "\\ud800 \\ud83d\\ude00 \\u0000", "output": "b"}',
        *(raw for raw, _, _ in DROPPED.values()),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = read(config(tmp_path / "a.jsonl"), tmp_path)
    kept = [row for row, drop in rows if drop is None]
    dropped = [(row, drop) for row, drop in rows if drop is not None]
    assert write_rows(tmp_path / "kept.parquet", kept) + write_drops(
        tmp_path / "dropped.parquet", dropped, stage="merge"
    ) == len(lines)
    assert list(read_rows(tmp_path / "kept.parquet")) == kept


def test_lone_surrogates_become_replacement_characters_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(
        b'[{"instruction": "\\ud800x\\udfff \\ud83d\\ude00 \\u0000 \\ufffd", "output": "NaN", "score": NaN}]'
    )
    ((row, drop),) = read(config(tmp_path / "a.json"), tmp_path)
    assert drop is None
    assert row.messages[0].content == "\ufffdx\ufffd \N{GRINNING FACE} \0 \ufffd"
    assert row.meta["repairs"] == {"lone_surrogates": 2}


def test_utf_16_with_a_lone_surrogate_is_repaired_too(tmp_path: Path) -> None:
    text = json.dumps([alpaca("a\ud800b")], ensure_ascii=False)
    (tmp_path / "a.json").write_bytes(text.encode("utf-16", "surrogatepass"))
    ((row, drop),) = read(config(tmp_path / "a.json"), tmp_path)
    assert drop is None
    assert row.messages[0].content == "a\ufffdb"
    assert row.meta["repairs"] == {"lone_surrogates": 2}  # in the question, and in the answer that repeats it


def test_parquet_rows_are_read_as_records(tmp_path: Path) -> None:
    chats = [
        {"id": n, "messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": None}]}
        for n in range(9)
    ]
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "a.parquet", row_group_size=4)
    rows = read(config(tmp_path / "a.parquet", part_bytes=1), tmp_path)
    assert [(row.record, row.meta["id"], row.messages[0].content, drop) for row, drop in rows] == [
        (n, str(n), f"q{n}", None) for n in range(9)
    ]


# Ids --------------------------------------------------------------------------------------------------------


def ids(rows: list[Row]) -> list[str]:
    return [row.row_id for row, _ in rows]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.integers(1, 400))
def test_equal_records_have_the_same_ids_in_whatever_parts_they_lie(
    tmp_path_factory: pytest.TempPathFactory, letters: list[str], part_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("ids")
    draw = random.Random(len(letters))
    records = [alpaca(letter, note=draw.random()) for letter in letters]  # equal chats, other bytes
    path = write(folder / "a.json", records)
    found = ids(read(config(path, part_bytes=part_bytes), folder))
    assert found == ids(read(config(path, part_bytes=1 << 20), folder))
    assert len(set(found)) == len(found)
    seen: Counter[str] = Counter()
    for letter, found_id in zip(letters, found, strict=True):
        base = row_id(
            content_id([Message("user", letter), Message("assistant", f"answer to {letter}")]), "src", "", 0
        )
        assert found_id == merge.nth_row_id(base, seen[letter])
        seen[letter] += 1


def test_parts_without_earlier_equals_need_no_second_reading() -> None:
    first, again = "a" * 32, merge.nth_row_id("a" * 32, 1)
    assert resolve_ordinals([[first, again, "b"], ["c"], ["d", first], ["b", first]]) == [
        {},
        {},
        {first: 2},
        {first: 3, "b": 1},
    ]
    assert resolve_ordinals([[first, again], [first, again], [again, first]]) == [{}, {first: 2}, {first: 4}]
    assert resolve_ordinals([]) == []


def test_ids_survive_a_moved_file_another_layout_and_new_neighbours(tmp_path: Path) -> None:
    records = [alpaca(f"q{n}", id=f"n{n % 7}") for n in range(30)]
    before = ids(read(config(write(tmp_path / "a.json", records)), tmp_path))
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps(record, indent=None) for record in reversed(records))
    )
    assert ids(read(config(tmp_path / "b.jsonl"), tmp_path)) == before[::-1]
    grown = [alpaca("new"), *records[:10], alpaca("newer"), *records[10:]]
    assert set(before) < set(ids(read(config(write(tmp_path / "c.json", grown)), tmp_path)))
    assert set(before).isdisjoint(ids(read(config(tmp_path / "a.json", name="other"), tmp_path)))


def test_of_versions_under_one_id_the_longer_stays_and_others_stay_beside_it(tmp_path: Path) -> None:
    def version(*turns: str) -> dict[str, Any]:
        said = [{"from": ("human", "gpt")[n % 2], "value": turn} for n, turn in enumerate(turns)]
        return {"id": "one", "conversations": said}

    short = version("Where is the harbour?", "Behind the old mill, on the left.")
    longer = version(
        "Where is the harbour?", "Behind the old mill, on the left.", "And the mill?", "By the river."
    )
    other = version("Where is the harbour?", "Ask somebody who has been there, I have not.")
    (tmp_path / "new.json").write_text(json.dumps([longer, other]))
    path = write(tmp_path / "a.json", [short])
    rows = [row for row, _ in [*read(config(path), tmp_path), *read(config(tmp_path / "new.json"), tmp_path)]]
    assert {row.meta["id"] for row in rows} == {"one"}
    settings = config(path)
    verdicts = dedup.decide(dedup.features(rows, settings), settings).verdicts.to_pylist()
    assert [(v["row_id"], v["reason"], v["survivor"]) for v in verdicts] == [
        (rows[0].row_id, "branch_of_longer", rows[1].row_id)
    ]


def test_the_size_of_parts_changes_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    texts = [json.dumps(alpaca(f"q{n % 40}", id=n % 3)) for n in range(200)]
    texts[50], texts[120] = '{"instruction": "x"y"}', "[1, 2]"
    path.write_text("[" + ",\n".join(texts))
    whole = read(config(path), tmp_path)
    assert Counter(drop.reason for _, drop in whole if drop) == {
        "invalid_json": 1,
        "not_an_object": 1,
        "truncated_file": 1,
    }
    assert read(config(path, part_bytes=700), tmp_path) == whole


# Sources ----------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_its_names_and_what_is_unknown_is_noted(tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    (folder / "sub").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for name in ("b.json", "sub/a.jsonl", "a.JSON", "c.ndjson", ".cache/x.json"):
        (folder / name).write_text(json.dumps(alpaca(name)))
    (folder / "z.json.gz").write_bytes(gzip.compress(json.dumps([alpaca("z")]).encode()))
    (folder / "empty.json").write_text("[]")
    (folder / "README.md").write_text("hello")
    wanted = config(folder)
    found = plan_source(wanted.sources[0], config=wanted, spool_folder=tmp_path / "spool")
    assert [part.file for part in found.parts] == ["a.JSON", "b.json", "c.ndjson", "sub/a.jsonl", "z.json.gz"]
    assert found.notes == [
        "source src: ignored 1 files, such as README.md",
        "source src: empty.json holds no records",
    ]
    assert found.parts[-1].path.startswith(str(tmp_path / "spool"))
    assert {row.source for row, _ in read(wanted, tmp_path / "spool")} >= {"src/sub/a.jsonl", "src/z.json.gz"}


def test_files_are_planned_by_workers_as_they_are_by_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    folder.mkdir()
    line = json.dumps(alpaca("x" * 40_000)).encode() + b"\n"
    for name in ("b.jsonl", "d.jsonl"):  # enough to be worth the start of workers
        (folder / name).write_bytes(name.encode() + b"\n" + line * 220)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(line * 30))
    (folder / "c.csv").write_text("instruction,output\nx,y\n")
    (folder / "e.json").write_text("[]")
    alone, shared = (
        config(folder).model_copy(update={"engine": EngineConfig(workers=workers)}) for workers in (1, 2)
    )
    try:
        plans = [
            plan_source(wanted.sources[0], config=wanted, spool_folder=tmp_path / "spool")
            for wanted in (alone, shared)
        ]
        assert plans[0] == plans[1]
        assert {part.file for part in plans[1].parts} == {"a.jsonl.gz", "b.jsonl", "c.csv", "d.jsonl"}
        assert plans[1].notes == ["source src: e.json holds no records"]
        for name, size in (
            ("c.json", 1000),
            ("aa.json", 9),
        ):  # the larger is planned first, the first one is told
            (folder / name).write_bytes(b"%PDF".ljust(size))
        for wanted in (alone, shared):
            with pytest.raises(InputError, match=r"aa\.json holds a PDF"):
                plan(wanted, tmp_path / "spool")
    finally:
        close_workers()


def test_a_glob_names_files_from_where_its_wildcards_begin(tmp_path: Path) -> None:
    (tmp_path / "x" / "2024").mkdir(parents=True)
    for name in ("x/2024/a.json", "x/2024/b.jsonl", "x/c.json"):
        (tmp_path / name).write_text(json.dumps(alpaca(name)))
    for pattern, files in (("x/**/*.json", ["2024/a.json", "c.json"]), ("x/2024/*", ["a.json", "b.jsonl"])):
        assert [part.file for part in plan(config(tmp_path / pattern), tmp_path)] == files


def test_a_named_file_needs_no_known_suffix(tmp_path: Path) -> None:
    (tmp_path / "dump.txt").write_text(json.dumps([alpaca("x")]))
    assert len(read(config(tmp_path / "dump.txt"), tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.json", r"source src: found nothing at .*absent\.json"),
        ("absent/*.json", r"source src: found nothing at"),
        ("other", r"source src: found 1 files of other kinds at .*other, expected files \.json"),
        ("empty.json", r"source src has no records: 1 empty files at .*empty\.json"),
    ],
)
def test_a_source_with_nothing_in_it_is_refused_by_name_and_path(
    tmp_path: Path, path: str, message: str
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("x")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(InputError, match=message):
        plan(config(tmp_path / path), tmp_path)


def test_a_relative_path_is_taken_from_the_folder_given(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [alpaca("x")])
    wanted = config(Path("a.json"))
    parts = merge.plan_parts(wanted.sources[0], config=wanted, spool_folder=tmp_path, base_folder=tmp_path)
    assert [part.path for part in parts] == [str(tmp_path / "a.json")]


# Parsing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1708776632.911129, "2024-02-24T12:10:32+00:00"),
        (1708776632, "2024-02-24T12:10:32+00:00"),
        (1708776632911, "2024-02-24T12:10:32+00:00"),
        ("1708776632.9", "2024-02-24T12:10:32+00:00"),
        ("2018-05-10T00:26:06Z", "2018-05-10T00:26:06+00:00"),
        ("2018-05-10T00:26:06.1234567+0530", "2018-05-09T18:56:06+00:00"),
        ("2018-05-10 00:26", "2018-05-10T00:26:00+00:00"),
        (" 2018-05-10", "2018-05-10T00:00:00+00:00"),
        ("2018-13-10", None),
        ("10/05/2018", None),
        ("20180510", None),
        ("", None),
        (5, None),
        (-1.0, None),
        (True, None),
        (float("nan"), None),
        (1e300, None),
        ("0001-01-01T00:00:00+23:59", None),
        (None, None),
        ([1], None),
    ],
)
def test_dates_are_iso_in_utc_or_nothing(value: Any, expected: str | None) -> None:
    assert iso_date(value) == expected


@given(st.binary(max_size=40))
def test_any_bytes_are_an_object_or_a_drop(raw: bytes) -> None:
    parsed = parse_record(raw)
    assert isinstance(parsed, Drop) or isinstance(parsed[0], dict)


LONE_SURROGATE = re.compile("[\ud800-\udfff]")
ANY_TEXT = st.text(st.characters())


def repaired(value: Any) -> Any:
    """What json.loads gives (it joins halves that stand together), lone halves and NaN taken out."""
    if isinstance(value, str):
        return LONE_SURROGATE.sub("\ufffd", value)
    return value if not isinstance(value, float) or math.isfinite(value) else None


@given(st.dictionaries(ANY_TEXT, st.one_of(ANY_TEXT, st.floats(), st.integers(-(2**63), 2**63 - 1))))
def test_what_json_writes_is_parsed_with_lone_surrogates_repaired_and_counted(record: dict[str, Any]) -> None:
    written = json.dumps(record)
    parsed = parse_record(written.encode())
    assert not isinstance(parsed, Drop)
    found = json.loads(written)
    assert parsed[0] == {repaired(key): repaired(value) for key, value in found.items()}
    texts = [text for pair in found.items() for text in pair if isinstance(text, str)]
    assert parsed[1] == sum(len(LONE_SURROGATE.findall(text)) for text in texts)


@pytest.mark.real_data
def test_published_shapes_are_read(real_data: Path, tmp_path: Path) -> None:
    rows = read(config(real_data / "sharegpt_shapes"), tmp_path)
    formats = Counter((row.source, row.meta.get("format")) for row, drop in rows)
    assert formats == {
        ("src/baiduzhidao-train-sample.jsonl", "alpaca"): 28,
        ("src/common_en_sample_230805.json", "sharegpt"): 5,
        ("src/common_zh_sample_230805.json", "sharegpt"): 5,
        ("src/gpt4_final_data_sample_230629.json", "sharegpt"): 1,
        ("src/openai_export.json", "chatgpt"): 5,
        ("src/vicuna_sample_230629.json", "sharegpt"): 11,
    }


@pytest.mark.real_data
def test_published_conversations_keep_every_turn(real_data: Path, tmp_path: Path) -> None:
    expected = json.loads(gzip.decompress((real_data / "sharegpt_html.json.gz").read_bytes()))
    rows = read(config(real_data / "sharegpt_html.json.gz", part_bytes=300_000), tmp_path)
    assert [[m.content for m in row.messages] for row, _ in rows] == [
        [turn["value"] for turn in record["conversations"]] for record in expected
    ]
    assert [row.meta["id"] for row, _ in rows] == [record["id"] for record in expected]
