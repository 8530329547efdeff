"""Answers that are no answers: a server's errors, texts that break off, the question again, unfilled templates."""

import re

from pipelines.markdown import fenced_blocks, without_code
from pipelines.rules.prose import num_letters, prose_of

MAX_ERROR_CHARS = 300
"""A longer answer tells of an error; it is none."""
MIN_ECHO_LETTERS = 20
"""Shorter ones ("Good morning") are fair answers to themselves."""
MIN_LINE_CHARS = 60
"""A last line that is shorter may be a title, a name, a signature."""

_ERROR = re.compile(
    r"""\s*[!*_"'>\[({]*\s*(?:
    too\ many\ requests | rate\ limit\ (?:exceeded|reached) | error\ in\ (?:body|message)\ stream
    | you(?:['’]ve|\ have)\ (?:reached|hit|exceeded)\ (?:your|the|our)\ [^.\n]{0,40}\b(?:limit|cap|quota)\b
    | there\ was\ an\ error\ (?:generating|processing) | unable\ to\ load\ (?:conversation|site)
    | the\ server\ (?:is\ (?:currently\ )?overloaded|had\ an\ error) | our\ systems\ are\ (?:a\ bit\ busy|experiencing)
    | only\ one\ message\ at\ a\ time | the\ message\ you\ submitted\ was\ too\ long | (?:the\ |your\ )?request\ timed\ out
    | your\ session\ has\ expired | conversation\ not\ found | this\ content\ may\ violate\ our
    | (?:http(?:/1\.1)?\s*)?(?:error\s*)?(?:429|50[0234])[\s:-]{1,3}(?:too\ many|internal|bad\ gateway|service|gateway)
    | (?:请求|請求)(?:过于频繁|過於頻繁|过多|過多) | (?:服务器|伺服器)(?:繁忙|忙碌) | demasiadas\ solicitudes
    | trop\ de\ (?:requêtes|demandes) | zu\ viele\ anfragen | muitas\ solicitações | troppe\ richieste
    | слишком\ много\ запросов | リクエストが多すぎ | 요청이\ 너무\ 많
    # What may also begin a sentence about something else must end one.
    | (?: (?:an|internal|unknown|unexpected)\ (?:server\ )?error\ (?:has\ )?occurred | network\ error | rate\ limited
    | internal\ server\ error | (?:(?:oops|hmm)[!,.…\s]{1,5})?something\ (?:went|seems\ to\ have\ gone)\ wrong
    | (?:发生|發生)(?:了)?(?:错误|錯誤|未知错误) | 出(?:错|錯)了 | (?:网络|網路)(?:错误|錯誤|异常) | (?:服务器|伺服器)(?:错误|錯誤)
    | (?:se\ produjo|ha\ ocurrido|se\ ha\ producido|ocurrió)\ un\ error | algo\ salió\ mal
    | une\ erreur\ (?:s['’]est\ produite|est\ survenue) | (?:es\ ist\ )?ein\ fehler\ (?:ist\ )?aufgetreten
    | (?:ocorreu|houve)\ um\ erro | algo\ deu\ errado | si\ è\ verificato\ un\ errore | произошла\ ошибка
    | что-то\ пошло\ не\ так | エラーが発生しました | 오류가\ 발생했습니다 | đã\ xảy\ ra\ lỗi | حدث\ خطأ )
    (?=\s*(?:[.!,;:…。！，、)*_<]|$|please|while\ |if\ this))
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_ABOUT_ERRORS = re.compile(
    r"error|fehler|erreur|errore|\berro\b|ошибк|错误|錯誤|出错|エラー|오류|lỗi|خطأ|limit|request|wrong|timeout|\b[45]\d\d\b"
    r"|translat|übersetz|tradu|перев|翻译|翻譯|訳|번역|dịch|ترجم",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(r"\{\{\s*(?!(?:and|or)\b)[^\W\d][\w. -]{0,40}\s*\}\}")
_TEMPLATE_LANGUAGE = re.compile(
    r"jinja|handlebars|mustache|liquid|django|\bvue\b|angular|twig|nunjucks|helm|ansible|hugo|template|模板|plantilla"
    r"|vorlage|modèle|шаблон|テンプレート|템플릿|placeholder",
    re.IGNORECASE,
)
_OPEN_END = re.compile(r"[,，、(\[{<—–-]\s*$")
_MARKED_LINE = re.compile(r"\s*(?:[-*+>|#]|\d{1,3}[.)、]|[a-zA-Z][.)]\s)")
_FREE_END = re.compile(r"(?:[#@]|://|www\.)\S*$|(?:--|[—–]|[\"”»’]\s*-)\s*[^!?]{3,60}$")
_SENTENCE_END = re.compile(r"[.!?…]\s|[。！？।؟۔]")
_NO_SENTENCE_MARKS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
_NOT_LETTERS = re.compile(r"[\W_]+")


def error_reply(question: str, answer: str) -> str:
    """The answer is an error of the server or a limit, and the question asks nothing about errors."""
    if len(answer) > MAX_ERROR_CHARS or not (found := _ERROR.match(answer)):
        return ""
    return "" if _ABOUT_ERRORS.search(question) else f"{found[0].strip()!r}"


def placeholder(question: str, answer: str) -> str:
    """A {{name}} in the prose of either, in a chat that isn't about templates."""
    if "{{" not in question and "{{" not in answer:
        return ""
    prose = f"{without_code(question)}\n{without_code(answer)}"
    found = _PLACEHOLDER.search(prose)
    return f"{found[0]!r}" if found and not _TEMPLATE_LANGUAGE.search(prose) else ""


def echo(question: str, answer: str) -> str:
    """The same letters and digits in the same order."""
    if abs(len(question) - len(answer)) > 20 + len(answer) // 10 or num_letters(answer) < MIN_ECHO_LETTERS:
        return ""
    same = _NOT_LETTERS.sub("", question).casefold() == _NOT_LETTERS.sub("", answer).casefold()
    return f"{answer[:60]!r} is the question" if same else ""


def unfinished_answer(question: str, answer: str) -> str:
    """An open code block, an open end, or a long last line of prose that stops in the middle of a sentence."""
    text = answer.rstrip()
    blocks = fenced_blocks(text)
    if blocks and blocks[-1][1] == len(text):
        lines = text[blocks[-1][0] :].split("\n")
        closed = len(lines) > 1 and lines[-1].strip(" \t>")[:3] in ("```", "~~~")
        return "" if closed else "a code block is not closed"
    last = text.rsplit("\n", 1)[-1].strip()
    if num_letters(answer) < _min_line_chars(last) or _NO_SENTENCE_MARKS.search(last) or not prose_of(last):
        return ""
    if _OPEN_END.search(last):
        return f"the end is open: {last[-40:]!r}"
    return f"no end of a sentence: {last[-40:]!r}" if _breaks_off(last, text) else ""


def _breaks_off(last: str, text: str) -> bool:
    """A long last line that ends in a letter, in an answer that ends its other sentences; no item, tag, signature."""
    if not last[-1].isalpha() or len(last) < _min_line_chars(last):
        return False
    return bool(_SENTENCE_END.search(text)) and not (_MARKED_LINE.match(last) or _FREE_END.search(last))


def _min_line_chars(line: str) -> int:
    """Chinese and Japanese say in a third of the characters what others do."""
    return MIN_LINE_CHARS if line.isascii() or max(line) < "\u3000" else MIN_LINE_CHARS // 3
