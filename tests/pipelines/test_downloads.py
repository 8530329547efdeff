"""Sources behind URLs give the rows that the same files give from the disk."""

import functools
import gzip
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import fsspec
import pytest
from pydantic import ValidationError

from pipelines.downloads import RemoteFile, download
from pipelines.merge import plan_source, read_part
from pipelines.stage import plan_stages, run_stage
from schemas.conversation import Conversation
from schemas.errors import InputError
from schemas.pipeline_config import EngineConfig, PipelineConfig
from schemas.run import DOWNLOADS_FOLDER
from schemas.source_config import SourceConfig


def rows(path: str, spool: Path) -> tuple[list[Conversation], list[str]]:
    config = PipelineConfig(run_root=Path("run"), sources=[SourceConfig(name="s", path=path)])
    plan = plan_source(config.sources[0], config=config, spool_folder=spool)
    return [row for part in plan.parts for row, _ in read_part(part, config)], plan.notes


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "dumps"
    (folder / "sub").mkdir(parents=True)
    records = [{"prompt": f"q{n}", "completion": "a"} for n in range(20)]
    (folder / "a.json").write_text(json.dumps(records))
    (folder / "sub" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x", "completion": "y"}\n'))
    (folder / "README.md").write_text("hello")
    (folder / "dataset_infos.json").write_text("{}")
    return folder


@pytest.fixture
def site(folder: Path) -> Iterator[str]:
    handler = functools.partial(Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_file_behind_http_is_the_file_on_the_disk(site: str, folder: Path, tmp_path: Path) -> None:
    for name in ("a.json", "sub/b.jsonl.gz"):
        found, _ = rows(f"{site}/{name}", tmp_path / "spool")
        local, _ = rows(str(folder / name), tmp_path / "spool")
        assert found == local


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_folder_and_a_glob_behind_a_url_are_those_on_the_disk(
    scheme: str, folder: Path, tmp_path: Path
) -> None:
    url = f"file://{folder}"
    if scheme == "memory":
        memory = fsspec.filesystem("memory")
        memory.put(str(folder), "/bucket", recursive=True)
        url = "memory://bucket"
    found, notes = rows(url, tmp_path / "spool")
    local, _ = rows(str(folder), tmp_path / "spool")
    assert [row.row_id for row in found] == [row.row_id for row in local]
    assert [row.source for row in found] == ["s/a.json"] * 20 + ["s/sub/b.jsonl.gz"]
    assert notes == ["source s: ignored 2 files, such as README.md"]
    globbed, _ = rows(f"{url}/**/*.gz", tmp_path / "spool")
    assert [row.source for row in globbed] == ["s/sub/b.jsonl.gz"]


def test_a_url_that_leads_nowhere_says_what_to_do(site: str, tmp_path: Path) -> None:
    for url, told in (
        (f"{site}/absent.json", "source s: "),
        ("http://127.0.0.1:9/a.json", "found nothing at http"),
        ("memory://no-such-bucket", "source s: found nothing at memory://no-such-bucket"),
        ("nosuch://bucket/a.json", "Protocol not known"),
    ):
        with pytest.raises(InputError, match=told):
            rows(url, tmp_path / "spool")


def test_a_hub_that_can_not_be_reached_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hf://datasets/nobody/nothing can't be read"):
        rows("hf://datasets/nobody/nothing", tmp_path / "spool")


def test_a_download_that_ends_early_is_refused(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/early/a.json", b"[1, 2, 3]")

    class Claims:
        def info(self, path: str) -> dict[str, int]:
            return {"size": 99}

        def open(self, path: str, mode: str) -> Any:
            return memory.open(path, mode)

    source = SourceConfig(name="s", path="memory://early/a.json")
    with pytest.raises(InputError, match="has 99 bytes, 9 came"):
        download(RemoteFile("a.json", "/early/a.json", Claims()), tmp_path / "copy", source)


@pytest.mark.parametrize(
    "url",
    [
        "https://me:secret@example.org/a.json",
        "https://me@example.org/a.json",
        "https://example.org/a.json?key=secret",
        "https://example.org/a.json#key",
        "simplecache::https://example.org/a.json",
        "zip://a.json::https://example.org/a.zip",
    ],
)
def test_a_url_with_a_secret_or_a_chain_is_refused_before_anything_keeps_it(url: str) -> None:
    with pytest.raises(ValidationError, match=r"environment|one scheme"):
        SourceConfig(name="s", path=url)


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub answers about one data set, o/n, to the real client of huggingface_hub."""

    files: ClassVar = {"README.md": b"hello", "data/train.jsonl": b'{"prompt": "x", "completion": "y"}\n'}

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        name = path.rpartition("/resolve/main/")[2]
        if path == "/api/datasets/o/n":
            self.answer(
                {"id": "o/n", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in self.files]}
            )
        elif path.startswith("/api/datasets/o/n/tree/main"):
            listed = [("file", name, len(data)) for name, data in self.files.items()]
            self.answer([{"type": t, "path": p, "size": size, "oid": "0" * 40} for t, p, size in listed])
        elif name in self.files:
            self.answer(self.files[name])
        else:
            self.answer({"error": "not found"}, status=404)

    def answer(self, value: Any, status: int = 200) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


READ_FROM_HUB = """
import sys
from pathlib import Path
from tests.pipelines.test_downloads import rows
found, notes = rows("hf://datasets/o/n", Path(sys.argv[1]))
print([(row.source, [message.content for message in row.messages]) for row in found], notes)
"""


def test_a_data_set_of_the_hub_is_read_by_its_name(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        # The client reads its endpoint when it is imported: a process of its own.
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
        }
        command = [sys.executable, "-c", READ_FROM_HUB, str(tmp_path / "spool")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        server.shutdown()
        thread.join()
    assert result.returncode == 0, result.stderr
    expected = "[('s/data/train.jsonl', ['x', 'y'])] ['source s: ignored 1 files, such as README.md']"
    assert result.stdout.strip() == expected


# Copies that stay -------------------------------------------------------------------------------------------


class Tagged(http.server.SimpleHTTPRequestHandler):
    """A server that names versions of its files, in the manner of `tags`, and remembers who was asked for."""

    tags: ClassVar = {"strong": '"{}"', "weak": 'W/"{}"', "none": ""}
    kind: str = "strong"
    asked: ClassVar[list[str]] = []

    def end_headers(self) -> None:
        path = Path(self.translate_path(self.path))
        if self.tags[self.kind] and path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            self.send_header("ETag", self.tags[self.kind].format(digest))
        super().end_headers()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def tagged(folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, list[str]]]:
    """Address of a server, and the files that were fetched from it so far."""
    kind, asked = getattr(request, "param", "strong"), list[str]()
    handler = functools.partial(
        type("Handler", (Tagged,), {"kind": kind, "asked": asked}), directory=str(folder)
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def merge_config(root: Path, *urls: str, **engine: Any) -> PipelineConfig:
    sources = [SourceConfig(name=f"s{number}", path=url) for number, url in enumerate(urls)]
    return PipelineConfig(run_root=root, sources=sources, engine=EngineConfig(workers=1, **engine))


def test_a_file_is_fetched_again_only_when_its_etag_is_another(
    tagged: tuple[str, list[str]], folder: Path, tmp_path: Path
) -> None:
    site, asked = tagged
    config = merge_config(tmp_path / "run", f"{site}/a.json", f"{site}/sub/b.jsonl.gz")
    assert run_stage("merge", config).manifest.num_rows_out == 21
    assert asked == ["/a.json", "/sub/b.jsonl.gz"]
    assert run_stage("merge", config).skipped
    assert dict(plan_stages(["merge"], config))["merge"] == "unchanged, would be skipped"
    shutil.rmtree(tmp_path / "run" / "01_merged")
    manifest = run_stage("merge", config).manifest
    assert manifest.num_rows_out == 21
    assert len(asked) == 2, "all of it came from the copies"

    # Of the same size: it is the ETag that tells.
    (folder / "a.json").write_text((folder / "a.json").read_text().replace("q7", "Q7"))
    changed = run_stage("merge", config)
    assert not changed.skipped
    assert asked[2:] == ["/a.json"]
    local = merge_config(tmp_path / "local", str(folder / "a.json"), str(folder / "sub" / "b.jsonl.gz"))
    assert changed.manifest.inputs == run_stage("merge", local).manifest.inputs


@pytest.mark.parametrize("tagged", ["weak", "none"], indirect=True)
def test_without_a_strong_etag_a_file_is_fetched_each_time(
    tagged: tuple[str, list[str]], tmp_path: Path
) -> None:
    site, asked = tagged
    config = merge_config(tmp_path / "run", f"{site}/a.json")
    run_stage("merge", config)
    assert run_stage("merge", config).skipped
    assert asked == ["/a.json"] * 2
    assert not (tmp_path / "run" / DOWNLOADS_FOLDER).exists()


def test_a_copy_that_was_damaged_is_fetched_again(tagged: tuple[str, list[str]], tmp_path: Path) -> None:
    site, asked = tagged
    config = merge_config(tmp_path / "run", f"{site}/a.json")
    run_stage("merge", config)
    copy, record = sorted((tmp_path / "run" / DOWNLOADS_FOLDER).iterdir())
    whole = copy.read_bytes()
    damages: list[Callable[[], object]] = [
        lambda: copy.write_bytes(whole.replace(b"q7", b"Q7")),
        lambda: copy.write_bytes(whole[:-1]),
        lambda: record.write_bytes(record.read_bytes().replace(b"num_bytes", b"num_byted")),
        record.unlink,
        copy.unlink,
    ]
    for number, damage in enumerate(damages, start=2):
        damage()
        assert run_stage("merge", config).skipped
        assert len(asked) == number
        assert copy.read_bytes() == whole


def test_copies_are_swept_with_their_sources_and_a_plan_writes_none(
    tagged: tuple[str, list[str]], tmp_path: Path
) -> None:
    site, _ = tagged
    root = tmp_path / "run"
    two = merge_config(root, f"{site}/a.json", f"{site}/sub/b.jsonl.gz")
    dict(plan_stages(["merge"], two))
    assert not root.exists()
    run_stage("merge", two)
    assert len(list((root / DOWNLOADS_FOLDER).iterdir())) == 4
    run_stage("merge", merge_config(root, f"{site}/a.json"))
    assert len(list((root / DOWNLOADS_FOLDER).iterdir())) == 2
    kept_key = run_stage("merge", merge_config(root, f"{site}/a.json")).manifest.key
    off = run_stage("merge", merge_config(root, f"{site}/a.json", keep_downloads=False))
    assert (off.skipped, off.manifest.key) == (True, kept_key)
    assert not (root / DOWNLOADS_FOLDER).exists()


def test_a_file_that_changes_while_it_comes_is_refused(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/changing/a.json", b"[1, 2, 3]")

    class Changing:
        num_asked = 0

        def info(self, path: str) -> dict[str, Any]:
            self.num_asked += 1
            return {"size": 9, "ETag": f'"{self.num_asked}"'}

        def open(self, path: str, mode: str) -> Any:
            return memory.open(path, mode)

    source = SourceConfig(name="s", path="memory://changing/a.json")
    with pytest.raises(InputError, match=r"a\.json changed while it was being fetched: run again"):
        download(RemoteFile("a.json", "/changing/a.json", Changing()), tmp_path / "copy", source)
