"""`doctor` as a process of its own in environments where one thing each is wrong; what it names, and its exit code."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows.distributions import is_there
from flows.local_prefect import running_server
from tests.flows.test_doctor import distribution, sized_model
from tests.integration import toy

ROOT = Path(__file__).parent.parent.parent
DOCTOR = [sys.executable, "-c", "from flows.cli import main; main()", "doctor", "--json"]


def doctor(
    *arguments: str, path: str = str(ROOT), shell: str = "", **environment: str
) -> tuple[int, dict[str, Any]]:
    """Exit code, and the findings that are not ok by subject. `shell` is run first, in mounts of its own."""
    command = [*DOCTOR, *arguments]
    if shell:
        command = [
            "unshare",
            "--mount",
            "--map-root-user",
            "sh",
            "-ec",
            f'{shell}\nexec "$@"',
            "sh",
            *command,
        ]
    result = subprocess.run(
        command,
        cwd="/",  # the working directory would come before PYTHONPATH
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.stdout.startswith("{"), result.stderr
    answer = json.loads(result.stdout)
    assert answer["would_run"] == (result.returncode == 0)
    wrong = {finding["subject"]: finding for finding in answer["findings"] if finding["level"] != "ok"}
    assert all(finding["expected"] and finding["remedy"] for finding in wrong.values())
    return result.returncode, wrong


@pytest.mark.parametrize("package", ["trainer", "pipelines", "schemas"])
def test_a_foreign_package_is_named_with_its_place_and_never_imported(tmp_path: Path, package: str) -> None:
    intruder = tmp_path / package
    intruder.mkdir()
    (intruder / "__init__.py").write_text("raise RuntimeError('imported')")
    code, wrong = doctor("--until", "pack", path=f"{tmp_path}{os.pathsep}{ROOT}")
    assert code == 1
    assert set(wrong) == {"packages"}
    assert str(intruder) in wrong["packages"]["found"]
    assert str(ROOT) in wrong["packages"]["expected"]


def test_a_second_fasttext_distribution_fails_with_the_commands_that_mend_it(tmp_path: Path) -> None:
    distribution(tmp_path, "fasttext", module="fasttext")
    code, wrong = doctor("--until", "pack", path=f"{ROOT}{os.pathsep}{tmp_path}")
    assert code == 1
    assert wrong["fasttext"]["found"] == "fasttext and fasttext-predict overwrite each other"
    assert "pip uninstall --yes fasttext fasttext-predict" in wrong["fasttext"]["remedy"]


def test_a_library_of_a_wrong_version_fails_with_the_command_that_mends_it(tmp_path: Path) -> None:
    distribution(tmp_path, "fastapi", version="0.165.0")
    code, wrong = doctor("--until", "pack", path=f"{ROOT}{os.pathsep}{tmp_path}")
    assert code == 1
    assert "fastapi is 0.165.0" in wrong["libraries"]["found"]
    assert wrong["libraries"]["remedy"] == "pip install 'fastapi<0.151,>=0.139'"


def test_a_torch_that_does_not_start_fails_where_training_is_wanted_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: no such file')")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    code, wrong = doctor(path=path)
    assert (code, wrong["training"]["level"]) == (1, "fails")
    assert "libcudart.so.13" in wrong["training"]["found"]
    code, wrong = doctor("--until", "pack", path=path)
    assert (code, "training" in wrong) == (0, False)


# Prefect ----------------------------------------------------------------------------------------------------


class Page(BaseHTTPRequestHandler):
    """A web page that has nothing to do with Prefect."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>welcome</html>")

    def log_message(self, format: str, *arguments: Any) -> None:
        return


@contextmanager
def web_page() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_a_port_that_another_program_has_taken_is_named_and_stops_no_run(tmp_path: Path) -> None:
    with web_page() as port:
        code, wrong = doctor(
            "--until", "pack", PREFECT_SERVER_API_PORT=str(port), HOME=str(tmp_path), PREFECT_API_URL=""
        )
    assert (code, wrong["port"]["level"]) == (0, "warns")
    assert f"{port} is taken by a program that is not Prefect" in wrong["port"]["found"]
    assert "PREFECT_SERVER_API_PORT" in wrong["port"]["remedy"]


@pytest.mark.parametrize("what", ["nothing", "a page", "no http"])
def test_a_server_that_was_named_must_answer_as_prefect(tmp_path: Path, what: str) -> None:
    with web_page() as page_port, socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=talk_nonsense, args=(bound,), daemon=True)
        thread.start()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports = {"nothing": free.getsockname()[1], "a page": page_port, "no http": bound.getsockname()[1]}
            url = f"http://127.0.0.1:{ports[what]}/api"
            code, wrong = doctor("--until", "pack", PREFECT_API_URL=url, PREFECT_HOME=str(tmp_path / "home"))
    assert (code, wrong["server"]["level"]) == (1, "fails")
    assert url in wrong["server"]["found"]
    assert wrong["server"]["found"].startswith("nothing answers") == (what == "nothing")
    assert list(tmp_path.iterdir()) == [], "doctor made Prefect's folder"


def talk_nonsense(bound: socket.socket) -> None:
    while True:
        try:
            client, _ = bound.accept()
        except OSError:
            return
        client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        client.close()


@pytest.mark.stress
def test_a_real_server_is_found_and_one_that_asks_for_a_password_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "admin:secret-word")
    with running_server() as url:
        with urllib.request.urlopen(f"{url}/health", timeout=240) as answer:
            assert answer.read() == b"true"
        monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING")
        code, wrong = doctor("--until", "pack", PREFECT_API_URL=url)
        assert (code, wrong["server"]["level"]) == (1, "fails")
        assert "PREFECT_API_AUTH_STRING" in wrong["server"]["remedy"]
        code, wrong = doctor("--until", "pack", PREFECT_API_URL=url, PREFECT_API_AUTH_STRING="admin:wrong")
        assert code == 1
        code, wrong = doctor(
            "--until", "pack", PREFECT_API_URL=url, PREFECT_API_AUTH_STRING="admin:secret-word"
        )
        assert (code, "server" in wrong) == (0, False)
        port = url.split(":")[2].split("/")[0]
        code, wrong = doctor("--until", "pack", PREFECT_SERVER_API_PORT=port, HOME=str(tmp_path / "h"))
        assert (code, "port" in wrong) == (0, False)


def test_a_prefect_folder_that_others_can_read_is_warned_about(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    code, wrong = doctor("--until", "pack", PREFECT_HOME=str(tmp_path), PREFECT_API_URL="")
    assert code == 0
    assert wrong["prefect home"]["remedy"].startswith(f"chmod 700 {tmp_path}")


# Disk -------------------------------------------------------------------------------------------------------


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(
    not can_mount(), reason="this machine allows no mounts, not even private ones"
)


@pytest.fixture(scope="module")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of the data stages, its run root on a folder of its own, its dumps of some 580 kB beside it."""
    folder = tmp_path_factory.mktemp("small")
    toy.write_dumps(folder / "dumps", num_chats=400, num_records=200)
    toy.write_tokenizer(folder / "model")
    (folder / "disk").mkdir()
    text = toy.CONFIG.format(run_root="disk/run").replace("min_free_gib: 0.1", "min_free_gib: 0.0001")
    config = folder / "config.yaml"
    config.write_text(text)
    return config


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize(
    ("size", "code", "level"), [("400k", 1, "fails"), ("3m", 0, "warns"), ("16m", 0, "ok")]
)
def test_a_small_disk_is_held_against_what_the_sources_will_become(
    small_config: Path, size: str, code: int, level: str
) -> None:
    disk = small_config.parent / "disk"
    found, wrong = doctor(
        str(small_config), "--until", "pack", shell=f"mount -t tmpfs -o size={size} none '{disk}'"
    )
    assert (found, wrong.get("disk", {"level": "ok"})["level"]) == (code, level)
    if level != "ok":
        assert f"free at {disk}" in wrong["disk"]["found"]
        assert all(name in wrong["disk"]["expected"] for name in ("01_merged", "06_shards", "min_free_gib"))


@pytest.mark.slow
@needs_mounts
def test_a_run_root_that_can_not_be_written_fails(small_config: Path) -> None:
    disk = small_config.parent / "disk"
    code, wrong = doctor(
        str(small_config), "--until", "pack", shell=f"mount -t tmpfs -o ro,size=16m none '{disk}'"
    )
    assert (code, set(wrong)) == (1, {"run root"})
    assert str(disk) in wrong["run root"]["found"]


@pytest.mark.slow
@pytest.mark.skipif(not is_there("deepspeed"), reason="DeepSpeed is not installed here")
def test_deepspeeds_build_tools_are_named_where_they_are_not_on_the_path(tmp_path: Path) -> None:
    toy.write_dumps(tmp_path / "dumps", num_chats=10, num_records=5)
    toy.write_model(tmp_path / "model")
    config = toy.write_config(tmp_path)
    code, wrong = doctor(str(config), "--set", "train.strategy=zero1", PATH=str(tmp_path))
    assert code == 0, "ZeRO 1 and 2 run without them"
    assert wrong["deepspeed"]["level"] == "warns"
    assert "g++, ninja" in wrong["deepspeed"]["found"]
    assert "g++" in wrong["deepspeed"]["remedy"]


@pytest.mark.slow
def test_a_model_too_large_for_memory_and_disk_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    toy.write_dumps(tmp_path / "dumps", num_chats=10, num_records=5)
    toy.write_tokenizer(sized_model(tmp_path / "model", layers=4000, hidden=8192))
    config = toy.write_config(tmp_path)
    started = time.monotonic()
    code, wrong = doctor(str(config), "--set", "train.method=full")
    assert code == 1
    assert wrong["memory"]["level"] == wrong["disk"]["level"] == "fails"
    assert "checkpoints" in wrong["disk"]["expected"]
    assert time.monotonic() - started < 100
