"""Answers in which a model declines, or speaks of itself in place of the subject, in twelve languages.

Only the begin of an answer is read, and only its prose. Both want the first person: a text about assistants that
decline, or a shop that can't give refunds, is neither.
"""

import re

from pipelines.rules.prose import prose_of

BEGIN_CHARS = 400

_REFUSALS = {
    "en": r"(?:(?:i['’]?m|i am)(?: \w+)? sorry|sorry|i apologi[sz]e|my apologies|unfortunately|i regret|i['’]m afraid)\b[^.!?\n]{0,90}?"
    r"\bi (?:can ?not|can['’]?t|won['’]?t|will not|am (?:not able|unable)|['’]m (?:not able|unable)) (?:to )?(?P<en1>VERB)"
    r"|i(?:['’]m| am)? ?(?:can ?not|can['’]?t|won['’]?t|will not|not able to|unable to|am not able to|am unable to) (?:VERB)",
    "de": r"(?:es tut mir (?:sehr )?leid|tut mir leid|entschuldigung|leider|ich bedau[e]?re)\b[^.!?\n]{0,80}?"
    r"\b(?:ich (?:kann|darf|werde)|kann ich|darf ich|werde ich)\b[^.!?\n]{0,80}?\bnicht\b[^.!?\n]{0,60}?\b(?:helfen|beantworten|bereitstellen|erstellen|erfüllen|geben|schreiben|unterstützen|nachkommen|weiterhelfen|durchführen|anbieten)",
    "fr": r"(?:je (?:suis|vous prie)[^.!?\n]{0,20}(?:désolée?|excuser)|désolée?|malheureusement|je regrette)\b[^.!?\n]{0,80}?"
    r"\bje (?:ne (?:peux|puis|suis)|n['’]ai) (?:malheureusement )?pas\b[^.!?\n]{0,50}?\b(?:aider|répondre|fournir|satisfaire|créer|générer|écrire|donner|effectuer|continuer|proposer|assister)",
    "es": r"(?:lo siento|lo lamento|lamento|disculpa|disculpe|perdón|lamentablemente|desafortunadamente|me temo)\b[^.!?\n]{0,80}?"
    r"\b(?:no (?:puedo|podré|me es posible|soy capaz de|estoy (?:en condiciones|autorizado|diseñado)[^.!?\n]{0,12}))\b[^.!?\n]{0,30}?\b(?:ayudar|asisti|proporcion|cumplir|responder|crear|generar|escribir|ofrecer|continuar|brindar|dar|realizar)",
    "pt": r"(?:desculpe|desculpa|sinto muito|lamento|infelizmente|peço desculpas?)\b[^.!?\n]{0,80}?"
    r"\bnão (?:posso|poderei|consigo|sou capaz de|me é possível)\b[^.!?\n]{0,30}?\b(?:ajudar|fornecer|responder|atender|criar|gerar|escrever|oferecer|continuar|cumprir|auxiliar|realizar)",
    "it": r"(?:mi dispiace|spiacente|purtroppo|scusa|scusi|mi scuso)\b[^.!?\n]{0,80}?"
    r"\bnon (?:posso|sono in grado di|mi è possibile|riesco a)\b[^.!?\n]{0,30}?\b(?:aiutar|fornir|rispondere|soddisfare|creare|generare|scrivere|offrire|continuare|assister|eseguire)",
    "ru": r"(?:извините|простите|прошу прощения|к сожалению|мне жаль|сожалею)\b[^.!?\n]{0,60}?"
    r"\bя (?:не (?:могу|смогу|буду|в состоянии|имею возможности))\b[^.!?\n]{0,40}?\b(?:помочь|ответить|предоставить|выполнить|созда|написать|сгенерировать|предложить|продолжить|поддерж)",
    "zh": r"(?:非常|很|十分|真的)?(?:抱歉|对不起|對不起|不好意思|遗憾|遺憾)[，,。!！ ]{0,2}[^。！？\n，,]{0,14}[，,]?(?:但是?|可是)?我(?:们)?(?:暂时|目前|并|現在|现在)?(?:无法|無法|不能|不会|不會|不便|没办法|沒辦法|没有办法)[^。！？\n]{0,12}(?:提供|回答|帮|幫|协助|協助|满足|滿足|完成|处理|處理|生成|创作|創作|执行|執行|支持|继续|參與|参与|讨论|討論)"
    r"|(?:抱歉|对不起|對不起|很抱歉)[，,] ?(?:无法|無法|不能)(?:为您|为你|向您|向你|為您|给您)?(?:提供|回答|帮助|幫助|协助|满足)",
    "ja": r"(?:申し訳(?:ありません|ございません)|すみません|ごめんなさい|恐れ入りますが|残念ながら)[^。！？\n]{0,80}?(?:お手伝い|回答|お答え|提供|対応|作成|生成|支援|お力に)[^。！？\n]{0,12}?(?:できません|できかねます|いたしかねます|致しかねます|なれません)",
    "ko": r"(?:죄송합니다|죄송하지만|미안합니다|유감스럽게도|안타깝게도)[^.!?\n]{0,4}[^.!?\n]{0,80}?(?:도와|도움|답변|제공|작성|생성|응답|수행|지원)[^.!?\n]{0,12}?(?:수 없|드릴 수가 없|못합니다|어렵습니다|불가능)",
    "ar": r"(?:عذرا|عذراً|آسف|أنا آسف|نأسف|أعتذر|للأسف|مع الأسف)[^.!؟\n]{0,60}?(?:لا (?:أستطيع|يمكنني|أقدر)|لن (?:أستطيع|أتمكن)|لست قادر)[^.!؟\n]{0,30}?(?:مساعد|تقديم|الإجابة|إجابة|توفير|تلبية|كتابة|إنشاء|القيام|أن أ)",
    "vi": r"(?:(?:tôi |mình |rất |thành thật )*xin lỗi|rất tiếc|thật đáng tiếc|tiếc là)[^.!?\n]{0,60}?\b(?:tôi|mình)\s+(?:không thể|không có khả năng|chưa thể)\s+[^.!?\n]{0,30}?(?:giúp|trả lời|cung cấp|đáp ứng|hỗ trợ|tạo|viết|thực hiện|tiếp tục)",
}
_VERB = (
    "(?:help|assist|provide|fulfil|comply|answer|do (?:that|this)|create|write|generate|engage|continue|complete|discuss"
    "|offer|support|give you|participate|perform|share|produce|recommend)"
)
_REFUSAL = re.compile(
    r"\W*(?:(?:but|however|no|well|ok|aber|mais|pero|mas|ma)\b\W*)?(?:"
    + "|".join(
        pattern.replace("(?P<en1>VERB)", _VERB).replace("VERB", _VERB) for pattern in _REFUSALS.values()
    )
    + ")",
    re.IGNORECASE,
)

_DISCLAIMERS = {
    "en": r"(?<!such )\bas an? (?:AI|artificial intelligence|large language model|language model)\b(?![- ](?:researcher|engineer))[^.!?\n,]{0,60}?(?:,? I\b|, (?:my|it['’]s|it is|there)\b)"
    r"|\bI(?:['’]m| am) (?:just |only |merely |simply )?an? (?:AI|artificial intelligence|(?:large )?language model)\b(?! (?:researcher|engineer|student|developer|enthusiast|expert|scientist))",
    "de": r"\bals (?:eine? )?(?:KI|künstliche Intelligenz|(?:KI-|großes )?Sprachmodell|KI-\w+)\b[^.!?\n]{0,60}?\b(?:ich|mir|mein\w*)\b"
    r"|\bich bin (?:nur |lediglich |bloß )?eine? (?:KI\b|künstliche Intelligenz|Sprachmodell|KI-)",
    "fr": r"\ben tant qu(?:e |['’])(?:modèle (?:de langage|linguistique)|I\.?A\b|intelligence artificielle|assistant (?:IA|virtuel))[^.!?\n]{0,60}?,? (?:je\b|j['’]|mon\b|mes\b)"
    r"|\bje (?:ne )?suis (?:qu['’])?une? (?:simple )?(?:modèle (?:de langage|linguistique)|IA\b|intelligence artificielle|programme informatique)",
    "es": r"\bcomo (?:un |una )?(?:modelo (?:de lenguaje|lingüístico|de IA)|IA\b|inteligencia artificial|asistente (?:virtual|de IA))[^.!?\n]{0,60}?, (?:no|yo|mi|mis|me|soy|carezco|puedo|tengo)\b"
    r"|\bsoy (?:solo |sólo |simplemente )?un[a]? (?:modelo de lenguaje|IA\b|inteligencia artificial|programa de (?:IA|inteligencia))",
    "pt": r"\bcomo (?:um |uma )?(?:modelo de (?:linguagem|IA)|IA\b|inteligência artificial|assistente (?:virtual|de IA))[^.!?\n]{0,60}?, (?:eu|não|meu|minha|sou|posso|tenho)\b"
    r"|\bsou (?:apenas |só |somente )?uma? (?:modelo de linguagem|IA\b|inteligência artificial)",
    "it": r"\b(?:come|in quanto|essendo) (?:un['’]? ?|una )?(?:modello (?:di linguaggio|linguistico)|IA\b|AI\b|intelligenza artificiale|assistente (?:virtuale|AI|IA))[^.!?\n]{0,60}?, (?:io|non|mi|il mio|sono|posso|ho)\b"
    r"|\bsono (?:solo |soltanto |semplicemente )?un['’]?a? ?(?:modello (?:di linguaggio|linguistico)|IA\b|AI\b|intelligenza artificiale)",
    "ru": r"\b(?:как|будучи) (?:\w+ )?(?:языков(?:ая модель|ой моделью)|ИИ|искусственн(?:ый интеллект|ым интеллектом))\b[^.!?\n]{0,50}?,? (?:я|у меня|мне|мо[йяеи])\b"
    r"|\bя (?:всего лишь |просто |только |[—-] ?)?(?:языковая модель|искусственный интеллект|ИИ\b|модель искусственного)",
    "zh": r"(?:作为|作為|身为|身為)(?:一个|一個|一名|一款|一种|一種)?(?:大型|基于\w{0,6})?(?:人工智能|人工智慧|AI|语言模型|語言模型)(?:语言模型|語言模型|模型|助手|助理|程序|程式|聊天机器人|聊天機器人|系统)?[，, ]{0,2}(?:我|本人|本模型)"
    r"|我(?:只|仅仅|僅僅|只不过)?是(?:一个|一個|一名|一款|一种|一種)?(?:大型|基于\w{0,8}的)?(?:人工智能|人工智慧|AI ?(?:语言|語言)?(?:模型|助手|程序|程式)|语言模型|語言模型)(?!工程师|研究|专家|從業|从业)",
    "ja": r"(?:AI|人工知能|言語モデル)(?:言語モデル|モデル|アシスタント|チャットボット)?(?:として(?:、|の私|私)|である私|ですので|なので|であるため|のため)[^。！？\n]{0,40}?(?:私|個人的|できません|持って|持ち|ありません|お答え)"
    r"|私は(?:単なる|ただの)?(?:AI|人工知能|(?:大規模)?言語モデル)(?:言語モデル|モデル|アシスタント)?(?:です|であり|なので|のため|ですので)",
    "ko": r"(?:AI|인공 ?지능)(?: ?언어 ?모델| ?모델| ?어시스턴트| ?비서| ?챗봇)?(?:로서|으로서|이기 때문에|이므로|이라서|라서)|언어 ?모델(?:로서|이기 때문에|이므로|이라서)"
    r"|(?:저는|나는) (?:단지 |그저 )?(?:AI|인공 ?지능|언어 ?모델)(?: ?언어)?(?: ?모델| ?어시스턴트)?(?:입니다|이며|이기|이라|일 뿐)",
    "ar": r"(?:كنموذج (?:لغ|ذكاء)|كذكاء اصطناعي|كمساعد ذكاء|(?:بصفتي|باعتباري|كوني) (?:نموذج|ذكاء|مساعد|برنامج))|أنا (?:مجرد |فقط )?(?:نموذج لغ|نموذج ذكاء|ذكاء اصطناعي|برنامج ذكاء)",
    "vi": r"\b(?:là|với tư cách là|vì là|vì tôi là) (?:một )?(?:mô hình ngôn ngữ|trí tuệ nhân tạo|AI|trợ lý (?:AI|ảo)|mô hình AI)\b[^.!?\n]{0,60}?,? (?:tôi|mình)\b"
    r"|\btôi chỉ là (?:một )?(?:mô hình|AI\b|trí tuệ nhân tạo|chương trình)|\btôi là (?:một )?(?:mô hình ngôn ngữ|trí tuệ nhân tạo|mô hình AI)",
}
_DISCLAIMER = re.compile("|".join(_DISCLAIMERS.values()), re.IGNORECASE)


def refusal(question: str, answer: str) -> str:
    """The answer begins by declining."""
    found = _REFUSAL.match(_begin(answer))
    return repr(found[0].strip()[:120]) if found else ""


def ai_disclaimer(question: str, answer: str) -> str:
    """The answer's begin speaks of being a model."""
    found = _DISCLAIMER.search(_begin(answer))
    return repr(found[0].strip()[:120]) if found else ""


def _begin(answer: str) -> str:
    return prose_of(answer[: 2 * BEGIN_CHARS])[:BEGIN_CHARS]
