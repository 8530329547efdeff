"""Files of every kind give the same records; parts cover them once, and move only where the content does."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.containers import RawRecord, plan_file, read_range
from pipelines.part_ranges import PartRange
from pipelines.unpack import unpack
from schemas.errors import InputError
from schemas.pipeline_config import MergeConfig
from schemas.source_config import SourceConfig

RECORDS: list[dict[str, Any]] = [
    {
        "id": f"r{n}",
        "conversations": [{"from": "human", "value": "é" * (n % 7)}, {"from": "gpt", "value": "x" * n}],
    }
    for n in range(60)
]


SOURCE = SourceConfig(name="s", path="x")


def plan(path: Path, *, source: SourceConfig = SOURCE, **config: int) -> list[PartRange]:
    spool_path = path.parent / f"spool of {path.name}"
    return plan_file(
        path, source=source, file=path.name, spool_path=spool_path, config=MergeConfig(**config), notes=[]
    )


def read(parts: list[PartRange]) -> list[RawRecord]:
    """All records, once it is checked that parts follow each other and number their records."""
    found: list[RawRecord] = []
    for part in parts:
        records = list(read_range(part))
        assert (part.first_record, part.num_records) == (len(found), len(records))
        found += records
    return found


def values(parts: list[PartRange]) -> list[Any]:
    return [json.loads(record.raw) for record in read(parts) if not record.reason]


def drops(parts: list[PartRange]) -> list[str]:
    return [record.reason for record in read(parts) if record.reason]


def utf16(text: str) -> bytes:
    return text.encode("utf-16")


LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
ARRAY = json.dumps(RECORDS, ensure_ascii=False, indent=1)
KINDS = {
    "array": ARRAY.encode(),
    "array on one line": json.dumps(RECORDS).encode(),
    "array behind a byte order mark": b"\xef\xbb\xbf\n " + ARRAY.encode(),
    "lines": LINES.encode(),
    "lines behind a byte order mark": b"\xef\xbb\xbf" + LINES.encode(),
    "lines with carriage returns": LINES.replace("\n", "\r\n").encode(),
    "pretty-printed objects": "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode(),
    "objects with commas": ",\n".join(json.dumps(record) for record in RECORDS).encode(),
    "objects on one line": "".join(json.dumps(record) for record in RECORDS).encode(),
    "gzip": gzip.compress(ARRAY.encode()),
    "gzip of lines, in two members": gzip.compress(LINES[:999].encode())
    + gzip.compress(LINES[999:].encode()),
    "gzip padded with zeros": gzip.compress(LINES.encode()) + bytes(2000),
    "zstd": zstandard.compress(ARRAY.encode()),
    "zstd in two frames": zstandard.compress(LINES[:999].encode()) + zstandard.compress(LINES[999:].encode()),
    "utf-16": utf16(ARRAY),
    "utf-16, big-endian, lines": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "utf-32": ARRAY.encode("utf-32"),
    "bzip2": bz2.compress(ARRAY.encode()),
    "bzip2 of lines, in two streams": bz2.compress(LINES[:999].encode()) + bz2.compress(LINES[999:].encode()),
    "xz": lzma.compress(ARRAY.encode()),
    "xz of lines, in two streams, padded": lzma.compress(LINES[:999].encode())
    + bytes(8)
    + lzma.compress(LINES[999:].encode(), preset=9)
    + bytes(4),
    "gzip of utf-16": gzip.compress(utf16(LINES)),
}


@pytest.mark.parametrize("name", ["data.json", "data.parquet"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_records_whatever_its_name(
    tmp_path: Path, kind: str, name: str
) -> None:
    (tmp_path / name).write_bytes(KINDS[kind])
    for part_bytes in (1, 1000, 1 << 20):
        parts = plan(tmp_path / name, part_bytes=part_bytes)
        assert values(parts) == RECORDS
        assert drops(parts) == []


@pytest.mark.parametrize("row_group_size", [1, 7, 1000])
def test_parquet_rows_are_records_in_sorted_json(tmp_path: Path, row_group_size: int) -> None:
    table = pa.Table.from_pylist(RECORDS)
    pq.write_table(table, tmp_path / "data.json", row_group_size=row_group_size)
    for part_bytes in (1, 1000, 1 << 20):
        parts = plan(tmp_path / "data.json", part_bytes=part_bytes)
        assert values(parts) == RECORDS
        assert len({part.digest for part in parts}) == len(parts)
    assert len(plan(tmp_path / "data.json", part_bytes=1)) == len(RECORDS)
    assert read(parts)[0].raw.startswith(b'{"conversations":')


@pytest.mark.parametrize(
    "data", [b"", b"[]", b" \n ", b"[\n]\n", b"\n\n", b"\xef\xbb\xbf", gzip.compress(b"[]", mtime=0)]
)
def test_a_file_without_records_has_no_parts(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "data.json").write_bytes(data)
    assert plan(tmp_path / "data.json") == []


def test_one_pretty_printed_object_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(RECORDS[3], indent=4))
    assert values(plan(tmp_path / "data.json")) == [RECORDS[3]]


def test_a_broken_first_line_does_not_hide_that_the_file_is_lines(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"id": "x\n' + LINES)
    parts = plan(tmp_path / "data.json")
    assert {part.container for part in parts} == {"lines"}
    assert read(parts)[0].raw == b'{"id": "x'  # one record, which the parser will refuse
    assert [json.loads(record.raw) for record in read(parts)[1:]] == RECORDS


# Cut off, broken, hostile -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [ARRAY, LINES])
@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
def test_a_cut_compressed_file_gives_what_could_be_read_and_one_drop(
    tmp_path: Path, text: str, pack: Any
) -> None:
    draw = random.Random(0)
    noise = "".join(draw.choice("abcdefgh ") for _ in range(400_000))  # more than one block of either format
    packed = pack(
        (text.rstrip("]\n ") + (",\n" if text is ARRAY else "\n") + json.dumps({"noise": noise})).encode()
    )
    for size in (len(packed) * 9 // 10, len(packed) - 1):
        (tmp_path / "data.json").write_bytes(packed[:size])
        parts = plan(tmp_path / "data.json")
        assert drops(parts) == ["truncated_file"]
        whole = values(parts)
        assert whole[: len(RECORDS)] == RECORDS[: len(whole)]
        assert pack is not gzip.compress or len(whole) >= len(RECORDS)


@pytest.mark.parametrize(
    "pack",
    [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress, bz2.compress, lzma.compress],
)
def test_compressed_data_broken_at_a_record_border_is_told_by_one_drop(tmp_path: Path, pack: Any) -> None:
    packed = bytearray(pack(LINES.encode()))
    packed[-6] ^= 1  # in the checksum or the length behind the data
    (tmp_path / "data.jsonl").write_bytes(bytes(packed))
    assert drops(plan(tmp_path / "data.jsonl")) == ["truncated_file"]
    assert "data" in read(plan(tmp_path / "data.jsonl"))[-1].detail


def test_an_array_cut_between_records_is_told_by_a_drop_of_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(b'[{"a": 1}, {"a": 2},')
    records = read(plan(tmp_path / "data.json"))
    assert [(record.raw, record.reason) for record in records] == [
        (b'{"a": 1}', ""),
        (b'{"a": 2}', ""),
        (b"", "truncated_file"),
    ]
    assert "byte 20 " in records[-1].detail


def test_a_last_line_that_is_cut_is_truncated_and_a_broken_one_is_for_the_parser(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"a": 1}\n{"a": [2')
    assert drops(plan(tmp_path / "data.jsonl")) == ["truncated_file"]
    (tmp_path / "data.jsonl").write_bytes(b'{"a": 1}\n{"a": [2\n')
    assert drops(plan(tmp_path / "data.jsonl")) == []


def test_utf_16_cut_inside_a_character_is_one_drop(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(utf16(LINES)[:-1])
    assert drops(plan(tmp_path / "data.jsonl")) == ["truncated_file"]
    assert values(plan(tmp_path / "data.jsonl"))[:-1] == RECORDS[:-1]


def test_a_line_too_large_behind_others_is_one_drop_and_nothing_is_read_twice(tmp_path: Path) -> None:
    """All in the first megabyte that is read, with a limit far below it."""
    lines = [b'{"a": %d}' % n for n in range(200)]
    (tmp_path / "data.jsonl").write_bytes(b"\n".join([*lines, b'{"b": "' + b"x" * 1_500_000 + b'"}', *lines]))
    records = read(plan(tmp_path / "data.jsonl", max_record_bytes=20_000))
    assert [record.reason for record in records] == [""] * 200 + ["record_too_large"] + [""] * 200
    assert [record.raw for record in records if not record.reason] == [*lines, *lines]


def test_invalid_utf_8_stays_inside_its_record(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(b'[{"a": "\xff\xfe"}, {"a": 2}]')
    assert [record.raw for record in read(plan(tmp_path / "data.json"))] == [
        b'{"a": "\xff\xfe"}',
        b'{"a": 2}',
    ]


@pytest.mark.parametrize("size", [4, 100, -10])
def test_a_cut_parquet_file_is_one_drop(tmp_path: Path, size: int) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "whole.parquet")
    (tmp_path / "data.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:size])
    assert drops(plan(tmp_path / "data.parquet")) == ["invalid_parquet"]


def test_parquet_pages_that_are_broken_drop_the_rows_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    table = pa.table({"id": [str(n) for n in range(1000)], "text": ["x" * (n % 97) for n in range(1000)]})
    pq.write_table(table, path, row_group_size=500, write_page_checksum=True, compression="none")
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1
    path.write_bytes(bytes(data))
    records = read(plan(path))
    assert len(records) == 1000
    assert {record.reason for record in records[:500]} >= {"invalid_parquet"}
    assert [json.loads(record.raw)["id"] for record in records[500:]] == [str(n) for n in range(500, 1000)]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
def test_a_bomb_is_refused_and_names_the_setting(tmp_path: Path, pack: Any) -> None:
    (tmp_path / "bomb.json").write_bytes(pack(bytes(80 << 20)))
    with pytest.raises(InputError, match=r"bomb\.json .* merge\.max_decompressed_ratio"):
        plan(tmp_path / "bomb.json", max_decompressed_ratio=2)
    assert unpack(tmp_path / "bomb.json", tmp_path / "spool", max_ratio=10**8).path == tmp_path / "spool"


def test_a_parquet_bomb_is_refused_by_its_footer(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{n:08d}" * 1000 for n in range(10_000)]})
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(InputError, match=r"unpacks to .* allowed are"):
        plan(tmp_path / "bomb.parquet", max_decompressed_ratio=2)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (gzip.compress(b"7z\xbc\xaf", mtime=0), "a 7z archive"),
    ],
)
def test_archives_and_foreign_compression_are_refused_by_name(tmp_path: Path, data: bytes, kind: str) -> None:
    (tmp_path / "data.json").write_bytes(data)
    with pytest.raises(InputError, match=kind):
        plan(tmp_path / "data.json")


def test_a_file_compressed_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.json.gz").write_bytes(gzip.compress(gzip.compress(b"[]")))
    with pytest.raises(InputError, match="twice"):
        plan(tmp_path / "data.json.gz")


# Parts ------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.binary(max_size=200), st.integers(1, 3000), st.booleans(), st.integers(0, 3))
def test_a_part_reads_back_what_was_planned_whatever_is_broken(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, part_bytes: int, as_lines: bool, where: int
) -> None:
    path = tmp_path_factory.mktemp("noise") / "data.json"
    text = (LINES if as_lines else ARRAY).encode()
    at = len(text) * where // 3
    noise = noise if at else b"[" + noise  # at the start it could be another kind of file
    path.write_bytes(text[:at] + noise + text[at:])
    one, many = plan(path, part_bytes=1 << 20), plan(path, part_bytes=part_bytes)
    assert read(many) == read(one)
    assert sum(part.num_records for part in many) == len(read(one))


def test_parts_begin_and_break_at_any_depth_of_arrays(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(
        b'[{"a": 1}, [{"a": 2}, {"a": x"}, {"a": 3}], 4, {"a": "y"z"}, {"a": 5}] [[{"a": 6}, {"a": 7"}, {"a": 8}], 9]'
    )
    for part_bytes in (1, 8, 16, 1000):
        parts = plan(tmp_path / "data.json", part_bytes=part_bytes)
        assert values(parts) == [{"a": 1}, {"a": 2}, {"a": 3}, 4, {"a": 5}, {"a": 6}, {"a": 8}, 9]
        assert drops(parts) == ["invalid_json"] * 3


def test_borders_follow_content_so_most_parts_survive_new_records(tmp_path: Path) -> None:
    draw = random.Random(1)
    old = [
        {"id": str(n), "text": "".join(draw.choices("abcdef ", k=draw.randint(50, 400)))} for n in range(8000)
    ]
    new = list(old)
    for n in range(80):  # 1 % more, in one stretch in the middle and scattered behind it
        new.insert(4000 + n if n < 76 else draw.randrange(len(new)), {"id": f"new{n}", "text": "n" * n})
    digests = []
    for name, records in (("old", old), ("new", new)):
        (tmp_path / name).write_text(json.dumps(records))
        parts = plan(tmp_path / name, part_bytes=20_000)
        assert values(parts) == records
        digests.append({part.digest for part in parts})
    assert len(digests[0]) > 50
    assert len(digests[0] & digests[1]) > 0.85 * len(digests[0])


def test_the_layout_of_the_file_does_not_reach_the_digests(tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in RECORDS]
    layouts = ["\n".join(lines), "[" + ", ".join(lines) + "]", "[\n  " + ",\n  ".join(lines) + "\n]\n"]
    digests = []
    for number, text in enumerate(layouts):
        (tmp_path / str(number)).write_text(text)
        digests.append([part.digest for part in plan(tmp_path / str(number), part_bytes=500)])
    assert digests[0] == digests[1] == digests[2]
    assert len(digests[0]) > 5


def test_parts_stay_between_half_of_the_aim_and_four_times_it_and_records_cost_something_too(
    tmp_path: Path,
) -> None:
    draw = random.Random(2)
    lines = [json.dumps({"n": n, "t": "x" * draw.randint(1, 300)}) for n in range(5000)]
    (tmp_path / "data").write_text("\n".join(lines))
    parts = plan(tmp_path / "data", part_bytes=20_000)
    sizes = [sum(len(record.raw) + 256 for record in read_range(part)) for part in parts]
    assert max(sizes) <= 80_000
    assert min(sizes[:-1]) >= 10_000
    assert 16_000 < sum(sizes) / len(sizes) < 26_000


def test_a_part_goes_through_pickle_and_json_unchanged(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(b'[{"a": 1}, {"a": "x"y"}, {"a": 3}, {"a":')
    (part,) = plan(tmp_path / "data.json")
    assert [item.reason for item in part.breaks] == ["invalid_json", "truncated_file"]
    assert pickle.loads(pickle.dumps(part)) == part
    assert PartRange.from_json(json.loads(json.dumps(part.to_json()))) == part


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_a_file_that_changed_since_it_was_planned_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    for number, records in enumerate((RECORDS, RECORDS[1:], None)):
        if records is None:
            path.unlink()
        elif suffix == "json":
            path.write_text(json.dumps(records))
        else:
            pq.write_table(pa.Table.from_pylist(records), path)
        if number == 0:
            parts = plan(path)
        else:
            with pytest.raises(InputError, match="changed while it was being read"):
                read(parts)


def test_equal_bytes_make_equal_parts(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(ARRAY.encode())
    parts = plan(tmp_path / "a", part_bytes=500)
    assert plan(tmp_path / "a", part_bytes=500) == parts
    assert len({dataclasses.astuple(part) for part in parts}) == len(parts) > 5


MEASURE = """
import resource, sys
from pathlib import Path
from pipelines.containers import plan_file, read_range
from schemas.pipeline_config import MergeConfig
from schemas.source_config import SourceConfig
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = SourceConfig(name="s", path="x")
spool = path.with_suffix(".spool")
parts = plan_file(path, source=source, file=path.name, spool_path=spool, config=MergeConfig(), notes=[])
num_records = sum(1 for part in parts for _ in read_range(part))
print(num_records, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["array", "gzip", "lines"])
def test_a_large_file_is_read_in_little_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data.json"
    record = json.dumps({"id": "x", "conversations": [{"from": "gpt", "value": 'say \\ "é"\n' * 40}] * 3})
    between, ends = ("\n", ("", "")) if kind == "lines" else (",\n", ("[", "]"))
    num_records = (60 << 20) // len(record)
    with gzip.open(path, "wt") if kind == "gzip" else path.open("w") as file:
        file.write(ends[0] + between.join([record] * num_records) + ends[1])
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    found, grown_kib = map(int, result.stdout.split())
    assert found == num_records
    assert grown_kib < 24 << 10


@pytest.mark.real_data
def test_the_published_broken_part_is_whole_but_for_a_comma(real_data: Path) -> None:
    """A comma stands behind its last record; json refuses the file, all its records are there and none is lost."""
    path = real_data / "broken_alpaca_part.json"
    with pytest.raises(json.JSONDecodeError):
        json.loads(path.read_bytes())
    expected = json.loads(path.read_text().rstrip("] \n").rstrip(",") + "]")
    parts = plan(path, part_bytes=100_000)
    assert values(parts) == expected
    assert (len(expected), drops(parts)) == (2801, [])


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["sharegpt_html.json.gz", "alpaca_data.json.gz", "sharegpt_zh_1k.jsonl.gz"])
def test_published_files_give_the_records_that_json_gives(real_data: Path, tmp_path: Path, name: str) -> None:
    text = gzip.decompress((real_data / name).read_bytes())
    expected = json.loads(text) if text.startswith(b"[") else [json.loads(line) for line in io.BytesIO(text)]
    parts = plan_file(
        real_data / name,
        source=SOURCE,
        file=name,
        spool_path=tmp_path / "spool",
        config=MergeConfig(),
        notes=[],
    )
    assert values(parts) == expected
