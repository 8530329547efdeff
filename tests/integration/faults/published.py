"""What a run root shows to those who read it is whole: judged from the files alone. Imports nothing of the product."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

VOLATILE = ("timing.json", "run.lock")
"""Times, hosts and process ids: not part of a result."""


def check_published(run_root: Path) -> list[str]:
    """Everything that is published and not whole, a line each; what is not there is in order."""
    problems: list[str] = []
    for path in sorted(run_root.rglob("*.json")):
        if not _is_hidden(path, run_root):
            problems += _check_record(path, run_root)
    for pointer in sorted(run_root.glob("checkpoints/current")):
        problems += _check_pointer(pointer, "training.json")
    for pointer in sorted(run_root.glob("checkpoints/*/latest")):
        problems += _check_pointer(pointer, "manifest.json")
    if (run_root / "holdout.parquet").exists():
        pq.read_table(run_root / "holdout.parquet", page_checksum_verification=True)
    return problems


def digests(run_root: Path) -> dict[str, str]:
    """sha256 of every file by name. Of metrics only what equal work makes equal: steps and losses."""
    found = {}
    for path in sorted(run_root.rglob("*")):
        name = path.relative_to(run_root).as_posix()
        if not path.is_file() or path.name in VOLATILE or "tensorboard" in path.parts:
            continue
        data = path.read_bytes()
        found[name] = hashlib.sha256(_losses(data) if path.name == "metrics.jsonl" else data).hexdigest()
    return found


def state(run_root: Path) -> str:
    """Digest of a run root as the next run finds it: a file that is still being written is only known by its name."""
    found = {
        re.sub(r"\.tmp-(removed-)?\d+-", r".tmp-\1PID-", name): "" if "/.tmp-" in f"/{name}" else digest
        for name, digest in digests(run_root).items()
    }
    folders = sorted(path.relative_to(run_root).as_posix() for path in run_root.rglob("*") if path.is_dir())
    named = [re.sub(r"\.tmp-(removed-)?\d+-", r".tmp-\1PID-", name) for name in folders]
    return hashlib.sha256(json.dumps([found, named], sort_keys=True).encode()).hexdigest()


def _is_hidden(path: Path, run_root: Path) -> bool:
    """Being written, or removed: nobody reads it."""
    return any(part.startswith(".") for part in path.relative_to(run_root).parts)


def _check_record(path: Path, run_root: Path) -> Iterator[str]:
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        yield f"{path}: {error}"
        return
    if isinstance(record, dict) and "self_sha256" in record and not is_sealed(record):
        yield f"{path}: its own digest is wrong"
    for entry in _entries(record):
        file = path.parent / entry["path"]
        data = file.read_bytes() if file.exists() else None
        if (
            data is None
            or hashlib.sha256(data).hexdigest() != entry["sha256"]
            or len(data) != entry["num_bytes"]
        ):
            yield f"{path} names {file}, which is {'gone' if data is None else 'another file'}"
    if path.name == "promoted.json":
        for model in (record["current"]["model"],):
            if not (run_root / model["path"]).is_dir():
                yield f"{path} names {model['path']}, which is gone"


def is_sealed(record: dict[str, Any]) -> bool:
    """Whether `self_sha256` is the digest of the rest as our files write it."""
    rest = {name: value for name, value in record.items() if name != "self_sha256"}
    text = json.dumps(rest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return hashlib.sha256(text.encode()).hexdigest() == record["self_sha256"]


def _entries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if {"path", "num_bytes", "sha256"} <= value.keys():
            yield value
        for inner in value.values():
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def _check_pointer(pointer: Path, needed: str) -> Iterator[str]:
    folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not (folder / needed).is_file():
        yield f"{pointer} names {folder.name!r}, which has no {needed}"


def _losses(data: bytes) -> bytes:
    kept = ("step", "loss", "validation_loss", "num_tokens")
    lines = [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
    return json.dumps([[line.get(name) for name in kept] for line in lines]).encode()
