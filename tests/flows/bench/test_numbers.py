"""From steps that a process noted to the table and the chart: counts, medians, agreement, who is left out."""

import dataclasses
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from flows.bench.chart import read_group, svg, write_chart
from flows.bench.contest import Entry, entry_of, variants_in
from flows.bench.contestants import PEERS, PEERS_FOLDER, contestants_of
from flows.bench.options import BenchOptions, check_options, checkpointing_setting, config_of, pythons_of
from flows.bench.results import Run, Summary, check_counts, run_of
from flows.bench.search import Tried, search
from flows.bench.table import markdown, record
from schemas.errors import ConfigError, InputError, IntegrityError

OPTIONS = BenchOptions(Path("bench"), shape="toy", peers=("trl", "padded"), memory_cap_gib=9.0)


def noted(seconds_of_step: float, *, num_steps: int = 6, started_at: float = 1000.0) -> list[dict[str, Any]]:
    """The first step ends three seconds after the start; each has 100 tokens, 65 of them trained."""
    return [
        {
            "unix_time": started_at + 3 + number * seconds_of_step,
            "num_tokens": 100,
            "num_trained_tokens": 65,
            "loss": 6.0 - number,
            "grad_norm": 0.5 + number if number in (0, num_steps - 1) else None,
        }
        for number in range(num_steps)
    ]


def run(seconds_of_step: float, *, first_loss: float = 6.0, is_cold: bool = True, **changes: Any) -> Run:
    raw = {
        "steps": noted(seconds_of_step),
        "first_loss": first_loss,
        "reserved_gib": 8.25,
        "resident_gib": 2.0,
        "device": "a card",
        "versions": {"torch": "2.13"},
        "kernel": "packed",
        "bins_at_once": 7,
    }
    found = run_of(
        raw, num_warm_up=2, started_at=1000.0, ended_at=1060.0, nvml_gib=8.75, is_cold=is_cold, kernel=""
    )
    return dataclasses.replace(found, **changes)


def test_tokens_a_second_are_of_the_steps_behind_the_warm_up_and_of_all_that_happens_between() -> None:
    found = run(0.5)
    assert (found.num_tokens, found.num_trained_tokens) == (400, 260)
    assert found.seconds == pytest.approx(2.0)
    assert found.tokens_per_second == pytest.approx(200)
    assert found.seconds_to_first_step == pytest.approx(3)
    assert found.process_seconds == pytest.approx(60)
    assert found.last_loss == pytest.approx(sum(6.0 - n for n in range(6)) / 6)
    assert found.grad_norms == (0.5, 5.5)
    assert found.more == {"bins_at_once": 7}


def test_a_step_that_counts_padding_is_refused() -> None:
    expected = [{"num_tokens": 100, "num_trained_tokens": 65}] * 6
    steps = noted(1.0)
    check_counts("ours", steps, expected, exact=True)
    steps[3]["num_tokens"] = 128
    with pytest.raises(IntegrityError, match=r"ours, step 4: .*128.* are in the plan"):
        check_counts("ours", steps, expected, exact=True)
    check_counts("padded", noted(1.0), expected, exact=False)
    with pytest.raises(IntegrityError, match=r"unsloth trains 100.0% of its tokens, ours 65.0%"):
        check_counts("unsloth", [{"num_tokens": 90, "num_trained_tokens": 90}], expected, exact=False)


def entries() -> list[Entry]:
    ours, trl, padded = (entry_of(found) for found in contestants_of(OPTIONS))
    ours.runs = [run(0.5), run(0.25, is_cold=False), run(1.0, is_cold=False)]
    trl.runs = [run(1.0, first_loss=6.001), run(2.0, first_loss=6.001)]
    trl.tried = [Tried(trl.variant, 99.0)]
    padded.problem = "peft is not installed"
    return [ours, trl, padded]


def test_the_table_has_medians_spread_agreement_and_who_is_left_out() -> None:
    text = markdown(OPTIONS, entries())
    assert (
        "| ours | 200 (100 to 400) |  | 8.2 | 8.8 | 6.0000 | 3.5000 | 0.500, 5.500 | 65.0% | 3 / 3 |" in text
    )
    assert "| trl | 75 (50 to 100) | 2.67 x | 8.2 | 8.8 | 6.0010, agrees (0.02%) |" in text
    assert "- padded is left out: peft is not installed." in text
    assert (
        "- Micro-step of ours: 7 of 1 bins at once, under a cap of 9 GiB of the whole GPU: kept (8.8 GiB)."
        in text
    )
    assert "| padded |" not in text


def test_the_table_says_where_losses_differ_and_a_cap_is_passed() -> None:
    found = entries()
    found[1].runs = [run(1.0, first_loss=6.6)]
    found[0].runs = [run(1.0, nvml_gib=9.1)]
    text = markdown(OPTIONS, found)
    assert "6.6000, differs by 10.0%" in text
    assert "NOT KEPT (9.1 GiB)" in text


def test_a_record_is_json_from_which_variants_and_a_chart_are_read(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    found = entries()
    found[1].variant["attention"] = "varlen"
    path.write_text(json.dumps(record(OPTIONS, found)))
    assert variants_in(path)["trl"]["attention"] == "varlen"
    group = read_group(path)
    assert [(bar.label, bar.tokens_per_second) for bar in group.bars] == [
        ("sft-pipeline", 200.0),
        ("TRL", 75.0),
    ]
    write_chart([path, path], tmp_path / "bench.svg")
    drawn = ElementTree.parse(tmp_path / "bench.svg").getroot()
    widths = [float(bar.attrib["width"]) for bar in drawn if bar.tag.endswith("rect")]
    assert len(widths) == 4
    assert widths[1] / widths[0] == pytest.approx(75 / 200, abs=0.001)
    (tmp_path / "other.json").write_text("{}")
    for read in (variants_in, read_group):
        with pytest.raises(InputError, match="is no result of `bench train --json`"):
            read(tmp_path / "other.json")


def test_a_chart_escapes_what_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(record(OPTIONS, entries())).replace("a card", "a <b>card</b> & more"))
    ElementTree.fromstring(svg([read_group(path)]))


def test_a_search_changes_one_thing_after_the_other_and_measures_nothing_twice() -> None:
    speeds = {"safe": 1.0, "fast": 3.0, "broken": None}
    asked: list[tuple[str, bool]] = []

    def measure(variant: dict[str, Any]) -> Tried:
        asked.append((variant["attention"], variant["compile"]))
        speed = speeds[variant["attention"]]
        if speed is None:
            return Tried(variant, None, "not installed")
        return Tried(variant, speed * (2 if variant["compile"] else 1))

    dimensions = {"attention": ("safe", "broken", "fast"), "compile": (False, True), "only": (1,)}
    assert search(dimensions, measure) == {"attention": "fast", "compile": True, "only": 1}
    assert asked == [("safe", False), ("broken", False), ("fast", False), ("fast", True)]


def test_summaries_leave_out_what_is_not_known() -> None:
    found = Summary("ours", (run(1.0, nvml_gib=None, reserved_gib=None),))
    assert found.most("nvml_gib") is None
    assert found.seconds_to_first_step(cold=False) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_step": 1000, "capacity": 512}, "multiple of --capacity 512"),
        ({"num_warm_up": 0}, "--warm-up is 0"),
        ({"num_rounds": 0}, "--rounds 0"),
        ({"num_steps": 0}, "--chats"),
    ],
)
def test_numbers_that_can_not_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(dataclasses.replace(OPTIONS, **changes))


def test_a_peer_is_asked_for_its_modules_in_its_own_interpreter() -> None:
    bare = str(Path(sys.base_prefix) / "bin" / "python3")
    options = dataclasses.replace(OPTIONS, peer_pythons={"trl": bare})
    _, trl, padded = contestants_of(options)
    assert trl.command == (bare, str(PEERS_FOLDER / "run_trl.py"))
    assert entry_of(trl).problem == "trl, peft is not installed"
    assert trl.not_tried == ("flash_attn", "liger_kernel")
    assert trl.dimensions["attention"] == ("sdpa", "varlen")
    assert trl.dimensions["liger"] == (False,)
    assert (padded.command[0], entry_of(padded).problem) == (sys.executable, "")


@pytest.mark.parametrize(
    ("ours", "trl", "unsloth"),
    [
        ("none", ("full", "none"), ("unsloth", "none")),
        ("auto", ("full", "none"), ("unsloth", "none")),
        ("selective", ("full", "selective"), ("unsloth",)),
        ("full", ("full",), ("unsloth",)),
    ],
)
def test_a_peer_may_use_as_much_memory_as_ours(
    ours: Any, trl: tuple[str, ...], unsloth: tuple[str, ...]
) -> None:
    options = dataclasses.replace(OPTIONS, checkpointing=ours)
    assert PEERS["trl"](options)["checkpointing"] == trl
    assert PEERS["unsloth"](options)["checkpointing"] == unsloth


def test_unknown_peers_and_interpreters_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="peer 'axolotl' is not known, expected one of padded, trl, unsloth"
    ):
        contestants_of(dataclasses.replace(OPTIONS, peers=("axolotl",)))
    with pytest.raises(ConfigError, match="there is no such interpreter"):
        contestants_of(dataclasses.replace(OPTIONS, peer_pythons=pythons_of(["trl=/no/python"])))
    with pytest.raises(ConfigError, match="expected NAME=PATH"):
        pythons_of(["trl"])


@pytest.mark.parametrize(("kind", "setting"), [("none", False), ("full", True)])
def test_checkpointing_is_written_as_this_version_writes_it(kind: str, setting: bool, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, folder=tmp_path, overrides=("train.seed=3",))
    config = config_of(options, max_steps=7, checkpointing=kind)
    assert config.train.gradient_checkpointing in (setting, kind)
    assert (config.train.seed, config.train.max_steps) == (3, 7)
    assert config.run_root == options.data_folder / "run"
    with pytest.raises(ConfigError, match="--checkpointing half"):
        checkpointing_setting("half")
