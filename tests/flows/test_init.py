"""`init`: what it writes can be read and run, tells what it saw, and names every key there is."""

import gzip
import json
import re
from pathlib import Path

import pytest
import zstandard

from flows.init_config import dump_files, write_config
from flows.look import HEAD_BYTES, look_at
from schemas.config_file import load_config
from schemas.errors import ConfigError, InputError
from schemas.pipeline_config import PipelineConfig
from tests.integration import toy


def written(folder: Path, out: Path, model: Path | None = None) -> str:
    return write_config(folder, model=model, out=out, force=False).read_text()


def test_the_config_of_a_folder_of_dumps_can_be_loaded_and_says_what_was_seen(tmp_path: Path) -> None:
    toy.write_dumps(tmp_path / "dumps")
    (tmp_path / "model").mkdir()
    text = written(tmp_path / "dumps", tmp_path / "configs" / "new.yaml", tmp_path / "model")
    config = load_config(tmp_path / "configs" / "new.yaml")
    assert [source.name for source in config.sources] == ["alpaca", "sharegpt"]
    assert [source.path for source in config.sources] == [
        str(tmp_path / "dumps" / name) for name in ("alpaca.jsonl", "sharegpt.json")
    ]
    assert config.model is not None
    assert config.model.path == str(tmp_path / "model")
    assert "80 alpaca; unusable 1 (invalid_json 1)" in text
    assert "100% of the answers are HTML" in text
    assert "The river" not in text, "no chat text"


def test_every_setting_stands_there_as_a_comment_with_its_default(tmp_path: Path) -> None:
    toy.write_dumps(tmp_path, num_chats=3, num_records=3)
    text = written(tmp_path, tmp_path / "new.yaml")
    uncommented = re.sub(
        r"^# (?=(\w+:|  ))", "", text.replace("#   path: models/my-model", "#   path: m"), flags=re.MULTILINE
    )
    (tmp_path / "all.yaml").write_text(uncommented)
    config, plain = load_config(tmp_path / "all.yaml"), load_config(tmp_path / "new.yaml")
    assert config.model_copy(update={"model": None}) == plain
    for name, field in PipelineConfig.model_fields.items():
        assert f"{name}:" in text
        for key in getattr(field.annotation, "model_fields", {}):
            assert re.search(rf"^# +{key}:", text, flags=re.MULTILINE), f"{name}.{key}"


def test_a_config_that_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    toy.write_dumps(tmp_path, num_chats=3, num_records=3)
    out = tmp_path / "mine.yaml"
    out.write_text("precious")
    with pytest.raises(ConfigError, match="--force"):
        write_config(tmp_path, model=None, out=out, force=False)
    assert out.read_text() == "precious"
    write_config(tmp_path, model=None, out=out, force=True)
    assert load_config(out).sources


def test_dumps_are_found_by_name_in_sub_folders_but_not_in_hidden_ones(tmp_path: Path) -> None:
    names = [
        "a.json",
        "b/c.jsonl.gz",
        "b/d.parquet",
        "e.JSONL.ZST",
        ".hidden/f.json",
        "g.txt",
        "b/.h.json",
        "i.csv",
        "j.zip",
        "k.pdf",
        "l/data-0.arrow",
        "l/cache-1.arrow",
        "l/state.json",
        "l/dataset_info.json",
        "dataset_dict.json",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "l/state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    found = [path.relative_to(tmp_path).as_posix() for path in dump_files(tmp_path)]
    expected = ["a.json", "b/c.jsonl.gz", "b/d.parquet", "e.JSONL.ZST", "i.csv", "j.zip", "l/data-0.arrow"]
    assert found == expected


def test_an_unreadable_dump_is_left_out_with_the_reason(tmp_path: Path) -> None:
    toy.write_dumps(tmp_path / "dumps", num_chats=3, num_records=3)
    (tmp_path / "dumps" / "archive.json").write_bytes(b"PK\x03\x04nothing")
    text = written(tmp_path / "dumps", tmp_path / "new.yaml")
    assert "not a zip archive" in text
    assert "# left out: dumps/archive.json" in text
    assert len(load_config(tmp_path / "new.yaml").sources) == 2


@pytest.mark.parametrize("kind", ["none", "empty", "file"])
def test_a_folder_without_a_chat_is_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "dumps"
    if kind == "file":
        folder.write_text("x")
    if kind == "empty":
        folder.mkdir()
        (folder / "empty.json").write_text("[]")
    with pytest.raises(InputError, match=str(folder)):
        write_config(folder, model=None, out=tmp_path / "new.yaml", force=False)
    assert not (tmp_path / "new.yaml").exists()


def test_names_of_sources_are_words_and_differ(tmp_path: Path) -> None:
    for name in ("a b.json", "a/a b.json", "ünï.jsonl", "a/b: #1.json"):
        (tmp_path / "dumps" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dumps" / name).write_text(json.dumps(toy.alpaca_records(2)))
    write_config(tmp_path / "dumps", model=None, out=tmp_path / "new.yaml", force=False)
    sources = load_config(tmp_path / "new.yaml").sources
    assert len({source.name for source in sources}) == 4
    assert all(Path(source.path).is_file() for source in sources)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_of_a_large_dump_only_the_head_is_read_and_its_cut_is_not_held_against_it(
    tmp_path: Path, packed: str
) -> None:
    record = json.dumps(toy.sharegpt_chats(1)[0] | {"filler": "x" * 50_000})
    number = 2 * HEAD_BYTES // len(record)
    content = ("[" + ",".join([record] * number) + "]").encode()
    path = tmp_path / f"large.json{packed}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed](content))
    look = look_at(path)
    assert look.problem == ""
    assert number // 3 < look.num_rows < number
    assert look.drops == {}


def test_a_broken_archive_is_looked_at_as_far_as_it_goes(tmp_path: Path) -> None:
    records = "\n".join(json.dumps(record) for record in toy.alpaca_records(20_000))
    packed = gzip.compress(records.encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    assert look_at(tmp_path / "cut.jsonl.gz").num_rows == 500
    (tmp_path / "dead.jsonl.gz").write_bytes(packed[:12])
    assert look_at(tmp_path / "dead.jsonl.gz").num_rows == 0


def conversations_zip(path: Path, data: bytes) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("chat.html", "<p>")
        archive.writestr("user.json", "{}")
        archive.writestr("conversations.json", data)


def arrow_file(path: Path, records: list[dict[str, str]], *, as_stream: bool) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(records)
    new = pa.ipc.new_stream if as_stream else pa.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


@pytest.mark.parametrize("kind", ["zip", "arrow file", "arrow stream", "csv", "keyed"])
@pytest.mark.parametrize("is_large", [False, True])
def test_archives_tables_and_objects_of_records_are_looked_at_by_their_beginning(
    tmp_path: Path, kind: str, is_large: bool
) -> None:
    number = 2 * HEAD_BYTES // 2000 if is_large else 60
    records = [
        record | {"input": f"{n} " + "x" * 2000} for n, record in enumerate(toy.alpaca_records(number))
    ]
    path = tmp_path / f"dump.{kind.split()[0]}"
    if kind == "zip":
        conversations_zip(path, json.dumps(records).encode())
    elif kind == "csv":
        path.write_text(
            "instruction,input,output\n"
            + "".join(f"{r['instruction']},{r['input']},{r['output']}\n" for r in records)
        )
    elif kind == "keyed":
        path.write_text(json.dumps({f"id {n}": record for n, record in enumerate(records)}))
    else:
        arrow_file(path, records, as_stream=kind == "arrow stream")
    look = look_at(path)
    assert look.problem == ""
    assert look.formats == {"alpaca": look.num_rows}
    assert look.num_rows == (500 if is_large else 60)


def test_what_new_formats_are_is_said_and_how_a_talk_is_read(tmp_path: Path) -> None:
    talk = [{"messages": [{"sender": "a", "text": "hi"}, {"sender": "b", "text": "ho"}]}]
    tree = [{"prompt": {"text": "q", "role": "prompter", "replies": [{"text": "A", "role": "assistant"}]}}]
    for name, records in (
        ("talk", talk),
        ("tree", tree),
        ("pairs", [{"prompt": "q", "chosen": "a", "rejected": "b"}]),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    text = written(tmp_path, tmp_path / "new.yaml")
    assert "1 oasst" in text
    assert "1 preference" in text
    assert "name the assistant with assistant_side" in text
