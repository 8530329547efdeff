"""The estimate of a run's disk against what runs really write."""

import gzip
from pathlib import Path

import polars as pl
import pytest
import zstandard

from flows.disk_need import STAGE_FACTORS, disk_need, folder_bytes, raw_bytes, total
from pipelines.stage import run_stage
from schemas.config_file import load_config
from schemas.run import STAGE_FOLDERS, STAGES
from tests.integration import toy


@pytest.mark.slow
def test_what_the_stages_write_lies_between_the_two_figures(tmp_path: Path) -> None:
    toy.write_dumps(tmp_path / "dumps", num_chats=250, num_records=120)
    toy.write_tokenizer(tmp_path / "model")
    config = load_config(toy.write_config(tmp_path))
    needs = {need.name: need for need in disk_need(config, STAGES, model=None)}
    for stage in STAGES:
        run_stage(stage, config)
        written = folder_bytes(config.run_root / STAGE_FOLDERS[stage])
        need = needs[STAGE_FOLDERS[stage]]
        assert need.smallest <= written <= need.largest, stage
    again = {need.name: need for need in disk_need(config, STAGES, model=None)}
    assert sum(need.smallest for need in again.values()) == 0, "what is there needs no new room"


def test_every_stage_has_its_factors() -> None:
    assert tuple(STAGE_FACTORS) == STAGES
    assert all(0 <= smallest <= largest for smallest, largest in STAGE_FACTORS.values())


def test_a_training_is_reckoned_from_the_models_files(tmp_path: Path) -> None:
    toy.write_dumps(tmp_path / "dumps", num_chats=4, num_records=4)
    toy.write_model(tmp_path / "model")
    config = load_config(toy.write_config(tmp_path), ["train.method=full", "train.keep_checkpoints=3"])
    needs = {need.name: need for need in disk_need(config, ["train"], model=tmp_path / "model")}
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    assert set(needs) == {"checkpoints", "model"}
    # Weights in float32, and three times that in a checkpoint: masters and two moments.
    assert needs["checkpoints"].smallest == pytest.approx(3 * weights.stat().st_size, rel=0.02)
    assert needs["checkpoints"].largest == 4 * needs["checkpoints"].smallest


TEXT = "".join(
    f'{{"instruction": "Repeat {n}", "output": "word {n * 7919}"}}\n' for n in range(40_000)
).encode()


@pytest.mark.parametrize(
    ("content", "packed"),
    [
        (TEXT, False),
        (gzip.compress(TEXT, mtime=0), True),
        (gzip.compress(TEXT[:100_000], mtime=0) + gzip.compress(TEXT[100_000:], mtime=0), True),
        (zstandard.compress(TEXT), True),
        (zstandard.ZstdCompressor(write_content_size=False).compress(TEXT), True),
    ],
    ids=["plain", "gzip", "gzip of two members", "zstd", "zstd without a size"],
)
def test_a_packed_file_counts_as_what_it_unpacks_to(tmp_path: Path, content: bytes, packed: bool) -> None:
    path = tmp_path / "dump"
    path.write_bytes(content)
    size, is_packed = raw_bytes(path)
    assert is_packed == packed
    assert size == pytest.approx(len(TEXT), rel=0.1)


@pytest.mark.parametrize(
    "content",
    [b"", gzip.compress(TEXT, mtime=0)[:50], b"\x1f\x8b" + b"x" * 99, b"\x28\xb5\x2f\xfd" + b"x" * 99],
)
def test_a_broken_file_breaks_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "dump"
    path.write_bytes(content)
    assert raw_bytes(path)[0] >= 0


def test_parquet_counts_uncompressed(tmp_path: Path) -> None:
    path = tmp_path / "dump.parquet"
    pl.DataFrame({"text": [f"the same words again and again {n} " * 50 for n in range(1000)]}).write_parquet(
        path
    )
    size, packed = raw_bytes(path)
    assert (size > 3 * path.stat().st_size, packed) == (True, False)


def test_compressed_sources_need_room_while_they_are_merged(tmp_path: Path) -> None:
    (tmp_path / "dumps").mkdir()
    (tmp_path / "dumps" / "a.jsonl.gz").write_bytes(gzip.compress(TEXT))
    config_path = tmp_path / "c.yaml"
    config_path.write_text("run_root: run\nsources: [{name: a, path: dumps/a.jsonl.gz}]\n")
    config = load_config(config_path)
    merged = total(disk_need(config, ["merge"], model=None))
    assert merged.smallest == pytest.approx(1.11 * len(TEXT), rel=0.1)
    everything = total(disk_need(config, STAGES, model=None))
    assert everything.largest == pytest.approx(12.25 * len(TEXT), rel=0.1), (
        "gone before the last stages write"
    )
