"""Rules about whole chats: sizes, repetition, shares, words, models, languages, a quality score."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines import filter as filter_stage
from pipelines.rules.answers import ANSWER_RULES
from pipelines.rules.chinese import chinese_script
from pipelines.rules.languages import load_detector, model_path
from pipelines.rules.repetition import _repeated, may_have_run, repeated_ngram_share
from schemas.conversation import Conversation, Drop, Message
from schemas.errors import ConfigError, InputError
from schemas.pipeline_config import FilterConfig, PipelineConfig
from schemas.source_config import SourceConfig
from schemas.training_config import ModelConfig
from tests.pipelines.tiny_tokenizers import tiny_tokenizer

ENGLISH = "The quick brown fox jumps over the lazy dog while everybody watches from afar."
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, während alle aus der Ferne zusehen."
RUSSIAN = "Быстрая коричневая лиса прыгает через ленивую собаку, пока все смотрят издалека."
SIMPLIFIED = "这只敏捷的棕色狐狸跳过了懒狗，所有的人都在远处观看，没有一个人说话。"
TRADITIONAL = "這隻敏捷的棕色狐狸跳過了懶狗，所有的人都在遠處觀看，沒有一個人說話。"
JAPANESE = "素早い茶色の狐がのろまな犬を飛び越え、みんなが遠くからそれを見ている。"
CODE = "```python\n" + "assert value == value  # openai 1111111111\n" * 20 + "```"
TABLE = "| a | b |\n|---|---|\n" + "| !!!!!!!!!!! | 1111111111 |\n" * 8
WORDS = "One morning the miller found that the river had taken his wheel, and walked down to the town to ask for help."


def chat(*turns: tuple[str, str], **meta: Any) -> Conversation:
    return Conversation("row", "s/f.json", 0, [Message(role, text) for role, text in turns], meta)


def rounds(*pairs: tuple[str, str]) -> Conversation:
    return chat(*[turn for q, a in pairs for turn in (("user", q), ("assistant", a))])


def asked(answer: str, question: str = "?") -> Conversation:
    return rounds((question, answer))


def named(*models: str, **meta: Any) -> Conversation:
    messages = [Message("user", "?")]
    for model in models:
        messages += [Message("assistant", "a", {"model": model} if model else {}), Message("user", "?")]
    return Conversation("row", "s/f.json", 0, messages[:-1], meta)


def judged(conversation: Conversation, **settings: Any) -> Conversation | Drop:
    return filter_stage.judge(conversation, FilterConfig(**settings), detector=load_detector())


@pytest.mark.parametrize(
    ("conversation", "settings", "reason"),
    [
        (rounds(("q", "a")), {"min_turns": 4}, "too_few_turns"),
        (rounds(("q", "long enough"), ("q", "no")), {"min_answer_chars": 5}, "answer_too_short"),
        (rounds(("q", "a"), ("q", "too long")), {"max_answer_chars": 5}, "answer_too_long"),
        (asked("it is 11111111111"), {"max_digit_run": 9}, "digit_repetition"),
        (asked("Nooooooooooooo"), {"max_character_run": 9}, "character_repetition"),
        (asked("好好好好好好好好好好好好"), {"max_character_run": 9}, "character_repetition"),
        (asked("What?!?????????????"), {"max_character_run": 9}, "character_repetition"),
        (asked("First.\n" + "The same again.\n" * 7), {"max_repeated_line_share": 0.5}, "line_repetition"),
        (asked(" ".join([WORDS] * 6)), {"max_repeated_ngram_share": 0.3}, "ngram_repetition"),
        (asked(SIMPLIFIED * 5), {"max_repeated_ngram_share": 0.3}, "ngram_repetition"),
        (asked(JAPANESE * 5), {"max_repeated_ngram_share": 0.3}, "ngram_repetition"),
        (asked("a ~ b # c % d ^ e & f ! g ? h + i / j : k ; l = m , n < o > p q ' r $ s @ t ! u"), {"max_symbol_share": 0.3}, "too_many_symbols"),
        (asked("12 34 56 78 90 12 34 56 78 90 12 34 56 78 90 apples and pears"), {"max_digit_share": 0.5}, "too_many_digits"),
        (asked(f"See:\n{CODE}"), {"max_code_share": 0.8}, "too_much_code"),
        (asked("Ask OpenAI about it."), {"blocked_words": ["openai"]}, "blocked_word"),
        (asked("Спросите ОТКРЫТЫЙ ии"), {"blocked_words": ["открытый ии"]}, "blocked_word"),
        (asked("请问百度公司在哪里"), {"blocked_words": ["百度"]}, "blocked_word"),
        (asked("It is C++ again."), {"blocked_words": ["c++"]}, "blocked_word"),
        (asked("a", "Is this by Vicuna?"), {"blocked_words": ["vicuna"]}, "blocked_word"),
        (named("gpt-3.5-turbo"), {"keep_models": ["gpt-4*"]}, "model_not_kept"),
        (named("gpt-4", "text-davinci"), {"keep_models": ["gpt-4*"]}, "model_not_kept"),
        (named(""), {"keep_models": ["gpt-4*"]}, "model_not_kept"),
        (named("", model="GPT-4o"), {"skip_models": ["gpt-4*"]}, "model_skipped"),
        (asked(GERMAN, ENGLISH), {"mixed_chats": "drop"}, "mixed_languages"),
        (asked(GERMAN, ENGLISH), {"mixed_chats": "cut"}, "mixed_languages"),
        (rounds((ENGLISH, ENGLISH), (ENGLISH, ENGLISH), (GERMAN, GERMAN)), {"keep_languages": ["en"], "foreign_rounds": "drop"}, "foreign_round"),
        (asked(SIMPLIFIED), {"keep_languages": ["zh-Hant"]}, "language_not_kept"),
        (asked(TRADITIONAL), {"skip_languages": ["zh-Hant"]}, "language_skipped"),
        (asked(TRADITIONAL), {"skip_languages": ["zh"]}, "language_skipped"),
    ],
)  # fmt: skip
def test_each_fault_drops_with_its_reason(
    conversation: Conversation, settings: dict[str, Any], reason: str
) -> None:
    outcome = judged(conversation, **settings)
    assert isinstance(outcome, Drop)
    assert (outcome.reason, bool(outcome.detail)) == (reason, True)
    assert isinstance(judged(conversation), Conversation), "every one of these rules is off by default"


@pytest.mark.parametrize(
    ("conversation", "settings"),
    [
        (rounds(("q", "a")), {"min_turns": 2}),
        (rounds(("q", "abc")), {"min_answer_chars": 3, "max_answer_chars": 3}),
        (asked("it is 111111111"), {"max_digit_run": 9}),
        (asked(f"See:\n{CODE}\n`11111111111` https://e.org/11111111111"), {"max_digit_run": 9}),
        (asked(TABLE), {"max_digit_run": 9}),
        (asked("Nooooo!!!!! Waaaaait\n----------------\nChapter 1 ............ 7"), {"max_character_run": 9}),
        (asked(f"{CODE}\n{TABLE}Fine."), {"max_character_run": 9}),
        (asked("- a\n- b\n- c\n- d\n- e\n- f\n- a"), {"max_repeated_line_share": 0.5}),
        (asked(f"{CODE}\nFine."), {"max_repeated_line_share": 0.1, "max_repeated_ngram_share": 0.1}),
        (asked("No!\nNo!\nNo!"), {"max_repeated_line_share": 0.1}),
        (asked(f"{WORDS} {GERMAN} {RUSSIAN} {ENGLISH} {WORDS}"), {"max_repeated_ngram_share": 0.4}),
        (asked(SIMPLIFIED + TRADITIONAL + JAPANESE), {"max_repeated_ngram_share": 0.1}),
        (asked(WORDS), {"max_symbol_share": 0.1, "max_digit_share": 0.1, "max_code_share": 0.1}),
        (asked("त्वरित भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है, जबकि सभी लोग दूर से देखते रहते हैं"), {"max_symbol_share": 0.1}),
        (asked("สุนัขจิ้งจอกสีน้ำตาลที่ว่องไวกระโดดข้ามสุนัขขี้เกียจขณะที่ทุกคนมองดูอยู่ไกลๆ"), {"max_symbol_share": 0.1}),
        (asked("42"), {"max_digit_share": 0.1, "max_symbol_share": 0.1}),
        (asked(f"{WORDS}\n{CODE}"), {"max_digit_share": 0.1, "max_symbol_share": 0.1}),
        (asked("The openairport is open."), {"blocked_words": ["openai", "port"]}),
        (asked(f"Use it:\n{CODE}\nand `import openai` from https://openai.com/openai"), {"blocked_words": ["openai"]}),
        (asked("a", "Is this by Vicuna?"), {"blocked_words": ["vicuna"], "blocked_words_in": "answers"}),
        (asked("Ein Mitarbeiter"), {"blocked_words": ["arbeit"]}),
        (named("gpt-4", "GPT-4o"), {"keep_models": ["gpt-4*"], "skip_models": ["gpt-4-mini"]}),
        (named("", model="gpt-4"), {"keep_models": ["GPT-4*"]}),
        (named(""), {"keep_models": ["gpt-4*", ""]}),
        (named(""), {"skip_models": ["gpt-4*"]}),
        (asked(GERMAN, GERMAN), {"mixed_chats": "drop"}),
        (asked(f"{WORDS} {ENGLISH}", "ok, danke"), {"mixed_chats": "drop"}),
        (asked(f"{GERMAN}\n{CODE}"), {"mixed_chats": "drop", "keep_languages": ["de"], "foreign_rounds": "drop"}),
        (asked(SIMPLIFIED), {"keep_languages": ["zh-Hans"]}),
        (asked(SIMPLIFIED), {"keep_languages": ["zh"]}),
        (asked(SIMPLIFIED), {"skip_languages": ["zh-Hant", "ja"]}),
        (asked(TRADITIONAL), {"keep_languages": ["zh-Hant"], "foreign_rounds": "drop"}),
        (asked("山水人口田地上下中大小多少天日月明火木土白金石"), {"keep_languages": ["zh"], "skip_languages": ["zh-Hant", "zh-Hans"]}),
    ],
)  # fmt: skip
def test_a_near_miss_is_kept_as_it_is(conversation: Conversation, settings: dict[str, Any]) -> None:
    outcome = judged(conversation, **settings)
    assert isinstance(outcome, Conversation), outcome
    assert outcome.messages == conversation.messages


# Languages ----------------------------------------------------------------------------------------------------

MIXED = rounds((ENGLISH, WORDS), (GERMAN, GERMAN), (WORDS, ENGLISH))


@pytest.mark.parametrize(
    "settings", [{"mixed_chats": "cut"}, {"skip_languages": ["de"], "foreign_rounds": "cut"}]
)
def test_a_cut_takes_out_whole_rounds_counts_them_and_judges_again(settings: dict[str, Any]) -> None:
    before = [message.content for message in MIXED.messages]
    outcome = judged(MIXED, **settings)
    assert isinstance(outcome, Conversation)
    assert outcome.messages == MIXED.messages[:2] + MIXED.messages[4:]
    assert outcome.meta == {"language": [["en", 1.0]], "repairs": {"rounds_cut_by_language": 1}}
    assert [message.content for message in MIXED.messages] == before


def test_a_mixed_chat_is_kept_by_default_with_both_languages() -> None:
    outcome = judged(MIXED)
    assert isinstance(outcome, Conversation)
    assert [code for code, _ in outcome.meta["language"]] == ["en", "de"]


def test_one_script_of_chinese_can_be_cut_from_the_other() -> None:
    chat = rounds((SIMPLIFIED, SIMPLIFIED), (TRADITIONAL, TRADITIONAL), (SIMPLIFIED, SIMPLIFIED))
    outcome = judged(chat, keep_languages=["zh-Hans"], foreign_rounds="cut")
    assert isinstance(outcome, Conversation)
    assert outcome.messages == chat.messages[:2] + chat.messages[4:]
    assert outcome.meta["chinese"] == "zh-Hans"


@pytest.mark.parametrize(
    ("text", "script"),
    [
        (SIMPLIFIED, "zh-Hans"),
        (TRADITIONAL, "zh-Hant"),
        ("山水人口", "zh"),
        ("", "zh"),
        ("软件工程师写程序", "zh-Hans"),
        ("軟體工程師寫程式", "zh-Hant"),
        (f"{SIMPLIFIED}（「說」）", "zh-Hans"),
    ],
)
def test_chinese_scripts_are_told_apart_by_their_characters(text: str, script: str) -> None:
    assert chinese_script(text) == script


@pytest.mark.parametrize("code", ["english", "EN", "zh-CN", "zh_hans", ""])
def test_what_is_no_language_code_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        FilterConfig(keep_languages=[code])


# Rounds and roles ---------------------------------------------------------------------------------------------


def test_only_the_first_round_is_kept_and_the_cut_counted() -> None:
    three = rounds(("1", "a"), ("2", "b"), ("3", "c"))
    three.messages.insert(0, Message("system", "s"))
    outcome = judged(three, first_round_only=True)
    assert isinstance(outcome, Conversation)
    assert outcome.messages == three.messages[:3]
    assert outcome.meta["repairs"] == {"later_rounds_cut": 2}
    assert judged(outcome, first_round_only=True) == outcome


ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


@pytest.mark.parametrize(
    ("turns", "settings", "expected"),
    [
        ("u1 a1 a2", {"same_role": "last"}, "u1 a2"),
        ("u1 u2 u3 a1", {"same_role": "last"}, "u3 a1"),
        ("s1 s2 u1 a1", {"same_role": "last"}, "s2 u1 a1"),
        ("u1 a1 t1 t2 a2 a3", {"same_role": "last"}, "u1 a1 t1 t2 a3"),
        ("u1 a1 a2", {"same_role": "drop"}, "wrong_role_order"),
        ("a1 u1 a2", {"same_role": "drop"}, "u1 a2"),
        ("a1 u1 a2", {"leading_answers": "drop"}, "wrong_role_order"),
        ("u1 a1 u2", {"leading_answers": "drop"}, "u1 a1"),
        ("u1 a1 u2", {"trailing_questions": "drop"}, "wrong_role_order"),
        ("a1 u1 a2", {"trailing_questions": "drop"}, "u1 a2"),
    ],
)
def test_each_repair_of_roles_has_its_policy(turns: str, settings: dict[str, Any], expected: str) -> None:
    outcome = judged(chat(*[(ROLES[turn[0]], turn[1:]) for turn in turns.split()]), **settings)
    if isinstance(outcome, Drop):
        assert outcome.reason == expected
        assert next(iter(settings)) in outcome.detail
    else:
        assert " ".join(message.role[0] + message.content for message in outcome.messages) == expected
        assert sum(outcome.meta["repairs"].values()) == len(turns.split()) - len(expected.split())


# Repetition ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=120))
def test_the_share_of_repeated_words_is_what_counting_by_hand_finds(numbers: list[int]) -> None:
    """Judge: for every word, whether one of the 8-grams over it stands further left, too."""
    words = [f"w{number}" for number in numbers]
    grams = [tuple(words[i : i + 8]) for i in range(len(words) - 7)]
    repeated = {i + k for i, gram in enumerate(grams) if gram in grams[:i] for k in range(8)}
    expected = len(repeated) / len(words) if len(words) >= 50 else 0.0
    assert repeated_ngram_share(" ".join(words)) == pytest.approx(expected)


# Tokens and quality -------------------------------------------------------------------------------------------


def config_with(folder: Path, **settings: Any) -> PipelineConfig:
    return PipelineConfig(
        run_root=folder / "run",
        sources=[SourceConfig(name="s", path="x")],
        model=ModelConfig(path=str(folder / "model")),
        filter=FilterConfig(**settings),
    )


@pytest.mark.slow
def test_tokens_are_those_of_the_models_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("byte_level_bpe", "{{ messages }}")
    tokenizer.save_pretrained(tmp_path / "model")
    count = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in (WORDS, ENGLISH))
    for settings, reason in (
        ({"max_tokens": count}, ""),
        ({"max_tokens": count - 1}, "too_many_tokens"),
        ({"min_tokens": count}, ""),
        ({"min_tokens": count + 1}, "too_few_tokens"),
    ):
        config = config_with(tmp_path, **settings)
        outcome = filter_stage.prepare(config)(asked(ENGLISH, WORDS))
        assert (outcome.reason if isinstance(outcome, Drop) else "") == reason
        assert "tokenizer" in filter_stage.versions(config)
    assert "tokenizer" not in filter_stage.versions(config_with(tmp_path))


def test_a_function_scores_chats_and_its_module_shapes_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "my_scores.py"
    module.write_text("def turns(chat):\n    return len(chat.messages) / 10\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_scores", raising=False)
    config = config_with(tmp_path, quality="my_scores:turns", min_quality=0.3)
    step = filter_stage.prepare(config)
    short, long = step(rounds(("q", "a"))), step(rounds(("q", "a"), ("q", "b")))
    assert isinstance(short, Drop)
    assert short.reason == "low_quality"
    assert isinstance(long, Conversation)
    assert long.meta["quality"] == 0.4
    before = filter_stage.versions(config)["quality"]
    module.write_text("def turns(chat):\n    return 1\n")
    assert filter_stage.versions(config)["quality"] != before


def test_a_fasttext_model_scores_chats_by_its_label(tmp_path: Path) -> None:
    """The language model is a fastText model with labels, too."""
    path = str(model_path())
    step = filter_stage.prepare(config_with(tmp_path, quality=path, quality_label="__label__en"))
    english, german = step(asked(ENGLISH)), step(asked(GERMAN))
    assert isinstance(english, Conversation)
    assert english.meta["quality"] > 0.7
    assert isinstance(german, Drop)
    assert german.reason == "low_quality"
    config = config_with(tmp_path, quality=path)
    with pytest.raises(ConfigError, match="__label__hq"):
        filter_stage.prepare(config)


@pytest.mark.parametrize(
    ("quality", "error", "found"),
    [
        ("no_such_module:score", ConfigError, "can't be imported"),
        ("math:no_such_function", ConfigError, "can't be imported"),
        ("math:pi", ConfigError, "no function but float"),
        ("no/such/model.bin", InputError, "not there"),
    ],
)
def test_a_quality_that_is_not_there_is_refused(
    tmp_path: Path, quality: str, error: type[Exception], found: str
) -> None:
    with pytest.raises(error, match=found):
        filter_stage.prepare(config_with(tmp_path, quality=quality))


def test_a_score_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad_scores.py").write_text("def score(chat):\n    return 'good'\n")
    monkeypatch.syspath_prepend(tmp_path)
    step = filter_stage.prepare(config_with(tmp_path, quality="bad_scores:score"))
    with pytest.raises(ConfigError, match="row row, expected a number"):
        step(asked(ENGLISH))


# Everything at once -------------------------------------------------------------------------------------------

ALL_RULES: dict[str, Any] = {
    **{rule.setting: "cut" for rule in ANSWER_RULES.values()},
    "max_digit_run": 9,
    "max_character_run": 9,
    "max_repeated_line_share": 0.5,
    "max_repeated_ngram_share": 0.5,
    "max_symbol_share": 0.5,
    "max_digit_share": 0.5,
    "max_code_share": 0.9,
    "blocked_words": ["vicuna", "百度"],
    "skip_models": ["gpt-3*"],
    "mixed_chats": "cut",
    "skip_languages": ["de"],
    "foreign_rounds": "cut",
}

_texts = st.one_of(
    st.text(max_size=80),
    st.sampled_from(
        [ENGLISH, GERMAN, RUSSIAN, SIMPLIFIED, TRADITIONAL, JAPANESE, CODE, TABLE, WORDS, "{{name}}"]
    ),
)


# What is left once the Spanish round is cut is mostly digits.
@example(
    [
        ("user", "0"),
        ("assistant", "¿"),
        ("assistant", "0000000001000000000100AAAAA0AAAAAAAAABA"),
        ("user", "0"),
        ("assistant", "AAAAAAAAABallpAa"),
    ]
)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), _texts), max_size=9))
def test_with_all_rules_on_a_chat_is_dropped_for_a_reason_or_in_order_and_its_turns_accounted_for(
    turns: list[tuple[str, str]],
) -> None:
    conversation = chat(*turns)
    outcome = judged(conversation, **ALL_RULES)
    assert conversation.messages == [Message(role, text) for role, text in turns]  # type: ignore[arg-type]
    assert outcome == judged(conversation, **ALL_RULES)
    if isinstance(outcome, Drop):
        assert outcome.reason
        assert outcome.detail
        return
    repairs = outcome.meta.get("repairs", {})
    assert (len(outcome.messages) < len(turns)) == bool(repairs)
    assert outcome.messages[-1].role == "assistant"
    assert judged(outcome, **ALL_RULES) == outcome, "a second pass changes nothing"


HOSTILE = [
    "<a ",
    "$",
    "\\(",
    "[(",
    "`",
    "```\n",
    "| a ",
    "a,",
    "as an AI ",
    "sorry, i ",
    "抱歉",
    "{{ a",
    "(x",
    "for a in b ",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_rule_takes_long_over_a_hostile_text(text: str) -> None:
    """Measured: below 0.3 s each for 100 KB. A pattern that tries again from every letter would take minutes."""
    started = time.process_time()
    judged(asked(text * (100_000 // len(text))), **ALL_RULES)
    assert time.process_time() - started < 10


@given(st.text("ab", max_size=60), st.integers(0, 70), st.text("ab", max_size=60), st.integers(1, 60))
def test_the_quick_look_for_runs_misses_none(before: str, length: int, after: str, max_run: int) -> None:
    text = before + "x" * length + after
    if _repeated(r"[^\d]", max_run).search(text):
        assert may_have_run(text, max_run)


def test_the_quick_look_for_runs_passes_over_plain_text() -> None:
    assert not may_have_run(ENGLISH * 20, 50)
