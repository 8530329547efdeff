"""Traditional Chinese -> simplified, on Chinese text only: never in code, addresses, Japanese or Korean.

FastChat's Chinese descendants ran OpenCC over every message, and damaged Japanese kanji and comments in code.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from pipelines.markdown import URL, ends_as_code, map_outside_code
from schemas.errors import ConfigError

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_OTHER_LANGUAGE = re.compile(
    "[\u3041-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]"
)
"""Kana and Hangul. U+30FB, the middle dot, stands in Chinese names too."""
_CHINESE_ONLY = re.compile("[你妳您們们這这嗎吗呢吧啊她很沒說说讓让麼么哪谁还]")
"""Characters that hardly stand in modern Japanese."""
_CHINESE = re.compile(f"{_CHINESE_ONLY.pattern}|的.*的")
_CODE_LINE = re.compile(
    r"^\s*(?://|/\*|\*/|[{}]\s*$)|=>|[=!]==?[^=]|->|</|^\s*[A-Za-z_][\w.\[\]]*\s*[-+*/]?=\s*\S"
    r"|^\s*(?:def|class|if|elif|else|for|while|try|except|return|import|from|print|function|const|let|var)\b.*[(:=]"
)


def simplifier() -> Callable[[Sequence[str], Counter[str]], list[str]]:
    """Texts of a chat's messages in simplified characters. Raises ConfigError where OpenCC isn't installed."""
    try:
        from opencc import OpenCC
    except ImportError:
        raise ConfigError(
            "clean.chinese: simplified needs OpenCC: pip install 'sft-pipeline[text]', or set it to keep"
        ) from None
    convert = OpenCC("t2s").convert

    def simplify(texts: Sequence[str], repairs: Counter[str]) -> list[str]:
        is_mixed = any(_OTHER_LANGUAGE.search(text) for text in texts)
        if not any(map((_CHINESE_ONLY if is_mixed else _CHINESE).search, texts)):
            return list(texts)
        return [_simplified(text, convert, repairs, is_mixed=is_mixed) for text in texts]

    return simplify


def _simplified(text: str, convert: Callable[[str], str], repairs: Counter[str], *, is_mixed: bool) -> str:
    if not _HAN.search(text):
        return text

    def prose(piece: str) -> str:
        paragraphs = re.split(r"(\n[ \t]*\n)", piece)
        return "".join(
            _simplified_paragraph(paragraph, convert, is_mixed=is_mixed) for paragraph in paragraphs
        )

    changed = map_outside_code(text, prose)
    repairs["simplified_chinese"] += changed != text
    return changed


def _simplified_paragraph(paragraph: str, convert: Callable[[str], str], *, is_mixed: bool) -> str:
    """Code outside fences stays too, with its comments. In a chat with Japanese or Korean, so does every line that
    can be read as either."""
    lines = paragraph.splitlines(keepends=True)
    if not _HAN.search(paragraph) or any(map(_is_code, lines)):
        return paragraph
    return "".join(
        line
        if _OTHER_LANGUAGE.search(line) or (is_mixed and not _CHINESE_ONLY.search(line))
        else _outside_addresses(line, convert)
        for line in lines
    )


def _is_code(line: str) -> bool:
    line = line.rstrip()
    return bool(_CODE_LINE.search(line)) or ends_as_code(line)


def _outside_addresses(line: str, convert: Callable[[str], str]) -> str:
    pieces, position = [], 0
    for address in URL.finditer(line):
        pieces += [convert(line[position : address.start()]), address[0]]
        position = address.end()
    return "".join([*pieces, convert(line[position:])])
