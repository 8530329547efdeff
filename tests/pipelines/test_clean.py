"""Stage clean: what it changes in a chat, and all that it doesn't."""

import copy
import gzip
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import clean
from pipelines.text_repair import clean_unicode
from schemas.conversation import Conversation, Drop, Message
from schemas.pipeline_config import CleanConfig, PipelineConfig
from schemas.source_config import SourceConfig


def chat(*turns: tuple[str, str], **meta: Any) -> Conversation:
    return Conversation("row", "s/f.json", 0, [Message(role, text) for role, text in turns], meta)


def step(conversation: Conversation, **settings: Any) -> Conversation | Drop:
    return clean.clean(conversation, CleanConfig(**settings))


def cleaned(conversation: Conversation, **settings: Any) -> Conversation:
    outcome = step(conversation, **settings)
    assert isinstance(outcome, Conversation), outcome
    return outcome


def texts(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages]


def answer(inner: str, classes: str = "markdown prose") -> str:
    return f'<div class="{classes}">{inner}</div>'


UNFINISHED = answer("<p>Half an ans</p>", "result-streaming markdown prose")


def test_html_answers_become_markdown_and_questions_stay_as_they_are() -> None:
    question = '<div class="markdown">\n  <b>why?</b> &amp; a &lt; b  </div>'
    outcome = cleaned(
        chat(
            ("system", "<p>Be <b>brief</b>.</p>"),
            ("user", question),
            ("assistant", answer("<p>a <b>b</b></p>")),
        )
    )
    assert texts(outcome) == ["<p>Be <b>brief</b>.</p>", question, "a **b**"]
    assert outcome.meta == {"answers": "text", "repairs": {"html": 1}}


@pytest.mark.parametrize(
    ("answers", "text", "expected"),
    [
        ("auto", "<p>a</p>", "a"),
        ("auto", "Hi <b>there</b>", "Hi <b>there</b>"),
        ("html", "Hi <b>there</b>", "Hi **there**"),
        ("html", "a &lt; b", "a < b"),
        ("html", "no markup,  two blanks & more", "no markup,  two blanks & more"),
        ("text", "<p>a</p>", "<p>a</p>"),
    ],
)
def test_the_source_says_whether_answers_are_html(answers: str, text: str, expected: str) -> None:
    assert texts(cleaned(chat(("assistant", text), answers=answers))) == [expected]


def test_an_answer_that_shows_html_as_text_is_not_converted_again() -> None:
    once = cleaned(chat(("assistant", answer("<p>&lt;p&gt;Hello&lt;/p&gt;</p>"))))
    assert texts(once) == ["\\<p>Hello\\</p>"]
    assert cleaned(once) == once


@pytest.mark.parametrize(
    ("text", "expected", "repairs"),
    [
        ("a\r\nb\rc", "a\nb\nc", {"line_ends": 1}),
        ("a\x00b\x1b[0m\x7f\x85\ufeffc\td\n", "ab[0mc\td\n", {"control_characters": 4, "zero_width": 1}),
        ("cafe\u0301", "caf\u00e9", {"nfc": 1}),
        ("e\u0301\n```\ne\u0301\n```\ne\u0301", "\u00e9\n```\ne\u0301\n```\n\u00e9", {"nfc": 1}),
        ("\ufffd \u200d \u200c \u202e", "\ufffd \u200d \u200c \u202e", {}),
        ("a\u200bb \u2060c \u200b", "ab c ", {"zero_width": 3}),
        ("ក\u200bខ ก\u200bข", "ក\u200bខ ก\u200bข", {}),
        (
            "a\x07\n```\n\x1b[0m\u200b\ufeff\n```\n`\u200b e\u0301`\u200b",
            "a\n```\n\x1b[0m\u200b\ufeff\n```\n`\u200b e\u0301`",
            {"control_characters": 1, "zero_width": 1},
        ),
        ("  untouched \n\n", "  untouched \n\n", {}),
    ],
)
def test_text_is_clean_unicode_and_what_was_repaired_is_counted(
    text: str, expected: str, repairs: dict[str, int]
) -> None:
    outcome = cleaned(chat(("user", text)))
    assert texts(outcome) == [expected]
    assert outcome.meta.get("repairs", {}) == repairs


def test_character_references_bring_in_no_control_characters() -> None:
    assert texts(cleaned(chat(("assistant", answer("<p>a&#x1b;b&#xfeff;c e&#x301;</p>"))))) == ["abc \u00e9"]


def test_repairs_of_earlier_stages_are_kept() -> None:
    outcome = cleaned(chat(("user", "a\r\n"), ("assistant", "b\r\n"), repairs={"line_ends": 1, "other": 2}))
    assert outcome.meta["repairs"] == {"line_ends": 3, "other": 2}


def test_order_number_and_extras_of_messages_are_kept() -> None:
    messages = [
        Message("assistant", answer("<p>a</p>"), {"model": "m"}),
        Message("tool", "{}", {"name": "n"}),
    ]
    outcome = cleaned(Conversation("row", "s/f", 3, messages, {"id": "x"}))
    assert [(m.role, m.extras) for m in outcome.messages] == [(m.role, m.extras) for m in messages]
    assert (outcome.row_id, outcome.source, outcome.record, outcome.meta["id"]) == ("row", "s/f", 3, "x")


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", UNFINISHED)], ["q1", "a1"]),
        (
            [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("user", "q3"), ("assistant", UNFINISHED)],
            ["q1", "a1"],
        ),
        ([("user", "q1"), ("assistant", "a1"), ("assistant", UNFINISHED)], ["q1", "a1"]),
        (
            [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", UNFINISHED), ("user", "q3")],
            ["q1", "a1"],
        ),
    ],
)
def test_an_unfinished_last_answer_goes_with_its_question(
    turns: Sequence[tuple[str, str]], expected: list[str]
) -> None:
    outcome = cleaned(chat(*turns))
    assert texts(outcome) == expected
    assert outcome.meta["repairs"]["unfinished_answers"] == 1
    assert "unfinished" not in outcome.meta


def test_an_unfinished_answer_is_kept_where_the_chat_goes_on_or_the_setting_says_so() -> None:
    going_on = chat(("user", "q"), ("assistant", UNFINISHED), ("user", "go on"), ("assistant", "wer."))
    assert texts(cleaned(going_on)) == ["q", "Half an ans", "go on", "wer."]
    assert cleaned(going_on).meta["unfinished"] is True
    only = chat(("user", "q"), ("assistant", UNFINISHED))
    assert cleaned(only, unfinished="keep").meta["unfinished"] is True
    assert step(only) == Drop("unfinished", "the only answer was cut off while being written")


def test_a_drop_names_the_message() -> None:
    outcome = step(chat(("user", "q"), ("assistant", answer("x" * 2_000))), max_message_bytes=1_000)
    assert outcome == Drop("html_too_large", "message 1: more than 1000 bytes")


def test_prepare_takes_the_settings_and_versions_name_the_converter(tmp_path: Path) -> None:
    config = PipelineConfig(
        run_root=tmp_path,
        sources=[SourceConfig(name="s", path="x")],
        clean=CleanConfig(converter="markdownify", images="alt"),
    )
    outcome = clean.prepare(config)(chat(("assistant", answer('<p>a <img alt="cat" src="x"></p>'))))
    assert isinstance(outcome, Conversation)
    assert texts(outcome) == ["a cat"]
    repairing = config.model_copy(update={"clean": CleanConfig(ftfy=True, chinese="simplified")})
    assert set(clean.versions(repairing)) >= {"ftfy", "opencc"}
    assert set(clean.versions(config)) == {"selectolax", "markdownify", "markdown-it-py", "unicode"}


def test_an_html_answer_keeps_the_bytes_of_its_code_and_loses_what_nobody_sees() -> None:
    html = "\ufeff" + answer(
        "<p>a\x07\u200bb\x85</p>\r\n<pre><code>e\u0301\x1b[0m\u200b</code></pre><p><code>\x08</code></p>"
    )
    outcome = cleaned(chat(("assistant", html)))
    assert texts(outcome) == ["ab\n\n```\ne\u0301\x1b[0m\u200b\n```\n\n`\x08`"]
    assert cleaned(outcome) == outcome


def test_all_answers_of_a_chat_together_have_a_limit() -> None:
    turns = [("assistant", answer("<p>a</p>"))] * 3
    size = len(turns[0][1])
    assert texts(cleaned(chat(*turns), max_chat_bytes=3 * size)) == ["a", "a", "a"]
    outcome = step(chat(*turns), max_chat_bytes=3 * size - 1)
    assert outcome == Drop(
        "html_too_large", f"message 2: more than {3 * size - 1} bytes in the answers of one chat"
    )


KEY = "sk-aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xY3zA5bC7dE9fG1h"


def test_opted_repairs_are_made_in_all_roles_and_counted() -> None:
    conversation = chat(
        ("system", "a@b.org, donâ€™t"),
        ("user", r"my\_var: a@b.org 說明這個"),
        ("assistant", answer(f"<p>c@d.org 說</p><pre><code>{KEY}\n說</code></pre>")),
    )
    wanted: dict[str, Any] = {
        "ftfy": True,
        "unescape": True,
        "chinese": "simplified",
        "redact": ["email", "key"],
    }
    outcome = cleaned(conversation, **wanted)
    assert texts(outcome) == [
        "[EMAIL_1], don’t",
        "my_var: [EMAIL_1] 说明这个",
        f"[EMAIL_2] 说\n\n```\n{KEY}\n說\n```",
    ]
    assert outcome.meta["repairs"] == {
        "api_keys_kept": 1, "html": 1, "mojibake": 1, "redacted_email": 3, "simplified_chinese": 2, "unescaped": 1,
    }  # fmt: skip
    assert cleaned(outcome, **wanted) == outcome
    assert cleaned(conversation, redact=["key"], redact_code=True).meta["repairs"] == {
        "html": 1,
        "redacted_key": 1,
    }
    assert cleaned(conversation).meta["repairs"] == {"api_keys_kept": 1, "html": 1}


def test_reasoning_is_repaired_like_text_and_calls_are_redacted_with_the_placeholders_of_the_chat() -> None:
    call = {"function": {"name": "mail", "arguments": {"to": ["a@b.org", "e@f.org"], "text": "e\u0301"}}}
    extras = {"reasoning": "e\u0301 to a@b.org", "tool_calls": [call], "name": "a@b.org"}
    conversation = chat(("user", "write to a@b.org"), ("assistant", ""))
    conversation.messages[1].extras = extras
    outcome = cleaned(conversation, redact=["email"])
    assert texts(outcome) == ["write to [EMAIL_1]", ""]
    arguments = {"to": ["[EMAIL_1]", "[EMAIL_2]"], "text": "e\u0301"}
    assert outcome.messages[1].extras == {
        "reasoning": "\u00e9 to [EMAIL_1]",
        "tool_calls": [{"function": {"name": "mail", "arguments": arguments}}],
        "name": "a@b.org",
    }
    assert extras["tool_calls"] == [call], "the record is not changed"
    assert call["function"]["arguments"]["to"] == ["a@b.org", "e@f.org"]  # type: ignore[index]
    assert cleaned(outcome, redact=["email"]) == outcome
    assert outcome.meta["repairs"]["redacted_email"] == 4


def test_calls_nested_as_deep_as_can_be_read_are_redacted() -> None:
    nested: Any = "a@b.org"
    for _ in range(5000):
        nested = [nested]
    conversation = chat(("user", "hi"), ("assistant", "hello"))
    conversation.messages[1].extras = {"tool_calls": nested}
    found: Any = cleaned(conversation, redact=["email"]).messages[1].extras["tool_calls"]
    while isinstance(found, list):
        (found,) = found
    assert found == "[EMAIL_1]"


_pieces = st.sampled_from(
    ["e\u0301", "\u1fef", "`", "```\n", "~~~", "\n", "\r\n", "\r", "\x00", "\x85", "\ufeff", "> ", "- ", "<p>", "</p>", "&lt;",
     "<pre>", "</pre>", "<code>", "</code>", "a@b.org", "說", "這", "a\\_b", "Ã©", "8.8.8.8 ", "[EMAIL_1]", "<div class='markdown'>", "</div>", "\u212b", "=\u0338", "word", "\u200b", "\ud7a3\u11a8"]
)  # fmt: skip
_texts = st.lists(_pieces, max_size=12).map("".join)
_answers = _texts.map(answer)
_turns = st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.one_of(_texts, _answers))
_chats = st.builds(
    lambda turns, answers: chat(*turns, answers=answers),
    st.lists(_turns, max_size=4),
    st.sampled_from(["auto", "html", "text"]),
)


_all_repairs = {
    "ftfy": True, "unescape": True, "chinese": "simplified", "redact": ["email", "ip", "phone", "card", "iban", "key"],
    "images": "keep", "citations": "keep",
}  # fmt: skip


@pytest.mark.parametrize("wanted", [{}, _all_repairs], ids=["default", "all repairs"])
@settings(max_examples=300)
@given(_chats)
def test_cleaning_twice_is_cleaning_once_and_never_changes_its_argument(
    wanted: dict[str, Any], conversation: Conversation
) -> None:
    before = copy.deepcopy(conversation)
    once = step(conversation, **wanted)
    assert conversation == before
    if isinstance(once, Conversation):
        assert step(once, **wanted) == once


@settings(max_examples=200)
@given(_texts)
def test_plain_text_changes_in_nothing_but_unicode(text: str) -> None:
    outcome = clean_unicode(text, Counter())
    assert (
        unicodedata.normalize("NFC", _without_controls(outcome)).split()
        == unicodedata.normalize("NFC", _without_controls(text)).split()
    )


def _without_controls(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(
        c for c in text if c in "\n\t" or (unicodedata.category(c) != "Cc" and c not in "\ufeff\u200b")
    )


@pytest.mark.real_data
@pytest.mark.slow
def test_real_chats_lose_only_what_was_never_finished(real_data: Path) -> None:
    chats = json.loads(gzip.decompress((real_data / "sharegpt_html.json.gz").read_bytes()))
    drops: Counter[str] = Counter()
    for record in chats:
        turns = [
            ("user" if turn["from"] == "human" else "assistant", turn["value"])
            for turn in record["conversations"]
        ]
        outcome = step(chat(*turns))
        if isinstance(outcome, Drop):
            drops[outcome.reason] += 1
            continue
        assert step(outcome) == outcome
        cut = len(turns) - len(outcome.messages)
        last = turns[-1][1]
        assert cut == 2 * ("result-streaming" in last or "text-red-500" in last)
        for (role, text), message in zip(turns, outcome.messages, strict=False):
            assert role == "assistant" or message.content == clean_unicode(text, Counter())
    assert drops == {"unfinished": 3}
