"""Stage 6, one row: a chat becomes one training example, or several where it is longer than split.max_tokens."""

import gc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipelines.cut import all_rounds, chat_rounds, last_context
from pipelines.documents import check_end_token, encode_document
from pipelines.encode import ChatEncoder, encode, encoder_of, load_encoder, proved_on
from pipelines.formats.document import is_document
from pipelines.left_out import torch_left_out
from pipelines.pieces import Chat, Example, Piece, build_examples, render_piece
from pipelines.policy import message_weights, prepared_messages
from pipelines.probes import PROBE_CHATS, check_encoder, check_template
from pipelines.render import Rendered, render
from pipelines.storage import read_manifest
from pipelines.templates import try_in_child
from pipelines.tokenizer_files import load_tokenizer, tokenizer_versions
from schemas.conversation import Conversation, Drop, utf8
from schemas.errors import LimitError
from schemas.pipeline_config import PipelineConfig, SplitConfig
from schemas.run import STAGE_FOLDERS

STAGE_VERSION = 3

NUM_PROVED_ROWS = 8
PROVED_CHARS = 1000
"""So many rows of a part, and characters of each, are encoded in both ways before the fast one is used for the part.
tokenizers takes as long for these as the fast one for all."""

MIN_BAD_SHOWN = 10
"""Fewer are an accident of single texts, whatever their share in a small data set."""

COUNTS = {
    "tokens": "tokens of all examples",
    "trained_tokens": "tokens that are trained",
    "trained_spans": "answers that are trained",
    "straddled_spans": "of these, answers that begin or end inside a token",
    "straddling_tokens": "tokens left untrained because they reach over the border of an answer",
    "straddling_prompt_tokens": "the same for trained texts that are no answers",
    "turns_without_end_token": "trained answers after which the template wrote no end token",
    "blank_answers_not_located": "blank answers that the template writes in another way, not trained",
    "documents": "plain texts, of any length, in examples of their own",
    "prompts_not_located": "texts to train that are no answers and that the template writes in another way, not trained",
    "answers_of_other_parts": "answers that are only reasoning or tool calls where these are not trained",
    "reasoning_dropped": "turns whose reasoning split.reasoning took out",
    "reasoning_left_out": "turns whose reasoning the template left out, as it does before the last question",
    "system_turns_moved": "system turns that split.system moved into the user turn after them",
    "system_turns_dropped": "system turns that split.system left out",
    "weighted_tokens": "of the trained tokens, those of another weight than 1",
    "rendered_bytes": "UTF-8 bytes of the chats as the template writes them",
    "tokenised_bytes": "UTF-8 bytes given to the tokenizer, pieces of cut chats included",
    "chats_cut": "chats longer than max_tokens",
    "rounds": "rounds of the chats that were cut",
    "rounds_kept": "of these, rounds that stand in an example",
    "rounds_cut": "of the rounds kept, rounds longer than max_tokens alone, cut inside",
    "windows": "pieces of these",
    "windows_untrained": "of these, pieces without anything to train, left out",
    "rounds_overlong": "of these, rounds longer than max_tokens alone, left out",
    "rounds_untrained": "of these, rounds in pieces without anything to train, left out",
    "rounds_before_context": "train_on last: of these, rounds too far before the trained answer, left out",
}
"""What a SplitResult counts. rounds = kept + overlong + untrained + before_context."""


@dataclass(frozen=True, slots=True, eq=False)
class SplitResult:
    """What became of a row: at least one example, and what was counted on the way (names in COUNTS)."""

    examples: list[Example]
    counts: dict[str, int]


def versions(config: PipelineConfig) -> dict[str, str]:
    """What shapes the shards beside the config: tokenizer, template, libraries."""
    return tokenizer_versions(config)


@dataclass(frozen=True, slots=True)
class RowSplitter:
    """The row step."""

    encoder: ChatEncoder
    config: SplitConfig

    def __call__(self, row: Conversation) -> SplitResult | Drop:
        return split_chat(self.encoder, self.config, row)

    def proved_on(self, rows: Sequence[Conversation]) -> "RowSplitter":
        """The step for these rows: with the fast encoder where it gives the same on samples of their texts."""
        return RowSplitter(proved_on(self.encoder, _samples(self.encoder, rows)), self.config)


def _samples(encoder: ChatEncoder, rows: Sequence[Conversation]) -> Iterator[str]:
    """The beginning of a chat with its control tokens, and pieces from the middle of some."""
    rendered = render(encoder.template, rows[0].messages) if rows and not is_document(rows[0]) else None
    if isinstance(rendered, Rendered):
        yield rendered.text[:PROVED_CHARS]
    for number, row in enumerate(rows[:: max(1, len(rows) // NUM_PROVED_ROWS)]):
        text = "\n".join(message.content for message in row.messages)
        start = number * 7919 % max(1, len(text) - PROVED_CHARS)
        yield text[start : start + PROVED_CHARS]


def prepare(config: PipelineConfig) -> RowSplitter:
    """The row step. Loads the tokenizer: three seconds for a large one, once per worker.

    Raises as load_encoder does.
    """
    with torch_left_out(), _without_collector():
        encoder = load_encoder(config)
    check_end_token(config, encoder)
    return RowSplitter(encoder, config.split)


@contextmanager
def _without_collector() -> Iterator[None]:
    """A vocabulary is a million objects that stay: to look through them for garbage takes a sixth of the loading."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def split_chat(encoder: ChatEncoder, config: SplitConfig, row: Conversation) -> SplitResult | Drop:
    """Examples of one chat.

    Drops beside those of render and encode: `nothing_to_train`, `bad_weight`, `overlong`.
    """
    if is_document(row):
        return _split_document(encoder, row)
    counts: Counter[str] = Counter()
    before = encoder.tokenised["bytes"]
    weights = message_weights(config, row.messages)
    if isinstance(weights, Drop):
        return weights
    chat = Chat(encoder, config, row, prepared_messages(encoder.template, config, row, counts), weights)
    whole = render_piece(chat, 0, len(row.messages), encode_with=partial(encode, encoder))
    if isinstance(whole, Drop):
        return whole
    _count_whole(chat, whole, counts)
    pieces: list[Piece] | Drop = [whole]
    if len(whole.encoded.ids) > config.max_tokens:
        find_pieces = last_context if config.train_on == ["last"] else all_rounds
        counts.update(chats_cut=1, rounds=len(chat_rounds(row.messages)))
        pieces = find_pieces(chat, whole, counts)
    counts["tokenised_bytes"] = encoder.tokenised["bytes"] - before
    return pieces if isinstance(pieces, Drop) else _result(chat, pieces, counts)


def _count_whole(chat: Chat, whole: Piece, counts: Counter[str]) -> None:
    counts["rendered_bytes"] = len(utf8(whole.rendered.text))
    counts["reasoning_left_out"] = whole.rendered.num_reasoning_left_out
    if chat.config.system != "keep":
        name = "system_turns_moved" if chat.config.system == "merge_into_user" else "system_turns_dropped"
        counts[name] = len(chat.messages) - len(whole.numbers)


def _split_document(encoder: ChatEncoder, row: Conversation) -> SplitResult | Drop:
    """One example, however long it is: the plan cuts it."""
    example = encode_document(encoder, row)
    if isinstance(example, Drop):
        return example
    counts = {"tokens": example.num_tokens, "trained_tokens": example.num_trained_tokens, "documents": 1}
    return SplitResult([example], counts)


def _result(chat: Chat, pieces: list[Piece], counts: Counter[str]) -> SplitResult | Drop:
    examples: list[Example] = []
    for piece in pieces:
        built = build_examples(chat, piece, number=len(examples), counts=counts)
        if counts["chats_cut"]:
            counts["rounds_kept" if built else "rounds_untrained"] += piece.num_rounds
        examples += built
    if examples:
        counts["tokens"] = sum(example.num_tokens for example in examples)
        counts["trained_tokens"] = sum(example.num_trained_tokens for example in examples)
        counts["weighted_tokens"] = sum(map(_num_weighted, examples))
        return SplitResult(examples, {name: number for name, number in counts.items() if number})
    if counts["rounds_overlong"]:
        limit = chat.config.max_tokens
        return Drop(
            "overlong", f"{counts['rounds_overlong']} of {counts['rounds']} rounds pass {limit} tokens"
        )
    return Drop(
        "nothing_to_train",
        f"{counts['trained_spans']} answers without a whole token of their own, "
        f"{counts['blank_answers_not_located']} blank",
    )


def _num_weighted(example: Example) -> int:
    return int(np.sum((example.span_ends - example.span_starts)[example.span_weights != 1]))


# Before and after the work ----------------------------------------------------------------------------------


def preflight(config: PipelineConfig) -> None:
    """Refuse a tokenizer and template that can't be proved on probe chats, before any stage runs.

    Shards that were finished with the same files and libraries are proof enough: then nothing is loaded.
    Raises ConfigError, InputError, RefusedError.
    """
    if _proved_before(config):
        return
    with torch_left_out():
        tokenizer: Any = load_tokenizer(config)
    special_tokens = tokenizer.special_tokens_map
    try_in_child(tokenizer.chat_template, special_tokens=special_tokens, chats=PROBE_CHATS)
    encoder = encoder_of(tokenizer, config)
    check_template(encoder.template, config.split)
    check_encoder(encoder, max_straddle_share=config.split.max_straddle_share, config=config.split)


def _proved_before(config: PipelineConfig) -> bool:
    manifest = read_manifest(config.run_root / STAGE_FOLDERS["split"])
    return (
        manifest is not None
        and manifest.stage_version == STAGE_VERSION
        and manifest.versions == versions(config)
        and manifest.config.get("split") == config.split.model_dump(mode="json")
    )


def check_hand_over(
    counts: Mapping[str, int], drops: Mapping[str, int], *, num_rows: int, config: SplitConfig
) -> None:
    """Refuse shards that would not teach what their chats say. `counts` and `drops` are sums over all `num_rows`.

    Raises LimitError when answers never end, when more of them than allowed begin or end inside a token, or when
    more rows than allowed have nothing to train.
    """
    spans, straddled = counts.get("trained_spans", 0), counts.get("straddled_spans", 0)
    if spans and counts.get("turns_without_end_token", 0) == spans:
        raise LimitError(
            f"split: none of {spans} trained answers ends with an end token, so the model would never learn to "
            "stop: set split.chat_template to a template that writes one after each answer"
        )
    if straddled >= MIN_BAD_SHOWN and straddled > config.max_straddle_share * spans:
        raise LimitError(
            f"split: {straddled} of {spans} answers begin or end inside a token, split.max_straddle_share allows "
            f"{config.max_straddle_share:.2%}: strip white space around answers, or use another chat template"
        )
    untrained = drops.get("nothing_to_train", 0)
    if untrained >= MIN_BAD_SHOWN and untrained > config.max_untrained_share * num_rows:
        raise LimitError(
            f"split: {untrained} of {num_rows} rows have nothing to train, split.max_untrained_share allows "
            f"{config.max_untrained_share:.2%}: look at the drops of 06_shards, or raise the limit"
        )
