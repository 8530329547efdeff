"""`download` from a hub on this machine: what comes, what never comes, and what is said when nothing can."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.flows.hub_server import COMMIT, NAME, hub_of
from tests.trainer.tiny_models import write_model

ROOT = Path(__file__).parent.parent.parent
CONFIG = """\
run_root: run
sources: [{name: chats, path: chats.json}]
engine: {min_free_gib: 0.1}
"""


def sft_pipeline(
    folder: Path, *arguments: str, address: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: the hub's client reads its variables once, as it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "hub"),
        "HF_ENDPOINT": address,
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model with everything that a hub's folder may hold beside."""
    folder = write_model(tmp_path_factory.mktemp("model") / "model")
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | {"pytorch_model.bin": b"pickle", "modeling_tiny.py": b"code", "onnx/model.onnx": b"other"}


def snapshots(folder: Path) -> set[str]:
    paths = (folder / "hub").glob("hub/models--*/snapshots/*/**/*")
    return {path.name for path in paths if path.is_file()}


def test_what_is_downloaded_is_pinned_and_found_again_without_a_network(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    with hub_of(files) as address:
        done = sft_pipeline(tmp_path, "download", NAME, "--revision", "v1", address=address)
    assert done.returncode == 0, done.stderr
    assert YAML(typ="safe").load(done.stdout) == {"model": {"path": NAME, "revision": COMMIT}}
    assert snapshots(tmp_path) == set(files) - {
        "pytorch_model.bin",
        "modeling_tiny.py",
        "model.onnx",
        "onnx/model.onnx",
    }
    (tmp_path / "config.yaml").write_text(CONFIG + done.stdout)
    # The hub is gone, and the rules read the model's own config.json.
    refused = sft_pipeline(tmp_path, "train", "config.yaml", address=address, HF_HUB_OFFLINE="1")
    assert refused.returncode == 2
    assert "error: positions: split.max_tokens is 2048, the model has 256 positions" in refused.stderr


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        (NAME, "v2", "has nothing at revision v2: give a commit, a tag or a branch"),
        ("owner/other", "", "the hub knows no model owner/other"),
        ("not/a/name", "", "is no name of the hub"),
    ],
)
def test_what_the_hub_does_not_have_is_said_on_one_line(
    tmp_path: Path, files: dict[str, bytes], name: str, revision: str, said: str
) -> None:
    with hub_of(files) as address:
        pinned = ["--revision", revision] if revision else []
        done = sft_pipeline(tmp_path, "download", name, *pinned, address=address)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_of_pickles_is_refused_with_the_reason(tmp_path: Path, files: dict[str, bytes]) -> None:
    pickled = {name: data for name, data in files.items() if not name.endswith(".safetensors")}
    with hub_of(pickled) as address:
        done = sft_pipeline(tmp_path, "download", NAME, address=address)
    assert done.returncode == 2
    assert "holds no safetensors, only pytorch_model.bin, a pickle, which can run code" in done.stderr
    assert snapshots(tmp_path) == set()


def test_bytes_other_than_the_hub_records_are_not_kept(tmp_path: Path, files: dict[str, bytes]) -> None:
    weights = files["model.safetensors"]
    flipped = {"model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])}
    with hub_of(files, served=flipped) as address:
        done = sft_pipeline(tmp_path, "download", NAME, address=address)
    assert done.returncode == 1
    assert "model.safetensors came with sha256" in done.stderr
    assert "model.safetensors" not in snapshots(tmp_path)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "the hub can't be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it for this command"),
    ],
    ids=["no hub", "switched off"],
)
def test_without_a_network_it_says_so(tmp_path: Path, variables: dict[str, str], said: str) -> None:
    done = sft_pipeline(tmp_path, "download", NAME, address="http://127.0.0.1:9", **variables)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
