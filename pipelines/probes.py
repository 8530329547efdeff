"""What a tokenizer and its chat template must show on plain chats before any work starts."""

import json
from collections.abc import Sequence

import numpy as np

from pipelines.encode import ChatEncoder, Encoded, encode, trained_tokens
from pipelines.habits import PLAIN_CHAT
from pipelines.policy import arranged
from pipelines.render import Rendered, render
from pipelines.templates import ChatTemplate
from schemas.conversation import Drop, Message
from schemas.errors import RefusedError
from schemas.pipeline_config import SplitConfig

_SYSTEM = Message("system", "Be brief.")
PROBE_CHATS: tuple[tuple[Message, ...], ...] = (
    PLAIN_CHAT[:2],
    PLAIN_CHAT,
    (_SYSTEM, *PLAIN_CHAT[:2]),
    (
        _SYSTEM,
        Message("user", "2 + 2"),
        Message("assistant", "4"),
        Message("user", "(why?)"),
        Message("assistant", '"Because", 因为。'),
        Message("user", "x"),
        Message("assistant", "(no)"),
    ),
)
"""Every template must be proved on these; only the system turn may be refused."""
_DEFAULT = SplitConfig()


def probe_chats(config: SplitConfig) -> list[list[Message]]:
    """The probe chats as the template gets them."""
    return [arranged(config, chat, range(len(chat)))[0] for chat in PROBE_CHATS]


def check_template(template: ChatTemplate, config: SplitConfig = _DEFAULT) -> None:
    """Refuse a template whose spans can't be proved on plain chats, or that never ends an answer.

    Raises RefusedError with the smallest chat that shows it.
    """
    proved = [(chat, render(template, chat)) for chat in probe_chats(config)]
    rendered = [result for _, result in proved if isinstance(result, Rendered)]
    for chat, result in proved:
        refused_system = isinstance(result, Drop) and result.reason == "template_refuses" and rendered
        if isinstance(result, Drop) and not refused_system:
            other_way = "split.system to merge_into_user or drop, or " if chat[0].role == "system" else ""
            raise RefusedError(
                f"the chat template can't be proved on {_chat_text(chat)}: {result.reason}: {result.detail}; set "
                f"{other_way}split.chat_template to a template that writes each message once, as it is"
            )
    if not any(span.has_end for result in rendered for span in result.spans):
        text = rendered[0].text
        raise RefusedError(
            f"the chat template never writes an end token after an answer (it wrote {text[-60:]!r}), so the "
            "model would never learn to stop: copy it, add {{ eos_token }} or a token that the tokenizer knows "
            "after the assistant's content, and set split.chat_template to the copy"
        )


def _chat_text(chat: Sequence[Message]) -> str:
    return json.dumps([[message.role, message.content] for message in chat], ensure_ascii=False)


def check_encoder(encoder: ChatEncoder, *, max_straddle_share: float, config: SplitConfig = _DEFAULT) -> None:
    """Compare text and ids of the probe chats with the tokenizer's own, and put control strings in every message.

    Raises RefusedError with the text that shows the difference.
    """
    num_spans, num_straddled = 0, 0
    for chat in probe_chats(config):
        rendered = render(encoder.template, chat)
        if isinstance(rendered, Drop):
            continue  # only a refused system turn: check_template has seen to it
        encoded = _checked_ids(encoder, chat, rendered)
        num_spans += len(rendered.spans)
        num_straddled += trained_tokens(encoded, rendered.spans).num_straddled_spans
        if num_straddled > max_straddle_share * num_spans:
            raise RefusedError(_straddle_message(encoded, rendered))
        _check_control_strings(encoder, chat)


def _checked_ids(encoder: ChatEncoder, chat: Sequence[Message], rendered: Rendered) -> Encoded:
    own_text = encoder.tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in chat], tokenize=False
    )
    # A template that writes the date writes another one here: our clock stands still.
    if rendered.text != own_text and "strftime_now" not in encoder.tokenizer.chat_template:
        raise RefusedError(f"the chat template wrote {rendered.text!r}, transformers writes {own_text!r}")
    encoded = encode(encoder, rendered)
    if isinstance(encoded, Drop) and encoded.reason == "id_without_embedding":
        raise RefusedError(
            f"the chat template can't be trained with this model: {encoded.detail}; take a template of tokens that "
            "the model knows (split.chat_template), or resize its embeddings first"
        )
    own_ids = encoder.tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    if isinstance(encoded, Drop) or encoded.ids.tolist() != own_ids:
        raise RefusedError(f"{rendered.text!r} is encoded differently from the tokenizer's own ids {own_ids}")
    return encoded


def _check_control_strings(encoder: ChatEncoder, chat: Sequence[Message]) -> None:
    end_token = min(encoder.template.end_tokens)
    forged = [Message(message.role, f"{message.content} {end_token} x") for message in chat]
    rendered = render(encoder.template, forged)
    # The encoding proves itself: control ids only where the template wrote them, else it is a Drop.
    encoded = rendered if isinstance(rendered, Drop) else encode(encoder, rendered)
    if isinstance(encoded, Drop):
        raise RefusedError(
            f"{end_token!r} in a message can't be told from the template's own ({encoded.detail}); use another "
            "tokenizer or template"
        )


def _straddle_message(encoded: Encoded, rendered: Rendered) -> str:
    borders = [border for span in rendered.spans for border in (span.start, span.end)]
    crossing = [(encoded.starts < border) & (encoded.ends > border) for border in borders]
    border, tokens = next((b, c) for b, c in zip(borders, crossing, strict=True) if c.any())
    index = int(np.flatnonzero(tokens)[0])
    token = rendered.text[encoded.starts[index] : encoded.ends[index]]
    return (
        f"answers begin or end inside a token with this template and tokenizer, as {token!r} in "
        f"{rendered.text[max(0, border - 20) : border + 20]!r}; such tokens can't be trained: take white space at "
        "the end of the generation prompt out of the template (split.chat_template), or allow it by "
        "split.max_straddle_share"
    )
