"""Jinja chat templates, compiled as transformers does it, less what would make texts depend on the day or on chance.

A template is foreign code: it runs in Jinja's sandbox and sees the chat and its tools only. The sandbox does not keep it
from using up memory and time, so an unknown one is first tried in a child process (`python -m pipelines.templates`).
"""

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from schemas.conversation import Message
from schemas.errors import RefusedError


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template wants tool calls: arguments as a JSON text, and no content (None) where there is no text."""

    as_text: bool
    without_content: bool


@dataclass(frozen=True, slots=True, eq=False)
class ChatTemplate:
    """A compiled template, and what probe chats taught about it (see pipelines.habits).

    `end_tokens` are the control tokens that may close an assistant turn, `closings` what the template writes
    behind an answer up to such a token. `prompt` is the generation prompt; `lead` the white space between it and
    an assistant's content, `other_leads` all that stands there before reasoning and calls. `reasoning_key` is the key of a message whose text it writes as reasoning, `call_form`
    is None where it does not write tool calls, `reads` are further keys of messages that it may read.
    """

    compiled: jinja2.Template
    special_tokens: Mapping[str, Any]
    control_pattern: re.Pattern[str]
    end_tokens: frozenset[str] = frozenset()
    lead: str = ""
    closings: tuple[str, ...] = ()
    prompt: str = ""
    other_leads: Mapping[str, str] = field(default_factory=dict)
    reasoning_key: str | None = None
    call_form: CallForm | None = None
    writes_tools: bool = False
    reads_input: bool = False
    reads: tuple[str, ...] = ()


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
    reads = tuple(key for key in ("name", "tool_call_id") if key in source)
    return ChatTemplate(compiled, special_tokens, pattern, reads=reads)


def render_text(
    template: ChatTemplate, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """What the tokenizer's `apply_chat_template(tokenize=False)` gives for texts alone. Raises as render_given."""
    given = [{"role": message.role, "content": message.content} for message in messages]
    return render_given(template, given, add_generation_prompt=add_generation_prompt)


def render_given(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """What the template writes for messages in its own form. Raises one of TEMPLATE_ERRORS."""
    return template.compiled.render(
        messages=messages,
        tools=tools,
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


# An unknown template in a child ------------------------------------------------------------------------------

CHILD_BYTES = 2**30
CHILD_SECONDS = 5


def try_in_child(
    source: str, *, special_tokens: Mapping[str, Any], chats: Sequence[Sequence[Message]]
) -> None:
    """Render chats in a child with 1 GiB and 5 s of processor time. Raises RefusedError when that is not enough.

    What the template writes, or that it refuses a chat, is not looked at.
    """
    work = json.dumps([source, dict(special_tokens), [[[m.role, m.content] for m in chat] for chat in chats]])
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.templates"],
            input=work.encode(),
            env=os.environ | {"PYTHONPATH": str(root)},
            cwd=root,
            capture_output=True,
            timeout=20 * CHILD_SECONDS,  # of the clock: the machine may be busy with other work
        )
    except subprocess.TimeoutExpired:
        raise RefusedError(_bomb("time")) from None
    if done.returncode != 0:
        raise RefusedError(_bomb(f"memory or time, exit code {done.returncode}"))


def _bomb(what: str) -> str:
    return f"the chat template used up its {what} on short chats: take the model's own, or one you can read"


def _child() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_BYTES, CHILD_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CHILD_SECONDS, CHILD_SECONDS))
    source, special_tokens, chats = json.load(sys.stdin)
    try:
        template = compile_bare(source, special_tokens=special_tokens, control_tokens=())
    except RefusedError:
        return  # the parent refuses it with the same words
    from pipelines.habits import compile_template

    # What is tried later to learn how it takes tools, calls and reasoning.
    compile_template(source, special_tokens=special_tokens, control_tokens=())
    for chat in chats:
        with contextlib.suppress(*TEMPLATE_ERRORS):
            render_text(template, [Message(role, content) for role, content in chat])


# Jinja ------------------------------------------------------------------------------------------------------


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


if __name__ == "__main__":
    _child()
