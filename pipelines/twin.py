"""A tokenizer that knows private strings in place of its control tokens; see pipelines.encode."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from schemas.errors import RefusedError

if TYPE_CHECKING:
    from pipelines.encode import ChatEncoder


@dataclass(frozen=True, slots=True, eq=False)
class Twin:
    """The tokenizer with each control token under its alias. `ids` turns the twin's ids into the tokenizer's."""

    backend: Tokenizer
    aliases: Mapping[str, str]
    ids: np.ndarray


_PLANES = (0xF0000, 0x100000)


def free_plane(text: str, num_aliases: int) -> int | None:
    """Where private characters begin of which the text has none."""
    # Icon fonts use plane 15; a text with characters of both planes has not been seen.
    planes = [p for p in _PLANES if not re.search(f"[{chr(p)}-{chr(p + num_aliases)}]", text)]
    return planes[0] if planes else None


@lru_cache(maxsize=4)
def twin_of(encoder: "ChatEncoder", plane: int) -> Twin:
    """The twin whose aliases begin at a plane of private characters. Raises RefusedError."""
    if len(encoder.control_ids) > 0xFFF0:
        raise RefusedError(f"the tokenizer has {len(encoder.control_ids)} added tokens, more than 65,520")
    aliases = {token: chr(plane + n) * len(token) for n, token in enumerate(encoder.control_ids)}
    state = json.loads(encoder.backend.to_str())
    for token in state["added_tokens"]:
        token["content"] = aliases.get(token["content"], token["content"])
    state["model"] = _renamed_model(state["model"], aliases)
    backend = Tokenizer.from_str(json.dumps(state))
    backend.encode_special_tokens = encoder.backend.encode_special_tokens
    known = backend.get_added_tokens_decoder()
    twin_ids = {token.content: token_id for token_id, token in known.items()}
    ids = np.arange(max(len(encoder.is_control), *twin_ids.values()) + 1, dtype=np.int32)
    for token, alias in aliases.items():
        ids[twin_ids[alias]] = encoder.control_ids[token]
    return Twin(backend, aliases, ids)


def _renamed_model(model: dict[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The model without a way from plain text to a control token: it may be a piece of the vocabulary too."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary = {aliases.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    else:
        vocabulary = [[aliases.get(piece, piece), score] for piece, score in vocabulary]
    renamed = model | {"vocab": vocabulary}
    if "unk_token" in model:
        renamed["unk_token"] = aliases.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        renamed["merges"] = [
            [a, b]
            for a, b in model["merges"]
            if a not in aliases and b not in aliases and a + b not in aliases
        ]
    return renamed
