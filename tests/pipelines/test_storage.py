"""What is on the disk is old or new, never half; what was damaged is refused."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import storage
from pipelines.row_columns import rows_of, rows_table
from schemas.conversation import Conversation, Drop, Message
from schemas.dataset import DROPS, ROWS
from schemas.errors import IntegrityError

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
messages = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant", "tool"]),
    texts,
    st.dictionaries(texts, texts, max_size=2),
)
conversations = st.builds(
    Conversation, texts, texts, st.integers(0, 2**40), st.lists(messages, max_size=4), st.just({"id": "x"})
)


@given(rows=st.lists(conversations, max_size=5))
def test_rows_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Conversation]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "part.parquet"
    assert storage.write_rows(path, rows) == len(rows)
    assert list(storage.read_rows(path)) == rows


@given(rows=st.lists(conversations, max_size=8), start=st.integers(0, 8), length=st.integers(0, 8))
def test_columns_are_those_that_arrow_makes_of_dicts_and_parts_of_them_are_read_as_such(
    rows: list[Conversation], start: int, length: int
) -> None:
    records = [
        {
            "row_id": row.row_id,
            "source": row.source,
            "record": row.record,
            "messages": [
                {
                    "role": m.role,
                    "content": m.content,
                    "extras": json.dumps(m.extras, sort_keys=True, ensure_ascii=False),
                }
                for m in row.messages
            ],
            "meta": json.dumps(row.meta),
        }
        for row in rows
    ]
    table = rows_table(rows)
    assert table.equals(pa.Table.from_pylist(records, schema=ROWS))
    for batch in table.slice(start, length).to_batches():
        assert list(rows_of(batch)) == rows[start : start + length]


def test_columns_are_the_documented_ones_and_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    row = Conversation("id", "chats/a.json", 3, [Message("user", "hello")], {"b": 1, "a": 2})
    again = Conversation("id", "chats/a.json", 3, [Message("user", "hello")], {"a": 2, "b": 1})
    storage.write_rows(tmp_path / "a.parquet", [row])
    storage.write_rows(tmp_path / "b.parquet", [again])
    storage.write_drops(tmp_path / "c.parquet", [(row, Drop("too_short", "1 of 4"))], stage="filter")
    assert pq.read_schema(tmp_path / "a.parquet").equals(ROWS)
    assert pq.read_schema(tmp_path / "c.parquet").equals(DROPS)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    storage.write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="broke off"):
        write_half(path)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def write_half(path: Path) -> None:
    with storage.durable_file(path) as temporary:
        temporary.write_text("half")
        raise ValueError("broke off")


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_file_is_refused_before_its_first_use(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "part.parquet"
    storage.write_rows(path, [Conversation("id", "s/f", 0, [Message("user", "hello")])])
    entry = storage.file_entry(path, folder=tmp_path, num_rows=1)
    assert storage.check_file(tmp_path, entry) == path
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(IntegrityError, match="part\\.parquet"):
        storage.check_file(tmp_path, entry)
