"""The coloured text of an example is the text that its tokenizer decodes, and its colours are the spans."""

import pytest

from pipelines.colours import ColouredPiece, coloured_pieces
from pipelines.encode import build_encoder
from pipelines.split import SplitResult, split_chat
from schemas.conversation import Conversation, Message
from schemas.pipeline_config import SplitConfig
from tests.pipelines.tiny_tokenizers import FAMILIES, TEMPLATES, tiny_tokenizer

CHAT = (
    Message("system", "Be brief."),
    Message("user", "你好 Hello world"),
    Message("assistant", "Hello élève, 世界"),
    Message("user", "x  y"),
    Message("assistant", "def add(a, b):\n    return a + b"),
)


@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", ["chatml", "llama_3"])
def test_colours_show_the_whole_text_and_what_is_trained(family: str, template: str, weight: float) -> None:
    tokenizer = tiny_tokenizer(family)
    tokenizer.chat_template = TEMPLATES[template]
    encoder = build_encoder(tokenizer)
    row = Conversation(row_id="0" * 32, source="s/f", record=0, messages=list(CHAT), meta={})
    result = split_chat(encoder, SplitConfig(), row)
    assert isinstance(result, SplitResult)
    (example,) = result.examples
    columns = {name: getattr(example, name) for name in ("input_ids", "span_starts", "span_ends")}
    weights = [weight] * len(example.span_starts)
    pieces = coloured_pieces(tokenizer, encoder.is_control, columns | {"span_weights": weights})
    whole = tokenizer.decode(example.input_ids, clean_up_tokenization_spaces=False)
    assert "".join(piece.text for piece in pieces) == whole
    assert {piece.weight for piece in pieces} == {0.0, weight}
    spans = zip(example.span_starts, example.span_ends, strict=True)
    decoded = [tokenizer.decode(example.input_ids[start:end]).strip() for start, end in spans]
    assert _trained(pieces) == decoded
    controls = [piece.text for piece in pieces if piece.is_control]
    assert all(any(token in text for token in encoder.control_ids) for text in controls)
    assert any(piece.is_control and piece.weight for piece in pieces), "an end token is trained"


def _trained(pieces: list[ColouredPiece]) -> list[str]:
    """The texts of neighbouring trained pieces together."""
    marked = "".join(f"{piece.text}" if piece.weight else "\0" for piece in pieces)
    return [run.strip() for run in marked.split("\0") if run]
