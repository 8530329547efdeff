"""What all contestants share: documents as rows and bins, losses over targets alone, steps' times, the memory cap."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.trainer.tiny_models import tiny_model
from trainer.bench.peers import measuring
from trainer.bench.peers.measuring import (
    CAP_MARGIN_BYTES,
    GIB,
    IGNORED,
    Documents,
    Steps,
    cap_memory,
    forward_loss,
    padded_batch,
)

LENGTHS, BINS = [3, 5, 2, 6], [2, 2]
CPU = torch.device("cpu")


@pytest.fixture
def documents(tmp_path: Path) -> Documents:
    """Four documents in two bins; the second half of each is trained."""
    draws = np.random.default_rng(0)
    ids = [draws.integers(3, 50, length).astype(np.int32) for length in LENGTHS]
    labels = [np.where(np.arange(len(row)) >= len(row) // 2, row, IGNORED).astype(np.int32) for row in ids]
    for row in labels:
        row[0] = IGNORED
    columns = {
        "input_ids": np.concatenate(ids),
        "labels": np.concatenate(labels),
        "document_starts": np.concatenate([[0], np.cumsum(LENGTHS)]),
        "bin_starts": np.concatenate([[0], np.cumsum(BINS)]),
    }
    save_file(columns, tmp_path / "documents.safetensors")
    return Documents(str(tmp_path / "documents.safetensors"))


def test_a_bin_is_its_documents_one_after_the_other(documents: Documents) -> None:
    assert (len(documents), documents.num_bins) == (4, 2)
    ids, labels, lengths = documents.packed(1)
    assert lengths == LENGTHS[2:]
    assert ids.tolist() == [*documents.document(2)[0], *documents.document(3)[0]]
    assert labels.tolist() == [*documents.document(2)[1], *documents.document(3)[1]]
    assert list(documents.in_bins(0, 2)) == [0, 1, 2, 3]
    assert list(documents.in_bins(1, 2)) == [2, 3]


def test_padding_is_masked_and_no_target(documents: Documents) -> None:
    batch = padded_batch(documents, range(4))
    assert batch["input_ids"].shape == (4, max(LENGTHS))
    assert batch["attention_mask"].sum(1).tolist() == LENGTHS
    assert bool((batch["labels"][batch["attention_mask"] == 0] == IGNORED).all())


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_the_loss_of_a_forward_pass_is_the_mean_over_targets_however_rows_are_cut(
    rows: int, documents: Documents
) -> None:
    model = tiny_model().eval()
    losses: list[float] = []
    for number in range(4):
        ids, labels = (torch.from_numpy(row).long() for row in documents.document(number))
        log_probabilities = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        losses += [
            -log_probabilities[t - 1, labels[t]].item() for t in range(1, len(ids)) if labels[t] != IGNORED
        ]
    assert forward_loss(model, documents, range(4), CPU, rows=rows) == pytest.approx(
        np.mean(losses), rel=1e-5
    )


def test_a_step_of_several_batches_counts_all_of_them_and_batches_made_ahead_do_not_count() -> None:
    steps = Steps(num_warm_up=1, num_steps=2, device=CPU)
    for batch in range(5):  # the fifth was made ahead
        steps.count(torch.tensor([[IGNORED, 7, 8]]), num_tokens=3 + batch)
    steps.losses = {2: 1.5}
    steps.end()
    steps.end()
    first, second = steps.records(batches_per_step=2)
    assert [(s["num_tokens"], s["num_trained_tokens"]) for s in (first, second)] == [(7, 4), (11, 4)]
    assert (first["loss"], second["loss"]) == (None, 1.5)
    assert first["unix_time"] <= second["unix_time"]


def test_seconds_of_the_benchmarks_own_checks_are_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(measuring.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(measuring.time, "time", lambda: 5000.0)
    steps = Steps(num_warm_up=1, num_steps=1, device=CPU)

    def check() -> float:
        clock.now += 40
        return 6.25

    assert steps.checked(check) == 6.25
    clock.now += 3
    steps.end()
    assert steps.records()[0]["unix_time"] == pytest.approx(5003.0)


def test_the_allocator_gets_what_the_cap_leaves_beside_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of a card that this machine lacks: 80 GiB, 3 in use, of which 1 is the allocator's."""
    asked: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (77 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: GIB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    cap_memory(9.0)
    cap_memory(None)
    assert asked == [pytest.approx((7 * GIB - CAP_MARGIN_BYTES) / (80 * GIB))]


def test_a_result_says_what_is_known_of_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = tmp_path / "request.json"
    request.write_text(
        json.dumps({"result": str(tmp_path / "result.json"), "memory_cap_gib": None, "parent": os.getpid()})
    )
    monkeypatch.setattr(sys, "argv", ["program", str(request)])
    monkeypatch.setattr(measuring, "end_with_parent", lambda parent: None)

    def train(found: Any) -> dict[str, Any]:
        return {"left_out": "is a test", "asked": found["memory_cap_gib"]}

    measuring.run(train)
    result = json.loads((tmp_path / "result.json").read_bytes())
    assert (result["left_out"], result["asked"], result["reserved_gib"], result["device"]) == (
        "is a test",
        None,
        None,
        "CPU",
    )
    assert result["resident_gib"] > 0.1
    assert result["versions"]["torch"] == torch.__version__


def test_a_process_whose_parent_has_ended_before_it_could_ask_for_a_signal_ends_itself(
    tmp_path: Path,
) -> None:
    code = "from measuring import end_with_parent; end_with_parent({}); print('goes on')"
    for parent, said in ((os.getpid(), "goes on"), (os.getppid(), f"process {os.getppid()}, which asked")):
        result = subprocess.run(
            [sys.executable, "-c", code.format(parent)],
            cwd=Path(measuring.__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert said in result.stdout + result.stderr
        assert (result.returncode == 0) == (said == "goes on")
