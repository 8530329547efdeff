"""Shards for other trainers: labels equal those of our own batches, token by token; TRL trains on them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.labels import IGNORED, add_labels, trained_mask
from pipelines.stage import run_stage
from schemas.config_file import load_config
from schemas.pipeline_config import PipelineConfig
from tests.integration import toy
from trainer.data import collate
from trainer.shard_reader import ShardReader


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.0])), max_size=5),
    st.integers(0, 3),
)
def test_a_token_is_a_target_in_spans_of_some_weight_and_never_at_the_beginning(
    gaps: list[tuple[int, int, float]], rest: int
) -> None:
    expected: list[bool] = []
    spans: list[tuple[int, int, float]] = []
    for gap, size, weight in gaps:
        expected += [False] * gap
        spans.append((len(expected), len(expected) + size, weight))
        expected += [weight > 0] * size
    expected += [False] * rest
    starts, ends, weights = zip(*spans, strict=True) if spans else ((), (), ())
    expected[:1] = [False] * len(expected[:1])
    assert trained_mask(len(expected), starts, ends, weights).tolist() == expected


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """Stages 1 to 6 over more than a thousand examples, chats of up to four rounds among them, and a tiny model."""
    folder = tmp_path_factory.mktemp("others")
    toy.write_dumps(folder / "dumps", num_chats=700, num_records=600)
    toy.write_model(folder / "model")
    text = (
        toy.CONFIG.format(run_root="run").replace("max_tokens: 256", "max_tokens: 1024")
        + "dedup: {near: false}\n"
    )
    (folder / "run.yaml").write_text(text)
    config = load_config(folder / "run.yaml")
    for stage in ("merge", "clean", "filter", "dedup", "holdout", "split"):
        run_stage(stage, config)
    return config


def our_labels(config: PipelineConfig) -> list[list[int]]:
    """From the trainer's batches: each target put back to its own place."""
    reader = ShardReader(config.run_root / "06_shards", "train")
    found = []
    for row in range(reader.num_rows):
        batch = collate([reader.example(row)])
        labels = np.full(batch.num_tokens, IGNORED)
        labels[batch.target_positions.numpy() + 1] = batch.targets.numpy()
        found.append(labels.tolist())
    return found


@pytest.mark.slow
def test_labels_equal_those_of_our_batches(run: PipelineConfig) -> None:
    import datasets

    data = datasets.load_from_disk(run.run_root / "06_shards")["train"]
    expected = our_labels(run)
    assert len(expected) >= 1000
    num_spans = [len(starts) for starts in data["span_starts"]]
    assert num_spans.count(3) > 50, "chats of three rounds are among them"
    mapped = data.map(add_labels, batched=True, load_from_cache_file=False)
    seen = data.with_transform(add_labels)
    for row, labels in enumerate(expected):
        assert mapped[row]["labels"] == labels
        assert mapped[row]["assistant_masks"] == [int(label != IGNORED) for label in labels]
        assert mapped[row]["input_ids"] == data[row]["input_ids"]
        assert seen[row]["labels"].tolist() == labels


TRL_PROGRAM = """
import json, sys
from pathlib import Path
from datasets import load_from_disk
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from pipelines.labels import add_labels

run_root, model, output = sys.argv[1:]
data = load_from_disk(run_root + "/06_shards")["train"].map(add_labels, batched=True, load_from_cache_file=False)
settings = SFTConfig(
    output_dir=output, max_length=None, max_steps=2, per_device_train_batch_size=4, use_cpu=True, bf16=False,
    report_to="none", save_strategy="no", logging_steps=1,
)
said = {}
for other in ("assistant_masks", "labels"):
    tokenizer = AutoTokenizer.from_pretrained(model)
    own = data.remove_columns(other)
    trainer = SFTTrainer(model=model, args=settings, train_dataset=own, processing_class=tokenizer)
    prepared = trainer.train_dataset
    batch = trainer.data_collator([prepared[0], prepared[1]])
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    labels = [row["labels"] for row in prepared]
    said[other] = {"labels": labels, "batch": batch["labels"].tolist(), "losses": losses}
Path(output, "said.json").write_text(json.dumps(said))
"""


@pytest.mark.slow
def test_trl_trains_on_the_shards_with_our_labels(run: PipelineConfig, tmp_path: Path) -> None:
    pytest.importorskip("trl", exc_type=ImportError)
    assert run.model is not None
    command = [sys.executable, "-c", TRL_PROGRAM, str(run.run_root), run.model.path, str(tmp_path)]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = our_labels(run)
    longest = max(len(expected[0]), len(expected[1]))
    for said in json.loads((tmp_path / "said.json").read_text()).values():
        assert said["labels"] == expected
        assert said["batch"] == [row + [IGNORED] * (longest - len(row)) for row in expected[:2]]
        assert len(said["losses"]) == 2
        assert all(0 < loss < 20 for loss in said["losses"])
