"""`show`: a row is followed through real stages, and what is printed can do no harm to a terminal."""

import re
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.show import find_row, follow, show_command, story
from flows.show_examples import (
    ShownExample,
    colored,
    examples,
    marked,
    page_text,
    source_shares,
    write_page,
)
from flows.terminal import safe_text, shortened
from pipelines.colours import ColouredPiece
from pipelines.stage import run_stage
from schemas.config_file import load_config
from schemas.errors import ConfigError, InputError
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGE_FOLDERS
from tests.integration import toy


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """A run root with the stages 1 to 6 done."""
    folder = tmp_path_factory.mktemp("toy")
    toy.write_dumps(folder / "dumps", num_chats=40, num_records=20)
    toy.write_tokenizer(folder / "model")
    config = load_config(toy.write_config(folder))
    for stage in ("merge", "clean", "filter", "dedup", "holdout", "split"):
        run_stage(stage, config)
    return config


def rows(config: PipelineConfig, stage: str, kind: str) -> list[dict[str, str]]:
    folder = config.run_root / STAGE_FOLDERS[stage]
    return [
        row for path in sorted(folder.rglob(f"{kind}-*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def test_a_kept_row_is_found_in_every_stage_with_its_messages(config: PipelineConfig) -> None:
    row = max(rows(config, "holdout", "part"), key=lambda row: len(row["messages"]))
    places = follow(config.run_root, row["row_id"])
    pieces = [place.where for place in places[5:]]
    assert [place.stage for place in places[:5]] == ["merge", "clean", "filter", "dedup", "holdout"]
    assert len(pieces) > 1, "a long chat is cut"
    assert all(
        re.match(rf"(train|validation|test), example \d+, piece {number}: \d+ of \d+ tokens", where)
        for number, where in enumerate(pieces)
    )
    assert not any(place.reason for place in places)
    told = "\n".join(story(places, row["row_id"]))
    assert "01_merged" in told
    assert "05_held_out" in told
    assert "<div" in told.split("02_cleaned")[0], "the answer as it was"
    assert "<div" not in told.split("02_cleaned")[1], "the answer as it became"


@pytest.mark.parametrize("stage", ["merge", "filter", "dedup"])
def test_a_dropped_row_is_followed_to_its_drop_with_the_reason(config: PipelineConfig, stage: str) -> None:
    for row in rows(config, stage, "dropped"):
        places = follow(config.run_root, row["row_id"])
        assert places[-1].stage == stage
        assert (places[-1].reason, places[-1].survivor) == (row["reason"], row["survivor"])
        told = list(story(places, row["row_id"]))
        drop = next(line for line in told if "DROPPED" in line)
        assert row["reason"] in drop
        assert row["survivor"] is None or row["survivor"] in drop


def test_a_record_that_could_not_be_read_is_shown_raw(config: PipelineConfig) -> None:
    row = next(row for row in rows(config, "merge", "dropped") if row["reason"] == "invalid_json")
    assert "{not json" in "\n".join(story(follow(config.run_root, row["row_id"]), row["row_id"]))


def test_an_id_may_be_given_by_its_first_digits_if_they_are_its_alone(config: PipelineConfig) -> None:
    ids = sorted({row["row_id"] for kind in ("part", "dropped") for row in rows(config, "merge", kind)})
    assert find_row(config.run_root, ids[0]) == ids[0]
    assert find_row(config.run_root, ids[0][:12]) == ids[0]
    several = re.escape(f"{len(ids)} row ids begin with ''")
    with pytest.raises(InputError, match=several):
        find_row(config.run_root, "")
    with pytest.raises(InputError, match="no row id"):
        find_row(config.run_root, "xyz")


def test_a_run_root_without_a_run_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sft-pipeline step merge"):
        find_row(tmp_path, "ab")


@pytest.mark.parametrize(
    ("row", "config_path", "run_root", "num_examples", "expected"),
    [
        (None, None, None, None, "id of a row"),
        ("ab", None, None, None, "--config or --run-root"),
        (None, None, Path(), 3, "--config"),
    ],
)
def test_show_says_what_it_needs(
    row: str | None, config_path: Path | None, run_root: Path | None, num_examples: int | None, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        show_command(row, config=config_path, run_root=run_root, num_examples=num_examples, color=None)


def test_the_marked_text_of_an_example_is_its_assistant_texts_with_their_end_tokens(
    config: PipelineConfig,
) -> None:
    texts = {row["row_id"]: row["messages"] for row in rows(config, "holdout", "part")}
    shown = 0
    for example in examples(config, 10):
        row_id = re.search(r"row ([0-9a-f]{32}) piece \d+, messages (\d+) to (\d+)", example.headline)
        assert row_id is not None
        first, last = int(row_id[2]), int(row_id[3])
        answers = [m["content"] for m in texts[row_id[1]][first : last + 1] if m["role"] == "assistant"]  # type: ignore[index]
        assert re.findall(r"\[\[(.*?)\]\]", marked(example.pieces), flags=re.DOTALL) == [
            f"{a}<|im_end|>" for a in answers
        ]
        assert colored(example.pieces).plain == "".join(piece.text for piece in example.pieces)
        shown += 1
    assert shown == 10


def test_the_examples_come_from_all_sources_and_their_shares_add_up(config: PipelineConfig) -> None:
    from pipelines.shards import open_split

    table = open_split(config.run_root / STAGE_FOLDERS["split"], "train")
    sources = {source.split("/")[0] for source in table["source"].to_pylist()}
    assert len(sources) > 1
    assert {
        source for source in sources for e in examples(config, 12) if f", {source}/" in e.headline
    } == sources
    shares = source_shares(config)
    assert {share.source for share in shares} == sources
    assert sum(share.num_trained_tokens for share in shares) == sum(table["num_trained_tokens"].to_pylist())
    assert sum(share.num_examples for share in shares) == table.num_rows


class _Spans(HTMLParser):
    """(class, text) of each piece of a page, and every element and attribute that stands in it."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[tuple[str, str]] = []
        self.seen: set[str] = set()
        self.in_pre = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen |= {tag, *(name for name, _ in attributes)}
        self.in_pre = self.in_pre or tag == "pre"
        if tag == "span" and self.in_pre:
            self.pieces.append((dict(attributes).get("class") or "", ""))

    def handle_endtag(self, tag: str) -> None:
        self.in_pre = self.in_pre and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self.in_pre and self.pieces and data != "\n":
            self.pieces[-1] = (self.pieces[-1][0], self.pieces[-1][1] + data)


def test_the_page_shows_the_same_pieces_and_runs_nothing(config: PipelineConfig, tmp_path: Path) -> None:
    write_page(config, tmp_path / "page.html", num_examples=5)
    page = _Spans()
    page.feed((tmp_path / "page.html").read_text())
    expected = [piece for example in examples(config, 5) for piece in example.pieces]
    assert [text.strip("\n") for _, text in page.pieces] == [piece.text.strip("\n") for piece in expected]
    assert ["trained" in name for name, _ in page.pieces] == [piece.weight == 1 for piece in expected]
    assert ["control" in name for name, _ in page.pieces] == [piece.is_control for piece in expected]
    assert not page.seen & {"script", "img", "src", "href", "onclick"}


def test_a_chat_cannot_write_markup_into_the_page(config: PipelineConfig, tmp_path: Path) -> None:
    hostile = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"
    shown = ShownExample(hostile, [ColouredPiece(hostile, 0.5, False)])
    page = _Spans()
    page.feed(page_text(title=hostile, shares=[], examples=[shown]))
    assert not page.seen & {"script", "img", "src", "onerror"}
    assert page.pieces == [("weighted", hostile)]


def test_a_weight_is_told_where_it_is_not_one() -> None:
    pieces = [ColouredPiece(text, weight, False) for text, weight in (("a", 0.0), ("b", 1.0), ("c", 0.5))]
    assert marked(pieces) == "a[[b]][[0.5x c]]"


def steers(character: str) -> bool:
    """By Unicode's own data: controls, separators of lines, surrogates, marks that turn the direction of text."""
    turns = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return character not in "\n\t" and (
        unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs")
        or unicodedata.bidirectional(character) in turns
        or unicodedata.name(character, "")
        in ("LEFT-TO-RIGHT MARK", "RIGHT-TO-LEFT MARK", "ARABIC LETTER MARK")
        or unicodedata.name(character, "").startswith(("TAG ", "LANGUAGE TAG", "CANCEL TAG"))
    )


def test_no_character_can_steer_a_terminal() -> None:
    hostile = [character for character in map(chr, range(sys.maxunicode + 1)) if steers(character)]
    assert len(hostile) > 2000
    for shown in (
        safe_text,
        shortened,
        lambda text: marked([ColouredPiece(text, 1.0, False)]),
        lambda text: colored([ColouredPiece(text, 0.0, False)]).plain,
    ):
        through = "".join(shown(f"a{character}b") for character in hostile)
        assert not any(map(steers, through))
        through.encode("utf-8")


@given(st.text())
def test_a_shortened_text_is_one_line(text: str) -> None:
    assert len(f"{shortened(text)} ".splitlines()) == 1


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "Zs"]), max_size=300))
def test_ordinary_text_is_shown_as_it_is(text: str) -> None:
    assert safe_text(text) == text


def test_a_long_text_is_shortened_in_the_middle_with_what_was_left_out() -> None:
    assert shortened("x" * 1000, 10) == "xxxxx ...990 characters... xxxxx"
