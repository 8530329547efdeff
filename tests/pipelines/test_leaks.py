"""Benchmark leaks: every planted one is found and told with both texts, near misses stay."""

import csv
import gzip
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.benchmark_files import read_benchmarks
from pipelines.leaks import (
    LEAKS,
    MAX_HITS_OF_ROW,
    MAX_SHOWN_CHARS,
    build_index,
    counts,
    find_leaks,
    leak_drops,
)
from pipelines.shared_runs import MAX_ITEMS_OF_GRAM
from pipelines.stage import run_stage
from pipelines.storage import read_manifest
from schemas.config_file import load_config
from schemas.conversation import Conversation, Message
from schemas.errors import InputError
from schemas.pipeline_config import DedupConfig, PipelineConfig
from schemas.source_config import BenchmarkConfig, SourceConfig

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
ANSWER = "Natalia sold 48/2 = 24 clips in the month of May. Put together, Natalia sold 48 + 24 = 72 clips in April and May."
CHINESE = "小明有三个苹果，妈妈又给了他五个苹果，请问小明现在一共有多少个苹果？"
ITEMS = [
    {"question": QUESTION, "answer": ANSWER},
    {"question": "What is 3 * 4?", "answer": "12"},
    {"question": CHINESE, "answer": ""},
]


def config_with(
    folder: Path = Path("/nowhere"), *benchmarks: BenchmarkConfig, **dedup: Any
) -> PipelineConfig:
    return PipelineConfig(
        run_root=folder / "run",
        sources=[SourceConfig(name="s", path="s.json")],
        benchmarks=list(benchmarks),
        dedup=DedupConfig(**dedup),
    )


def items_of(records: list[dict[str, str]]) -> pa.Table:
    from pipelines.benchmark_files import ITEMS as SCHEMA

    lines = [{"benchmark": "b", "file": "b.json", "record": n} | item for n, item in enumerate(records)]
    return pa.Table.from_pylist(lines, schema=SCHEMA)


def hits_of(
    turns: list[tuple[str, str]], items: list[dict[str, str]] | None = None, **dedup: Any
) -> list[dict[str, Any]]:
    messages = [Message(role, text) for role, text in turns]  # type: ignore[arg-type]
    index = build_index(items_of(ITEMS if items is None else items), config_with(**dedup))
    found = find_leaks([Conversation("r", "s/f", 0, messages)], index)
    assert found.schema == LEAKS
    return found.to_pylist()  # type: ignore[no-any-return]


def kinds_of(*turns: tuple[str, str], **dedup: Any) -> list[tuple[str, int, int]]:
    return [(hit["kind"], hit["benchmark_record"], hit["turn"]) for hit in hits_of(list(turns), **dedup)]


WORDS = QUESTION.split()


@pytest.mark.parametrize(
    ("turn", "found"),
    [
        (("user", QUESTION), ("question", 0, 0)),
        (("user", f"Solve this step by step, please.\n\n> {QUESTION}\n\nThanks!"), ("question", 0, 0)),
        (("user", QUESTION.upper().replace(",", "").replace(" ", "\n")), ("question", 0, 0)),
        (("user", " ".join(WORDS[:-10])), ("question", 0, 0)),
        (("user", QUESTION.replace("friends", "**colleagues**")), ("question", 0, 0)),
        (("user", f"{' '.join(WORDS[16:])} Know that {' '.join(WORDS[:16])}"), ("question", 0, 0)),
        (("assistant", f"Here is a riddle: {QUESTION}"), ("question", 0, 0)),
        (("system", QUESTION), ("question", 0, 0)),
        (("assistant", f"Sure! {ANSWER}"), ("answer", 0, 0)),
        (("user", "what  is 3 * 4"), ("question", 1, 0)),
        (("user", "**What is 3 * 4?**"), ("question", 1, 0)),
        (("user", CHINESE), ("question", 2, 0)),
        (("user", f"请回答：{CHINESE.replace('，', ',')}谢谢"), ("question", 2, 0)),
    ],
)
def test_a_planted_leak_is_found(turn: tuple[str, str], found: tuple[str, int, int]) -> None:
    assert kinds_of(turn) == [found]


@pytest.mark.parametrize(
    "turn",
    [
        (
            "user",
            "Natalia sold clips to 50 of her cousins in June. How much did she earn altogether with it?",
        ),
        ("user", " ".join(WORDS[:14])),
        ("user", " ".join(word for pair in itertools.pairwise(WORDS) for word in reversed(pair))),
        ("user", ANSWER),
        ("user", "What is 3 - 4?"),
        ("user", "What is 3 * 4? And what is 5 * 6?"),
        ("assistant", "What is 3 * 4?"),
        ("assistant", "12"),
        ("user", "小红有三个橘子，爸爸又给了她两个橘子。"),
        ("user", ""),
    ],
)
def test_a_near_miss_is_no_leak(turn: tuple[str, str]) -> None:
    assert kinds_of(turn) == []


def test_settings_say_how_much_must_be_shared() -> None:
    beginning = ("user", " ".join(WORDS[:14]))
    assert kinds_of(beginning, leak_share=14 / len(WORDS)) == [("question", 0, 0)]
    assert kinds_of(beginning, leak_share=14.1 / len(WORDS)) == []
    assert kinds_of(("user", QUESTION.replace("friends", "colleagues")), leak_words=len(WORDS)) == []
    assert kinds_of(("user", "so what is 3 * 4 then"), leak_words=3) == [("question", 1, 0)]


def test_every_turn_is_told_with_both_texts() -> None:
    turns = [("user", "Hello!"), ("assistant", "Hi."), ("user", f"Well: {QUESTION}"), ("assistant", ANSWER)]
    question, answer = hits_of(turns)
    assert (question["turn"], question["role"], question["share"]) == (2, "user", 1.0)
    assert (question["chat_text"], question["benchmark_text"]) == (QUESTION, QUESTION)
    assert (answer["turn"], answer["chat_text"], answer["benchmark_text"]) == (3, ANSWER, ANSWER)


def test_shown_texts_and_hits_of_a_row_are_bounded() -> None:
    draw = random.Random(0)
    items = [{"question": " ".join(f"w{draw.random()}" for _ in range(99)), "answer": ""} for _ in range(40)]
    everything = "\n".join(item["question"] for item in items)
    hits = hits_of([("user", f"{everything}\n{everything}")], items)
    assert len(hits) == MAX_HITS_OF_ROW
    assert {len(hit[name]) for hit in hits for name in ("chat_text", "benchmark_text")} == {MAX_SHOWN_CHARS}


def test_a_lone_surrogate_is_shown_as_something_else() -> None:
    (hit,) = hits_of([("user", f"{QUESTION} \ud83d")])
    assert hit["chat_text"].startswith(QUESTION)


TEMPLATE = "Read the following statement with great care and then say whether it is true or false :"


def test_what_most_items_share_proves_nothing() -> None:
    """Nor does it hide the item that is really there."""
    draw = random.Random(1)
    texts = [
        " ".join(f"word{draw.randrange(10**6)}" for _ in range(12)) for _ in range(MAX_ITEMS_OF_GRAM + 1)
    ]
    items = [{"question": f"{TEMPLATE} {text}", "answer": ""} for text in texts]
    assert hits_of([("user", f"{TEMPLATE} water boils at ninety degrees on a mountain")], items) == []
    assert [hit["benchmark_record"] for hit in hits_of([("user", items[7]["question"])], items)] == [7]
    assert [hit["benchmark_record"] for hit in hits_of([("user", f"Is it so: {texts[7]}")], items)] == [7]


def test_a_question_that_stands_in_a_file_a_hundred_times_is_no_template() -> None:
    assert len(hits_of([("user", f"So: {QUESTION}")], [ITEMS[0]] * 100)) == MAX_HITS_OF_ROW


def test_shares_are_those_of_a_plain_reading_of_the_rule() -> None:
    """Random texts of few words against the definition, word by word."""
    draw = random.Random(2)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choice("abcde") for _ in range(draw.randint(least, most)))

    items = [{"question": text(3, 12), "answer": text(0, 12)} for _ in range(40)]
    rows = [
        Conversation(f"{n}", "s/f", n, [Message("user", text(0, 30)), Message("assistant", text(0, 30))])
        for n in range(60)
    ]
    index = build_index(items_of(items), config_with(leak_words=3, leak_share=0.6))
    assert len(items) > MAX_HITS_OF_ROW  # hence only rows with fewer hits are compared
    found: dict[str, dict[tuple[str, int, int], float]] = {row.row_id: {} for row in rows}
    for hit in find_leaks(rows, index).to_pylist():
        found[hit["row_id"]][hit["kind"], hit["benchmark_record"], hit["turn"]] = hit["share"]
    expected = {row.row_id: plain_shares(row, items, 3, 0.6) for row in rows}
    compared = [row for row, shares in expected.items() if len(shares) <= MAX_HITS_OF_ROW]
    assert sum(len(expected[row]) for row in compared) > 100
    assert {row: found[row] for row in compared} == {row: expected[row] for row in compared}


def plain_shares(
    row: Conversation, items: list[dict[str, str]], num_words: int, least: float
) -> dict[tuple[str, int, int], float]:
    shares = {}
    for number, item in enumerate(items):
        for turn, message in enumerate(row.messages):
            for kind in ("question", "answer") if message.role == "assistant" else ("question",):
                sought, said = item[kind].split(), message.content.split()
                runs = {tuple(said[n : n + num_words]) for n in range(len(said) - num_words + 1)}
                starts = [
                    n for n in range(len(sought) - num_words + 1) if (*sought[n : n + num_words],) in runs
                ]
                common = {word for start in starts for word in range(start, start + num_words)}
                share = len(common) / max(len(sought), 1)
                if share >= least and common:
                    shares[kind, number, turn] = round(share, 4)
    return shares


def test_a_row_is_dropped_for_its_question_before_its_answer() -> None:
    index = build_index(items_of(ITEMS), config_with())
    rows = [
        Conversation("a", "s/f", 0, [Message("user", QUESTION), Message("assistant", ANSWER)]),
        Conversation("b", "s/f", 1, [Message("user", "Help"), Message("assistant", ANSWER)]),
        Conversation("c", "s/f", 2, [Message("user", "Help"), Message("assistant", "Yes.")]),
    ]
    leaks = find_leaks(rows, index)
    drops = leak_drops(leaks)
    assert {row: drop.reason for row, drop in drops.items()} == {"a": "leaked_question", "b": "leaked_answer"}
    assert drops["a"].detail == "turn 0 holds 100% of the words of the question of b b.json record 0"
    found = counts(leaks, index)
    assert (found["leak_hits"], found["leak_rows"], found["leak_rows_b"]) == (3, 2, 2)
    assert (found["benchmark_questions_as_whole_turns_only"], found["benchmark_answers_too_short"]) == (1, 1)


# --- files --------------------------------------------------------------------------------------------------


def write_json(path: Path, items: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(items))


def write_lines(path: Path, items: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def write_parquet(path: Path, items: list[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(items), path)


def write_csv(path: Path, items: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(items)


@pytest.mark.parametrize(
    ("name", "write"),
    [("b.json", write_json), ("b.jsonl", write_lines), ("b.parquet", write_parquet), ("b.csv", write_csv)],
)
def test_benchmarks_are_read_from_any_container(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, str]]], None]
) -> None:
    write(tmp_path / name, ITEMS)
    benchmark = BenchmarkConfig(name="b", path=str(tmp_path / name), question=["question"], answer=["answer"])
    items = read_benchmarks(config_with(tmp_path, benchmark)).to_pylist()
    assert [{kind: item[kind] for kind in ("question", "answer")} for item in items] == ITEMS
    assert [(item["benchmark"], item["file"], item["record"]) for item in items] == [
        ("b", name, number) for number in range(3)
    ]


def test_a_text_file_has_a_question_a_line(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("".join(item["question"] + "\n" for item in ITEMS))
    fields = {"container": "text_lines", "question": ["text"]}
    benchmark = BenchmarkConfig.model_validate({"name": "b", "path": str(tmp_path / "b.txt")} | fields)
    items = read_benchmarks(config_with(tmp_path, benchmark))
    assert items["question"].to_pylist() == [item["question"] for item in ITEMS]


def test_parts_of_a_question_are_joined(tmp_path: Path) -> None:
    record = {"q": {"stem": "Which?", "choices": ["red", "blue"], "number": 7}, "answer": 1}
    (tmp_path / "b.json").write_text(json.dumps([record]))
    benchmark = BenchmarkConfig(
        name="b", path=str(tmp_path / "b.json"), question=["q.stem", "q.choices"], answer=["answer"]
    )
    (item,) = read_benchmarks(config_with(tmp_path, benchmark)).to_pylist()
    assert (item["question"], item["answer"]) == ("Which?\n\nred\nblue", "1")


def test_a_benchmark_is_parsed_as_sources_are(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"question": "a\\ud800b", "level": NaN}\n')
    benchmark = BenchmarkConfig(name="b", path=str(tmp_path / "b.jsonl"), question=["question"])
    (item,) = read_benchmarks(config_with(tmp_path, benchmark)).to_pylist()
    assert item["question"] == "a\ufffdb"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"prompt": "x"}]', "none of 1 records has a text at 'question'; keys: 'prompt'"),
        ('{"question": "x"}\n{"question": \n', "b.jsonl record 1 "),
        ('[["question"]]', "b.jsonl record 0 can't be read .*the record is list, expected an object"),
        ("", "holds no records|has no records"),
    ],
)
def test_a_benchmark_that_is_not_read_whole_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "b.jsonl").write_text(text)
    benchmark = BenchmarkConfig(name="b", path=str(tmp_path / "b.jsonl"), question=["question"])
    with pytest.raises(InputError, match=said):
        read_benchmarks(config_with(tmp_path, benchmark))


# --- real data ----------------------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.slow
def test_lima_holds_six_questions_of_gsm8k(real_data: Path, tmp_path: Path) -> None:
    """Those that stand in it letter by letter, each with its answer; none besides of GSM8K's 7,473."""
    gsm = BenchmarkConfig(
        name="gsm", path=str(real_data / "gsm8k_train.jsonl.gz"), question=["question"], answer=["answer"]
    )
    config = config_with(tmp_path, gsm)
    records = json.loads(gzip.decompress((real_data / "lima.json.gz").read_bytes()))
    rows = []
    for number, record in enumerate(records):
        asked = Message("user", f"{record['instruction']}\n\n{record['input']}")
        rows.append(
            Conversation(
                f"{number}", "lima/lima.json", number, [asked, Message("assistant", record["output"])]
            )
        )
    items = read_benchmarks(config)
    leaks = find_leaks(rows, build_index(items, config)).to_pylist()
    texts = [" ".join(record["instruction"].split()) for record in records]
    questions = [" ".join(question.split()) for question in items["question"].to_pylist()]
    verbatim = {str(n) for n, text in enumerate(texts) if any(question in text for question in questions)}
    assert len(verbatim) == 6
    for kind in ("question", "answer"):
        assert {hit["row_id"] for hit in leaks if hit["kind"] == kind} == verbatim


# --- the stage ----------------------------------------------------------------------------------------------

CONFIG = """
run_root: run
sources: [{name: chats, path: chats.jsonl}]
benchmarks:
  - {name: gsm, path: gsm.jsonl, question: [question], answer: [answer]}
merge: {part_bytes: 2000}
engine: {workers: 1, min_free_gib: 0.1}
"""


def write_project(folder: Path) -> Path:
    draw = random.Random(3)
    rounds = [
        (" ".join(f"w{draw.randrange(500)}" for _ in range(20)), f"reply {number} of many")
        for number in range(40)
    ]
    rounds[11] = (f"Please: {QUESTION}", "No idea.")
    rounds[12] = (f"Please: {QUESTION} Thanks.", "No idea.")
    rounds[23] = ("Tell me something.", ANSWER)
    lines = [json.dumps({"instruction": q, "input": "", "output": a}) for q, a in rounds]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    write_lines(folder / "gsm.jsonl", ITEMS)
    (folder / "config.yaml").write_text(CONFIG)
    return folder / "config.yaml"


def run_to_dedup(config: Path, *overrides: str) -> Any:
    loaded = load_config(config, overrides)
    for stage in ("merge", "clean", "filter", "dedup"):
        result = run_stage(stage, loaded)
    return result


def test_leaks_are_dropped_counted_and_reported(tmp_path: Path) -> None:
    config = write_project(tmp_path)
    manifest = run_to_dedup(config).manifest
    folder = tmp_path / "run" / "04_deduplicated"
    # The near-copy of a leak is a leak of its own, and no near-duplicate of a row that is gone.
    assert manifest.drops == {"leaked_answer": 1, "leaked_question": 2}
    assert manifest.num_rows_out == 37
    assert manifest.counts["leak_rows_gsm"] == 3
    (report,) = folder.glob("leaks-*.parquet")
    hits = pq.read_table(report).to_pylist()
    assert [(hit["record"], hit["kind"]) for hit in sorted(hits, key=lambda hit: hit["record"])] == [
        (11, "question"),
        (12, "question"),
        (23, "answer"),
    ]
    assert all(hit["chat_text"].startswith(hit["benchmark_text"]) for hit in hits)
    assert report.name in {file.path for file in manifest.files}
    assert read_manifest(folder) == manifest


def test_leaks_can_be_reported_alone(tmp_path: Path) -> None:
    manifest = run_to_dedup(write_project(tmp_path), "dedup.leaks=report").manifest
    assert manifest.drops == {"near_duplicate": 1}
    assert manifest.counts["leak_rows"] == 3
    (report,) = (tmp_path / "run" / "04_deduplicated").glob("leaks-*.parquet")
    assert pq.read_table(report).num_rows == 3


def test_the_search_runs_again_only_for_what_changed(tmp_path: Path) -> None:
    config = write_project(tmp_path)
    run_to_dedup(config)
    assert run_to_dedup(config).skipped
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "gsm.jsonl").rename(tmp_path / "elsewhere" / "gsm.jsonl")
    elsewhere = "benchmarks.0.path=elsewhere/gsm.jsonl"
    assert run_to_dedup(config, elsewhere).skipped
    write_lines(tmp_path / "elsewhere" / "gsm.jsonl", ITEMS[1:])
    result = run_to_dedup(config, elsewhere)
    assert not result.skipped
    assert result.manifest.drops == {"near_duplicate": 1}
    assert len(list((tmp_path / "run" / "04_deduplicated").glob("leaks-*.parquet"))) == 1
