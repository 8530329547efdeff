"""Validation of each source and language: the same numbers as for that group's documents alone."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from schemas.run import STAGE_FOLDERS
from tests.trainer.tiny_models import Document, random_documents, tiny_model, write_plans, write_shards
from trainer.attention import use_packed_attention
from trainer.data import read_plan
from trainer.loss import split_loss
from trainer.loss_by_group import SplitLoss
from trainer.ranks import CPU
from trainer.shard_reader import ShardReader

PLACES = [("chats/a.json", "en"), ("chats/b.json", "de"), ("essays/a.json", "en"), ("essays/a.json", "fr")]


def documents() -> list[Document]:
    found = random_documents([30, 9, 41, 17, 22, 12, 35, 8, 27])
    return [
        dataclasses.replace(document, source=source, language=language)
        for document, (source, language) in zip(found, PLACES * 3, strict=False)
    ]


def validate(folder: Path, chosen: Sequence[Document], model: torch.nn.Module) -> SplitLoss:
    write_shards(folder, {"validation": chosen})
    write_plans(folder, {"validation": chosen})
    reader = ShardReader(folder / STAGE_FOLDERS["split"], "validation")
    return split_loss(model, reader, read_plan(folder, "validation", 0), device=CPU)


@torch.no_grad()
def alone(model: torch.nn.Module, chosen: Sequence[Document]) -> tuple[float, float, int]:
    """transformers' own forward pass, a document at a time, and sums in plain Python."""
    nats, weighted, weights, num_tokens = 0.0, 0.0, 0.0, 0
    for document in chosen:
        ids = torch.tensor([document.ids])
        losses = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none").tolist()
        for start, end, weight in document.spans:
            for place in range(max(start, 1), end):
                nats += losses[place - 1]
                weighted += weight * losses[place - 1]
                weights += weight
                num_tokens += 1
    num_bytes = 3 * sum(end - start for d in chosen for start, end, _ in d.spans)  # as the toy shards say
    return weighted / weights, nats / math.log(2) / num_bytes, num_tokens


def test_each_source_and_language_has_the_loss_of_its_documents_alone(tmp_path: Path) -> None:
    model = tiny_model()
    all_documents = documents()
    groups = {
        "chats": [d for d in all_documents if d.source.startswith("chats/")],
        "essays": [d for d in all_documents if d.source.startswith("essays/")],
        **{name: [d for d in all_documents if d.language == name] for name in ("de", "en", "fr")},
        "all": all_documents,
    }
    expected = {name: alone(model, chosen) for name, chosen in groups.items()}
    use_packed_attention(model)
    found = validate(tmp_path, all_documents, model)
    assert list(found.by_source) == ["chats", "essays"]
    assert list(found.by_language) == ["de", "en", "fr"]
    for name, loss in [*found.by_source.items(), *found.by_language.items(), ("all", found)]:
        numbers = (loss.loss, loss.bits_per_byte, loss.num_trained_tokens)
        assert numbers == pytest.approx(expected[name], rel=1e-5), name
    assert len({round(loss, 3) for loss, _, _ in expected.values()}) == len(expected)  # told apart


def test_a_group_without_trained_text_has_no_loss_and_the_others_theirs(tmp_path: Path) -> None:
    model = tiny_model()
    use_packed_attention(model)
    first, second, *_ = documents()
    found = validate(tmp_path, [first, dataclasses.replace(second, spans=[], source="empty/x")], model)
    assert math.isnan(found.by_source["empty"].loss)
    assert math.isnan(found.by_source["empty"].bits_per_byte)
    assert found.by_source["chats"].loss == found.loss
    assert found.by_source["chats"].bits_per_byte == found.bits_per_byte
