"""Jinja chat templates, compiled as transformers does it, less what would make texts depend on the day or on chance.

A template is foreign code: it runs in Jinja's sandbox and sees roles and texts only.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from schemas.conversation import Message
from schemas.errors import RefusedError


@dataclass(frozen=True, slots=True, eq=False)
class ChatTemplate:
    """A compiled template, and what probe chats taught about it.

    `lead` is the white space between the generation prompt and an assistant's content; `end_tokens` are the
    control tokens that may close an assistant turn.
    """

    compiled: jinja2.Template
    special_tokens: Mapping[str, Any]
    control_pattern: re.Pattern[str]
    end_tokens: frozenset[str] = frozenset()
    lead: str = ""


def compile_bare(
    source: str, *, special_tokens: Mapping[str, Any], control_tokens: Sequence[str]
) -> ChatTemplate:
    """Compile a template of which nothing is known yet; see pipelines.render.compile_template.

    Raises RefusedError for one that is not valid.
    """
    longest_first = sorted(control_tokens, key=lambda token: (-len(token), token))
    pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    try:
        compiled = _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise RefusedError(f"the chat template is not valid Jinja ({error}): repair it") from error
    return ChatTemplate(compiled, special_tokens, pattern)


def render_text(
    template: ChatTemplate, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """What the tokenizer's `apply_chat_template(tokenize=False)` gives. Raises one of TEMPLATE_ERRORS."""
    return template.compiled.render(
        messages=[{"role": message.role, "content": message.content} for message in messages],
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **template.special_tokens,
    )


TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template can raise on a chat that it does not support."""

FROZEN_NOW = datetime(2024, 7, 26)
"""What `strftime_now` tells a template: shards must not depend on the day on which they were made. It is the
date that the Llama 3 templates fall back to."""


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers sets it up, less what would make the bytes depend on the day or on chance."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    del environment.filters["random"], environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = FROZEN_NOW.strftime
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks answers for other programs; the text in it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own, as in transformers: what is set inside is not seen outside.
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
