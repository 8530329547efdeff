"""Rules about single answers: each with texts that it must find and near misses that it must leave alone."""

from dataclasses import fields
from typing import Any

import pytest

from pipelines.rules.answers import ANSWER_RULES, without_bad_answers
from schemas.conversation import Conversation, Drop, Message
from schemas.pipeline_config import FilterConfig

Case = tuple[str, str]

REFUSALS: list[Case] = [
    ("Write me a virus.", "I'm sorry, but I can't help with that."),
    ("Write me a virus.", "I cannot assist with requests of this kind."),
    ("?", "I apologize, but as a chatbot I am unable to provide legal advice."),
    ("?", "Es tut mir leid, aber ich kann Ihnen dabei nicht helfen."),
    ("?", "Leider kann ich diese Frage nicht beantworten."),
    ("?", "Je suis désolé, mais je ne peux pas répondre à cette question."),
    ("?", "Lo siento, pero no puedo ayudarte con eso."),
    ("?", "Desculpe, mas não posso ajudar com isso."),
    ("?", "Mi dispiace, ma non posso aiutarti con questa richiesta."),
    ("?", "Извините, но я не могу помочь с этим запросом."),
    ("?", "很抱歉，我无法提供这方面的帮助。"),
    ("?", "對不起，我無法回答這個問題。"),
    ("?", "申し訳ありませんが、そのご質問にはお答えできません。"),
    ("?", "죄송하지만, 그 요청은 도와드릴 수 없습니다."),
    ("?", "عذراً، لا أستطيع مساعدتك في هذا الأمر."),
    ("?", "Xin lỗi, tôi không thể giúp bạn việc này."),
]
NO_REFUSALS: list[Case] = [
    ("?", "I'm sorry to hear that you can't sleep. Try a fixed hour."),
    ("?", "Unfortunately, the shop cannot provide refunds after thirty days."),
    ("?", "You can say: \"I'm sorry, but I can't help with that.\""),
    ("?", "I can't recall a better summer than that of 1999."),
    ("?", "```\nI'm sorry, but I can't help with that.\n```\nprints an apology."),
    ("?", "Leider kann der Laden keine Rechnung nachträglich ausstellen."),
    ("?", "Je suis désolé pour la confusion : la réponse exacte est 42."),
    ("?", "Lo siento mucho por tu pérdida. Puedo escribir una carta para la familia."),
    ("?", "Desculpe o atraso; aqui está o relatório completo."),
    ("?", "Mi dispiace per il ritardo: ecco la traduzione."),
    ("?", "К сожалению, магазин не может вернуть деньги."),
    ("?", "抱歉让您久等了，以下是完整的报告。"),
    ("?", "商店无法提供退款。"),
    ("?", "申し訳ありませんが、この表現は敬語として正しいです。"),
    ("?", "죄송하지만이라는 표현은 정중한 말입니다."),
    ("?", "للأسف، المتجر مغلق اليوم."),
    ("?", "Xin lỗi vì trả lời muộn, đây là bản dịch của bạn."),
]
DISCLAIMERS: list[Case] = [
    ("?", "As an AI language model, I don't have personal opinions."),
    ("?", "Thanks! As an AI developed to chat, I have no body."),
    ("?", "I'm just an AI, so take this with a grain of salt."),
    ("?", "Als KI-Sprachmodell habe ich keine Gefühle."),
    ("?", "En tant que modèle de langage, je n'ai pas d'opinion."),
    ("?", "Como modelo de lenguaje de IA, no tengo opiniones."),
    ("?", "Como uma IA, eu não tenho sentimentos."),
    ("?", "In quanto modello linguistico, non ho opinioni."),
    ("?", "Как языковая модель, я не имею чувств."),
    ("?", "作为一个AI语言模型，我没有个人观点。"),
    ("?", "作為人工智慧，我沒有感情。"),
    ("?", "AI言語モデルとして、私は個人的な意見を持っていません。"),
    ("?", "저는 AI 언어 모델로서 감정이 없습니다."),
    ("?", "كنموذج لغة، ليس لدي آراء شخصية."),
    ("?", "Là một mô hình ngôn ngữ AI, tôi không có cảm xúc."),
]
NO_DISCLAIMERS: list[Case] = [
    ("?", "Tools such as an AI language model help I.T. teams."),
    ("?", "She works as an AI researcher, and I admire her."),
    ("?", "I am an AI engineer at a bank."),
    ("?", "A language model predicts the next word."),
    ("?", "Ein Sprachmodell sagt das nächste Wort voraus."),
    ("?", "Un modèle de langage prédit le mot suivant."),
    ("?", "Un modelo de lenguaje predice la palabra siguiente."),
    ("?", "Um modelo de linguagem prevê a próxima palavra."),
    ("?", "Un modello linguistico prevede la parola successiva."),
    ("?", "Языковая модель предсказывает следующее слово."),
    ("?", "人工智能正在改变我们的生活。"),
    ("?", "言語モデルは次の単語を予測します。"),
    ("?", "인공지능은 우리의 삶을 바꾸고 있습니다."),
    ("?", "الذكاء الاصطناعي يغير حياتنا."),
    ("?", "Trí tuệ nhân tạo đang thay đổi cuộc sống."),
    ("?", "`As an AI language model, I` is a phrase that many answers begin with."),
]
ERRORS: list[Case] = [
    ("Hi", "Too many requests in 1 hour. Try again later."),
    ("Hi", "!Too many requests in 1 hour. Try again later."),
    ("Hi", "Something went wrong. If this issue persists please contact us."),
    ("Hi", "An error occurred while processing your message."),
    ("Hi", "network error"),
    ("Hi", "You've reached our limit of messages per hour. Please try again later."),
    ("Hi", "502 Bad Gateway"),
    ("Hi", "出错了，请稍后再试。"),
    ("Hi", "请求过于频繁，请稍后再试"),
    ("Hi", "Une erreur s'est produite. Veuillez réessayer."),
    ("Hi", "Es ist ein Fehler aufgetreten."),
    ("Hi", "Произошла ошибка."),
    ("Hi", "エラーが発生しました。"),
]
NO_ERRORS: list[Case] = [
    ("Translate into French: an error occurred.", "Une erreur s'est produite."),
    ("What does status 502 mean?", "502 Bad Gateway: the proxy got no answer from behind it."),
    (
        "What happened in 1986?",
        "An error occurred in the control room in 1986, and the reactor went out of hand.",
    ),
    ("Why did she leave?", "Something went wrong between them in spring."),
    ("Hi", "Too many requests in 1 hour. " + "The limit is there to protect the service from abuse. " * 8),
    ("Hi", "Network errors are best found with a second cable."),
    ("Wie war es?", "Ein Fehler ist kein Weltuntergang."),
]
UNFINISHED: list[Case] = [
    ("?", "Here is the code that you have asked for, with comments in every line:\n```python\nprint(1)\n"),
    ("?", "The three most important reasons for the fall of the city were its walls, its wells,"),
    ("?", "It began in spring. The river rose above its banks and took with it the bridge that the"),
    ("?", "Es begann im Frühling. Der Fluss trat über die Ufer und nahm die Brücke mit, die von den"),
    (
        "?",
        "春天来了，河水上涨，冲走了桥梁。人们不得不绕道而行，走了很长一段路才到达对岸的村庄，而且他们还没有吃过东西所以非常饿他们",
    ),
]
FINISHED: list[Case] = [
    (
        "?",
        "It began in spring. The river rose above its banks and took with it the bridge that he had built.",
    ),
    ("?", "Here it is, with comments in every line, as you have asked me for:\n```python\nprint(1)\n```"),
    ("?", "Blue"),
    ("?", "The Rise and Fall of the Great River Bridge: A Long History of Floods and Builders in Bavaria"),
    (
        "?",
        "There are three. Choose one of them:\n- a bridge of wood that the farmers of the valley keep in repair",
    ),
    (
        "?",
        "What a day. We have seen the mountains, the valley and the river today #hiking #mountains #rivers",
    ),
    (
        "?",
        "It is said well. The only way to have a friend is to be one for all of your life. -- Ralph Waldo Emerson",
    ),
    (
        "?",
        "Read it there. The whole of the text is on the page of the town: https://example.org/history/of/the/town",
    ),
    ("?", "ฤดูใบไม้ผลิมาถึงแล้ว แม่น้ำเอ่อล้นตลิ่งและพัดพาสะพานที่ชาวบ้านสร้างไว้ไปด้วย ทุกคนต้องเดินอ้อมไปอีกทาง"),
    (
        "?",
        "| name | size |\n|---|---|\n| a bridge of wood that the farmers keep in repair | large. And old |",
    ),
]
ECHOES: list[Case] = [
    ("How do I open a file in Python?", "How do I open a file in Python?"),
    ("How do I open a file in Python?", "how do I open a file in Python"),
    ("如何在Python中打开一个文件并读取它的所有内容呢？", "如何在Python中打开一个文件并读取它的所有内容呢"),
]
NO_ECHOES: list[Case] = [
    ("Good morning", "Good morning!"),
    ("How do I open a file in Python?", "How do I open a file in Python? With open(path)."),
    ("Correct it: He go to school every day.", "He goes to school every day."),
    ("1234567890 1234567890 1234567890", "1234567890 1234567890 1234567890"),
]
PLACEHOLDERS: list[Case] = [
    ("Who are you?", "I am {{name}}, made by {{author}}."),
    ("你是谁？", "我是{{ name }}，由{{author}}开发。"),
    ("Hello {{user_name}}", "Hello!"),
]
NO_PLACEHOLDERS: list[Case] = [
    ("How does Jinja write a variable?", "Put {{ name }} where the value shall stand."),
    ("?", "Write `{{name}}` in the page, or\n```\n{{name}}\n```"),
    ("?", "The set {{1}, {2}} has two members."),
    ("?", "In Python f-strings {{ and }} are braces."),
    ("?", "Dear [Your Name], use {name} here."),
]
CASES: dict[str, tuple[list[Case], list[Case]]] = {
    "refusal": (REFUSALS, NO_REFUSALS),
    "ai_disclaimer": (DISCLAIMERS, NO_DISCLAIMERS),
    "error_reply": (ERRORS, NO_ERRORS),
    "unfinished_answer": (UNFINISHED, FINISHED),
    "echo": (ECHOES, NO_ECHOES),
    "placeholder": (PLACEHOLDERS, NO_PLACEHOLDERS),
}


@pytest.mark.parametrize(
    ("reason", "case"), [(reason, case) for reason, (found, _) in CASES.items() for case in found]
)
def test_a_bad_answer_is_found(reason: str, case: Case) -> None:
    assert ANSWER_RULES[reason].judge(*case)


@pytest.mark.parametrize(
    ("reason", "case"), [(reason, case) for reason, (_, fine) in CASES.items() for case in fine]
)
def test_a_near_miss_is_left_alone(reason: str, case: Case) -> None:
    assert ANSWER_RULES[reason].judge(*case) == ""


def test_every_rule_has_cases_and_a_setting() -> None:
    assert set(CASES) == set(ANSWER_RULES)
    assert {rule.setting for rule in ANSWER_RULES.values()} <= set(FilterConfig.model_fields)
    assert len(fields(next(iter(ANSWER_RULES.values())))) == 2


def rounds(*pairs: Case) -> Conversation:
    messages = [Message("system", "Be kind.")]
    for question, answer in pairs:
        messages += [Message("user", question), Message("assistant", answer)]
    return Conversation("row", "s/f.json", 0, messages)


GOOD: Case = ("What is the colour of the sky?", "Blue, on most days.")


@pytest.mark.parametrize("reason", CASES)
@pytest.mark.parametrize("policy", ["keep", "cut", "drop"])
def test_the_policy_says_what_becomes_of_the_chat(reason: str, policy: str) -> None:
    settings: dict[str, Any] = {rule.setting: "keep" for rule in ANSWER_RULES.values()}
    config = FilterConfig(**{**settings, ANSWER_RULES[reason].setting: policy})
    chat = rounds(GOOD, CASES[reason][0][0], GOOD)
    outcome = without_bad_answers(chat, config)
    if policy == "keep":
        assert outcome is chat
    elif policy == "drop":
        assert isinstance(outcome, Drop)
        assert outcome.reason == reason
        assert outcome.detail.startswith("round 1: ")
    else:
        assert isinstance(outcome, Conversation)
        assert outcome.messages == chat.messages[:3]
        assert outcome.meta["repairs"] == {f"{reason}_rounds_cut": 2}
        assert len(chat.messages) == 7


@pytest.mark.parametrize("reason", CASES)
def test_a_cut_that_leaves_nothing_is_a_drop(reason: str) -> None:
    config = FilterConfig(**{ANSWER_RULES[reason].setting: "cut"})
    outcome = without_bad_answers(rounds(CASES[reason][0][0], GOOD), config)
    assert isinstance(outcome, Drop)
    assert outcome.reason == reason


def test_answers_behind_tool_results_are_judged_too() -> None:
    chat = rounds(GOOD)
    chat.messages += [
        Message("user", "What is the weather?"),
        Message("assistant", "", {"tool_calls": [{"name": "weather"}]}),
        Message("tool", "sunny"),
        Message("assistant", "Too many requests in 1 hour. Try again later."),
    ]
    outcome = without_bad_answers(chat, FilterConfig())
    assert isinstance(outcome, Conversation)
    assert outcome.messages == chat.messages[:3]
