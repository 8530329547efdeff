"""Repairs of plain text. None of them touches code, but for line ends; each counts what it changed.

`clean_unicode` always runs: line ends, control and zero-width characters, NFC. `without_mojibake` (ftfy) and
`without_artefacts` (back-slashes that an earlier cleaner left) run where the settings ask for them.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial

from pipelines.markdown import map_outside_code, without_code
from pipelines.rules.prose import UNPARTED_SCRIPTS
from schemas.errors import ConfigError

MAX_PASSES = 4
"""What is taken out can make or break a code fence, so that the next pass sees other code. After these, all is prose."""

# C0 but for new line and tab (a lone carriage return has become a new line before), DEL, C1, marks of annotations.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufff9-\ufffb]")
# Neither a control character of ASCII nor the first byte of another one: a tenth of the time of the pattern.
_NO_CONTROL_BYTES = bytes({*range(256)} - {*range(9), *range(0x0B, 0x20), 0x7F, 0xC2, 0xEF})
# U+200B between letters of scripts that put no blanks between words says where a line may break: it stays.
_ZERO_WIDTH = re.compile(f"[\u2060\ufeff]|(?<![{UNPARTED_SCRIPTS}])\u200b|\u200b(?![{UNPARTED_SCRIPTS}])")


def clean_unicode(text: str, repairs: Counter[str]) -> str:
    """Line ends as "\\n"; outside code no control or zero-width characters, and NFC.

    U+FFFD stays: it says that something was lost. So do blanks and characters that steer direction or joining.
    """
    if text.isascii() and text.isprintable():
        return text
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        repairs["line_ends"] += 1
    if not _needs_repair(text):
        return text
    found: Counter[str] = Counter()
    # U+1FEF normalises to a back-tick: put first, else what is code would differ the second time.
    changed = text.replace("\u1fef", "`")
    found["nfc"] += changed != text
    for _ in range(MAX_PASSES):
        before, changed = changed, map_outside_code(changed, partial(_repaired, repairs=found))
        if changed == before:
            break
    else:
        changed = _repaired(changed, found)
    found["nfc"] = int(found["nfc"] > 0)
    repairs.update(+found)
    return changed


def _needs_repair(text: str) -> bool:
    data = text.encode("utf-8", "surrogatepass")
    if data.translate(None, _NO_CONTROL_BYTES) and _CONTROLS.search(text):
        return True
    if text.isascii():
        return False
    # U+2060 and U+200B begin with E2 81 and E2 80, as dashes and quotes do; U+FEFF with EF.
    may_be_invisible = b"\xe2\x81\xa0" in data or b"\xe2\x80\x8b" in data or b"\xef\xbb\xbf" in data
    return bool((may_be_invisible and _ZERO_WIDTH.search(text)) or not unicodedata.is_normalized("NFC", text))


def without_invisible(prose: str) -> str:
    """Without control and zero-width characters."""
    prose = _CONTROLS.sub("", prose)
    return prose if prose.isascii() else _ZERO_WIDTH.sub("", prose)


def _repaired(prose: str, repairs: Counter[str]) -> str:
    prose, num_controls = _CONTROLS.subn("", prose)
    prose, num_zero_width = _ZERO_WIDTH.subn("", prose)
    if num_controls:
        repairs["control_characters"] += num_controls
    if num_zero_width:
        repairs["zero_width"] += num_zero_width
    composed = unicodedata.normalize("NFC", prose)
    repairs["nfc"] += composed != prose
    return composed


# ------------------------------------------------------------------------------------------------- mojibake


def mojibake_fixer() -> Callable[[str, Counter[str]], str]:
    """ftfy's repair of text that was decoded with the wrong encoding, and of nothing else. Raises ConfigError."""
    try:
        import ftfy
    except ImportError:
        raise ConfigError(
            "clean.ftfy needs ftfy: pip install 'sft-pipeline[text]', or set it to false"
        ) from None
    encoding_only = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        fix_surrogates=False,
        remove_control_chars=False,
        normalization=None,
    )

    def fix(text: str, repairs: Counter[str]) -> str:
        if text.isascii():
            return text
        fixed = map_outside_code(text, lambda prose: ftfy.fix_text(prose, encoding_only))
        repairs["mojibake"] += fixed != text
        return fixed

    return fix


# ------------------------------------------------------------------------------------------------- artefacts

_WORD_ARTEFACT = re.compile(r"(?<=[^\W_])(?:\\_)+(?=[^\W_])")
_STAR_ARTEFACT = re.compile(r"(?<=\S )\\\*(?= \S)")
_BARE_NAME = re.compile(r"[^\W_]_[^\W_]")
_WORD = re.compile(r"\S+")
_FORMULA_OR_ADDRESS = re.compile(
    r"\$\$.{1,2000}?\$\$|\$[^$\n]{1,200}\$|\\\(.{1,500}?\\\)|\\\[.{1,2000}?\\\]|(?:https?://|www\.)\S+",
    re.DOTALL,
)


def without_artefacts(text: str, repairs: Counter[str]) -> str:
    r"""`my\_var` and ` \* ` as `my_var` and ` * `, where a cleaner, not an author, wrote the back-slash.

    Markdown never needs it there. It counts as a cleaner's where all of a message's names have it, and only in words
    without other back-slashes (paths, patterns), outside code and formulas.
    """
    if "\\_" not in text and "\\*" not in text:
        return text
    if _BARE_NAME.search(_FORMULA_OR_ADDRESS.sub(" ", without_code(text))):
        return text
    return map_outside_code(text, lambda piece: _map_words(piece, repairs))


def _map_words(prose: str, repairs: Counter[str]) -> str:
    pieces, position = [], 0
    for kept in _FORMULA_OR_ADDRESS.finditer(prose):
        pieces += [_unescaped(prose[position : kept.start()], repairs), kept[0]]
        position = kept.end()
    return "".join([*pieces, _unescaped(prose[position:], repairs)])


def _unescaped(prose: str, repairs: Counter[str]) -> str:
    def word(match: re.Match[str]) -> str:
        bare = _WORD_ARTEFACT.sub(lambda m: m[0].replace("\\", ""), match[0])
        if bare == match[0] or "\\" in bare.replace("\\_", "").replace("\\*", ""):
            return match[0]
        repairs["unescaped"] += len(match[0]) - len(bare)
        return bare

    prose = _WORD.sub(word, prose) if "\\_" in prose else prose
    if "\\*" in prose:
        prose, num_stars = _STAR_ARTEFACT.subn("*", prose)
        repairs["unescaped"] += num_stars
    return prose
