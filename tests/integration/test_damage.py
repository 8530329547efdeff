"""A file that was cut off, or in which one bit has flipped, is never taken for what was written.

Each kind of file is read as the product reads it first, after cuts (at all borders of messages and around them, and
at random), and after flips of one bit.
"""

import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.part_files import read_sidecar, write_sidecar
from pipelines.stage import run_stage
from schemas.config_file import load_config
from schemas.errors import InputError, IntegrityError
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGE_FOLDERS, STAGES, FileEntry, PartEntry
from tests.integration import toy
from tests.integration.faults.published import digests

NEAR_BYTES = 9


@pytest.fixture(
    params=[pytest.param(40, marks=pytest.mark.slow), pytest.param(400, marks=pytest.mark.stress)]
)
def number(request: pytest.FixtureRequest) -> int:
    """How many random cuts are tried, and how many flips."""
    return int(request.param)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """A finished run, trained and promoted; shards of several record batches."""
    from trainer.evaluation import evaluate
    from trainer.promotion import promote
    from trainer.train import train

    folder = tmp_path_factory.mktemp("damage")
    toy.write_dumps(folder / "dumps", num_chats=40, num_records=20)
    toy.write_model(folder / "model")
    settings = ["split.shard_rows=8", "train.max_steps=2", "train.checkpoint_every_steps=1"]
    sides = ["holdout.validation=0.2", "holdout.test=0.3", "engine.min_free_gib=0"]
    config = load_config(toy.write_config(folder), [*settings, *sides])
    for stage in STAGES:
        run_stage(stage, config)
    train(config)
    evaluate(config)
    assert promote(config).outcome == "promoted"
    return config


def damaged(data: bytes, number: int, borders: Sequence[int] = ()) -> Iterator[tuple[str, bytes]]:
    """What became of the file, and its bytes then."""
    draw = random.Random(len(data))
    near = {border + step for border in borders for step in range(-NEAR_BYTES, NEAR_BYTES + 1)}
    cuts = {cut for cut in near if 0 <= cut < len(data)} | set(range(min(NEAR_BYTES, len(data))))
    cuts |= {draw.randrange(len(data)) for _ in range(number)} | {len(data) - 1}
    yield from ((f"cut to {cut} of {len(data)} bytes", data[:cut]) for cut in sorted(cuts))
    for _ in range(number):
        bit = draw.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit % 8} of byte {bit // 8} flipped", bytes(flipped)


def check_refused(
    path: Path,
    read: Callable[[], object],
    number: int,
    *,
    harmless: object = None,
    borders: Sequence[int] = (),
) -> int:
    """`read` refuses every damage by the name of the file; where `harmless` is given it may read just that.

    Returns how many damages were tried.
    """
    data = path.read_bytes()
    read()
    tried = list(damaged(data, number, borders))
    try:
        for what, bytes_now in tried:
            replace(path, bytes_now)
            found, told = outcome(read)
            if told:
                assert path.name in told, f"{what}: {told}"
                assert "\n" not in told, f"{what}: {told}"
            else:
                assert harmless is not None, f"{path}, {what}: read without an error"
                assert found == harmless, f"{path}, {what}: read as other data"
    finally:
        replace(path, data)
    read()
    return len(tried)


def outcome(read: Callable[[], object]) -> tuple[object, str]:
    """What was read, or the message of a refusal."""
    try:
        return read(), ""
    except (IntegrityError, InputError) as error:
        return None, str(error)


def replace(path: Path, data: bytes) -> None:
    """By a new file: an inode rewritten within one tick of the clock looks unchanged."""
    path.with_name(f"{path.name}.new").write_bytes(data)
    path.with_name(f"{path.name}.new").replace(path)


def stream_borders(path: Path) -> list[int]:
    """Where messages of an Arrow stream begin."""
    borders = []
    with pa.OSFile(str(path)) as source:
        reader = pa.ipc.MessageReader.open_stream(source)
        while True:
            borders.append(source.tell())
            try:
                reader.read_next_message()
            except StopIteration:
                return borders


# Data of the stages -----------------------------------------------------------------------------------------


def first_part(config: PipelineConfig, stage: str) -> tuple[Path, FileEntry]:
    folder = config.run_root / STAGE_FOLDERS[stage]
    manifest = storage.read_manifest(folder)
    assert manifest is not None
    return folder, manifest.parts[0].kept[0]


@pytest.mark.parametrize(("written_by", "read_by"), [("merge", "clean"), ("dedup", "holdout")])
def test_a_damaged_part_is_refused_by_the_stage_that_reads_it(
    config: PipelineConfig, number: int, written_by: str, read_by: str
) -> None:
    folder, entry = first_part(config, written_by)
    away = config.run_root / STAGE_FOLDERS[read_by]
    away.rename(away.with_name("away"))

    def read() -> None:
        if (folder / entry.path).stat().st_size == entry.num_bytes and storage.file_sha256(
            folder / entry.path
        ) == entry.sha256:
            return  # the intact part: its rows are another test's subject
        shutil.rmtree(away, ignore_errors=True)
        run_stage(read_by, config)

    try:
        assert check_refused(folder / entry.path, read, number) >= 1.5 * number
    finally:
        shutil.rmtree(away, ignore_errors=True)
        away.with_name("away").rename(away)


def test_a_damaged_shard_is_refused_also_where_it_is_cut_at_a_border_and_reads_short(
    config: PipelineConfig,
    number: int,
) -> None:
    from trainer.shard_reader import ShardReader

    folder = config.run_root / STAGE_FOLDERS["split"]
    (path,) = (folder / "train").glob("data-*.arrow")
    borders = stream_borders(path)
    assert len(borders) > 4
    data, whole = path.read_bytes(), storage.read_arrow(path).num_rows
    short = folder.parent / "short.arrow"
    short.write_bytes(data[: borders[2]])
    assert 0 < storage.read_arrow(short).num_rows < whole, "the format itself no longer reads short: good"
    short.unlink()
    tried = check_refused(path, lambda: ShardReader(folder, "train").check_files(), number, borders=borders)
    assert tried > 2 * number


def test_a_damaged_list_of_shards_is_refused(config: PipelineConfig, number: int) -> None:
    from trainer.shard_reader import ShardReader

    folder = config.run_root / STAGE_FOLDERS["split"]
    check_refused(folder / "train" / "state.json", lambda: ShardReader(folder, "train"), number)


def test_a_damaged_plan_is_refused(config: PipelineConfig, number: int) -> None:
    from trainer.data import plan_name, read_plan

    path = config.run_root / STAGE_FOLDERS["pack"] / plan_name("train", 0)
    check_refused(path, lambda: read_plan(config.run_root, "train", 0), number, borders=stream_borders(path))


def test_a_damaged_ledger_is_refused_and_a_lost_one_is_brought_back(
    config: PipelineConfig, number: int
) -> None:
    path = config.run_root / "holdout.parquet"
    check_refused(path, lambda: run_stage("holdout", config).manifest.key, number)
    data = path.read_bytes()
    path.unlink()
    run_stage("holdout", config)
    assert path.read_bytes() == data


def test_a_ledger_from_elsewhere_is_refused_or_read_as_it_was_written(
    config: PipelineConfig, number: int
) -> None:
    """A new run root has no manifest that knows its digest: the checksums of its pages must do."""
    from pipelines.corpus_stages import _read_ledger
    from pipelines.holdout_ledger import LEDGER, checked

    path = config.run_root / "holdout.parquet"

    def read() -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = checked(_read_ledger(path)).select(LEDGER.names).to_pylist()
        return rows

    check_refused(path, read, number, harmless=read())


# Manifests and pointers, which no other file vouches for ----------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_manifest_is_refused(config: PipelineConfig, number: int, stage: str) -> None:
    folder = config.run_root / STAGE_FOLDERS[stage]
    check_refused(folder / "manifest.json", lambda: storage.read_manifest(folder), number)


def test_a_damaged_entry_of_a_finished_part_counts_as_none(tmp_path: Path, number: int) -> None:
    file = FileEntry(path="part.parquet", num_bytes=7, sha256="ab" * 32, num_rows=3)
    entry = PartEntry(
        key="k" * 32, label="a/b:0", kept=(file,), dropped=None, num_rows_in=3, num_rows_out=3, drops={}
    )
    write_sidecar(tmp_path, entry)
    assert read_sidecar(tmp_path, entry.key) == entry
    (path,) = tmp_path.iterdir()
    for what, data in damaged(path.read_bytes(), number):
        path.write_bytes(data)
        assert read_sidecar(tmp_path, entry.key) is None, what


def test_a_damaged_report_is_refused(config: PipelineConfig, number: int) -> None:
    from trainer.service import read_evaluation

    check_refused(config.run_root / "evaluation.json", lambda: read_evaluation(config.run_root), number)


def test_damaged_losses_of_a_report_decide_nothing(config: PipelineConfig, number: int) -> None:
    from trainer.promotion import chat_losses
    from trainer.service import read_evaluation

    path = config.run_root / "evaluation_examples.arrow"
    evaluation = read_evaluation(config.run_root)
    check_refused(
        path, lambda: chat_losses(config.run_root, evaluation), number, borders=stream_borders(path)
    )


def test_a_damaged_pointer_to_the_model_in_service_is_refused(config: PipelineConfig, number: int) -> None:
    from trainer.service import find_promoted

    check_refused(config.run_root / "promoted.json", lambda: find_promoted(config.run_root), number)


def test_a_damaged_pointer_to_the_newest_training_is_refused(config: PipelineConfig, number: int) -> None:
    from trainer.service import find_candidate

    check_refused(
        config.run_root / "checkpoints" / "current", lambda: find_candidate(config.run_root), number
    )


# Models -----------------------------------------------------------------------------------------------------


def adapter_files(config: PipelineConfig) -> list[Path]:
    from trainer.service import find_candidate

    trained = config.run_root / find_candidate(config.run_root).path
    return [trained.parent / "training.json", *sorted(path for path in trained.iterdir() if path.is_file())]


def test_a_model_with_any_damaged_file_is_refused(config: PipelineConfig, number: int) -> None:
    from trainer.service import check_trained_model, find_candidate

    trained = find_candidate(config.run_root)
    paths = adapter_files(config)
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {p.name for p in paths}
    for path in paths:
        check_refused(path, lambda: check_trained_model(config.run_root, trained), number)


@pytest.mark.parametrize(
    "name", ["pieces-00001-of-00001.safetensors", "index.json", "state.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(
    config: PipelineConfig, number: int, name: str
) -> None:
    from trainer.checkpoint import read_newest, step_folders
    from trainer.job import facts, plan_job

    job = plan_job(config)
    newest, before = step_folders(job.folder)[:2]
    assert int(newest.name[-8:]) == int(before.name[-8:]) + 1
    data = (newest / name).read_bytes()
    try:
        for what, bytes_now in damaged(data, number):
            replace(newest / name, bytes_now)
            said: list[str] = []
            found = read_newest(job.folder, facts=facts(job), report=said.append)
            assert found is not None
            assert found.progress.num_steps == int(before.name[-8:]), what
            assert len(said) == 1, what
            assert newest.name in said[0], what
    finally:
        replace(newest / name, data)


def test_damaged_lines_of_the_metrics_are_left_out_and_told(
    config: PipelineConfig, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.metrics import keep_steps

    (path,) = config.run_root.glob("checkpoints/*/metrics.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    copy = tmp_path / "metrics.jsonl"
    for what, data in damaged(path.read_bytes(), number):
        copy.write_bytes(data)
        keep_steps(copy, 10**9)
        left = copy.read_bytes().splitlines(keepends=True)
        assert len(left) >= data.count(b"\n") - 2, what
        assert sum(line not in lines for line in left) <= 1, what
    copy.write_bytes(b"".join([lines[0], b"\xff" + lines[1], *lines[2:]]))
    capsys.readouterr()
    keep_steps(copy, 10**9)
    assert "1 of" in capsys.readouterr().err
    assert copy.read_bytes() == b"".join([lines[0], *lines[2:]])


# Anywhere ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_flips",
    [
        pytest.param(15, marks=pytest.mark.slow),
        pytest.param(2000, marks=[pytest.mark.hard, pytest.mark.timeout(0)]),
    ],
)
def test_a_bit_flipped_anywhere_is_told_by_name_or_mended_by_the_next_run(
    config: PipelineConfig, num_flips: int
) -> None:
    """In any file of the stages: the run names it and stops, or ends with the bytes that were there before."""
    expected = digests(config.run_root)
    folders = tuple(STAGE_FOLDERS.values())
    names = [name for name in expected if name.startswith(folders) or name == "holdout.parquet"]
    draw = random.Random(num_flips)
    num_told = 0
    for _ in range(num_flips):
        path = config.run_root / draw.choice(names)
        data = path.read_bytes()
        flipped = bytearray(data)
        bit = draw.randrange(8 * len(data))
        flipped[bit // 8] ^= 1 << bit % 8
        replace(path, bytes(flipped))
        _, told = outcome(lambda: [run_stage(stage, config) for stage in STAGES])
        if told:
            num_told += 1
            assert path.name in told
            replace(path, data)
        found = digests(config.run_root)
        odd = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
        assert not odd, f"bit {bit} of {path}: {odd}"
    assert 0 < num_told < num_flips


@pytest.mark.slow
def test_every_line_of_a_manifest_but_its_digest_is_under_the_digest(config: PipelineConfig) -> None:
    """Anybody can check it: grep -v self_sha256 manifest.json | sha256sum."""
    import hashlib

    for stage in STAGES:
        text = (config.run_root / STAGE_FOLDERS[stage] / "manifest.json").read_text(encoding="utf-8")
        found = re.search(r'^  "self_sha256": "([0-9a-f]{64})",\n', text, re.MULTILINE)
        assert found is not None
        assert hashlib.sha256(text.replace(found[0], "").encode()).hexdigest() == found[1]
