"""Languages of chats, judged by labelled sentences of other people's data."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.rules import languages
from pipelines.rules.languages import Detector, load_detector, num_letters, prose_of

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


# ------------------------------------------------------------------------------------------------- real data


def _turns_of(record: dict[str, Any]) -> Sequence[str]:
    if "messages" in record:
        return [message["content"] for message in record["messages"]]
    if "query" in record:
        return [record["query"]]
    if "text" in record:
        return [record["text"]]
    cases = [str(case.get(part) or "") for case in record["instances"] for part in ("input", "output")]
    return [record["instruction"], *cases]


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "code"),
    [
        *((f"llmzoo_{code}100", code) for code in "ar de en es fr it ja ko pt zh".split()),
        ("seed_tasks_fr", "fr"),
        ("seed_tasks_ru", "ru"),
        ("oasst_fr", "fr"),
        ("camoscio_it_fanpage", "it"),
        ("camoscio_it_ilpost", "it"),
    ],
)
def test_instructions_in_ten_languages_are_known(
    real_data: Path, detector: Detector, name: str, code: str
) -> None:
    records = [json.loads(line) for line in (real_data / "lang" / f"{name}.jsonl").read_text().splitlines()]
    found = [detector.of_chat(_turns_of(record))[0][0] for record in records]
    assert found.count(code) >= 0.97 * len(found)


@pytest.fixture
def counted_opinions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that the second opinion was asked about."""
    asked: list[str] = []
    real: Callable[[str], str] = languages._second_opinion
    monkeypatch.setattr(languages, "_second_opinion", lambda text: (asked.append(text), real(text))[1])
    return asked


@pytest.mark.real_data
def test_news_sentences_in_26_languages_are_known(
    real_data: Path, detector: Detector, counted_opinions: list[str]
) -> None:
    sentences = json.loads(gzip.decompress((real_data / "lang" / "lingua_sentences.json.gz").read_bytes()))
    codes = "ar cs da de el en es fi fr hi hu id it ja ko nl pl pt ro ru sv th tr uk vi zh".split()
    wrong = [
        (code, text)
        for code in codes
        for text in sentences[code][:80]
        if detector.of_chat([text])[0][0] != code
    ]
    assert len(wrong) <= 0.04 * 80 * len(codes), wrong
    assert len(counted_opinions) <= 0.02 * 80 * len(codes)


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
