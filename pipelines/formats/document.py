"""Plain text that is trained as it is, without questions and without a template: {"text": "..."} -> one long answer.

Chosen by `format: document` alone. The end token and, where the tokenizer has one, the begin token are put on when
the text is encoded.
"""

from typing import Any

from pipelines.formats.text import title_and_text
from schemas.conversation import Conversation, Drop, Message
from schemas.pipeline_config import PipelineConfig
from schemas.source_config import SourceConfig

NAME = "document"


def read(record: dict[str, Any], source: SourceConfig) -> list[Message] | Drop:
    """The whole text as the one message, below its title where the record has one."""
    found = title_and_text(record)
    if isinstance(found, Drop):
        return found
    title, text = found
    if not text.strip():
        return Drop("no_messages", "a document without text")
    return [Message("assistant", f"{title}\n\n{text}" if title and not text.startswith(title) else text)]


def is_document(row: Conversation) -> bool:
    """Whether a row is a text, not a chat."""
    return row.meta.get("format") == NAME


def document_sources(config: PipelineConfig) -> frozenset[str]:
    """Names of the sources whose texts are trained as documents."""
    return frozenset(source.name for source in config.sources if source.format == NAME)
