"""Documents as examples: a text of any length, encoded once, with an end token behind it.

The shard holds the whole text; which tokens of it an epoch trains is for the plan to say (exact blocks, or a window
of each document), so that another epoch, seed or length of window rewrites no shard.
"""

from functools import lru_cache

import numpy as np

from pipelines.encode import ChatEncoder, encode
from pipelines.formats.document import document_sources
from pipelines.pieces import Example
from pipelines.render import Rendered
from schemas.conversation import Conversation, Drop, utf8
from schemas.errors import RefusedError
from schemas.pipeline_config import PipelineConfig


def check_end_token(config: PipelineConfig, encoder: ChatEncoder) -> None:
    """Raises RefusedError for documents without anything to stand between them."""
    if document_sources(config) and encoder.tokenizer.eos_token_id is None:
        raise RefusedError(
            "the tokenizer has no eos token to stand between documents (sources with format: document): set eos_token "
            "in its tokenizer_config.json, or name another one in model.tokenizer"
        )


def encode_document(encoder: ChatEncoder, row: Conversation) -> Example | Drop:
    """[begin token,] text, end token: all of it trained but the first token, before which nothing stands.

    Control strings in the text are encoded as the text that they are. Drops as encode does, and `nothing_to_train`.
    """
    text = row.messages[0].content
    encoded = encode(encoder, Rendered(text, (), np.zeros((0, 2), np.int64), (), ()))
    if isinstance(encoded, Drop):
        return encoded
    if not len(encoded.ids):
        return Drop("nothing_to_train", "a document without a token")
    begin = _begin_tokens(encoder)
    ids = np.concatenate([begin, encoded.ids, [encoder.tokenizer.eos_token_id]]).astype(np.int32)
    languages = row.meta.get("language") or [["und", 1.0]]
    return Example(
        input_ids=ids,
        span_starts=np.array([1], np.int32),
        span_ends=np.array([len(ids)], np.int32),
        span_weights=np.ones(1, np.float32),
        num_tokens=len(ids),
        num_trained_tokens=len(ids) - 1,
        num_trained_bytes=len(utf8(text)),
        row_id=row.row_id,
        piece=0,
        first_message=0,
        end_message=len(row.messages),
        source=row.source,
        language=str(languages[0][0]),
    )


@lru_cache(maxsize=4)
def _begin_tokens(encoder: ChatEncoder) -> tuple[int, ...]:
    """The begin token, where the tokenizer itself puts one before plain text."""
    begin = encoder.tokenizer.bos_token_id
    ids = encoder.tokenizer("text")["input_ids"]
    return (begin,) if begin is not None and ids[:1] == [begin] else ()
