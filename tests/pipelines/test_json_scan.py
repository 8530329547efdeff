"""Cutting JSON into records: the same records as json.loads where it is whole, nothing lost around what is broken."""

import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import json_lines
from pipelines.json_lines import LineScanner, Segment
from pipelines.json_scan import ValueScanner

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TRICKY = st.sampled_from(
    ['"', "\\", '\\"', "{", "}", "[", "]", '{"id":', '"}, {"id": "', "\n", ",", "é", "😀", "</p>"]
)
STRING = st.builds("".join, st.lists(st.one_of(TEXT, TRICKY), max_size=4))
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), STRING
)
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(STRING, inner, max_size=3)),
    max_leaves=8,
)
OBJECT = st.dictionaries(STRING, VALUE, max_size=4)
ELEMENT = st.one_of(OBJECT, SCALAR, st.lists(SCALAR, max_size=3))
CHUNK = st.sampled_from([1, 2, 7, 64, 1 << 20])


@contextmanager
def chunks_of(num_bytes: int) -> Iterator[None]:
    """The window reads so few bytes at a time: every record is cut somewhere by its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "_CHUNK_BYTES", num_bytes)
        yield


def scan_values(data: bytes, *, chunk: int = 1 << 20, max_record_bytes: int = 1 << 26) -> list[Segment]:
    with chunks_of(chunk):
        return list(ValueScanner(io.BytesIO(data), 0, len(data), depth=0, max_record_bytes=max_record_bytes))


def scan_lines(data: bytes, *, chunk: int = 1 << 20, max_record_bytes: int = 1 << 26) -> list[Segment]:
    with chunks_of(chunk):
        return list(LineScanner(io.BytesIO(data), 0, len(data), max_record_bytes=max_record_bytes))


def records(segments: list[Segment]) -> list[Any]:
    assert [s for s in segments if s.raw is None] == []
    return [json.loads(segment.raw or b"") for segment in segments]


def breaks(segments: list[Segment]) -> list[tuple[str, int, int]]:
    return [(segment.reason, segment.start, segment.end) for segment in segments if segment.raw is None]


def check_cover(segments: list[Segment], data: bytes) -> None:
    """Segments are in order, do not overlap, hold the file's bytes, and leave out punctuation only."""
    at = 3 if data.startswith(b"\xef\xbb\xbf") else 0  # a byte order mark is no record
    for segment in segments:
        assert at <= segment.start <= segment.end
        assert data[at : segment.start].strip(b" \t\r\n,[]") == b""
        assert segment.raw is None or segment.raw == data[segment.start : segment.end]
        at = segment.end
    assert data[at:].strip(b" \t\r\n,[]") == b""


@settings(max_examples=300)
@given(
    st.lists(ELEMENT, max_size=8),
    st.sampled_from([None, 0, 1, 4, "\t"]),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\r\n", "\t: ")]),
    st.booleans(),
    CHUNK,
)
def test_an_array_gives_exactly_the_elements_that_json_gives(
    elements: list[Any], indent: Any, separators: tuple[str, str], ascii_only: bool, chunk: int
) -> None:
    data = json.dumps(elements, indent=indent, separators=separators, ensure_ascii=ascii_only).encode()
    segments = scan_values(data, chunk=chunk)
    assert records(segments) == json.loads(data)
    check_cover(segments, data)


@given(st.lists(OBJECT, max_size=6), st.sampled_from(["", " ", "\n", ",", ",\n", "\r\n\r\n"]), CHUNK)
def test_objects_one_after_another_are_records_with_or_without_commas(
    elements: list[Any], between: str, chunk: int
) -> None:
    data = between.join(json.dumps(element, indent=2) for element in elements).encode()
    assert records(scan_values(data, chunk=chunk)) == elements


@given(st.lists(st.lists(OBJECT, max_size=3), max_size=3), CHUNK)
def test_arrays_one_after_another_are_read_as_one(arrays: list[list[Any]], chunk: int) -> None:
    data = "\n".join(json.dumps(array) for array in arrays).encode()
    assert records(scan_values(data, chunk=chunk)) == [record for array in arrays for record in array]


@given(st.lists(ELEMENT, max_size=8), st.sampled_from(["\n", "\r\n", "\n\n \n"]), st.booleans(), CHUNK)
def test_lines_give_each_line_that_is_not_blank(
    elements: list[Any], newline: str, ends_with_newline: bool, chunk: int
) -> None:
    data = (newline.join(json.dumps(e) for e in elements) + newline * ends_with_newline).encode()
    segments = scan_lines(data, chunk=chunk)
    assert records(segments) == elements
    check_cover(segments, data)


def test_an_array_inside_an_array_is_stepped_into_where_it_begins_with_an_object() -> None:
    data = b'[[{"a": 1}, 5], [ {"a": 2}], [3, {"a": 4}], [], [[{"a": 6}]]]'
    assert records(scan_values(data)) == [{"a": 1}, 5, {"a": 2}, [3, {"a": 4}], [], [[{"a": 6}]]]
    assert scan_values(data, chunk=1) == scan_values(data)


def test_a_comma_behind_the_last_element_and_a_byte_order_mark_between_files_lose_nothing() -> None:
    assert records(scan_values(b'[{"a": 1}, {"b": 2},\n]  ')) == [{"a": 1}, {"b": 2}]
    assert records(scan_values(b'{"a": 1}\n\xef\xbb\xbf{"b": 2}')) == [{"a": 1}, {"b": 2}]


# Broken arrays ----------------------------------------------------------------------------------------------


def chats(number: int, *, indent: int | None = None) -> tuple[bytes, list[tuple[int, int]]]:
    """An array as exports write them, and where each of its records lies."""
    array = [
        {
            "id": f"chat{n}",
            "conversations": [
                {"from": "human", "value": f'say "{n}" in {{braces}}, [brackets]'},
                {"from": "gpt", "value": f"number\n{n}\\"},
            ],
        }
        for n in range(number)
    ]
    texts = [json.dumps(chat, indent=indent) for chat in array]
    data, places = b"[", []
    for text in texts:
        data += b",\n" if len(data) > 1 else b"\n"
        places.append((len(data), len(data) + len(text)))
        data += text.encode()
    return data + b"\n]", places


LAYOUTS = {"compact": chats(12), "indented": chats(12, indent=2)}
ONE_LINE = chats(12)[0].replace(b",\n{", b", {"), chats(12)[1]
LAYOUTS["one line"] = ONE_LINE


def intact_but(places: list[tuple[int, int]], touched: int) -> list[int]:
    """Records that do not touch the broken byte, and are not the next after one that does."""
    first = next((n for n, (_, end) in enumerate(places) if end >= touched), len(places))
    return [n for n in range(len(places)) if n < first or n > first + 1]


@settings(max_examples=600)
@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.data(),
    st.sampled_from([b"", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"x", b"\n", b"\x00", b"\xff"]),
    st.integers(0, 1),
    CHUNK,
)
def test_one_wrong_byte_costs_its_record_and_at_most_the_next(
    layout: str, data: st.DataObject, put: bytes, num_removed: int, chunk: int
) -> None:
    """A byte removed, replaced or put in. Every record but the one it lies in and the next one is found as it was."""
    whole, places = LAYOUTS[layout]
    at = data.draw(st.integers(1, len(whole) - 1))
    broken = whole[:at] + put + whole[at + num_removed :]
    segments = scan_values(broken, chunk=chunk)
    check_cover(segments, broken)
    found = {segment.raw for segment in segments}
    missing = [n for n in intact_but(places, at) if whole[slice(*places[n])] not in found]
    assert missing == []
    assert len(breaks(segments)) <= 3


@settings(max_examples=300)
@given(st.sampled_from(sorted(LAYOUTS)), st.data(), CHUNK)
def test_a_file_cut_anywhere_keeps_all_whole_records_and_one_drop_says_so(
    layout: str, data: st.DataObject, chunk: int
) -> None:
    whole, places = LAYOUTS[layout]
    size = data.draw(st.integers(2, len(whole) - 1))
    cut = whole[:size]
    segments = scan_values(cut, chunk=chunk)
    check_cover(segments, cut)
    complete = [place for place in places if place[1] <= size]
    assert [(s.start, s.end) for s in segments if s.raw is not None] == complete
    started = [start for start, end in places if start < size < end]
    assert breaks(segments) == [("truncated_file", start, size) for start in started]
    assert all(f"byte {start}" in segments[-1].detail for start in started)


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(st.binary(max_size=6), TRICKY.map(str.encode), st.sampled_from([b'{"a":1}', b'"b":'])),
        max_size=30,
    ),
    CHUNK,
    st.sampled_from([8, 1 << 26]),
)
def test_any_bytes_are_covered_by_records_and_breaks(pieces: list[bytes], chunk: int, limit: int) -> None:
    data = b"".join(pieces)
    check_cover(scan_values(data, chunk=chunk, max_record_bytes=limit), data)
    for segment in scan_lines(data, chunk=chunk, max_record_bytes=limit):
        assert segment.raw is None or segment.raw == data[segment.start : segment.end]


@settings(max_examples=100)
@given(st.binary(max_size=60), CHUNK)
def test_the_size_of_the_window_changes_nothing(data: bytes, chunk: int) -> None:
    data = b'[{"a": 1}, {"a": [' + data + b']}, {"a": 2}, {"b": {"a": 3}}]'
    assert scan_values(data, chunk=chunk) == scan_values(data)
    assert scan_lines(data, chunk=chunk) == scan_lines(data)


CASES = {
    "a quote too many": (b'[{"i": "x"y"}, {"i": 2}]', [2], ["invalid_json"]),
    "a quote missing at the end": (b'[{"i": "x}, {"i": 2}, {"i": 3}]', [2, 3], ["invalid_json"]),
    "a quote missing at the start": (b'[{"i": x"}, {"i": 2}]', [2], ["invalid_json"]),
    "a brace missing": (b'[{"i": 1, {"i": 2}, {"i": 3}]', [2, 3], ["invalid_json"]),
    "a brace too many": (b'[{"i": 1}}, {"i": 2}]', [1, 2], ["invalid_json"]),
    "an opening brace missing": (b'[{"i": 1}, "i": 2}, {"i": 3}]', [1, 3], ["invalid_json"]),
    "a bracket too many": (b'[{"i": 1}], {"i": 2}]', [1, 2], ["invalid_json"]),
    "an opening bracket too many": (b'[{"i": 1}, [{"i": 2}, {"i": 3}]', [1, 2, 3], []),
    "a comma missing": (b'[{"i": 1} {"i": 2}]', [1, 2], []),
    "text between": (b'[{"i": 1}, oops! {"i": 2}]', [1, 2], ["invalid_json"]),
    "text behind": (b'[{"i": 1}]\nbye', [1], ["invalid_json"]),
    "two brackets missing, the next record swallowed": (
        b'[{"i": 1}, {"i": 2, "j": [{"k": 1}, {"i": 3}, {"i": 4}]',
        [1, 3, 4],
        ["invalid_json"],
    ),
    "a line break inside a text": (b'[\n{"i": "a\nb"},\n{"i": 2}\n]', [2], ["invalid_json"]),
    "no array's end": (b'[{"i": 1}', [1], []),
}


@pytest.mark.parametrize("name", CASES)
def test_the_next_record_is_found_again_behind(name: str) -> None:
    data, kept, reasons = CASES[name]
    segments = scan_values(data)
    assert [json.loads(s.raw)["i"] for s in segments if s.raw is not None] == kept
    assert [s.reason for s in segments if s.raw is None] == reasons
    check_cover(segments, data)


def test_turns_inside_a_broken_chat_are_no_records() -> None:
    """The next `{` behind the broken text opens a turn; the row of turns ends inside the chat, so it is nested."""
    data = (
        b'[{"id": 1, "turns": [{"from": "a", "value": "x"y"}, {"from": "b", "value": "z"}]},'
        b' {"other": 2, "turns": []}, {"id": 3, "turns": []}]'
    )
    segments = scan_values(data)
    assert [segment.raw for segment in segments][1:] == [
        b'{"other": 2, "turns": []}',
        b'{"id": 3, "turns": []}',
    ]
    assert segments[0].reason == "invalid_json"
    assert "byte 1 " in segments[0].detail


def test_a_record_over_the_limit_is_a_break_and_its_neighbours_stay() -> None:
    large = json.dumps({"id": 2, "text": 'say "}{" ' * 100, "more": [{"id": 1}]})
    data = f'[{{"id": 1}}, {large}, {{"id": 3}}]'.encode()
    for chunk in (1, 50, 1 << 20):
        segments = scan_values(data, chunk=chunk, max_record_bytes=200)
        kinds = [(segment.reason, data[segment.start : segment.end]) for segment in segments]
        assert kinds == [("", b'{"id": 1}'), ("record_too_large", large.encode()), ("", b'{"id": 3}')]
    lines = b"\n".join([b'{"id": 1}', large.encode(), b'{"id": 3}'])
    assert [s.reason for s in scan_lines(lines, chunk=50, max_record_bytes=200)] == [
        "",
        "record_too_large",
        "",
    ]


def test_a_record_of_just_the_limit_is_kept() -> None:
    record = b'{"id": "' + b"x" * 91 + b'"}'
    for chunk in (1, 1 << 20):
        for size, reason in ((len(record), ""), (len(record) - 1, "record_too_large")):
            assert scan_values(b"[" + record + b"]", chunk=chunk, max_record_bytes=size)[0].reason == reason
            assert scan_lines(record + b"\n", chunk=chunk, max_record_bytes=size)[0].reason == reason


HOSTILE = [
    b'{"a":[',
    b'"',
    b"{",
    b"[",
    b"\\",
    b'{"a":1,',
    b"}{",
    b'{"a":"',
    b'{"a":{"b":1}',
    b'"\\',
    b"]",
    b'{"',
    b'{"k":x}',
]


@pytest.mark.slow
@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_repetition_takes_linear_time(unit: bytes) -> None:
    """Quadratic work on 2 MiB would take hours: about 4 s a MiB is the worst, one break every 6 bytes."""
    data = b'[{"z": 1},' + unit * ((2 << 20) // len(unit))
    started = time.process_time()
    check_cover(scan_values(data), data)
    assert time.process_time() - started < 30


def test_records_that_seem_to_swallow_each_other_do_not_cost_a_walk_each() -> None:
    """500 open records inside each other, each of which could be the one whose end is missing."""
    data = b'[{"z": 1},' + b'{"z":[' * 500 + b'"x",' * 1000
    found = breaks(scan_values(data))
    assert found[-1][0] == "truncated_file"
    assert len(found) <= 65  # each is one walk to the end of the file


def test_nesting_over_the_parsers_limit_is_a_break() -> None:
    deep = b'{"a":' * 1500 + b"1" + b"}" * 1500
    segments = scan_values(b"[" + deep + b',\n{"b": 1}]')
    assert segments[0].raw is None
    assert segments[-1].raw == b'{"b": 1}'


def test_an_element_nested_too_deep_is_one_break_whatever_it_holds() -> None:
    """Pieces that begin as records do are no records; one that never ends costs no more than itself."""
    inner = b'{"b": 1, "c": [{"b": 2}]}'
    deep = b'{"b": ' + b"[" * 1100 + inner + b"]" * 1100 + b', "d": [' + inner + b"]}"
    data = b'[{"b": 0},\n' + deep + b',\n{"b": 3}]'
    segments = scan_values(data)
    assert [segment.raw for segment in segments] == [b'{"b": 0}', None, b'{"b": 3}']
    assert data[segments[1].start : segments[1].end] == deep
    endless = b'[{"b": 0},\n{"b": ' + b"[" * 1100 + b',\n{"b": 4},\n{"b": 5}]'
    assert [segment.raw for segment in scan_values(endless)][-2:] == [b'{"b": 4}', b'{"b": 5}']


def test_many_elements_nested_too_deep_without_an_end_take_no_longer_than_they_are() -> None:
    data = b'[{"b": 0},\n' + (b'{"b": ' + b"[" * 1100 + b",\n") * 3000 + b'{"b": 1}]'
    assert scan_values(data)[-1].raw == b'{"b": 1}'
