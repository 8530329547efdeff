"""A chat as the token ids that ask for its next answer: read, cleaned, arranged and written as training does it.

    encode_prompt(tokenizer, messages)            ids up to where the assistant begins to speak
    prompt_reader(config, tokenizer).read(raw)    a record of any format that sources may have -> what is asked

What a user typed is text, as in training: `<|im_end|>` in a question is not the end of the turn.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import orjson
from transformers import PreTrainedTokenizerBase

from pipelines import clean
from pipelines.chat_fields import given_chat, template_messages
from pipelines.containers import RawRecord
from pipelines.encode import ChatEncoder, build_encoder, encode
from pipelines.parse import parse_record
from pipelines.policy import arranged, prepared_messages
from pipelines.records import read_rows
from pipelines.render import Rendered, render
from pipelines.templates import TEMPLATE_ERRORS, render_given
from schemas.conversation import Conversation, Drop, Message
from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig, SourceConfig, SplitConfig

Messages: TypeAlias = Sequence[Message | Mapping[str, Any]]

# Token ids --------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Any = None) -> list[int]:
    """Token ids of a chat up to where the assistant begins to speak.

    Equal to the tokenizer's own apply_chat_template, unless a message holds a control string: that stays text.
    Raises InputError when the template refuses the messages, or would leave a part of them out.
    """
    chat = [_as_message(message) for message in messages]
    try:
        encoder = chat_encoder(tokenizer)
        given = given_chat(encoder.template, chat, tools)
        if isinstance(given, Drop):
            raise InputError(f"the chat template can't write these messages: {given.detail}")
        written = template_messages(encoder.template, given)
        text = render_given(encoder.template, written, given.tools, add_generation_prompt=True)
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"character {error.start} of the prompt is no Unicode: {error.reason}") from None
    except TEMPLATE_ERRORS as error:
        raise InputError(f"the chat template refuses these messages: {_one_line(error)}") from error
    if not (given.tools or any(_may_hold_controls(encoder, message) for message in chat)):
        return list(encoder.backend.encode(text, add_special_tokens=False).ids)
    rendered = _with_generation_prompt(encoder, render(encoder.template, chat, tools), text)
    encoded = encode(encoder, rendered) if isinstance(rendered, Rendered) else rendered
    if isinstance(encoded, Drop):
        raise InputError(f"these messages hold control strings: {encoded.reason}: {encoded.detail}")
    return [int(token) for token in encoded.ids]


@lru_cache(maxsize=4)
def _encoder(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> ChatEncoder:
    """Built once per tokenizer and template: it compiles the template and learns how its answers end."""
    return build_encoder(tokenizer)


def chat_encoder(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """The encoder of stage 6 around this tokenizer. Raises ValueError where it has no template."""
    return _encoder(tokenizer, tokenizer.get_chat_template())


def _as_message(message: Message | Mapping[str, Any]) -> Message:
    return message if isinstance(message, Message) else Message(message["role"], message["content"])


def _may_hold_controls(encoder: ChatEncoder, message: Message) -> bool:
    return bool(message.extras or encoder.template.control_pattern.search(message.content))


def _with_generation_prompt(encoder: ChatEncoder, chat: Rendered | Drop, text: str) -> Rendered | Drop:
    """The proved rendering of the chat, and behind it what the template wrote for the answer to come."""
    if isinstance(chat, Drop):
        return chat
    if not text.startswith(chat.text):
        return Drop(
            "template_changes_text", "with the generation prompt the chat itself is written otherwise"
        )
    found = list(encoder.template.control_pattern.finditer(text, len(chat.text)))
    places = np.array([match.span() for match in found], np.int64).reshape(-1, 2)
    return Rendered(
        text=text,
        spans=chat.spans,
        control_spans=np.concatenate([chat.control_spans, places]),
        control_tokens=(*chat.control_tokens, *(match.group() for match in found)),
        message_spans=chat.message_spans,
    )


# Records ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """What one record asks. `reference` is the answer that stood in it: it is no part of the prompt."""

    messages: list[Message]
    tools: Any = None
    reference: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Reads lines as merge and clean would, and arranges them as the section split says."""

    config: PipelineConfig
    tokenizer: PreTrainedTokenizerBase
    cleaning: Callable[[Conversation], Conversation | Drop]

    def read(self, raw: bytes) -> Asked:
        """What a line asks. Raises InputError, with the words of the stage that would drop such a record."""
        rows = read_rows(RawRecord(_as_chat(raw), ""), _ANY_FORMAT, self.config.merge.max_record_bytes)
        row, drop = rows[0]
        if len(rows) > 1:
            raise InputError(f"the record holds {len(rows)} chats, expected one")
        cleaned = drop or self.cleaning(row)
        if isinstance(cleaned, Drop):
            raise InputError(f"{cleaned.reason}: {cleaned.detail}")
        chat = list(cleaned.messages)
        reference = chat.pop().content if chat[-1].role == "assistant" else None
        if not chat:
            raise InputError("the record asks nothing: no message stands before its answer")
        asked = Conversation(row.row_id, row.source, row.record, chat, cleaned.meta)
        messages = prompt_messages(self.tokenizer, self.config.split, asked)
        return Asked(messages, cleaned.meta.get("tools"), reference, cleaned.meta.get("id"))


def prompt_reader(config: PipelineConfig, tokenizer: PreTrainedTokenizerBase) -> PromptReader:
    """Raises ConfigError where a library that the section clean asks for is missing."""
    return PromptReader(config, tokenizer, clean.prepare(config))


def prompt_messages(
    tokenizer: PreTrainedTokenizerBase, config: SplitConfig, row: Conversation
) -> list[Message]:
    """As stage 6 hands them to the template: system prompts, reasoning and Alpaca's inputs as the settings want."""
    messages = prepared_messages(chat_encoder(tokenizer).template, config, row, Counter())
    return arranged(config, messages, range(len(messages)))[0]


_ANY_FORMAT = SourceConfig(name="prompts", path="prompts.jsonl")


def _as_chat(raw: bytes) -> bytes:
    """Records without an answer, which no stage would read: a bare prompt, an instruction without its output."""
    parsed = parse_record(raw)
    record = {} if isinstance(parsed, Drop) else parsed[0]
    if isinstance(record.get("prompt"), str) and record.keys() <= {"prompt", "system", "id"}:
        return orjson.dumps(record | {"messages": [{"role": "user", "content": record["prompt"]}]})
    if "instruction" in record and "output" not in record:
        return orjson.dumps(record | {"output": ""})
    return raw


# Text for people --------------------------------------------------------------------------------------------

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text that is safe on a terminal: escape sequences and direction marks could hide or rewrite lines."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
