"""Sources behind URLs (s3://, gs://, https://, hf://datasets/OWNER/NAME, ...): listed, and copied into the spool.

Any file system that fsspec knows. Keys and passwords come from where its library looks for them (environment,
profile), never from the URL.
"""

import glob
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.sources import has_known_suffix, ignored_note, nothing_found
from schemas.errors import InputError
from schemas.source_config import SourceConfig

_CHUNK_BYTES = 4 << 20
# What `datasets` and the hub put beside their data.
_BESIDE_DATA = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


class RemoteFile(NamedTuple):
    """A file behind a URL: `label` is its path inside the source."""

    label: str
    path: str
    file_system: Any


def is_url(path: str) -> bool:
    """Whether a source is not on this machine's disk."""
    return "://" in path


def find_remote_files(source: SourceConfig) -> tuple[list[RemoteFile], list[str]]:
    """The files of a source in the order of their labels, and notes on what was ignored. Raises InputError."""
    try:
        file_system, root, found = _listed(source.path)
    except Exception as error:
        raise _unreachable(source, source.path, error) from error
    if found == [root]:
        return [RemoteFile(root.rsplit("/", 1)[-1], root, file_system)], []
    fixed = _fixed_part(root)
    labels = sorted((path.removeprefix(fixed).lstrip("/"), path) for path in found)
    visible = [
        (label, path) for label, path in labels if not any(s.startswith(".") for s in label.split("/"))
    ]
    known = [
        RemoteFile(label, path, file_system)
        for label, path in visible
        if has_known_suffix(label, source) and label.rsplit("/", 1)[-1] not in _BESIDE_DATA
    ]
    if not known:
        raise nothing_found(source, source.path, len(labels))
    names = {file.label for file in known}
    return known, ignored_note(source, [label for label, _ in visible if label not in names])


def remote_version(file: RemoteFile, source: SourceConfig) -> str:
    """What the store calls this state of the file; empty where it does not say, or only nearly. Raises InputError."""
    try:
        return _version(file.file_system.info(file.path))
    except Exception as error:
        raise _unreachable(source, file.label, error) from error


def download(file: RemoteFile, target: Path, source: SourceConfig) -> str:
    """Copy a file to this machine and return its version. Raises InputError when it can't be had whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = 0
    try:
        info = file.file_system.info(file.path)
        with file.file_system.open(file.path, "rb") as remote, target.open("wb") as local:
            while chunk := remote.read(_CHUNK_BYTES):
                num_bytes += local.write(chunk)
        # A file is asked for block by block: one that is replaced meanwhile comes as a mixture of its two states.
        version, version_after = _version(info), _version(file.file_system.info(file.path))
    except Exception as error:
        raise _unreachable(source, file.label, error) from error
    expected = info.get("size")
    if expected is not None and num_bytes != expected:
        raise InputError(
            f"source {source.name}: {file.label} has {expected} bytes, {num_bytes} came: run again"
        )
    if version != version_after:
        raise InputError(f"source {source.name}: {file.label} changed while it was being fetched: run again")
    return version


# HTTP, S3 and Azure; Google; the hub.
_VERSION_KEYS = ("ETag", "etag", "blob_id")


def _version(info: dict[str, Any]) -> str:
    found = next((info[key] for key in _VERSION_KEYS if info.get(key)), "")
    # A weak ETag stays when the bytes change in a way that its server takes for none.
    return found if isinstance(found, str) and not found.startswith("W/") else ""


def _listed(url: str) -> tuple[Any, str, list[str]]:
    from fsspec.core import url_to_fs

    file_system, root = url_to_fs(url)
    root = root.rstrip("/")
    file_system.invalidate_cache()  # of listings that an earlier merge of this process has seen
    if glob.has_magic(root):
        found = [path for path in file_system.glob(root) if file_system.isfile(path)]
    elif _is_file(file_system, root):
        found = [root]
    else:
        found = file_system.find(root)
    return file_system, root, found


def _is_file(file_system: Any, path: str) -> bool:
    """As the store's own isfile; over HTTP that one asks for the whole file."""
    try:
        return bool(file_system.info(path)["type"] == "file")
    except FileNotFoundError:
        return False


def _fixed_part(root: str) -> str:
    """The folder, or the part of a glob without wildcards."""
    parts = root.split("/")
    num_fixed = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[:num_fixed])


def _unreachable(source: SourceConfig, what: str, error: Exception) -> InputError:
    said = " ".join(str(error).split())[:300]
    return InputError(
        f"source {source.name}: {what} can't be read ({type(error).__name__}: {said}); is it there, is the network, "
        "and are keys set in the environment? Or download it and name the local path"
    )
