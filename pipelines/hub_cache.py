"""Where a model or tokenizer lies on this machine: a folder, or its snapshot in the local hub cache. No network.

`sft-pipeline download` puts snapshots there.
"""

from functools import lru_cache
from pathlib import Path

from schemas.errors import InputError

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.md", "LICENSE*")
"""All that is downloaded of a model, and asked for here: weights as safetensors, settings, tokenizer, licence. A
snapshot without its pickles would else count as incomplete."""


def model_folder(name: str, revision: str | None = None, *, what: str = "model") -> Path:
    """The folder itself, or the snapshot of a hub name. Raises InputError when it is neither."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(name, revision)
    except (LocalEntryNotFoundError, HFValidationError):
        pinned = f" --revision {revision}" if revision else ""
        raise InputError(
            f"{what} {name!r} is neither a folder nor in the local hub cache; download it once "
            f"with `sft-pipeline download {name}{pinned}` or give a folder"
        ) from None


@lru_cache
def _snapshot(name: str, revision: str | None) -> Path:
    # Imported late: the hub client costs more than all that asks for folders.
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        name, revision=revision, local_files_only=True, allow_patterns=list(MODEL_FILES)
    )
    return Path(found)
