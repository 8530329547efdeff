"""The judge of templates: nothing to find in what we make, and it finds what is planted."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import templates_judge
from benchmarks.templates import FAMILIES, generated_chats, small_tokenizer
from pipelines.encode import Encoded, build_encoder, encode
from pipelines.render import Rendered, render
from schemas.conversation import Drop
from schemas.pipeline_config import SplitConfig
from tests.pipelines.model_templates import MARKED


def judged(source: str, family: str, num_chats: int = 12) -> Counter[str]:
    tokenizer = small_tokenizer(family, source)
    encoder = build_encoder(tokenizer)
    counts: Counter[str] = Counter()
    for row in generated_chats("test", num_chats, tokenizer):
        templates_judge.judge(encoder, SplitConfig(), row, counts)
    return counts


def wrong(counts: Counter[str]) -> set[str]:
    return {name for name, number in counts.items() if name.startswith("wrong") and number}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_with_a_generation_block_is_right_with_each_family(family: str) -> None:
    counts = judged(MARKED, family)
    assert wrong(counts) == set()
    assert min(counts["plain"], counts["control"], counts["masks"]) > 0


@pytest.mark.real_data
def test_the_published_templates_are_right(real_data: Path) -> None:
    for path in sorted((real_data / "chat_templates").glob("*.jinja")):
        counts = judged(path.read_text(), "byte_level_bpe", 6)
        assert wrong(counts) == set(), path.name
        assert counts["decoded"] == counts["chats"] - counts["dropped"]


def other_ids(encoder: Any, rendered: Rendered) -> Encoded | Drop:
    encoded = encode(encoder, rendered)
    return encoded if isinstance(encoded, Drop) else replace(encoded, ids=np.roll(encoded.ids, 1))


def fooled(encoder: Any, rendered: Rendered) -> Encoded | Drop:
    """As if control strings in messages were not looked for."""
    ids = encoder.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    starts, ends = np.array(ids["offset_mapping"], np.int32).T
    return Encoded(np.array(ids["input_ids"], np.int32), starts, ends)


def longer_spans(*arguments: Any) -> Rendered | Drop:
    rendered = render(*arguments)
    if isinstance(rendered, Drop):
        return rendered
    return replace(rendered, spans=tuple(replace(span, end=span.end + 1) for span in rendered.spans))


PLANTED: dict[str, tuple[str, Any, str]] = {
    "ids": ("encode", other_ids, "wrong_ids"),
    "control ids": ("encode", fooled, "wrong_control"),
    "spans": ("render", longer_spans, "wrong_spans"),
    "masks": ("render", longer_spans, "wrong_masks"),
    "text": ("encode", other_ids, "wrong_decoded"),
}


@pytest.mark.parametrize(("name", "planted", "found"), PLANTED.values(), ids=PLANTED)
def test_what_is_planted_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, planted: Any, found: str
) -> None:
    monkeypatch.setattr(templates_judge, name, planted)
    assert found in wrong(judged(MARKED, "byte_level_bpe"))
