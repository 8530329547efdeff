"""Features on the disk read as they do in memory, and decide the same, whatever the blocks, passes and threads."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import dedup, feature_files, near_duplicates, overlap, prefix_index, prefixes
from pipelines.feature_files import FeatureFiles
from pipelines.grams import GRAMS_TYPE, GramSets
from schemas.conversation import Conversation, Message
from schemas.errors import IntegrityError
from schemas.pipeline_config import DedupConfig, EngineConfig, PipelineConfig
from schemas.source_config import SourceConfig

CODE = "```python\n{}\n```"
words = st.lists(st.sampled_from("abcdefg"), max_size=12).map(" ".join)
texts = st.one_of(words, st.tuples(words, words).map(lambda pair: f"{pair[0]}\n{CODE.format(pair[1])}"))
chats = st.lists(st.tuples(texts, texts, st.sampled_from(["", "", "tree"])), max_size=16)
in_any_folder = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(said: list[tuple[str, str, str]], name: str) -> list[Conversation]:
    return [
        Conversation(
            f"{name}{number:02}",
            "s/file.json",
            number,
            [Message("user", asked), Message("assistant", answer)],
            {"group": group} if group else {},
        )
        for number, (asked, answer, group) in enumerate(said)
    ]


def config_with(threshold: float, workers: int) -> PipelineConfig:
    return PipelineConfig(
        run_root=Path("/nowhere"),
        sources=[SourceConfig(name="s", path="s.json")],
        dedup=DedupConfig(near_threshold=threshold),
        engine=EngineConfig(workers=workers),
    )


def write_arrow(path: Path, table: pa.Table) -> None:
    """Without the fsyncs of storage.write_arrow: hundreds of them take a minute."""
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def written(folder: Path, tables: list[pa.Table]) -> FeatureFiles:
    paths = [folder / f"{number}.arrow" for number in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        write_arrow(path, table)
    return FeatureFiles(dedup.FEATURES, paths, [table.num_rows for table in tables])


def lists_of(sets: GramSets) -> list[list[int]]:
    borders = zip(sets.starts.tolist(), sets.starts[1:].tolist(), strict=False)
    return [sets.hashes[start:end].tolist() for start, end in borders]


def cut(table: pa.Table, places: list[int]) -> list[pa.Table]:
    borders = [0, *sorted(min(place, table.num_rows) for place in places), table.num_rows]
    return [table.slice(start, end - start) for start, end in itertools.pairwise(borders)]


@contextmanager
def little_memory() -> Iterator[None]:
    """Many blocks and passes, and no file may stay open."""
    with (
        mock.patch.multiple(feature_files, _MAX_OPEN_FILES=0),
        mock.patch.multiple(prefixes, _MAX_READ_GRAMS=30, _MAX_PASS_ENTRIES=16),
        mock.patch.multiple(prefix_index, _MAX_EXPANDED=5),
        mock.patch.multiple(overlap, _MAX_COUNTED=20),
        mock.patch.multiple(near_duplicates, _MAX_BLOCK_ROWS=2, _MAX_GROWN_ROWS=4, _MAX_INSIDE_MEETINGS=2),
        mock.patch.multiple(dedup, _MAX_TOLD_ROWS=3),
    ):
        yield


@in_any_folder
@given(chats, chats, st.lists(st.integers(0, 16), max_size=3), st.sampled_from([0.3, 0.8]), st.integers(1, 3))
def test_parts_passes_and_threads_decide_as_one_table_in_memory(
    tmp_path: Path,
    ours: list[tuple[str, str, str]],
    theirs: list[tuple[str, str, str]],
    places: list[int],
    threshold: float,
    workers: int,
) -> None:
    config = config_with(threshold, workers)
    table = dedup.features(rows_of(ours, "r"), config)
    earlier = dedup.features(rows_of(theirs, "e"), config)
    expected = dedup.decide(table, config_with(threshold, 1), earlier)
    features = written(tmp_path, [*cut(table, places), *cut(earlier, places)])
    with little_memory():
        found = dedup.decide_rows(
            features, config, present=np.ones(len(features), bool), num_ours=table.num_rows
        )
    assert found.verdicts.equals(expected.verdicts)
    assert found.counts == expected.counts
    ids = features.column("row_id").to_pylist()
    assert [ids[row] for row in found.rows.tolist()] == found.verdicts["row_id"].to_pylist()


@in_any_folder
@given(chats, st.sets(st.integers(0, 15)))
def test_rows_that_are_not_present_count_as_if_they_were_not_there(
    tmp_path: Path, said: list[tuple[str, str, str]], gone: set[int]
) -> None:
    config = config_with(0.5, 1)
    table = dedup.features(rows_of(said, "r"), config)
    present = np.array([row not in gone for row in range(table.num_rows)], bool)
    expected = dedup.decide(table.filter(pa.array(present)), config)
    features = written(tmp_path, [table])
    found = dedup.decide_rows(features, config, present=present, num_ours=table.num_rows)
    assert found.verdicts.equals(expected.verdicts)
    counted = {name: number for name, number in found.counts.items() if name != "near_largest_bucket_rows"}
    assert counted.items() <= expected.counts.items()


@in_any_folder
@given(
    st.lists(st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=6), max_size=5), max_size=4),
    st.data(),
)
def test_sets_on_the_disk_are_those_in_memory(
    tmp_path: Path, parts: list[list[list[int]]], data: st.DataObject
) -> None:
    schema = pa.schema([pa.field("before", pa.int64()), pa.field("grams", GRAMS_TYPE)])
    tables = [pa.table({"before": range(len(sets)), "grams": sets}, schema=schema) for sets in parts]
    paths = [tmp_path / f"{number}.arrow" for number in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        write_arrow(path, table)
    features = FeatureFiles(schema, paths, [table.num_rows for table in tables])
    everything = [members for sets in parts for members in sets]
    drawn = data.draw(st.lists(st.sampled_from(range(len(everything))))) if everything else []
    rows = np.array(drawn, np.int64)
    with features.sets("grams") as sets:
        assert sets.sizes.tolist() == [len(members) for members in everything]
        assert lists_of(sets.of_rows(rows)) == [everything[row] for row in rows.tolist()]
        read = []
        for first, block in sets.blocks(data.draw(st.integers(1, 20))):
            assert first == len(read)
            read += lists_of(block)
        assert read == everything
    assert features.column("before").to_pylist() == [row for sets in parts for row in range(len(sets))]


def test_a_file_that_is_cut_while_it_is_read_is_told(tmp_path: Path) -> None:
    features = written(
        tmp_path, [dedup.features(rows_of([("a b c d", "e f", "")], "r"), config_with(0.8, 1))]
    )
    with features.sets("grams") as sets:
        os.truncate(features.paths[0], 64)
        with pytest.raises(IntegrityError, match=r"ends at byte .* run again"):
            sets.of_rows(np.array([0]))


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    features = written(
        tmp_path, [dedup.features(rows_of([("a b c d", "e f", "")], "r"), config_with(0.8, 1))]
    )
    with features.sets("grams") as sets:
        sets.of_rows(np.array([0]))
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
