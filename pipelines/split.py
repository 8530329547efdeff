"""Stage 6, one row: a chat becomes one training example, or several where it is longer than split.max_tokens."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines.cut import Chat, Example, all_rounds, build_example, chat_rounds, last_context, render_piece
from pipelines.encode import ChatEncoder, build_encoder, encode, load_encoder
from pipelines.left_out import torch_left_out
from pipelines.probes import PROBE_CHATS, check_encoder, check_template
from pipelines.storage import read_manifest
from pipelines.templates import try_in_child
from pipelines.tokenizer_files import load_tokenizer, tokenizer_versions
from schemas.conversation import Conversation, Drop, Message
from schemas.errors import LimitError
from schemas.pipeline_config import PipelineConfig, SplitConfig
from schemas.run import STAGE_FOLDERS

STAGE_VERSION = 2

MIN_STRADDLED_SPANS = 10
"""Fewer are an accident of single texts, whatever their share in a small data set."""

COUNTS = {
    "tokens": "tokens of all examples",
    "trained_tokens": "tokens that are trained",
    "trained_spans": "answers that are trained",
    "straddled_spans": "of these, answers that begin or end inside a token",
    "straddling_tokens": "tokens left untrained because they reach over the border of an answer",
    "turns_without_end_token": "trained answers after which the template wrote no end token",
    "blank_answers_not_located": "blank answers that the template writes in another way, not trained",
    "chats_cut": "chats longer than max_tokens",
    "rounds": "rounds of the chats that were cut",
    "rounds_kept": "of these, rounds that stand in an example",
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


def prepare(config: PipelineConfig) -> Callable[[Conversation], SplitResult | Drop]:
    """The row step. Loads the tokenizer: a second, once per worker. Raises as load_encoder does."""
    with torch_left_out():
        return partial(split_chat, load_encoder(config), config.split)


def split_chat(encoder: ChatEncoder, config: SplitConfig, row: Conversation) -> SplitResult | Drop:
    """Examples of one chat.

    Drops beside those of render and encode: `nothing_to_train`, `overlong`, `content_beside_text`.
    """
    if (message := _with_content_beside_text(row.messages)) is not None:
        return Drop("content_beside_text", f"message {message} has tool calls or reasoning beside its text")
    answers = [number for number, message in enumerate(row.messages) if message.role == "assistant"]
    if not answers:
        return Drop("nothing_to_train", "no assistant message")
    wanted = answers if config.train_on == "assistant" else answers[-1:]
    trained = frozenset(number for number in wanted if not _has_no_weight(row.messages[number]))
    if not trained:
        return Drop("nothing_to_train", f"{len(answers)} answers, all of weight 0")
    chat = Chat(encoder, config, row, trained)
    whole = render_piece(chat, 0, len(row.messages), encode_with=partial(encode, encoder))
    if isinstance(whole, Drop):
        return whole
    counts: Counter[str] = Counter()
    if len(whole.encoded.ids) > config.max_tokens:
        find_pieces = last_context if config.train_on == "last" else all_rounds
        counts.update(chats_cut=1, rounds=len(chat_rounds(row.messages)))
        pieces = find_pieces(chat, whole, counts)
    else:
        pieces = [whole]
    return pieces if isinstance(pieces, Drop) else _result(chat, pieces, counts)


def _result(chat: Chat, pieces: list[Any], counts: Counter[str]) -> SplitResult | Drop:
    examples: list[Example] = []
    for piece in pieces:
        example = build_example(chat, piece, number=len(examples), counts=counts)
        if counts["chats_cut"]:
            counts["rounds_kept" if example else "rounds_untrained"] += piece.num_rounds
        examples += [example] if example else []
    if examples:
        counts["tokens"] = sum(example.num_tokens for example in examples)
        counts["trained_tokens"] = sum(example.num_trained_tokens for example in examples)
        return SplitResult(examples, dict(counts))
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


CONTENT_EXTRAS = ("function_call", "reasoning_content", "reasoning", "thinking", "tool_calls")


def _with_content_beside_text(messages: list[Message]) -> int | None:
    """The first message with content that a template may write and that `content` does not hold."""
    return next((n for n, m in enumerate(messages) if any(m.extras.get(key) for key in CONTENT_EXTRAS)), None)


def _has_no_weight(message: Message) -> bool:
    """As OpenAI's and other formats mark answers that are context only; answers that paths of a tree share, too."""
    weights = (message.extras.get("weight"), message.extras.get("loss_weight"), message.extras.get("train"))
    return any(isinstance(weight, (int, float)) and not weight for weight in weights)


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
    encoder = build_encoder(tokenizer)
    check_template(encoder.template)
    check_encoder(encoder, max_straddle_share=config.split.max_straddle_share)


def _proved_before(config: PipelineConfig) -> bool:
    manifest = read_manifest(config.run_root / STAGE_FOLDERS["split"])
    return (
        manifest is not None
        and manifest.stage_version == STAGE_VERSION
        and manifest.versions == versions(config)
        and manifest.config.get("split") == config.split.model_dump(mode="json")
    )


def check_counts(counts: Mapping[str, int], config: SplitConfig) -> None:
    """Raises LimitError when more answers than allowed began or ended inside a token."""
    spans, straddled = counts.get("trained_spans", 0), counts.get("straddled_spans", 0)
    if straddled >= MIN_STRADDLED_SPANS and straddled > config.max_straddle_share * spans:
        raise LimitError(
            f"split: {straddled} of {spans} answers begin or end inside a token, split.max_straddle_share allows "
            f"{config.max_straddle_share:.2%}: strip white space around answers, or use another chat template"
        )


def colour_spans(tokenizer: Any, example: Any) -> list[tuple[str, bool]]:
    """The text of an example in order, in pieces that are trained (True) or not.

    `tokenizer` is a transformers tokenizer; `example` has input_ids, span_starts and span_ends.
    """
    ids = [int(token) for token in example.input_ids]
    spans = zip(example.span_starts, example.span_ends, strict=True)
    borders = [int(border) for span in spans for border in span]
    pieces, shown = [], ""
    for number, end in enumerate([*borders, len(ids)]):
        # From the beginning each time: decoders strip the blank before the first word of what they are given.
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append((text[len(shown) :], number % 2 == 1))
        shown = text
    return [(text, trained) for text, trained in pieces if text]
