"""Languages of chats, judged by labelled sentences of other people's data."""

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import languages as bench
from pipelines.rules import languages
from pipelines.rules.languages import Detector, load_detector, num_letters, prose_of
from tests.conftest import REAL_DATA

SENTENCES = {
    "en": "Could you explain to me how the garbage collector of this language decides what to free?",
    "de": "Kannst du mir erklären, wie die Speicherbereinigung dieser Sprache entscheidet, was sie freigibt?",
    "fr": "Peux-tu m'expliquer comment le ramasse-miettes de ce langage décide de ce qu'il libère ?",
    "vi": "Bạn có thể giải thích cho tôi cách bộ thu gom rác của ngôn ngữ này quyết định giải phóng cái gì không?",
    "ru": "Можешь объяснить, как сборщик мусора этого языка решает, что освобождать?",
    "ar": "هل يمكنك أن تشرح لي كيف يقرر جامع القمامة في هذه اللغة ما الذي يجب تحريره؟",
    "zh": "你能解释一下这种语言的垃圾收集器是如何决定释放什么的吗？",
    "ja": "この言語のガベージコレクタが何を解放するかをどのように決めるのか説明してもらえますか？",
    "ko": "이 언어의 가비지 컬렉터가 무엇을 해제할지 어떻게 결정하는지 설명해 줄 수 있나요?",
}
CODE = "\n".join(
    f"for item in list_{n}: print(item.value, the_list[{n}])  # print the value" for n in range(30)
)


@pytest.fixture(scope="module")
def detector() -> Detector:
    return load_detector()


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_is_known(detector: Detector, code: str) -> None:
    assert detector.of_chat([SENTENCES[code]]) == [[code, 1.0]]


@pytest.mark.parametrize("code", SENTENCES)
@pytest.mark.parametrize("fence", ["```python", "~~~"])
def test_fenced_code_has_no_say(detector: Detector, code: str, fence: str) -> None:
    answer = f"{SENTENCES[code]}\n\n{fence}\n{CODE}\n{fence[:3]}\n\n`the_list` https://example.org/the/list <div class='the list'>"
    assert detector.of_chat([SENTENCES[code], answer]) == [[code, 1.0]]


def test_votes_weigh_as_much_as_their_letters(detector: Detector) -> None:
    english, german = num_letters(SENTENCES["en"]), num_letters(SENTENCES["de"])
    shares = detector.of_chat([SENTENCES["de"], SENTENCES["en"], SENTENCES["en"]])
    assert shares == [
        ["en", round(2 * english / (2 * english + german), 4)],
        ["de", round(german / (2 * english + german), 4)],
    ]


def test_short_turns_go_with_the_turn_before_them(detector: Detector) -> None:
    assert detector.of_chat(["ok", SENTENCES["de"], "yes please", "merci"]) == [["de", 1.0]]


def test_a_chat_of_short_turns_is_judged_as_a_whole(detector: Detector) -> None:
    assert detector.of_chat(["Wie geht es dir?", "Mir geht es gut, danke."]) == [["de", 1.0]]


@pytest.mark.parametrize(
    "turns", [[], [""], ["42", "1 + 1 = 2"], ["```\nthe code of the day\n```"], ["ok"], ["🙂 …"]]
)
def test_without_words_the_language_is_unknown(detector: Detector, turns: list[str]) -> None:
    assert detector.of_chat(turns) == [["und", 1.0]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("東京都渋谷区神南一丁目", "zh"),
        ("「の」是日语里最常见的助词，表示所属关系，用法非常广泛", "zh"),
        ("私は学生です", "ja"),
        ("서울特別市", "zh"),
    ],
)
def test_scripts_decide_between_chinese_japanese_and_korean(
    detector: Detector, text: str, expected: str
) -> None:
    assert detector.of_text(text) == expected


def test_the_same_chat_gets_the_same_answer_whatever_came_before(detector: Detector) -> None:
    doubtful = "Lorem ipsum dolor xyzzy plugh frobnicate quux zork gnusto rezrov blorb frotz nitfol"
    first = detector.of_chat([doubtful])
    for sentence in SENTENCES.values():
        detector.of_chat([sentence, doubtful])
    assert detector.of_chat([doubtful]) == first


def test_prose_is_what_is_left_of_a_turn() -> None:
    turn = "See  https://e.org/x\n```\ncode\n```\nand `code` <b>bold</b> $x^2$\nint main() { return 0; }\nend"
    assert prose_of(turn) == "See\nand bold\nend"


@pytest.mark.parametrize("code", [code for code in SENTENCES if code != "en"])
@pytest.mark.parametrize("border", [" ", "\n", "\n\n"])
def test_a_change_of_language_inside_of_a_turn_is_seen(detector: Detector, code: str, border: str) -> None:
    turn = border.join([SENTENCES["en"], "It is a question that many people ask me.", SENTENCES[code]])
    assert {found for found, _ in detector.of_chat([SENTENCES["en"], turn])} == {"en", code}


def test_a_short_question_in_another_language_than_its_long_answer_is_reported(detector: Detector) -> None:
    answer = " ".join([SENTENCES["en"]] * 20)
    assert [code for code, _ in detector.of_chat([SENTENCES["zh"], answer])] == ["en", "zh"]


@pytest.mark.parametrize(
    "turn",
    [
        "请用 Python 的 pandas 读取 CSV 文件，然后用 DataFrame.groupby 计算每个 customer 的 total revenue。",
        "Bitte nutze in Python die Bibliothek pandas und lies das CSV-File als DataFrame in den Speicher ein.",
        "この関数は list comprehension を使って、Python の dictionary を作成しています。とても便利です。",
    ],
)
def test_technical_words_make_no_second_language(detector: Detector, turn: str) -> None:
    assert len(detector.of_chat([turn, turn])) == 1


def test_each_turn_has_its_language_and_short_ones_that_of_the_turn_before(detector: Detector) -> None:
    turns = ["ok", SENTENCES["de"], "ja", SENTENCES["ru"], "42", SENTENCES["zh"]]
    assert detector.judge(turns).turns == ["de", "de", "de", "ru", "ru", "zh"]


def test_a_sentence_between_two_languages_is_what_the_rest_of_the_chat_is(detector: Detector) -> None:
    """Without its accents Romanian looks like Italian; not in a Romanian chat."""
    bare = "Experienta lui le-a marcat evolutia profesionala."
    full = "Poți să-mi explici, te rog, cum se eliberează memoria în acest limbaj și cine hotărăște asta?"
    assert detector.of_chat([bare]) == [["it", 1.0]]
    assert detector.of_chat([full, bare, full]) == [["ro", 1.0]]


@given(st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=1, max_size=80))
def test_han_alone_is_never_japanese_or_korean(text: str) -> None:
    assert {code for code, _ in load_detector().of_chat([text])} <= {"zh", "und"}


@given(st.lists(st.text(max_size=300), max_size=6))
def test_shares_are_in_order_and_every_turn_has_a_language(texts: list[str]) -> None:
    found = load_detector().judge(texts)
    shares = [share for _, share in found.shares]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1.0002
    assert len(found.turns) == len(texts)
    assert found == load_detector().judge(texts)


@pytest.mark.parametrize(
    ("turn", "prose"),
    [
        ("Try this; it works;", "Try this; it works;"),
        ("Do this:\n| a | b |\n|---|---|\n| 1 | 2 |\ndone", "Do this:\ndone"),
        ("Data:\n2022-01-01,150.02,155.28,148.50\nAlice, Bob, Carol, Dan", "Data:\nAlice, Bob, Carol, Dan"),
        ("Run it:\nx = 5\nprint(x)\nand see", "Run it:\nand see"),
        ("for example:\nif you like it, take it.", "for example:\nif you like it, take it."),
        ("He said \\(x^2\\) and $$y$$ at www.e.org/x.", "He said and at"),
        ("- a list\n    - of (two) items", "- a list\n- of (two) items"),
        ("```\nonly code\n```", ""),
    ],
)
def test_prose_has_no_code_no_data_no_tables(turn: str, prose: str) -> None:
    assert prose_of(turn) == prose


def test_comments_and_docstrings_go_with_their_code() -> None:
    code = 'import os\n\ndef walk(path):\n    """Every file below the path."""\n    # the hidden ones too\n    for name in os.listdir(path):\n        yield name'
    assert prose_of(f"Erklär mir das:\n{code}\n\nDanke!") == "Erklär mir das:\nDanke!"


# ------------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def sentences() -> dict[str, list[str]]:
    data = (REAL_DATA / "lang" / "lingua_sentences.json.gz").read_bytes()
    return dict(json.loads(gzip.decompress(data)))


@pytest.mark.real_data
@pytest.mark.slow
def test_the_largest_language_of_labelled_chats_is_their_label(real_data: Path, detector: Detector) -> None:
    """One of 115 oasst chats is all English by mistake; three others quote more than they say."""
    rows = list(bench.exact_rows(real_data / "lang", detector, show=False))
    right = {family: float(share.removesuffix(" %")) for family, _, share, _ in rows}
    assert set(right) == {"llmzoo", "seed_tasks", "oasst", "camoscio", "arabic_culture"}
    assert {family: share for family, share in right.items() if share < 99.3} == {"oasst": 99.13}


@pytest.mark.real_data
@pytest.mark.slow
def test_the_label_of_a_bilingual_chat_is_reported_and_little_else(
    real_data: Path, detector: Detector
) -> None:
    for name, count, right, text in bench.reported_rows(real_data / "lang", detector, show=False):
        mean = float(re.findall(r"[\d.]+", text)[0])
        assert float(right.removesuffix(" %")) >= 99, name
        assert mean <= 1.2, name
        assert count > 10


@pytest.fixture
def counted_opinions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that the second opinion was asked about."""
    asked: list[str] = []
    real: Callable[[str], str] = languages._second_opinion
    monkeypatch.setattr(languages, "_second_opinion", lambda text: (asked.append(text), real(text))[1])
    return asked


@pytest.mark.real_data
def test_news_sentences_in_26_languages_are_known_with_and_without_code(
    sentences: dict[str, list[str]], detector: Detector, counted_opinions: list[str]
) -> None:
    draw = random.Random(5)
    rows = [(code, text) for code in bench.COMMON for text in sentences[code][:60]]
    wrong = [(code, text) for code, text in rows if detector.of_chat([text])[0][0] != code]
    assert len(wrong) <= 0.012 * len(rows), wrong
    assert len(counted_opinions) <= 0.02 * len(rows)
    for code, text in rows:
        plain = detector.of_chat([text])
        assert detector.of_chat([f"{text}\n```\n{bench.python_code(4 * len(text), draw)}```"]) == plain, code


@pytest.mark.real_data
@pytest.mark.slow
def test_two_languages_in_a_chat_are_found_and_one_is_not_called_two(
    sentences: dict[str, list[str]], detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "NUM_MIXED", 600)
    *mixed, single = list(bench.mixed_rows(sentences, detector, show=False))
    shares = [float(row[2].removesuffix(" %")) for row in mixed]
    assert len(shares) == 4
    assert min(shares) >= 95
    assert float(single[2].removesuffix(" %")) <= 1


@pytest.mark.real_data
def test_han_without_kana_is_never_japanese(sentences: dict[str, list[str]], detector: Detector) -> None:
    assert bench.han_row(sentences, detector)[2] == "0.00 %"


@pytest.mark.real_data
@pytest.mark.slow
def test_langdetect_is_asked_on_few_turns_of_real_chats(
    real_data: Path, detector: Detector, counted_opinions: list[str]
) -> None:
    chats = json.loads(gzip.decompress((real_data / "sharegpt_v3_sample.json.gz").read_bytes()))
    turns = [[turn["value"] for turn in chat["conversations"]] for chat in chats]
    for chat in turns:
        detector.of_chat(chat)
    assert 0 < len(counted_opinions) <= 0.02 * sum(map(len, turns))
