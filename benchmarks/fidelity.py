"""Does our Markdown say what the page said? Every answer of a ShareGPT dump, read twice and compared.

    python benchmarks/fidelity.py sharegpt_html.json.gz
    python benchmarks/fidelity.py sharegpt_html.json.gz --fastchat FOLDER   # beside FastChat's own converter

One reading is the page's (html.parser), one that of its Markdown (markdown-it-py: CommonMark with tables,
strikethrough and footnotes, raw HTML taken as HTML; formulas between dollars where the page has formulas). They are
compared in

    code        blocks: every byte, but for one last line end; their languages
    inline code spans, line ends as blanks
    cells       of each table, row by row
    lists       every item with its place (kind, first number and index of each list around it) and its own text
    headings    level and text
    quotes, rules, footnotes
    links       text and address
    formulas    inline or displayed, and their TeX without white space
    pictures    by the setting that was asked for: address and description, description, or nothing; so citations
    style       which letters and digits are strong, emphasised, struck out, raised or lowered
    text        all of it in order, without white space

Not compared: white space and paragraph borders outside code; U+200B, U+2060, U+FEFF; which formula a dollar sign
means where the page has none; and what no reader takes for the answer: buttons and all in them, icons (svg), scripts,
styles, frames, text for screen readers, code bars (but for the language), KaTeX's other two copies of a formula,
links from a footnote back, numbers of edits between their buttons. Pictures and citations are counted and printed.
"""

import argparse
import gzip
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import html_to_markdown
import markdownify

sys.path.insert(0, str(Path(__file__).parent.parent))  # also as a script, the packages of this checkout

from benchmarks.fidelity_markdown import read_markdown
from benchmarks.fidelity_page import read_page
from benchmarks.fidelity_reading import compare
from pipelines.html import CONVERTERS, convert_answer
from schemas.conversation import Drop
from schemas.pipeline_config import CleanConfig

MAX_DIFFERENT_SHARE = {
    "html-to-markdown behind our pre-pass": 0.005,
    "markdownify behind our pre-pass": 0.02,
}


def differences(page: str, markdown: str, *, images: str = "drop", citations: str = "drop") -> list[str]:
    """One line for each facet in which the Markdown differs from its page; its first word is the facet's name."""
    was = read_page(page, images=images, citations=citations)
    became = read_markdown(markdown, math=bool(was.formulas))
    return list(compare(was, became))


Writer: TypeAlias = Callable[[str], str]


def ours(converter: str) -> Writer:
    def write(page: str) -> str:
        converted = convert_answer(page, CleanConfig(converter=converter))  # type: ignore[arg-type]
        return (
            f"DROPPED {converted.reason} {converted.detail}"
            if isinstance(converted, Drop)
            else converted.markdown
        )

    return write


def writers(fastchat: Path | None) -> dict[str, Writer]:
    found: dict[str, Writer] = {f"{name} behind our pre-pass": ours(name) for name in CONVERTERS}
    found["markdownify alone"] = lambda page: markdownify.markdownify(page)
    found["html-to-markdown alone"] = lambda page: html_to_markdown.convert(page).content or ""
    if fastchat is not None:
        sys.path.append(str(fastchat))
        from fastchat.data.clean_sharegpt import html_to_markdown as convert  # type: ignore[import-not-found]

        found["FastChat"] = convert
    return found


def answers_of(path: Path) -> dict[str, str]:
    """Answers by place: id#turn."""
    raw = path.read_bytes()
    chats = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    return {
        f"{chat['id']}#{number}": turn["value"]
        for chat in chats
        for number, turn in enumerate(chat["conversations"])
        if turn["from"] not in ("human", "user")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dump", type=Path)
    parser.add_argument("--fastchat", type=Path, help="folder into which `pip install --target` put fschat")
    parser.add_argument("--show", type=int, default=10, help="differences to print for each of ours")
    arguments = parser.parse_args()
    answers = answers_of(arguments.dump)
    pages = [read_page(page) for page in answers.values()]
    counts = f"{sum(p.num_images for p in pages)} pictures, {sum(p.num_citations for p in pages)} citations"
    packages = ("markdown-it-py", "mdit-py-plugins", "html-to-markdown", "markdownify", "selectolax")
    print(
        f"{len(answers)} answers with {counts}; " + ", ".join(f"{name} {version(name)}" for name in packages)
    )
    too_many = [
        name
        for name, write in writers(arguments.fastchat).items()
        if _share_of_different(name, write, answers, arguments.show) > MAX_DIFFERENT_SHARE.get(name, 1)
    ]
    if too_many:
        sys.exit(f"more differences than allowed: {', '.join(too_many)}")


def _share_of_different(name: str, write: Writer, answers: dict[str, str], num_shown: int) -> float:
    """Judge all answers as `write` converts them, and print the result; of ours, the differences too."""
    start = time.process_time()
    written = {place: write(page) for place, page in answers.items()}
    seconds = time.process_time() - start
    found = {p: lines for p, page in answers.items() if (lines := differences(page, written[p]))}
    facets = Counter(line.split(":")[0] for lines in found.values() for line in lines)
    share = len(found) / len(answers)
    print(f"{name}: {1 - share:.2%} without a difference, {len(found)} with, {seconds:.1f} s; {dict(facets)}")
    for place, lines in list(found.items())[: num_shown if name in MAX_DIFFERENT_SHARE else 0]:
        print(f"  {place}", *lines, sep="\n    ")
    return share


if __name__ == "__main__":
    main()
