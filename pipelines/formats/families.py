"""The families of records, in the order in which `format: auto` asks them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pipelines.formats import (
    alpaca,
    chatgpt,
    custom,
    dialogue,
    document,
    messages,
    moss,
    oasst,
    preference,
    prompt,
    sharegpt,
    text,
)
from pipelines.formats.turns import Reading
from schemas.source_config import SourceConfig


class Format(NamedTuple):
    """A family: whether a record belongs to it, and its chat or why it has none.

    One of the readers: `read` looks at the record alone, `read_for` also at what its source says.
    """

    matches: Callable[[dict[str, Any]], bool]
    read: Callable[[dict[str, Any]], Reading] | None = None
    read_for: Callable[[dict[str, Any], SourceConfig], Reading] | None = None

    def reading(self, record: dict[str, Any], source: SourceConfig) -> Reading:
        """What the family makes of a record."""
        if self.read is not None:
            return self.read(record)
        assert self.read_for is not None
        return self.read_for(record, source)


FORMATS: dict[str, Format] = {
    "preference": Format(preference.matches_pair, preference.read_pair),
    "kto": Format(preference.matches_label, preference.read_label),
    "chatgpt": Format(chatgpt.matches, read_for=chatgpt.read),
    "oasst": Format(oasst.matches, read_for=oasst.read),
    "dialogue": Format(dialogue.matches, read_for=dialogue.read),
    "sharegpt": Format(sharegpt.matches, sharegpt.read),
    "messages": Format(messages.matches, messages.read),
    "moss": Format(moss.matches, moss.read),
    "alpaca": Format(alpaca.matches, alpaca.read),
    "prompt": Format(prompt.matches, prompt.read),
    "text": Format(text.matches, read_for=text.read),
}
"""More telling keys first: a preference set has the question of its chosen answer as messages or conversations."""

CHOSEN: dict[str, Format] = {
    "custom": Format(custom.matches, read_for=custom.read),
    "document": Format(text.matches, read_for=document.read),
}
"""Not among those that are asked: only where the source says `format: custom` or `format: document`."""
