"""Chat templates that a config can take by name: for base models, which have none, or in place of their own.

Each is a Jinja file in pipelines/chat_templates that names its end token in its second line. A tokenizer that
lacks this token gets its eos_token in its place: an end token that is only text would stop no generation. Roles
and other marks that a tokenizer lacks are encoded as text.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError, RefusedError
from schemas.pipeline_config import BUILT_IN_TEMPLATES

_FOLDER = Path(__file__).parent / "chat_templates"
_END = re.compile(r"\{%- set end_of_turn = (?:'(?P<token>[^']+)'|eos_token) -%\}")


def template_bytes(name_or_path: str) -> bytes:
    """The file that split.chat_template names. Raises ConfigError."""
    if name_or_path in BUILT_IN_TEMPLATES:
        return _built_in(name_or_path)
    try:
        source = Path(name_or_path).read_bytes()
        source.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"split.chat_template: {name_or_path} is not a readable UTF-8 file ({error}); give a Jinja file or "
            f"one of {', '.join(BUILT_IN_TEMPLATES)}"
        ) from error
    return source


def template_for(name_or_path: str, tokenizer: Any) -> str:
    """The source of that template as this tokenizer needs it. Raises ConfigError, RefusedError (no end token)."""
    source = template_bytes(name_or_path).decode()
    if name_or_path not in BUILT_IN_TEMPLATES:
        return source
    found = _END.search(source)
    assert found is not None, f"{name_or_path} names no end token"
    end = found["token"]
    if end is not None and end in tokenizer.get_added_vocab():
        return source
    if tokenizer.eos_token is None:
        wanted = f"neither {end} nor" if end is not None else "no"
        raise RefusedError(
            f"split.chat_template: {name_or_path} needs a token that ends answers, and the tokenizer has {wanted} an "
            "eos_token: set eos_token in its tokenizer_config.json, or name a template whose end token it has"
        )
    return _END.sub("{%- set end_of_turn = eos_token -%}", source)


@cache
def _built_in(name: str) -> bytes:
    return (_FOLDER / f"{name}.jinja").read_bytes()
