"""The tokenizer of the config as files: where they lie, their digest, and the tokenizer loaded from them.

Nothing is downloaded, no code from the folder is run, and torch is not needed.
"""

import hashlib
import json
import re
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, models

from pipelines.built_in_templates import template_bytes, template_for
from pipelines.hub_cache import model_folder
from schemas.conversation import blake2b_128
from schemas.errors import ConfigError, InputError, RefusedError
from schemas.pipeline_config import BUILT_IN_TEMPLATES, PipelineConfig
from schemas.training_config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_TOKENIZER_BYTES = 64 * 2**20
"""Gemma 3, with 262,144 entries, has 33 MB."""


def load_tokenizer(config: PipelineConfig) -> "PreTrainedTokenizerFast":
    """The tokenizer that `model` names, with the template of split.chat_template where one is set.

    Raises ConfigError (no model section, no chat template), InputError (not there, unreadable),
    RefusedError (only a slow tokenizer).
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(config)
    _files(folder)
    _refuse_remote_code(folder)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder} has no readable tokenizer: {' '.join(str(error).split())[:300]}"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise RefusedError(
            f"{folder}: {type(tokenizer).__name__} gives no character offsets, which prove what is trained; "
            "use a tokenizer with a tokenizer.json"
        )
    if config.model is not None:
        add_new_tokens(tokenizer, config.model)
    tokenizer.chat_template = chat_template(tokenizer, config)
    return tokenizer  # type: ignore[no-any-return]


def add_new_tokens(tokenizer: Any, model: ModelConfig) -> None:
    """Those of model.new_tokens that it has not. Words are plain vocabulary; others are borders, as control tokens."""
    known = tokenizer.get_vocab()
    for token in model.new_tokens:
        if token not in known:
            is_special = not is_only_vocabulary(token)
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=is_special)])


def is_only_vocabulary(token: str) -> bool:
    """Whether an added token that is not special is a word or a run of blanks, and can't be taken for a border."""
    return re.fullmatch(r"[\w\s▁]+", token) is not None


def copied(backend: Tokenizer, model: models.Model | None = None) -> Tokenizer:
    """A copy to change the settings of, without post-processor, truncation and padding; around the same model.

    The model is the largest part of all and is shared: written as JSON and read again it takes most of a second.
    """
    copy = Tokenizer(model or backend.model)
    copy.normalizer, copy.pre_tokenizer, copy.decoder = (
        backend.normalizer,
        backend.pre_tokenizer,
        backend.decoder,
    )
    in_order = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    for is_special, tokens in groupby(in_order, key=lambda token: token.special):
        (copy.add_special_tokens if is_special else copy.add_tokens)(list(tokens))
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy


def chat_template(tokenizer: Any, config: PipelineConfig) -> str:
    """The template's source: what split.chat_template names, else the tokenizer's own.

    Raises ConfigError, RefusedError (no token to end answers with).
    """
    if config.split.chat_template is not None:
        return template_for(config.split.chat_template, tokenizer)
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise ConfigError(
            f"the tokenizer {tokenizer_name(config)} has no chat template: set split.chat_template to a Jinja "
            "file (a base model has none; take that of the chat model it shall become) or to one of "
            f"{', '.join(BUILT_IN_TEMPLATES)}"
        ) from None


def tokenizer_versions(config: PipelineConfig) -> dict[str, str]:
    """What shapes ids and texts beside the config: digests of the files, versions of the libraries.

    Read from the files alone, in milliseconds: it is asked in every run, also when nothing has changed.
    """
    template = "of the tokenizer"
    if config.split.chat_template is not None:
        template = hashlib.sha256(template_bytes(config.split.chat_template)).hexdigest()
    return {
        "tokenizer": _folder_digest(tokenizer_folder(config)),
        "chat_template": template,
        "embeddings": str(num_embeddings(config)),
        **_new_tokens(config),
        **{library: version(library) for library in ("jinja2", "tokenizers", "transformers")},
    }


def _new_tokens(config: PipelineConfig) -> dict[str, str]:
    tokens = config.model.new_tokens if config.model is not None else []
    return {"new_tokens": json.dumps(tokens)} if tokens else {}


def num_embeddings(config: PipelineConfig) -> int | None:
    """How many ids the model knows, by its config.json; None where there is none to read yet."""
    if config.model is None:
        return None
    try:
        path = model_folder(config.model.path, config.model.revision) / "config.json"
    except InputError:
        return None  # loading the model says it
    try:
        settings = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): take the model's own") from error
    text_settings = settings.get("text_config") or {}
    number = settings.get("vocab_size", text_settings.get("vocab_size"))
    return number if isinstance(number, int) else None


def tokenizer_name(config: PipelineConfig) -> str:
    """The name or folder that the config gives. Raises ConfigError when there is none."""
    if config.model is None:
        raise ConfigError("the config has no section model: add model.path, a folder or a cached hub name")
    return config.model.tokenizer or config.model.path


def tokenizer_folder(config: PipelineConfig) -> Path:
    """Where the tokenizer's files lie: a folder, or its snapshot in the local hub cache. Raises InputError."""
    revision = config.model.revision if config.model and config.model.tokenizer is None else None
    return model_folder(tokenizer_name(config), revision, what="tokenizer")


def _folder_digest(folder: Path) -> str:
    """Digest of every file that a tokenizer may be loaded from, by name."""
    parts: list[bytes] = []
    for path in _files(folder):
        parts += (path.relative_to(folder).as_posix().encode(), path.read_bytes())
    return blake2b_128(*parts)


def _files(folder: Path) -> list[Path]:
    """Raises InputError when there is no tokenizer, RefusedError when one is larger than any known."""
    paths = sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
    if not paths:
        raise InputError(f"{folder} has no tokenizer: expected tokenizer.json or another of its files")
    for path in paths:
        if (num_bytes := path.stat().st_size) > MAX_TOKENIZER_BYTES:
            raise RefusedError(
                f"{path} has {num_bytes} bytes, more than the {MAX_TOKENIZER_BYTES} of any known tokenizer"
            )
    return paths


_TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template.json",
    "chat_template*.jinja",
    "additional_chat_templates/*.jinja",
)


def _refuse_remote_code(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): take the model's own") from error
    unsafe = sorted(key for key in settings if key == "auto_map" or key.endswith("_internal"))
    if unsafe:
        raise RefusedError(
            f"{path} has {unsafe[0]!r}, which makes transformers run code from the model's folder; "
            "use a tokenizer that transformers knows itself"
        )
