"""What a rendered and encoded chat must show; only the chat, transformers and the offsets are asked.

- Text and ids equal `apply_chat_template`, for a chat that holds no control string.
- With control strings: the control ids are those of the same chat with these strings made harmless, and so are all
  ids of the template between two texts.
- A token is trained if and only if all its characters lie in one trained span, and a span is a text as the chat has it
  (up to white space around it) with what the template writes behind the generation prompt and up to an end token.
- Decoded by a byte-level tokenizer, all ids are the text, and the trained ones the spans.
- Where the template marks answers itself, the trained tokens are transformers' assistant mask.
"""

import re
import unicodedata
from collections import Counter
from typing import Any

import numpy as np

from pipelines.encode import ChatEncoder, Encoded, encode, trained_tokens
from pipelines.render import Rendered, render
from pipelines.split import SplitResult, split_chat
from schemas.conversation import Conversation, Drop, Message
from schemas.pipeline_config import SplitConfig

COLUMNS = {
    "chats": "chats",
    "dropped": "dropped",
    "plain": "without control strings",
    "wrong_ids": "other text or ids",
    "control": "with control strings",
    "wrong_control": "moved control ids",
    "spans": "trained spans",
    "wrong_spans": "wrong spans",
    "straddled": "straddled",
    "decoded": "decoded",
    "wrong_decoded": "decoded otherwise",
    "masks": "masks",
    "wrong_masks": "other masks",
    "cut": "cut chats",
    "percent_tokenised": "bytes tokenised, % of rendered",
}
_PERCENT = ("tokenised", "rendered")


def judge(encoder: ChatEncoder, config: SplitConfig, row: Conversation, counts: Counter[str]) -> None:
    """Add one chat to the counts, which are named in COLUMNS."""
    counts["chats"] += 1
    tools = row.meta.get("tools")
    rendered = render(encoder.template, row.messages, tools)
    encoded = rendered if isinstance(rendered, Drop) else encode(encoder, rendered)
    if isinstance(rendered, Drop) or isinstance(encoded, Drop):
        counts["dropped"] += 1
        return
    beside = tools or any(message.extras.get("tool_calls") for message in row.messages)
    if _has_control(encoder, row.messages):
        counts["control"] += 1
        counts["wrong_control"] += not (beside or _control_is_right(encoder, row.messages, rendered, encoded))
    elif not beside:
        counts["plain"] += 1
        counts["wrong_ids"] += not _is_transformers_own(encoder, row.messages, rendered, encoded)
        _judge_mask(encoder, row.messages, rendered, encoded, counts)
    _judge_spans(encoder, row.messages, rendered, encoded, counts)
    _judge_work(encoder, config, row, counts)


def _plain(messages: list[Message]) -> Any:
    return [{"role": message.role, "content": message.content} for message in messages]


def _is_transformers_own(
    encoder: ChatEncoder, messages: list[Message], rendered: Rendered, encoded: Encoded
) -> bool:
    own = encoder.tokenizer.apply_chat_template(_plain(messages), tokenize=True, return_dict=True)[
        "input_ids"
    ]
    text = encoder.tokenizer.apply_chat_template(_plain(messages), tokenize=False)
    return bool(text == rendered.text and own == encoded.ids.tolist())


# Control strings --------------------------------------------------------------------------------------------


def _has_control(encoder: ChatEncoder, messages: list[Message]) -> bool:
    """Also in the wide letters that some tokenizers turn into plain ones."""
    texts = [form for m in messages for form in (m.content, unicodedata.normalize("NFKC", m.content))]
    return any(token in text for text in texts for token in encoder.control_ids)


def _control_is_right(
    encoder: ChatEncoder, messages: list[Message], rendered: Rendered, encoded: Encoded
) -> bool:
    """By transformers' own encoding of the chat without control strings."""
    pattern = re.compile("|".join(map(re.escape, sorted(encoder.control_ids, key=len, reverse=True))))

    def harmless(text: str) -> str:
        return pattern.sub(lambda found: "x" * len(found.group()), unicodedata.normalize("NFKC", text))

    safe = [Message(message.role, harmless(message.content)) for message in messages]
    own = encoder.tokenizer.apply_chat_template(_plain(safe), tokenize=True, return_dict=True)["input_ids"]
    found = [int(token) for token in encoded.ids if encoder.is_control[token]]
    wanted = [token for token in own if token < len(encoder.is_control) and encoder.is_control[token]]
    unknown = encoder.unknown_id
    if [token for token in found if token != unknown] != [token for token in wanted if token != unknown]:
        return False
    return _template_ids(encoder, rendered, encoded) == _template_ids_of(encoder, safe)


def _template_ids_of(encoder: ChatEncoder, messages: list[Message]) -> list[list[int]] | None:
    rendered = render(encoder.template, messages)
    encoded = rendered if isinstance(rendered, Drop) else encode(encoder, rendered)
    if isinstance(rendered, Drop) or isinstance(encoded, Drop):
        return None
    return _template_ids(encoder, rendered, encoded)


def _template_ids(encoder: ChatEncoder, rendered: Rendered, encoded: Encoded) -> list[list[int]]:
    """Ids between the first and the last control token of the template between two texts, and of those tokens."""
    places = sorted(place for place in rendered.message_spans if place)
    starts = [0, *(end for _, end in places)]
    ends = [*(start for start, _ in places), len(rendered.text)]
    result: list[list[int]] = []
    for start, end in zip(starts, ends, strict=True):
        inside = [(int(a), int(b)) for a, b in rendered.control_spans if start <= a and b <= end]
        if inside:
            first, last = inside[0][0], inside[-1][1]
            result.append(encoded.ids[(encoded.starts >= first) & (encoded.ends <= last)].tolist())
    return result


# Spans ------------------------------------------------------------------------------------------------------


def _judge_spans(
    encoder: ChatEncoder,
    messages: list[Message],
    rendered: Rendered,
    encoded: Encoded,
    counts: Counter[str],
) -> None:
    tokens = trained_tokens(encoded, rendered.spans)
    found = np.zeros(len(encoded.ids), bool)
    for start, end in zip(tokens.starts, tokens.ends, strict=True):
        found[start:end] = True
    wanted = np.zeros(len(encoded.ids), bool)
    for span in rendered.spans:
        wanted |= (encoded.starts >= span.start) & (encoded.ends <= span.end)
        counts["wrong_spans"] += not _is_answer(encoder, messages, rendered, span)
    wanted[0] = False
    counts["spans"] += len(rendered.spans)
    counts["straddled"] += tokens.num_straddled_spans
    counts["wrong_spans"] += int(not np.array_equal(found, wanted))
    decoder = encoder.tokenizer.backend_tokenizer.decoder
    if type(decoder).__name__ == "ByteLevel" and encoder.tokenizer.backend_tokenizer.normalizer is None:
        counts["decoded"] += 1
        text = encoder.tokenizer.decode(encoded.ids, clean_up_tokenization_spaces=False)
        spans = "".join(rendered.text[span.start : span.end] for span in rendered.spans)
        trained = encoder.tokenizer.decode(encoded.ids[found], clean_up_tokenization_spaces=False)
        counts["wrong_decoded"] += text != rendered.text or (
            not tokens.num_straddled_spans and trained != spans
        )


def _is_answer(encoder: ChatEncoder, messages: list[Message], rendered: Rendered, span: Any) -> bool:
    """The text of the message, white space and template marks before it, one end token behind it."""
    message = messages[span.message_index]
    written = rendered.text[span.start : span.end]
    if message.extras.get("tool_calls") or "</think>" in message.content or span.parts[0][0] == "reasoning":
        return span.has_end
    content = message.content.strip()
    place = written.find(content)
    before, behind = written[: max(place, 0)], written[place + len(content) :].lstrip()
    ends = {token for token in encoder.template.end_tokens if behind.endswith(token)}
    return place >= 0 and not before.strip() and (behind == "" or (bool(ends) and behind in ends))


def _judge_mask(
    encoder: ChatEncoder,
    messages: list[Message],
    rendered: Rendered,
    encoded: Encoded,
    counts: Counter[str],
) -> None:
    if "endgeneration" not in encoder.tokenizer.chat_template:
        return
    own = encoder.tokenizer.apply_chat_template(
        _plain(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    if any(own.char_to_token(span.start) is None for span in rendered.spans):
        return  # an answer that begins with a character of no token: transformers then marks no more answers
    tokens = trained_tokens(encoded, rendered.spans)
    mask = np.zeros(len(encoded.ids), np.int64)
    for start, end in zip(tokens.starts, tokens.ends, strict=True):
        mask[start:end] = 1
    # transformers also takes a token that reaches over the border of an answer.
    borders = [border for span in rendered.spans for border in (span.start, span.end)]
    over = np.zeros(len(mask), bool)
    for border in borders:
        over |= (encoded.starts < border) & (border < encoded.ends)
    counts["masks"] += 1
    counts["wrong_masks"] += not np.array_equal(mask[~over], np.array(own["assistant_masks"])[~over])


# Work -------------------------------------------------------------------------------------------------------


def _judge_work(encoder: ChatEncoder, config: SplitConfig, row: Conversation, counts: Counter[str]) -> None:
    result = split_chat(encoder, config, row)
    if not isinstance(result, SplitResult):
        return
    counts["cut"] += result.counts.get("chats_cut", 0)
    for name in _PERCENT:
        counts[name] += result.counts.get(f"{name}_bytes", 0)
    counts["percent_tokenised"] = round(100 * counts["tokenised"] / max(counts["rendered"], 1))
