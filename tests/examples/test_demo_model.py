"""The demo's model: made whole or not at all, made once, and its tokenizer as it should be."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "examples" / "demo_model.py"


@pytest.fixture(scope="module")
def demo_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(demo_model: ModuleType, tmp_path: Path) -> Path:
    """A folder as the script leaves it, with other files."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    demo_model.write_digests(folder, source_sha256="source")
    return folder


def test_a_folder_is_whole_until_a_file_changes_goes_or_has_another_source(
    demo_model: ModuleType, folder: Path
) -> None:
    assert demo_model.is_whole(folder, source_sha256="source")
    assert not demo_model.is_whole(folder, source_sha256="another")
    (folder / "model.safetensors").write_bytes(b"Weights")
    assert not demo_model.is_whole(folder, source_sha256="source")
    (folder / "model.safetensors").unlink()
    assert not demo_model.is_whole(folder, source_sha256="source")
    assert not demo_model.is_whole(folder.parent / "absent", source_sha256="source")


@pytest.mark.parametrize("digests", ["", "[]", "{}", '{"conversion_version": 0}'])
def test_a_folder_with_another_record_is_not_whole(
    demo_model: ModuleType, folder: Path, digests: str
) -> None:
    (folder / "digests.json").write_text(digests)
    assert not demo_model.is_whole(folder, source_sha256="source")


def test_a_new_folder_takes_the_place_of_an_old_one_and_leaves_nothing_beside_it(
    demo_model: ModuleType, folder: Path
) -> None:
    aside = folder.parent / ".aside"
    aside.mkdir(mode=0o700)
    (aside / "new").write_text("new")
    demo_model.replace_folder(aside, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_what_a_killed_run_left_is_removed_and_a_failure_leaves_nothing(
    demo_model: ModuleType, folder: Path
) -> None:
    (folder.parent / ".model-killed").mkdir()
    (folder.parent / ".model-killed" / "half").write_text("half")
    with pytest.raises(OSError, match="disk full"):
        fail_while_writing(demo_model, folder)
    assert list(folder.parent.iterdir()) == [folder]


def fail_while_writing(demo_model: ModuleType, folder: Path) -> None:
    with demo_model.room_aside(folder) as aside:
        (aside / "half").write_text("half")
        raise OSError("disk full")


@pytest.mark.smollm
def test_the_tokenizer_splits_digits_and_ends_turns_with_its_end_token(smollm: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  2024").input_ids) == ["a", "ĠĠ", "2", "0", "2", "4"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).endswith(
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )


@pytest.mark.smollm
def test_the_folder_is_bf16_safetensors_and_complete(demo_model: ModuleType, smollm: Path) -> None:
    from safetensors import safe_open

    recorded = json.loads((smollm / "digests.json").read_text())
    assert demo_model.is_whole(smollm, source_sha256=recorded["source_sha256"])
    assert "quantization_config" not in json.loads((smollm / "config.json").read_text())
    with safe_open(smollm / "model.safetensors", framework="numpy") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
