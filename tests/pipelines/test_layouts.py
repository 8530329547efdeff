"""Zip, CSV, Arrow, objects of records, documents, declared encodings: the same records, and nothing lost in silence."""

import csv
import gzip
import io
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines import archives, arrow_batches
from pipelines.containers import plan_file, read_range
from pipelines.merge import plan_source, read_part
from pipelines.part_ranges import PartRange
from schemas.conversation import Conversation, Drop
from schemas.errors import InputError
from schemas.pipeline_config import MergeConfig, PipelineConfig
from schemas.source_config import BenchmarkConfig, SourceConfig
from tests.pipelines.test_containers import drops, plan, read, values

RECORDS = [
    {"instruction": f'Grüße, 你好 {n}\n"quoted"; it, is\t|', "input": "", "output": f"line\r\n{n}"}
    for n in range(60)
]


def csv_text(records: list[dict[str, str]], delimiter: str = ",") -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write_arrow(path: Path, *, as_stream: bool = False, compression: str | None = None) -> None:
    table = pa.Table.from_pylist(RECORDS)
    new: Any = pa.ipc.new_stream if as_stream else pa.ipc.new_file
    with new(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=7)


def write_zip(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), data)


def keyed(indent: int | None = None) -> bytes:
    return json.dumps({f"key {n}": record for n, record in enumerate(RECORDS)}, indent=indent).encode()


KINDS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "csv": ("a.csv", lambda path: path.write_bytes(csv_text(RECORDS).encode())),
    "csv with a byte order mark": ("a.csv", lambda path: path.write_bytes(csv_text(RECORDS).encode("utf-8-sig"))),
    "csv in utf-16": ("a.csv", lambda path: path.write_bytes(csv_text(RECORDS).encode("utf-16"))),
    "semicolons": ("a.csv", lambda path: path.write_bytes(csv_text(RECORDS, ";").encode())),
    "tabs": ("a.tsv", lambda path: path.write_bytes(csv_text(RECORDS, "\t").encode())),
    "csv in gzip": ("a.csv.gz", lambda path: path.write_bytes(gzip.compress(csv_text(RECORDS).encode()))),
    "json that is named csv": ("a.csv", lambda path: path.write_text(json.dumps(RECORDS))),
    "arrow file": ("a.arrow", write_arrow),
    "arrow stream": ("a.arrow", lambda path: write_arrow(path, as_stream=True)),
    "arrow, compressed": ("a.bin", lambda path: write_arrow(path, compression="zstd")),
    "zip": ("a.zip", lambda path: write_zip(path, a_json=json.dumps(RECORDS).encode())),
    "zip of csv": ("a.zip", lambda path: write_zip(path, b__a_csv=csv_text(RECORDS).encode())),
    "zip of zstd": ("a", lambda path: write_zip(path, a_json_zst=zstandard.compress(json.dumps(RECORDS).encode()))),
    "json in utf-16 without a mark": ("a.json", lambda path: path.write_bytes(json.dumps(RECORDS).encode("utf-16-le"))),
    "lines in utf-16 without a mark": (
        "a.json",
        lambda path: path.write_bytes("\n".join(map(json.dumps, RECORDS)).encode("utf-16-be")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    name, write = KINDS[kind]
    write(tmp_path / name)
    for part_bytes in (1, 1000, 1 << 20):
        parts: list[PartRange] = plan(tmp_path / name, part_bytes=part_bytes)
        assert values(parts) == RECORDS
        assert drops(parts) == []


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_of_records_gives_its_records_with_their_keys_as_ids(
    tmp_path: Path, indent: int | None
) -> None:
    (tmp_path / "a.json").write_bytes(keyed(indent))
    expected = [{"id": f"key {n}"} | record for n, record in enumerate(RECORDS)]
    for part_bytes in (1, 1 << 20):
        assert values(plan(tmp_path / "a.json", part_bytes=part_bytes)) == expected
    large = {f"a long key {n}": {"n": n} for n in range(60_000)}  # the first megabyte ends inside a key
    (tmp_path / "large.json").write_text(json.dumps(large))
    assert values(plan(tmp_path / "large.json")) == [{"id": key} | value for key, value in large.items()]
    (tmp_path / "b.json").write_text('{"a": {"id": 7, "x": 1}, "b": {}}')
    assert values(plan(tmp_path / "b.json")) == [{"id": 7, "x": 1}, {"id": "b"}]


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": {"a": 1}, "chosen": {"b": 2}}',
        '{"a": {"b": 1}, "c": {"d": 2}}\n{"a": {"b": 1}, "c": {"d": 2}}',
        '{"a": {"b": 1}, "c": 2}',
        '{"a": {"b": 1}}',
    ],
)
def test_one_record_that_holds_objects_is_no_object_of_records(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert values(plan(tmp_path / "a.json")) == [json.loads(line) for line in text.splitlines()]
    source = SourceConfig(name="s", path="x", container="json")
    (tmp_path / "b.json").write_bytes(keyed())
    assert len(values(plan(tmp_path / "b.json", source=source))) == 1


# Broken -----------------------------------------------------------------------------------------------------


def test_a_csv_row_with_other_fields_is_a_drop_and_its_lines_are_tried_again(tmp_path: Path) -> None:
    text = 'prompt,completion\na,b\nc\nd,"e\nf,g\nh,i"\nj,k\n"l,m\nn,o\n'
    (tmp_path / "a.csv").write_text(text)
    records = read(plan(tmp_path / "a.csv"))
    assert [json.loads(r.raw) for r in records if not r.reason] == [
        {"prompt": "a", "completion": "b"},
        {"prompt": "d", "completion": "e\nf,g\nh,i"},
        {"prompt": "j", "completion": "k"},
        {"prompt": "n", "completion": "o"},
    ]
    broken = [r for r in records if r.reason]
    assert [(r.reason, json.loads(r.raw)[:3]) for r in broken] == [
        ("invalid_csv", "c\n"),
        ("invalid_csv", '"l,'),
    ]
    assert "line 3: 1 fields, the first row names 2" in broken[0].detail


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from('ab",\n\r;\0é'), max_size=60), st.integers(20, 200))
def test_every_line_of_any_csv_is_in_a_record_or_a_drop(
    tmp_path: Path, body: str, max_record_bytes: int
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(("p,q\n" + body).encode())
    found = read(plan(path, max_record_bytes=max_record_bytes))
    shown = "".join(record.raw.decode() for record in found)
    for letter in "ab":
        assert shown.count(letter) >= body.count(letter) or any(r.reason == "record_too_large" for r in found)


NAMED = SourceConfig(name="s", path="x", columns=["instruction", "input", "output"])


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_csv_without_names_is_read_by_columns(delimiter: str, encoding: str, tmp_path: Path) -> None:
    body = csv_text(RECORDS, delimiter).partition("\n")[2]
    (tmp_path / "a.csv").write_bytes(body.encode(encoding))
    assert values(plan(tmp_path / "a.csv", source=NAMED)) == RECORDS
    (tmp_path / "a.csv").write_bytes(csv_text(RECORDS, delimiter).encode(encoding))
    assert values(plan(tmp_path / "a.csv", source=NAMED)) == RECORDS, "a first row of names is one"


def test_columns_find_the_delimiter_that_is_rarer_in_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a, b, c, d;e, f;g\n\nh;i;j\nk;l\ninstruction;input;output\n")
    records = read(plan(tmp_path / "a.csv", source=NAMED))
    assert [list(json.loads(r.raw).values()) for r in records if not r.reason] == [
        ["a, b, c, d", "e, f", "g"],
        ["h", "i", "j"],
        ["instruction", "input", "output"],
    ]
    assert [r.detail for r in records if r.reason] == ["line 4: 2 fields, columns names 3"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=12))
def test_what_a_csv_writer_writes_is_read_by_columns(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    (tmp_path / "a.csv").write_bytes(text.getvalue().encode())
    source = SourceConfig(name="s", path="x", columns=["left", "right"], container="csv")
    assert [(r["left"], r["right"]) for r in values(plan(tmp_path / "a.csv", source=source))] == rows


def test_quoted_names_behind_a_byte_order_mark_are_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('"prompt","completion"\na,b\n'.encode("utf-8-sig"))
    assert values(plan(tmp_path / "a.csv")) == [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize(
    ("settings_", "told"),
    [
        ({"columns": ["a", "a"]}, "name each column once"),
        ({"columns": ["a", " "]}, "none of them empty"),
        ({"columns": ["a"], "container": "json"}, "container is json"),
    ],
)
def test_columns_that_make_no_sense_are_refused(settings_: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        SourceConfig(name="s", path="x", **settings_)
    with pytest.raises(ValidationError, match=told):
        BenchmarkConfig(name="s", path="x", question=["a"], **settings_)


def test_a_csv_row_without_end_is_too_large_and_the_next_rows_are_read(tmp_path: Path) -> None:
    rows = ['"' + "x" * 50 + "\n" * 100, *(f"a{n},b\n" for n in range(50)), "x" * 5000 + "\n", "c,d\n"]
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "".join(rows))
    records = read(plan(tmp_path / "a.csv", max_record_bytes=300))
    assert [record.reason for record in records].count("record_too_large") == 2
    assert json.loads(records[-1].raw) == {"prompt": "c", "completion": "d"}


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_cut_arrow_file_gives_what_could_be_read_and_one_drop(tmp_path: Path, as_stream: bool) -> None:
    write_arrow(tmp_path / "whole", as_stream=as_stream)
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data[: len(data) // 2])
    parts = plan(tmp_path / "a.arrow")
    assert drops(parts) == ["truncated_file"]
    assert values(parts) == RECORDS[: len(values(parts))]
    assert not as_stream or len(values(parts)) > 20


def bad_text() -> pa.Array:
    """Texts, one of them no UTF-8, as other writers leave them."""
    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 3, raw.buffers())


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_text_that_is_no_utf_8_drops_its_row_alone(tmp_path: Path, kind: str) -> None:
    table = pa.table({"prompt": bad_text(), "completion": ["a", "b", "c"]})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    assert [value["prompt"] for value in values(plan(path))] == ["good", "fine"]
    assert drops(plan(path)) == ["invalid_utf8"]


@pytest.mark.parametrize("size", [3, 200, -30])
def test_a_cut_zip_is_one_drop(tmp_path: Path, size: int) -> None:
    write_zip(tmp_path / "whole.zip", a_json=json.dumps(RECORDS).encode())
    data = (tmp_path / "whole.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data[:size])
    if size > 3:
        assert drops(plan(tmp_path / "a.zip")) == ["invalid_zip"]
    elif size == 3:  # not even known as a zip
        assert len(read(plan(tmp_path / "a.zip"))) == 1


def test_a_zip_member_with_broken_data_is_told_by_a_drop(tmp_path: Path) -> None:
    draw = random.Random(0)
    lines = "".join(json.dumps({"a": draw.random()}) + "\n" for _ in range(20_000)).encode()
    write_zip(tmp_path / "a.zip", a_jsonl=lines)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "a.zip").write_bytes(bytes(data))
    parts = plan(tmp_path / "a.zip")
    assert drops(parts)[-1] == "truncated_file"
    assert [record.raw for record in read(parts)[:100]] == lines.splitlines()[:100]


def test_an_object_of_records_that_breaks_off_gives_what_came_before_and_a_drop(tmp_path: Path) -> None:
    for cut, end in ((b"", -200), (b'"z": 5, ', -1), (b", !", -1)):
        data = keyed()
        (tmp_path / "a.json").write_bytes(data[:end] + cut)
        source = SourceConfig(name="s", path="x", container="keyed")
        parts = plan(tmp_path / "a.json", source=source)
        assert len(values(parts)) >= len(RECORDS) - 3
        assert "truncated_file" in drops(parts)


# Hostile ----------------------------------------------------------------------------------------------------


def test_a_zip_bomb_is_refused_also_when_it_is_spread_over_its_files(tmp_path: Path) -> None:
    write_zip(tmp_path / "one.zip", a_json=bytes(80 << 20))
    write_zip(tmp_path / "many.zip", **{f"a{n}_json": bytes(9 << 20) for n in range(9)})
    for name in ("one.zip", "many.zip"):
        with pytest.raises(InputError, match=r"merge\.max_decompressed_ratio"):
            plan(tmp_path / name, max_decompressed_ratio=2)


def test_a_csv_whose_names_repeat_into_gigabytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x" * 100_000 + ",y\n" + "1,2\n" * 2000)
    with pytest.raises(InputError, match="bomb"):
        plan(tmp_path / "a.csv", max_decompressed_ratio=2)


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("as_dictionary", [False, True])
def test_an_arrow_batch_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_stream: bool, compression: str, as_dictionary: bool
) -> None:
    text = pa.array(["x" * 3_000_000])
    column = text.dictionary_encode() if as_dictionary else text
    data = pa.table({"text": column})
    new: Any = pa.ipc.new_stream if as_stream else pa.ipc.new_file
    path = tmp_path / "a.arrow"
    with new(path, data.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(data)
    assert path.stat().st_size < 100_000
    assert len(values(plan(path))) == 1
    monkeypatch.setattr(arrow_batches, "MAX_BATCH_BYTES", 2_900_000)
    with pytest.raises(InputError, match="at most 2900000 are read at once"):
        plan(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_arrow_with_any_byte_changed_is_read_or_dropped(
    tmp_path: Path, changes: list[tuple[float, int]], as_stream: bool
) -> None:
    path = tmp_path / "a.arrow"
    write_arrow(path, as_stream=as_stream, compression="zstd")
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[8 + int(place * (len(data) - 9))] = value
    path.write_bytes(bytes(data))
    try:
        parts = plan(path)
    except InputError:
        return
    assert sum(part.num_records for part in parts) == len(read(parts))


def test_an_encrypted_a_nested_and_an_overfull_zip_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zip(tmp_path / "inner.zip", a_json=b"[]")
    write_zip(tmp_path / "nested.zip", a_zip=(tmp_path / "inner.zip").read_bytes())
    with pytest.raises(InputError, match="archive inside an archive"):
        plan(tmp_path / "nested.zip")
    data = bytearray((tmp_path / "inner.zip").read_bytes())
    data[data.find(b"PK\x01\x02") + 8] |= 1  # encrypted, says the index
    (tmp_path / "locked.zip").write_bytes(bytes(data))
    with pytest.raises(InputError, match="encrypted"):
        plan(tmp_path / "locked.zip")
    monkeypatch.setattr(archives, "MAX_MEMBERS", 0)
    with pytest.raises(InputError, match="holds 1 files, at most 0"):
        plan(tmp_path / "inner.zip")
    monkeypatch.setattr(archives, "_MAX_INDEX_BYTES", 10)
    with pytest.raises(InputError, match="index of"):
        plan(tmp_path / "inner.zip")


def test_names_in_a_zip_write_nothing_and_are_no_way_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../../evil.json", '[{"a": 1}]')
        archive.writestr("/abs/evil.json", '[{"a": 2}]')
        archive.writestr("evil.json", '[{"a": 3}]')
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("evil.json", '[{"a": 4}]')
    before = {path for path in tmp_path.parent.rglob("*") if "evil" in path.name}
    parts = plan(tmp_path / "a.zip")
    assert sorted(part.file for part in parts) == [
        "a.zip/#2/evil.json",
        "a.zip/#3/evil.json",
        "a.zip/abs/evil.json",
        "a.zip/evil.json",
    ]
    found = sorted(json.loads(record.raw)["a"] for part in parts for record in read_range(part))
    assert found == [1, 2, 3, 4]
    assert {path for path in tmp_path.parent.rglob("*") if "evil" in path.name} == before


MEASURE = """
import resource, sys
from pathlib import Path
from pipelines.containers import plan_file, read_range
from schemas.pipeline_config import MergeConfig
from schemas.source_config import SourceConfig
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
parts = plan_file(
    path, source=SourceConfig(name="s", path="x"), file=path.name, spool_path=path.with_suffix(".spool"),
    config=MergeConfig(), notes=[],
)
num_records = sum(1 for part in parts for _ in read_range(part))
print(num_records, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def write_large(path: Path, num_bytes: int) -> int:
    """A file of its suffix's kind; returns its records."""
    record = {"prompt": "q" * 300, "completion": 'say "é"\n' * 60}
    number = num_bytes // len(json.dumps(record))
    if path.suffix == ".csv":
        row = csv_text([record]).partition("\n")[2]
        path.write_text("prompt,completion\n" + row * number)
    elif path.suffix == ".json":
        text = json.dumps(record)
        path.write_text("{" + ", ".join(f'"{n}": {text}' for n in range(number)) + "}")
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", (json.dumps(record) + "\n") * number)
    else:
        table = pa.Table.from_pylist([record] * 1000)
        with pa.ipc.new_stream(path, table.schema) as writer:
            for _ in range(number // 1000):
                writer.write_table(table)
        return number // 1000 * 1000
    return number


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["csv", "json", "zip", "arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    grown = []
    for megabytes in (10, 60):
        path = tmp_path / f"{megabytes}.{suffix}"
        expected = write_large(path, megabytes << 20)
        command = [sys.executable, "-c", MEASURE, str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd())
        found, grown_kib = map(int, result.stdout.split())
        assert found == expected
        grown.append(grown_kib >> 10)
    assert grown[1] < 60, grown
    assert grown[1] - grown[0] < 12, grown


# Encodings --------------------------------------------------------------------------------------------------


def rows(path: Path, **source: Any) -> list[tuple[Conversation, Drop | None]]:
    wanted = PipelineConfig(run_root=Path("run"), sources=[SourceConfig(name="s", path=str(path), **source)])
    parts = plan_source(wanted.sources[0], config=wanted, spool_folder=path.parent / "spool").parts
    return [row for part in parts for row in read_part(part, wanted)]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Grüße – “naïve” €"),
        ("gb18030", "你好，世界 𠀀 €"),
        ("big5", "你好"),
        ("shift_jis", "こんにちは"),
        ("euc-kr", "안녕하세요"),
        ("cp1251", "Привет"),
        ("koi8-r", "Привет"),
        ("utf-16-le", "é你"),
    ],
)
@pytest.mark.parametrize("kind", ["json", "csv", "csv.gz"])
def test_a_declared_encoding_is_read(tmp_path: Path, encoding: str, text: str, kind: str) -> None:
    records = [{"prompt": f"{text} {n}", "completion": text} for n in range(5)]
    body = json.dumps(records, ensure_ascii=False) if kind == "json" else csv_text(records)
    data = body.encode(encoding)
    (tmp_path / f"a.{kind}").write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    found = rows(tmp_path / f"a.{kind}", encoding=encoding)
    assert [row.messages[0].content for row, _ in found] == [f"{text} {n}" for n in range(5)]
    assert all(drop is None for _, drop in found)


@pytest.mark.parametrize(
    ("encoding", "bad"), [("cp1252", b"\x81"), ("gb18030", b"\xff"), ("gb18030", b"\x81 ")]
)
def test_bytes_that_are_none_in_the_declared_encoding_are_repaired_and_counted_in_their_record(
    tmp_path: Path, encoding: str, bad: bytes
) -> None:
    lines = [b'{"prompt": "a", "completion": "' + text + b'"}' for text in (b"x", b"y" + bad + b"z", b"w")]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = rows(tmp_path / "a.jsonl", encoding=encoding)
    assert [drop for _, drop in found] == [None] * 3
    assert found[1][0].messages[1].content == "y\ufffd" + bad[1:].decode() + "z"
    assert [row.meta.get("repairs") for row, _ in found] == [None, {"lone_surrogates": 1}, None]


def test_a_byte_order_mark_outdoes_what_is_declared(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.json").write_bytes('[{"prompt": "é", "completion": "你"}]'.encode(encoding))
        ((row, drop),) = rows(tmp_path / "a.json", encoding="cp1252")
        assert (row.messages[1].content, drop) == ("你", None)


def test_nul_in_a_text_is_kept_and_nul_beside_the_records_is_a_drop(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"prompt": "a\\u0000b", "completion": "c"}\n\0\0\0\n{"prompt": "d", "completion": "e"}\n'
    )
    found = rows(tmp_path / "a.jsonl")
    assert [drop.reason if drop else row.messages[0].content for row, drop in found] == [
        "a\0b",
        "invalid_json",
        "d",
    ]
    (tmp_path / "b.csv").write_bytes(b"prompt,completion\na\0b,c\n")
    assert len(rows(tmp_path / "b.csv")) == 1


# Folders and documents --------------------------------------------------------------------------------------


def test_a_folder_that_datasets_saved_is_read_without_its_indexes_and_caches(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    data = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"train": data, "test": data.select(range(5))}).save_to_disk(folder)
    (folder / "train" / "cache-123.arrow").write_bytes(b"rubbish")
    found = rows(folder)
    assert len(found) == 65
    assert {row.source for row, _ in found} == {
        "s/train/data-00000-of-00001.arrow",
        "s/test/data-00000-of-00001.arrow",
    }
    assert all(drop is None for _, drop in found)


def test_texts_are_documents_or_lines_of_documents(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One\n\nfirst\n")
    (tmp_path / "b.tex").write_text("\\section{Two}\nsecond\n")
    (tmp_path / "[c].txt").write_text("[1] a footnote\nis no JSON\n")
    (tmp_path / "e.txt").write_bytes(b"bad \xff\n")
    found = rows(tmp_path, format="text")
    assert [[m.content for m in row.messages] for row, drop in found if drop is None] == [
        ["[1] a footnote", "is no JSON"],
        ["# One", "first"],
        ["\\section{Two}", "second"],
    ]
    assert [drop.reason for _, drop in found if drop] == ["invalid_utf8"]
    (tmp_path / "lines.txt").write_text("One. Two.\n\nThree. Four.\n")
    found = rows(tmp_path / "lines.txt", format="text", container="text_lines")
    assert [[m.content for m in row.messages] for row, _ in found] == [["One.", "Two."], ["Three.", "Four."]]


def test_a_document_larger_than_a_record_may_be_is_a_drop(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 1000)
    source = SourceConfig(name="s", path="x", format="text")
    (part,) = plan(tmp_path / "a.txt", source=source, max_record_bytes=999)
    (record,) = read_range(part)
    assert record.reason == "record_too_large"
    assert "5000 bytes" in record.detail


def test_what_is_ignored_in_an_archive_is_noted(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", a_json=b'[{"a": 1}]', chat_html=b"<p>", b_png=b"x")
    notes: list[str] = []
    plan_file(
        tmp_path / "a.zip",
        source=SourceConfig(name="s", path="x"),
        file="a.zip",
        spool_path=tmp_path / "spool",
        config=MergeConfig(),
        notes=notes,
    )
    assert notes == ["source s: ignored 2 files in a.zip, such as b.png"]


@pytest.mark.real_data
def test_people_talking_are_read_from_an_object_of_records(real_data: Path, tmp_path: Path) -> None:
    expected = json.loads(gzip.decompress((real_data / "chitchat.json.gz").read_bytes()))
    copy = tmp_path / "chitchat.json.gz"
    copy.write_bytes((real_data / "chitchat.json.gz").read_bytes())
    found = rows(copy, assistant_side="second")
    assert [row.meta["id"] for row, _ in found] == list(expected)
    two = {
        key
        for key, talk in expected.items()
        if len({m["sender"] for turn in talk["messages"] for m in turn}) > 1
    }
    kept = [row for row, drop in found if drop is None]
    assert {row.meta["id"] for row in kept} == two
    assert len(two) > 600
    assert {drop.reason for _, drop in found if drop} <= {"no_assistant_side", "unknown_format"}
    for row in kept[:50]:
        said = [m["text"] for turn in expected[row.meta["id"]]["messages"] for m in turn]
        assert "\n".join(m.content for m in row.messages) == "\n".join(said)
