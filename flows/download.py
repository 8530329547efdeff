"""`sft-pipeline download NAME --revision COMMIT`: a model of the hub into the local cache. No other command goes there.

Weights come as safetensors or not at all, code never, and each large file is held against its sha256 in the
hub's own record. What is printed goes into the config, so that the same bytes are trained next year.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.hub_cache import MODEL_FILES
from pipelines.storage import file_sha256
from schemas.errors import InputError, IntegrityError, RefusedError, StorageError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
GIB = 2**30


def download(name: str, revision: str | None) -> None:
    """Print the section model for the config, with the revision pinned. Raises errors of schemas.errors."""
    _prepare_client()
    from huggingface_hub import HfApi, snapshot_download

    with _explained(name, revision):
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        wanted = _wanted_files(name, info)
        _check_room(wanted)
        sys.stderr.write(f"{name} {info.sha}: {len(wanted)} files, {sum(wanted.values()) / GIB:.2f} GiB\n")
        folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=list(MODEL_FILES)))
    _check_digests(folder, info)
    sys.stderr.write(f"in {folder}\n")
    print(f"model:\n  path: {name}\n  revision: {info.sha}")


def _prepare_client() -> None:
    """Before its import, which reads these."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _wanted_files(name: str, info: "ModelInfo") -> Mapping[str, int]:
    """Their sizes. Raises RefusedError where the weights are no safetensors."""
    from fnmatch import fnmatchcase

    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if not any(path.endswith(".safetensors") for path in sizes):
        raise RefusedError(f"{name} holds no safetensors, {_what_it_holds(sorted(sizes))}")
    return {
        path: size
        for path, size in sizes.items()
        if any(fnmatchcase(path, pattern) for pattern in MODEL_FILES)
    }


def _what_it_holds(paths: Sequence[str]) -> str:
    pickles = [path for path in paths if path.endswith(PICKLES)]
    if not pickles:
        return f"but {', '.join(paths[:3]) or 'nothing'}: is it a model? name one with weights"
    return (
        f"only {pickles[0]}, a pickle, which can run code as it is read: look for a revision with safetensors (the "
        "hub's robot offers them as refs/pr/...)"
    )


def _check_room(wanted: Mapping[str, int]) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    place = next(path for path in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if path.exists())
    free, needed = shutil.disk_usage(place).free, sum(wanted.values())
    if free < needed:
        raise StorageError(
            f"{place} has {free / GIB:.2f} GiB free, the model takes {needed / GIB:.2f} GiB; make room, or set HF_HOME "
            "to another disk"
        )


def _check_digests(folder: Path, info: "ModelInfo") -> None:
    """Of the large files, whose sha256 the hub keeps."""
    for file in info.siblings or ():
        path = folder / file.rfilename
        if file.lfs is None or not path.is_file():
            continue
        found = file_sha256(path)
        if found != file.lfs.sha256:
            path.resolve().unlink()
            raise IntegrityError(
                f"{file.rfilename} came with sha256 {found[:12]}, the hub says {file.lfs.sha256[:12]}; it was removed: run "
                "the command again"
            )


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Errors of the hub's client, on one line with what to do."""
    import huggingface_hub.errors as hub

    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except hub.OfflineModeIsEnabled:
        raise RefusedError(
            f"{name} can't be downloaded: HF_HUB_OFFLINE is set; unset it for this command"
        ) from None
    except hub.GatedRepoError:
        raise InputError(
            f"{name} is given to those who accepted its licence: do so on its page, and set HF_TOKEN to a token of yours"
        ) from None
    except hub.RepositoryNotFoundError:
        raise InputError(
            f"the hub knows no model {name}, or shows it to its owners alone: look at the name, or set HF_TOKEN"
        ) from None
    except (hub.RevisionNotFoundError, hub.EntryNotFoundError):
        raise InputError(f"{name} has nothing{at}: give a commit, a tag or a branch of it") from None
    except hub.HFValidationError as error:
        raise InputError(f"{name!r} is no name of the hub, such as owner/model: {_line(error)}") from None
    except Exception as error:
        if not _is_connection(error):
            raise
        raise InputError(
            f"the hub can't be reached ({_line(error)}): look at the network, the proxy and HF_ENDPOINT; a folder copied "
            "from elsewhere works as model.path, too"
        ) from None


def _is_connection(error: Any) -> bool:
    """Of the hub itself, or of whatever HTTP library its client stands on."""
    import huggingface_hub.errors as hub

    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, (hub.HfHubHTTPError, ConnectionError)) or bool(
        modules & {"httpx", "httpx2", "httpcore"}
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
