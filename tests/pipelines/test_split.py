"""Chats to examples: nothing over the limit, no round lost, the pieces are the chat, everything counted."""

import json
from collections import Counter
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cut import chat_rounds
from pipelines.encode import ChatEncoder, build_encoder, encode
from pipelines.render import Rendered, render
from pipelines.split import (
    COUNTS,
    STAGE_VERSION,
    SplitResult,
    check_hand_over,
    preflight,
    prepare,
    split_chat,
    versions,
)
from pipelines.storage import write_manifest
from schemas.conversation import Conversation, Drop, Message
from schemas.errors import ConfigError, InputError, LimitError, RefusedError
from schemas.pipeline_config import PipelineConfig, SplitConfig
from schemas.run import Manifest
from tests.pipelines.tiny_tokenizers import EOS, TEMPLATES, tiny_tokenizer

# A template that, as Qwen's, writes a system message by itself where there is none.
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}" + TEMPLATES["chatml"]
)
KINDS = {
    "chatml": ("byte_level_bpe", TEMPLATES["chatml"]),
    "default system": ("byte_level_bpe", DEFAULT_SYSTEM),
    "vicuna": ("metaspace_bpe", TEMPLATES["vicuna"]),
    "mistral": ("legacy_metaspace_bpe", TEMPLATES["mistral"]),
    "llama_3": ("unigram", TEMPLATES["llama_3"]),
}


@cache
def encoder_of(kind: str) -> ChatEncoder:
    family, template = KINDS[kind]
    return build_encoder(tiny_tokenizer(family, template))


def row_of(messages: list[Message], **meta: Any) -> Conversation:
    return Conversation("row", "source/file.json", 3, messages, meta)


def asked(*contents: str, system: str | None = None) -> list[Message]:
    start = [Message("system", system)] if system is not None else []
    roles = ("user", "assistant")
    return start + [Message(roles[n % 2], content) for n, content in enumerate(contents)]  # type: ignore[arg-type]


def check_counted(result: SplitResult) -> None:
    assert result.examples
    counts = Counter(result.counts)
    assert set(counts) <= set(COUNTS)
    parts = ("rounds_kept", "rounds_overlong", "rounds_untrained", "rounds_before_context")
    assert counts["rounds"] == sum(counts[part] for part in parts)
    assert counts["tokens"] == sum(example.num_tokens for example in result.examples)
    assert counts["trained_tokens"] == sum(example.num_trained_tokens for example in result.examples)


# Cutting ----------------------------------------------------------------------------------------------------

words = st.text("abc ü你\n<", min_size=1, max_size=30).filter(lambda text: bool(text.strip()))


@st.composite
def long_chats(draw: st.DrawFn) -> list[Message]:
    messages = [Message("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 8))):
        answer = draw(words) * draw(st.sampled_from([1, 1, 1, 4]))
        messages += [Message("user", draw(words)), Message("assistant", answer)]
    return messages


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(messages=long_chats(), max_tokens=st.integers(9, 120), repeat_system=st.booleans())
def test_pieces_are_chats_of_their_own_within_the_limit_and_together_the_chat(
    kind: str, messages: list[Message], max_tokens: int, repeat_system: bool
) -> None:
    encoder = encoder_of(kind)
    result = split_chat(
        encoder, SplitConfig(max_tokens=max_tokens, repeat_system=repeat_system), row_of(messages)
    )
    rounds = chat_rounds(messages)
    if isinstance(result, Drop):
        assert result.reason == "overlong"
        assert all(len(ids_of(encoder, messages, *one, repeat_system)) > max_tokens for one in rounds)
        return
    check_counted(result)
    covered: list[int] = []
    for number, example in enumerate(result.examples):
        assert example.piece == number
        assert example.num_tokens <= max_tokens
        own_ids = ids_of(encoder, messages, example.first_message, example.end_message, repeat_system)
        assert example.input_ids.tolist() == own_ids, "a piece is what its messages are as a chat"
        covered += range(example.first_message, example.end_message)
    assert covered == sorted(set(covered)), "no message twice, in order"
    left_out = [one for one in rounds if one[0] not in covered]
    assert len(left_out) == result.counts.get("rounds_overlong", 0)
    for first, end in left_out:
        assert len(ids_of(encoder, messages, first, end, repeat_system)) > max_tokens
        assert not set(range(first, end)) & set(covered)
    assert len(covered) + sum(end - first for first, end in left_out) == len(messages)


def ids_of(
    encoder: ChatEncoder, messages: list[Message], first: int, end: int, repeat_system: bool
) -> list[int]:
    repeated = [m for m in messages[:1] if m.role == "system"] if first > 0 and repeat_system else []
    rendered = render(encoder.template, [*repeated, *messages[first:end]])
    assert isinstance(rendered, Rendered), rendered
    encoded = encode(encoder, rendered)
    assert not isinstance(encoded, Drop)
    return [int(token) for token in encoded.ids]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(messages=long_chats(), max_tokens=st.integers(9, 120))
def test_a_piece_could_not_have_taken_the_next_round(
    kind: str, messages: list[Message], max_tokens: int
) -> None:
    encoder = encoder_of(kind)
    result = split_chat(encoder, SplitConfig(max_tokens=max_tokens), row_of(messages))
    if isinstance(result, Drop):
        return
    for one, following in zip(result.examples, result.examples[1:], strict=False):
        if one.end_message == following.first_message:
            first_round = next(end for first, end in chat_rounds(messages) if first == one.end_message)
            assert len(ids_of(encoder, messages, one.first_message, first_round, True)) > max_tokens


@settings(max_examples=60)
@given(messages=long_chats(), max_tokens=st.integers(9, 120))
def test_train_on_last_keeps_the_last_answer_and_the_most_context(
    messages: list[Message], max_tokens: int
) -> None:
    encoder = encoder_of("chatml")
    result = split_chat(encoder, SplitConfig(max_tokens=max_tokens, train_on="last"), row_of(messages))
    rounds = chat_rounds(messages)
    if isinstance(result, Drop):
        assert result.reason == "overlong"
        assert len(ids_of(encoder, messages, *rounds[-1], True)) > max_tokens
        return
    check_counted(result)
    (example,) = result.examples
    assert example.end_message == len(messages)
    assert example.num_tokens <= max_tokens
    if not result.counts.get(
        "straddled_spans"
    ):  # blanks that one token joins with the line break before them
        assert trained_text(encoder, example) == [f"{messages[-1].content}<|im_end|>"]
    if example.first_message > 0:
        before = [first for first, _ in rounds if first < example.first_message]
        assert len(ids_of(encoder, messages, before[-1], len(messages), True)) > max_tokens


def trained_text(encoder: ChatEncoder, example: Any) -> list[str]:
    spans = zip(example.span_starts, example.span_ends, strict=True)
    return [
        encoder.tokenizer.decode(example.input_ids[a:b], clean_up_tokenization_spaces=False) for a, b in spans
    ]


def test_a_chat_that_fits_is_one_example_with_everything_known_of_it() -> None:
    encoder = encoder_of("chatml")
    row = row_of(asked("Hi", "Grüße", "Bye", "So long", system="S"), language=[["de", 0.8], ["en", 0.2]])
    result = split_chat(encoder, SplitConfig(), row)
    assert isinstance(result, SplitResult)
    (example,) = result.examples
    assert trained_text(encoder, example) == ["Grüße<|im_end|>", "So long<|im_end|>"]
    assert example.num_trained_bytes == len("GrüßeSo long".encode())
    assert example.num_tokens == len(example.input_ids)
    assert example.num_trained_tokens == sum(example.span_ends - example.span_starts)
    assert example.input_ids.dtype == example.span_starts.dtype == np.int32
    assert example.span_weights.tolist() == [1.0, 1.0]
    place = (example.row_id, example.piece, example.first_message, example.end_message)
    assert place == ("row", 0, 0, 5)
    assert (example.source, example.language) == ("source/file.json", "de")
    assert "rounds" not in result.counts


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss_weight": 0.0}, {"train": False}])
def test_an_answer_of_weight_0_is_context_only(mark: dict[str, Any]) -> None:
    encoder = encoder_of("chatml")
    messages = asked("q1", "a1", "q2", "a2")
    messages[1].extras.update(mark)
    messages[3].extras.update(weight=1)
    result = split_chat(encoder, SplitConfig(), row_of(messages))
    assert isinstance(result, SplitResult)
    (example,) = result.examples
    assert trained_text(encoder, example) == ["a2<|im_end|>"]
    assert "a1" in encoder.tokenizer.decode(example.input_ids)


def test_an_overlong_round_in_the_middle_is_left_out_and_counted() -> None:
    encoder = encoder_of("chatml")
    messages = asked("q1", "a1", "q2", "long " * 40, "q3", "a3")
    result = split_chat(encoder, SplitConfig(max_tokens=60), row_of(messages))
    assert isinstance(result, SplitResult)
    assert [(e.first_message, e.end_message) for e in result.examples] == [(0, 2), (4, 6)]
    assert (result.counts["rounds_overlong"], result.counts["rounds_kept"]) == (1, 2)


def test_rounds_of_a_chat_that_was_not_repaired() -> None:
    roles = "SSUUAATAUASUTA"
    names = {"S": "system", "U": "user", "A": "assistant", "T": "tool"}
    messages = [Message(names[role], role) for role in roles]  # type: ignore[arg-type]
    cut = ["".join(roles[first:end]) for first, end in chat_rounds(messages)]
    assert cut == ["SSUUAATA", "UA", "SUTA"]
    assert [len(chat_rounds(asked(*"qa", system="s")[:n])) for n in (1, 2, 3)] == [1, 1, 1]


def test_questions_without_an_answer_at_the_end_are_counted_when_cut_off() -> None:
    encoder = encoder_of("chatml")
    messages = [*asked("q", "a" * 30), Message("user", "b" * 30)]
    result = split_chat(encoder, SplitConfig(max_tokens=48), row_of(messages))
    assert isinstance(result, SplitResult)
    assert [(e.first_message, e.end_message) for e in result.examples] == [(0, 2)]
    assert result.counts["rounds_untrained"] == 1


def test_cutting_encodes_hardly_more_than_the_chat_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import segments

    encoder = encoder_of("chatml")
    messages = asked(*(f"question {n} and answer {n}" for n in range(200)), system="Be brief.")
    num_again = []

    def counting(encoder: ChatEncoder, rendered: Rendered) -> Any:
        num_again.append(len(rendered.text))
        return encode(encoder, rendered)

    monkeypatch.setattr(segments, "encode", counting)
    result = split_chat(encoder, SplitConfig(max_tokens=200), row_of(messages))
    assert isinstance(result, SplitResult)
    assert len(result.examples) > 10
    num_chars = sum(len(message.content) for message in messages)
    assert sum(num_again) < 0.3 * num_chars


# Drops ------------------------------------------------------------------------------------------------------

DROPS = {
    "no answer": ("chatml", [Message("user", "q")], "nothing_to_train"),
    "only a blank answer, written in another way": ("vicuna", asked("q", ""), "nothing_to_train"),
    "too long": ("chatml", asked("q", "a" * 500), "overlong"),
    "roles": (
        "mistral",
        [Message("user", "q"), Message("user", "q"), Message("assistant", "a")],
        "template_refuses",
    ),
    "surrogate": ("chatml", asked("\ud800", "a"), "not_unicode"),
    "tool calls": (
        "chatml",
        [Message("user", "q"), Message("assistant", "", {"tool_calls": [{"name": "f"}]})],
        "content_beside_text",
    ),
    "no answer has a weight": (
        "chatml",
        [Message("user", "q"), Message("assistant", "a", {"weight": 0})],
        "nothing_to_train",
    ),
}


@pytest.mark.parametrize(("kind", "messages", "reason"), DROPS.values(), ids=DROPS)
def test_a_chat_that_gives_no_example_is_a_drop_with_its_reason(
    kind: str, messages: list[Message], reason: str
) -> None:
    result = split_chat(encoder_of(kind), SplitConfig(max_tokens=64), row_of(messages))
    assert isinstance(result, Drop)
    assert result.reason == reason


# Files and settings -----------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_tokenizer("byte_level_bpe", TEMPLATES["chatml"]).save_pretrained(folder)
    return folder


def config_of(model: Path, **split: Any) -> PipelineConfig:
    return PipelineConfig.model_validate(
        {
            "run_root": str(model.parent / "run"),
            "sources": [{"name": "s", "path": "x.json"}],
            "model": {"path": str(model)},
            "split": split,
        }
    )


def test_the_prepared_step_reads_tokenizer_and_template_from_the_models_folder(model: Path) -> None:
    preflight(config_of(model))
    row = row_of(asked("q", f"{EOS} a"))
    result = prepare(config_of(model))(row)
    assert isinstance(result, SplitResult)
    at_hand = split_chat(encoder_of("chatml"), SplitConfig(), row)
    assert isinstance(at_hand, SplitResult)
    assert result.examples[0].input_ids.tolist() == at_hand.examples[0].input_ids.tolist()


def test_a_template_file_takes_the_place_of_the_tokenizers_own(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATES["zephyr"])
    config = config_of(model, chat_template=str(file))
    preflight(config)
    result = prepare(config)(row_of(asked("q", "a")))
    assert isinstance(result, SplitResult)
    (example,) = result.examples
    tokenizer = tiny_tokenizer("byte_level_bpe")
    spans = zip(example.span_starts, example.span_ends, strict=True)
    assert [tokenizer.decode(example.input_ids[start:end]) for start, end in spans] == [f"a{EOS}"]


def test_versions_follow_every_file_that_shapes_the_ids_and_nothing_else(model: Path, tmp_path: Path) -> None:
    before = versions(config_of(model))
    assert set(before) == {"tokenizer", "chat_template", "embeddings", "jinja2", "tokenizers", "transformers"}
    (model / "model.safetensors").write_bytes(b"weights")
    assert versions(config_of(model)) == before
    settings_file = model / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"eos_token": "<|im_end|>"}))
    assert versions(config_of(model))["tokenizer"] != before["tokenizer"]
    file = tmp_path / "template.jinja"
    file.write_text("one")
    first = versions(config_of(model, chat_template=str(file)))
    file.write_text("two")
    assert versions(config_of(model, chat_template=str(file)))["chat_template"] != first["chat_template"]


def test_shards_made_with_the_same_files_are_proof_enough(
    model: Path,
) -> None:
    config = config_of(model)
    manifest = Manifest(
        stage="split",
        stage_version=STAGE_VERSION,
        key="",
        inputs={},
        config={"split": config.split.model_dump(mode="json")},
        versions=versions(config),
        parts=(),
        num_rows_in=0,
        num_rows_out=0,
        num_pieces_cut=0,
        drops={},
    )
    write_manifest(config.run_root / "06_shards", manifest)
    (model / "tokenizer.json").write_text("broken, but the manifest is as old as the files: see below")
    with pytest.raises(InputError):
        preflight(config)
    write_manifest(config.run_root / "06_shards", manifest.model_copy(update={"versions": versions(config)}))
    preflight(config)


def break_config(model: Path, what: str) -> PipelineConfig:
    if what == "no template":
        tiny_tokenizer("byte_level_bpe").save_pretrained(model.parent / "base")
        return config_of(model.parent / "base")
    if what == "no tokenizer":
        return config_of(Path("no/such-model"))
    if what == "no template file":
        return config_of(model, chat_template="nowhere.jinja")
    if what == "empty folder":
        (model.parent / "empty").mkdir()
        return config_of(model.parent / "empty")
    if what == "remote code":
        file = model / "tokenizer_config.json"
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["x.Y", None]}})
        )
        return config_of(model)
    assert what == "no end"
    (model.parent / "bad.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    )
    return config_of(model, chat_template=str(model.parent / "bad.jinja"))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("no template", ConfigError, "set split.chat_template"),
        ("no tokenizer", InputError, "neither a folder nor in the local hub cache"),
        ("no template file", ConfigError, "not a readable UTF-8 file"),
        ("empty folder", InputError, "has no tokenizer"),
        ("remote code", RefusedError, "auto_map"),
        ("no end", RefusedError, "never writes an end token"),
    ],
)
def test_preflight_says_what_is_wrong_before_any_work(
    model: Path, what: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        preflight(break_config(model, what))


GOOD_COUNTS = {"trained_spans": 1000, "straddled_spans": 10, "turns_without_end_token": 999}


@pytest.mark.parametrize(
    ("counts", "num_untrained", "problem"),
    [
        (GOOD_COUNTS, 50, None),
        ({}, 0, None),
        ({"trained_spans": 20, "straddled_spans": 9}, 9, None),
        (GOOD_COUNTS | {"straddled_spans": 11}, 0, "11 of 1000 answers begin or end inside a token"),
        (GOOD_COUNTS | {"turns_without_end_token": 1000}, 0, "none of 1000 trained answers ends"),
        (GOOD_COUNTS, 51, "51 of 1000 rows have nothing to train"),
    ],
)
def test_shards_that_would_not_teach_what_was_said_are_refused(
    counts: dict[str, int], num_untrained: int, problem: str | None
) -> None:
    config = SplitConfig(max_straddle_share=0.01)
    drops = {"nothing_to_train": num_untrained, "overlong": 700}
    with pytest.raises(LimitError, match=problem) if problem else nullcontext():
        check_hand_over(counts, drops, num_rows=1000, config=config)
