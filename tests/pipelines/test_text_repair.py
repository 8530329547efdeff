"""Opt-in repairs of text: mojibake, an earlier cleaner's back-slashes, simplified Chinese. Code stays untouched."""

import gzip
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.chinese import simplifier
from pipelines.redact import KINDS, redact
from pipelines.text_repair import clean_unicode, mojibake_fixer, without_artefacts

FIX = mojibake_fixer()
SIMPLIFY = simplifier()


def simplified(*texts: str) -> list[str]:
    return SIMPLIFY(texts, Counter())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("donâ€™t, Ã©tÃ©", "don’t, été"),
        ("“quotes” and ﬁ and ＡＢ &amp; é stay", "“quotes” and ﬁ and ＡＢ &amp; é stay"),
        ("`donâ€™t`\n```\nÃ©tÃ©\n```\nÃ©tÃ©", "`donâ€™t`\n```\nÃ©tÃ©\n```\nété"),
        ("正常的中文, Größe, día", "正常的中文, Größe, día"),
    ],
)
def test_only_wrongly_decoded_prose_is_repaired(text: str, expected: str) -> None:
    repairs: Counter[str] = Counter()
    assert FIX(text, repairs) == expected
    assert FIX(expected, Counter()) == expected
    assert repairs["mojibake"] == (text != expected)


@pytest.mark.parametrize(
    ("text", "expected", "num_removed"),
    [
        (r"set my\_var and a\_b\_c", "set my_var and a_b_c", 3),
        (r"self.\_x and 2 \* 3", r"self.\_x and 2 * 3", 1),
        (r"\* a list? \_not\_ emphasised", r"\* a list? \_not\_ emphasised", 0),
        (r"my\_var beside my_var", r"my\_var beside my_var", 0),
        (r"`my\_var` and $x\_1$ and \(y\_2\)", r"`my\_var` and $x\_1$ and \(y\_2\)", 0),
        ("```\nmy\\_var\n```\nmy\\_var", "```\nmy\\_var\n```\nmy_var", 1),
        (r"C:\dir\_x and \d\_\w", r"C:\dir\_x and \d\_\w", 0),
        (r"my\_var at https://e.org/a_b", "my_var at https://e.org/a_b", 1),
        (r"my\_var, code `a_b`", r"my_var, code `a_b`", 1),
    ],
)
def test_only_back_slashes_that_a_cleaner_must_have_written_go(
    text: str, expected: str, num_removed: int
) -> None:
    repairs: Counter[str] = Counter()
    assert without_artefacts(text, repairs) == expected
    assert without_artefacts(expected, Counter()) == expected
    assert repairs["unescaped"] == num_removed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("這個軟體很好用", "这个软体很好用"),
        ("乾隆皇帝說：頭髮乾了", "乾隆皇帝说：头发干了"),
        ("他們說 `變數 = 1`：\n```\n# 註解\n```\n結束", "他们说 `變數 = 1`：\n```\n# 註解\n```\n结束"),
        ("這是程式\n\n# 計算總和\ntotal = 0\n\n# 標題", "这是程式\n\n# 計算總和\ntotal = 0\n\n# 标题"),
        ("請看 https://e.org/說明/頁 這頁", "请看 https://e.org/說明/頁 这页"),
        (
            "| 價格 | 說明 |\n| --- | --- |\n| 10,000 | 你們 |",
            "| 价格 | 说明 |\n| --- | --- |\n| 10,000 | 你们 |",
        ),
        ("東京都渋谷区、経済産業省", "東京都渋谷区、経済産業省"),
        ("學校と経済の話を聞いて、體を休める", "學校と経済の話を聞いて、體を休める"),
        ("大韓民國 헌법 第一條", "大韓民國 헌법 第一條"),
        ("這是「學校の話」的意思\n這樣說", "這是「學校の話」的意思\n这样说"),
        ("形容詞: 夢想的、神秘的\nこれは日本語", "形容詞: 夢想的、神秘的\nこれは日本語"),
        (
            "你們說「東京」\n東京タワーは綺麗\n東京駅 構內圖",
            "你们说「东京」\n東京タワーは綺麗\n東京駅 構內圖",
        ),
    ],
)
def test_chinese_becomes_simplified_and_nothing_else_does(text: str, expected: str) -> None:
    assert simplified(text) == [expected]
    assert simplified(expected) == [expected]


def test_a_chat_with_japanese_turns_changes_only_where_it_is_surely_chinese() -> None:
    assert simplified("請說明", "東京駅", "これは駅") == ["请说明", "東京駅", "これは駅"]


_pieces = st.sampled_from(
    ["這", "說", "に", "學", "한", "`", "```\n", "\n", "\n\n", "a\\_b", "a_b", " \\* ", " x", "=", "的", "Ã©", "â€™", "https://e.org/說", "\\"]
)  # fmt: skip


@settings(max_examples=300)
@given(st.lists(_pieces, max_size=14).map("".join))
def test_repairs_done_twice_are_repairs_done_once(text: str) -> None:
    for repair in (
        lambda t: simplified(t)[0],
        lambda t: FIX(t, Counter()),
        lambda t: without_artefacts(t, Counter()),
    ):
        once = repair(text)
        assert repair(once) == once


@pytest.mark.parametrize(
    "unit", ["({[", "這(", "(11) 9", "`", "`a`` ```", "\\(", "a\\_b ", "$ a", "\x00`", "https://"]
)
def test_repairs_of_hostile_text_take_linear_time(unit: str) -> None:
    text = unit * (100_000 // len(unit)) + " a\\_b 你們"
    start = time.process_time()
    for repair in (FIX, without_artefacts, clean_unicode):
        repair(text, Counter())
    SIMPLIFY([text], Counter())
    redact([text], KINDS, in_code=True, repairs=Counter())
    assert time.process_time() - start < 5


@pytest.mark.parametrize(("module", "call"), [("ftfy", "mojibake_fixer"), ("opencc", "simplifier")])
def test_a_missing_library_is_named_with_its_remedy(module: str, call: str) -> None:
    source = "text_repair" if call == "mojibake_fixer" else "chinese"
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"from schemas.errors import ConfigError\nfrom pipelines.{source} import {call}\n"
        f"try: {call}()\nexcept ConfigError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'sft-pipeline[text]'" in result.stdout


@pytest.mark.real_data
def test_real_japanese_and_korean_stay_as_they_are(real_data: Path) -> None:
    lines = gzip.decompress((real_data / "lang" / "mtbench_ja.jsonl.gz").read_bytes()).decode().splitlines()
    chats = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
    sentences = json.loads(gzip.decompress((real_data / "lang" / "lingua_sentences.json.gz").read_bytes()))
    chats += [[sentence] for language in ("ja", "ko") for sentence in sentences[language]]
    assert len(chats) > 800
    assert [chat for chat in chats if SIMPLIFY(chat, Counter()) != chat] == []
