"""Languages of chats on labelled data: how many are right, mixed chats, speed; beside other identifiers.

    python benchmarks/languages.py FOLDER [--peers fasttext langdetect py3langid cld2] [--wrong]

FOLDER holds llmzoo_*.jsonl, mtbench_*.jsonl.gz, lingua_sentences.json.gz and the others named below. Peers that are
not installed are left out. Chats of two languages are put together here, always the same ones.
"""

import argparse
import gzip
import inspect
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pipelines.rules import languages
from pipelines.rules.languages import Detector, load_detector

COMMON = "en zh es fr de ja ko ru pt it nl pl tr ar vi id uk sv cs hi fa he th el ro hu".split()
SCRIPTS = ["en es fr de pt it nl pl tr vi id sv cs ro hu".split(), ["ru", "uk"], ["ar", "fa"], ["zh", "ja"]]
"""Of COMMON, those that share a script."""
EXACT = {
    **{f"llmzoo_{code}100.jsonl": code for code in "ar de en es fr it ja ko pt zh".split()},
    "seed_tasks_fr.jsonl": "fr",
    "seed_tasks_ru.jsonl": "ru",
    "oasst_fr.jsonl": "fr",
    "camoscio_it_fanpage.jsonl": "it",
    "camoscio_it_ilpost.jsonl": "it",
    "arabic_culture_ar.jsonl.gz": "ar",
}
REPORTED = {
    **{f"mtbench_{code}.jsonl.gz": code for code in "de fr id ja pl ru vi zh".split()},
    "alpaca_zh_v3.jsonl.gz": "zh",
}
FAMILIES = {
    "llmzoo": "llmzoo",
    "seed_tasks": "seed",
    "oasst": "oasst",
    "camoscio": "camoscio",
    "arabic_culture": "arabic",
}
NUM_MIXED = 2000
"""Chats of two languages of each kind, and of chats of one language."""

Chat = list[str]


def main() -> None:
    options = parse_arguments()
    folder, detector = options.folder, load_detector()
    sentences = json.loads(gzip.decompress((folder / "lingua_sentences.json.gz").read_bytes()))
    print("| data | chats | right | what is right |\n|---|---|---|---|")
    rows = chain(
        exact_rows(folder, detector, options.wrong),
        reported_rows(folder, detector, options.wrong),
        sentence_rows(sentences, detector, options),
        mixed_rows(sentences, detector, options.wrong),
        [han_row(sentences, detector)],
    )
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print("\n" + speed(folder, detector))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", nargs="*", default=["fasttext", "langdetect", "py3langid", "cld2"])
    parser.add_argument("--wrong", action="store_true", help="print every chat that is not right")
    return parser.parse_args()


Row = tuple[str, int, str, str]


def exact_rows(folder: Path, detector: Detector, show: bool) -> Iterator[Row]:
    """The largest language is the label. One row a family of files."""
    total, right = Counter[str](), Counter[str]()
    for name, code in EXACT.items():
        family = next(family for family in FAMILIES if name.startswith(family))
        for chat in chats_of(folder / name):
            found = detector.of_chat(chat)
            total[family] += 1
            right[family] += found[0][0] == code
            if show and found[0][0] != code:
                print(name, found, repr(" / ".join(chat))[:300])
    for family, count in total.items():
        yield family, count, percent(right[family], count), "the largest language is the label"


def reported_rows(folder: Path, detector: Detector, show: bool) -> Iterator[Row]:
    """The label is among the reported languages, and few are reported."""
    for name, code in REPORTED.items():
        reported = [[found for found, _ in detector.of_chat(chat)] for chat in chats_of(folder / name)]
        right = sum(code in codes for codes in reported)
        mean = sum(map(len, reported)) / len(reported)
        if show:
            for chat, codes in zip(chats_of(folder / name), reported, strict=True):
                if code not in codes:
                    print(name, codes, repr(" / ".join(chat))[:300])
        text = f"the label is among the reported, {mean:.3f} reported on average"
        yield name.split(".")[0], len(reported), percent(right, len(reported)), text


def sentence_rows(
    sentences: dict[str, list[str]], detector: Detector, options: argparse.Namespace
) -> Iterator[Row]:
    """One sentence a chat: alone, and with four times as much code."""
    plain = [(code, text) for code in COMMON for text in sentences[code]]
    draw = random.Random(3)
    pasted = [(code, text, python_code(4 * len(text), draw)) for code, text in plain]
    fenced = [(code, f"{text}\n\n```python\n{lines}```") for code, text, lines in pasted]
    bare = [(code, f"{text}\n\n{lines}") for code, text, lines in pasted]
    identifiers = {"ours": lambda text: detector.of_chat([text])[0][0], **peers(options.peers)}
    kinds = {"sentences": plain, "sentences, 4x code": fenced, "sentences, 4x code without a fence": bare}
    for what, data in kinds.items():
        for name, identify in identifiers.items():
            started = time.process_time()
            wrong = [(code, found, text) for code, text in data if (found := identify(text)) != code]
            rate = len(data) / (time.process_time() - started)
            if name == "ours" and options.wrong:
                print(*wrong, sep="\n")
                print(Counter((code, found) for code, found, _ in wrong).most_common(30))
            text = f"{name}, {rate:,.0f} a second"
            yield (
                f"{what} in {len(COMMON)} languages",
                len(data),
                percent(len(data) - len(wrong), len(data)),
                text,
            )


def mixed_rows(sentences: dict[str, list[str]], detector: Detector, show: bool) -> Iterator[Row]:
    """Both languages are reported, and no third; a chat of one language is not called mixed."""
    for kind, build in (("turn by turn", by_turns), ("inside of turns", inside_turns)):
        draw = random.Random(7)
        right = {"one script": 0, "two scripts": 0}
        for number in range(NUM_MIXED):
            pair = draw_pair(draw, one_script=number % 2 == 0)
            chat = build(two_languages(sentences, pair, draw), draw)
            found = detector.of_chat(chat)
            is_right = {code for code, _ in found} == set(pair)
            right["two scripts" if number % 2 else "one script"] += is_right
            if show and not is_right:
                print(kind, pair, found, chat)
        for scripts, count in right.items():
            text = f"{kind}, {scripts}: exactly these two are reported"
            yield "chats of two languages", NUM_MIXED // 2, percent(count, NUM_MIXED // 2), text
    draw = random.Random(11)
    mixed = 0
    for number in range(NUM_MIXED):
        code = COMMON[number % len(COMMON)]
        chat = by_turns([draw.sample(sentences[code], draw.randint(2, 8))], draw)
        found = detector.of_chat(chat)
        mixed += len(found) > 1
        if show and len(found) > 1:
            print("single", code, found, chat)
    yield "chats of one language", NUM_MIXED, percent(mixed, NUM_MIXED), "wrongly called mixed"


def han_row(sentences: dict[str, list[str]], detector: Detector) -> Row:
    """Every Chinese sentence, and every Japanese one without its kana."""
    texts = [*sentences["zh"], *("".join(languages._KANA.sub("", text)) for text in sentences["ja"])]
    called = sum(any(code == "ja" for code, _ in detector.of_chat([text])) for text in texts)
    return "Han without kana", len(texts), percent(called, len(texts)), "wrongly called ja"


def speed(folder: Path, detector: Detector) -> str:
    """Turns a second of process time over all chats of the folder, and langdetect's share."""
    chats = [chat for name in (*EXACT, *REPORTED) for chat in chats_of(folder / name)]
    num_turns, asked = sum(map(len, chats)), 0
    real = languages._second_opinion

    def counted(text: str) -> str:
        nonlocal asked
        asked += 1
        return real(text)

    languages._second_opinion = counted
    started, wall = time.process_time(), time.monotonic()
    for chat in chats:
        detector.of_chat(chat)
    seconds, wall = time.process_time() - started, time.monotonic() - wall
    languages._second_opinion = real
    mean = sum(len(turn) for chat in chats for turn in chat) / num_turns
    return (
        f"{num_turns} turns of {mean:.0f} characters on average: {num_turns / seconds:,.0f} turns a second of process "
        f"time, {num_turns / wall:,.0f} by the clock; langdetect was asked on {percent(asked, num_turns)}"
    )


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %"


# Data ---------------------------------------------------------------------------------------------------------


def chats_of(path: Path) -> list[Chat]:
    """The turns of each record of a JSONL file."""
    data = path.read_bytes()
    lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()
    return [turns_of(json.loads(line)) for line in lines if line.strip()]


def turns_of(record: dict[str, Any]) -> Chat:
    if "messages" in record:
        return [message["content"] for message in record["messages"]]
    if "zh_instruction" in record:
        return [f"{record['zh_instruction']}\n{record['zh_input']}".strip(), record["zh_output"]]
    if "instances" in record:
        case = record["instances"][0]
        return [f"{record['instruction']}\n{case.get('input') or ''}".strip(), str(case.get("output") or "")]
    return [record[key] for key in ("query", "text", "question", "answer") if key in record]


def draw_pair(draw: random.Random, *, one_script: bool) -> tuple[str, str]:
    """Two of COMMON; half of the pairs in one script."""
    if one_script:
        script = draw.choices(SCRIPTS, weights=[7, 1, 1, 1])[0]
        first, second = draw.sample(script, 2)
        return first, second
    while True:
        first, second = draw.sample(COMMON, 2)
        if not any(first in script and second in script for script in SCRIPTS):
            return first, second


def two_languages(
    sentences: dict[str, list[str]], pair: tuple[str, str], draw: random.Random
) -> list[list[str]]:
    """Sentences of both languages; the second has 20 to 50 % of the letters."""
    while True:
        first = draw.sample(sentences[pair[0]], draw.randint(2, 6))
        second = draw.sample(sentences[pair[1]], draw.randint(1, 4))
        letters = [sum(sum(map(str.isalpha, text)) for text in texts) for texts in (first, second)]
        if 0.2 <= letters[1] / sum(letters) <= 0.5:
            return [first, second]


def by_turns(parts: list[list[str]], draw: random.Random) -> Chat:
    """Each turn is in one language and has one or two sentences; the order is drawn."""
    turns: Chat = []
    for texts in parts:
        while texts:
            count = draw.randint(1, 2)
            turns.append(" ".join(texts[:count]))
            texts = texts[count:]
    draw.shuffle(turns)
    return turns


def inside_turns(parts: list[list[str]], draw: random.Random) -> Chat:
    """A question in the first language, and one answer that changes the language, at a space or a line's end."""
    (question, *first), second = parts
    blocks = [" ".join(first), " ".join(second)]
    draw.shuffle(blocks)
    return [question, draw.choice([" ", "\n", "\n\n"]).join(block for block in blocks if block)]


def python_code(num_chars: int, draw: random.Random) -> str:
    """Lines of Python's own library, at least so many characters."""
    lines = inspect.getsource(argparse).splitlines(keepends=True)
    position, code = draw.randrange(len(lines)), ""
    while len(code) < num_chars:
        code += lines[position % len(lines)]
        position += 1
    return code


# Peers --------------------------------------------------------------------------------------------------------


def peers(names: Sequence[str]) -> dict[str, Callable[[str], str]]:
    """Other identifiers as functions, on the whole text as it is; those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = PEERS[name]()
        except ImportError:
            print(f"{name} is not installed and left out")
    return found


def fasttext_alone() -> Callable[[str], str]:
    model = load_detector().model
    return lambda text: short_code(model.predict(text.replace("\n", " "))[0][0].removeprefix("__label__"))


def langdetect_alone() -> Callable[[str], str]:
    import langdetect

    langdetect.DetectorFactory.seed = 0

    def identify(text: str) -> str:
        try:
            return short_code(langdetect.detect(text))
        except langdetect.LangDetectException:  # no letters that it knows
            return "und"

    return identify


def py3langid_alone() -> Callable[[str], str]:
    import py3langid

    return lambda text: short_code(py3langid.classify(text)[0])


def cld2_alone() -> Callable[[str], str]:
    import pycld2

    def identify(text: str) -> str:
        try:
            return short_code(pycld2.detect(text)[2][0][1])
        except pycld2.error:  # it takes control characters for broken UTF-8
            return "und"

    return identify


def short_code(code: str) -> str:
    code = code.split("-")[0]
    return {"iw": "he", "nb": "no", "nn": "no"}.get(code, code)


PEERS: dict[str, Callable[[], Callable[[str], str]]] = {
    "fasttext": fasttext_alone,
    "langdetect": langdetect_alone,
    "py3langid": py3langid_alone,
    "cld2": cld2_alone,
}

if __name__ == "__main__":
    main()
