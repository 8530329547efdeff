"""Chat templates and tokenizers, each chat judged against transformers' own text, ids and mask.

    python benchmarks/templates.py generated FOLDER_OF_TEMPLATES [--chats 2000] [--workers 2]
    python benchmarks/templates.py real TOKENIZER [TOKENIZER ...] --data FILE_OR_FOLDER [...] [--limit 1000]

generated: every *.jinja file of a folder (and one with a generation block) with small tokenizers of five kinds,
trained in this process, on random chats: half of them hold control strings of the tokenizer. real: folders of
tokenizers, or .tar.gz files of such, on every chat that can be read from the data; one without a template gets
chatml. What is judged stands in benchmarks/templates_judge.py. Run it in the checkout: the small tokenizers are those
of the tests.
"""

import argparse
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.templates_judge import COLUMNS, judge  # noqa: E402
from pipelines.built_in_templates import template_for  # noqa: E402
from pipelines.encode import build_encoder  # noqa: E402
from schemas.conversation import Conversation, Message  # noqa: E402
from schemas.pipeline_config import SplitConfig  # noqa: E402

FAMILIES = ("byte_level_bpe", "metaspace_bpe", "metaspace_bpe_without_prefix", "unigram", "word_piece")
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
DEEPSEEK_END = "<｜end▁of▁sentence｜>"
"""The folder of that tokenizer names no end token."""
NO_CHATS = {"tokenizers", "chat_templates"}


def main() -> None:
    options = parse_arguments()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "transformers", "jinja2"))
    print(f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {libraries}\n")
    print(f"| case | {' | '.join(COLUMNS.values())} | seconds |")
    print("|---|" + "---|" * (len(COLUMNS) + 1), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        jobs = list(
            generated_jobs(options) if options.what == "generated" else real_jobs(options, Path(folder))
        )
        total: Counter[str] = Counter()
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            for name, counts, seconds in pool.map(run_job, jobs):
                total.update(counts)
                total["percent_tokenised"] = round(100 * total["tokenised"] / max(total["rendered"], 1))
                print(line(name, counts, seconds), flush=True)
    print(line("all", total, 0.0))
    sys.exit(1 if any(total[name] for name in total if name.startswith("wrong")) else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="what", required=True)
    generated = kinds.add_parser("generated")
    generated.add_argument("templates", type=Path)
    generated.add_argument("--chats", type=int, default=2000)
    real = kinds.add_parser("real")
    real.add_argument("tokenizers", type=Path, nargs="+")
    real.add_argument("--data", type=Path, nargs="+", required=True)
    real.add_argument("--limit", type=int, default=None, help="chats of each file")
    for kind in (generated, real):
        kind.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


def line(name: str, counts: Counter[str], seconds: float) -> str:
    return f"| {name} | " + " | ".join(f"{counts[column]:,}" for column in COLUMNS) + f" | {seconds:.0f} |"


Job = tuple[str, Any, Any]
"""Name, what makes the tokenizer, what makes the chats."""


def run_job(job: Job) -> tuple[str, Counter[str], float]:
    """All chats of one tokenizer and template."""
    name, make_tokenizer, make_chats = job
    start = time.perf_counter()
    tokenizer = make_tokenizer()
    encoder = build_encoder(tokenizer)
    counts: Counter[str] = Counter()
    for row in make_chats(tokenizer):
        judge(encoder, SplitConfig(), row, counts)
    return name, counts, time.perf_counter() - start


# Generated chats --------------------------------------------------------------------------------------------


def generated_jobs(options: argparse.Namespace) -> Iterator[Job]:
    from tests.pipelines.model_templates import MARKED

    sources = {path.stem: path.read_text() for path in sorted(options.templates.glob("*.jinja"))}
    for name, source in {**sources, "with a generation block": MARKED}.items():
        for family in FAMILIES:
            chats = partial(generated_chats, f"{name} {family}", options.chats)
            yield f"{name}, {family}", partial(small_tokenizer, family, source), chats


def small_tokenizer(family: str, source: str) -> Any:
    from tests.pipelines.tiny_tokenizers import metaspace_bpe, tiny_tokenizer, wrapped

    if family == "metaspace_bpe_without_prefix":
        return wrapped(metaspace_bpe("never"), source)
    return tiny_tokenizer(family, source)


_WORDS = (
    *(
        "Hello",
        "world",
        "the answer is 42",
        "print(1)",
        "def add(a, b):\n    return a + b",
        "Größe",
        "你好，世界。",
    ),
    *(
        "мир",
        "👍🏽",
        "e\u0301",
        "\u00a0",
        "ASSISTANT:",
        "### Response:",
        "  ",
        "\n\n",
        "\t",
        '"quoted"',
        "a_b",
    ),
    *(
        "<div>",
        "&lt;",
        "{{ eos_token }}",
        "[INST",
        "\\n",
        "1,234.5",
        "ＡＢ",
        "\u200b",
        "<|im_end",
        "|>",
        "don't",
    ),
)


def generated_chats(seed: str, num_chats: int, tokenizer: Any) -> Iterator[Conversation]:
    """Random chats of one to four rounds; every second one holds control strings."""
    random = Random(seed)
    controls = sorted(tokenizer.get_added_vocab())
    for number in range(num_chats):
        words = [*_WORDS, *controls] if number % 2 else list(_WORDS)
        chat = [Message("system", _text(random, words))] if random.random() < 0.4 else []
        for _ in range(random.randint(1, 4)):
            chat.append(Message("user", _text(random, words)))
            chat.append(Message("assistant", _text(random, words)))
        yield Conversation(str(number), "generated/chats", number, chat)


def _text(random: Random, words: list[str]) -> str:
    return random.choice((" ", "", "\n")).join(random.choices(words, k=random.randint(0, 12)))


# Real chats -------------------------------------------------------------------------------------------------


def real_jobs(options: argparse.Namespace, folder: Path) -> Iterator[Job]:
    rows = merged(options.data, folder)
    for path in options.tokenizers:
        tokenizer = unpacked(path, folder)
        yield tokenizer.name, partial(real_tokenizer, tokenizer), partial(real_chats, rows, options.limit)


def unpacked(path: Path, folder: Path) -> Path:
    """A tokenizer's folder, taken out of its archive."""
    if path.is_dir():
        return path
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return folder / path.name.split(".")[0]


def real_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token is None and DEEPSEEK_END in tokenizer.get_added_vocab():
        tokenizer.eos_token = DEEPSEEK_END
    if tokenizer.chat_template is None:
        tokenizer.chat_template = template_for("chatml", tokenizer)
    return tokenizer


def merged(paths: list[Path], folder: Path) -> list[Path]:
    """The rows of all files, read by the stage merge alone: nothing is cleaned or filtered."""
    files = [file for path in paths for file in (_files(path) if path.is_dir() else [path])]
    sources = [
        {"name": f"s{number}", "path": str(file.resolve()), "assistant_side": "second"}
        for number, file in enumerate(files)
    ]
    config = folder / "config.yaml"
    config.write_text(json.dumps({"run_root": str(folder / "run"), "sources": sources}))
    command = [sys.executable, "-m", "flows.cli", "step", "merge", str(config)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return sorted((folder / "run" / "01_merged").glob("part-*.parquet"))


def _files(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if path.name.endswith(SUFFIXES)]
    return [path for path in found if not set(path.relative_to(folder).parts) & NO_CHATS]


def real_chats(parts: list[Path], limit: int | None, _tokenizer: Any) -> Iterator[Conversation]:
    from pipelines.storage import read_rows

    seen: Counter[str] = Counter()
    for part in parts:
        for row in read_rows(part):
            seen[row.source] += 1
            if limit is None or seen[row.source] <= limit:
                yield row


if __name__ == "__main__":
    main()
