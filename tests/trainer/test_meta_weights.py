"""Meta's own files -> a model folder. Judges: the made-up model that was cut into such files, whose logits come back,
and the libraries that Meta's tokenizers are read by.
"""

import base64
import io
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flows.cli import run_command
from schemas.errors import ConfigError, InputError
from trainer.meta_tokenizer import llama_3_specials
from trainer.meta_weights import LAYER_MATRICES, LAYER_NORMS, convert

IDS = torch.tensor([[1, 5, 9, 33, 2, 17, 64, 90]])
TEXTS = (
    "The river follows the bridge.",
    "  two spaces,  then\nlines\n\n and tabs\t!",
    "Größe, 漢字 and 🙂 in one",
    "12345 apples, don't",
    "",
)


def made_up_model(*, num_key_heads: int = 2, vocabulary: int = 400, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_key_heads,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        **settings,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def write_as_meta(
    model: LlamaForCausalLM, folder: Path, *, num_shards: int, embedding_by: int = 1, **params: Any
) -> Path:
    """What tensor parallelism of so many ranks leaves. Rows of queries and keys go back into Meta's order, where
    neighbours are turned together: written here from its paper's formula, not from the code under test."""
    folder.mkdir(parents=True)
    config = model.config
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pieces: list[dict[str, torch.Tensor]] = [{} for _ in range(num_shards)]

    def put(name: str, whole: torch.Tensor, cut: int | None) -> None:
        parts = whole.chunk(num_shards, dim=cut) if cut is not None else [whole] * num_shards
        for piece, part in zip(pieces, parts, strict=True):
            piece[name] = part.clone()

    put("tok_embeddings.weight", tensors["model.embed_tokens.weight"], embedding_by)
    put("norm.weight", tensors["model.norm.weight"], None)
    put("output.weight", tensors["lm_head.weight"], 0)
    put("rope.freqs", torch.ones(4), None)
    for layer in range(config.num_hidden_layers):
        for theirs, (ours, cut) in LAYER_MATRICES.items():
            whole = tensors[f"model.layers.{layer}.{ours}.weight"]
            if theirs.endswith(("wq", "wk")):
                whole = neighbours_together(
                    whole, head_width=config.hidden_size // config.num_attention_heads
                )
            put(f"layers.{layer}.{theirs}.weight", whole, cut)
        for theirs, ours in LAYER_NORMS.items():
            put(f"layers.{layer}.{theirs}.weight", tensors[f"model.layers.{layer}.{ours}.weight"], None)
    for number, piece in enumerate(pieces):
        torch.save(piece, folder / f"consolidated.{number:02d}.pth")
    facts = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-6, "vocab_size": -1, "multiple_of": 16}
    facts |= {"n_kv_heads": config.num_key_value_heads} | params
    (folder / "params.json").write_text(json.dumps(facts))
    return folder


def neighbours_together(matrix: torch.Tensor, *, head_width: int) -> torch.Tensor:
    """Row i and row i + half of each head become neighbours."""
    rows = []
    for head in matrix.split(head_width):
        half = head_width // 2
        rows += [row for i in range(half) for row in (head[i], head[i + half])]
    return torch.stack(rows)


def write_sentencepiece(path: Path) -> Any:
    import sentencepiece

    draw = random.Random(0)
    words = "the river bridge follows repairs and tabs lines apples near market letter".split()
    sentences = iter(" ".join(draw.choices(words, k=8)) for _ in range(200))
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=written,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.mark.parametrize(
    ("num_shards", "num_key_heads", "embedding_by"), [(1, 4, 1), (2, 4, 1), (2, 2, 0)], ids=str
)
def test_logits_come_back_from_files_of_one_rank_and_of_two(
    tmp_path: Path, num_shards: int, num_key_heads: int, embedding_by: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made_up_model(num_key_heads=num_key_heads)
    theirs = write_as_meta(model, tmp_path / "meta", num_shards=num_shards, embedding_by=embedding_by)
    write_sentencepiece(theirs / "tokenizer.model")
    run_command(["weights", "from-meta", str(theirs), "--out", str(tmp_path / "model")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.config.max_position_embeddings == 2048
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_numbers_keep_their_dtype_and_files_their_size(tmp_path: Path) -> None:
    model = made_up_model().to(torch.bfloat16)
    theirs = write_as_meta(model, tmp_path / "meta", num_shards=2, rope_theta=500000.0)
    write_sentencepiece(theirs / "tokenizer.model")
    convert(theirs, tmp_path / "model", max_file_bytes=20_000)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3
    assert all(os.path.getsize(path) < 28_000 for path in files), "an embedding alone has 25,600 bytes"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.max_position_embeddings == 8192
    assert loaded.config.rope_parameters["rope_theta"] == 500000.0
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


# Refused ------------------------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("trap-was-sprung", "w"))


def with_code(folder: Path) -> None:
    with (folder / "consolidated.01.pth").open("wb") as file:
        pickle.dump({"norm.weight": Trap()}, file)


def with_code_in_a_zip(folder: Path) -> None:
    torch.save({"norm.weight": Trap()}, folder / "consolidated.01.pth")


def without_a_file(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-2000])


def with_other_layers(folder: Path) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_layers": 3}))


def with_other_heads(folder: Path) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_kv_heads": 4}))


def without_params(folder: Path) -> None:
    (folder / "params.json").unlink()


def without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def with_another_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"\xff\xff\xff")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (with_code, "nothing else is read out of a pickle"),
        (with_code_in_a_zip, "nothing else is read out of a pickle"),
        (cut_short, "is damaged"),
        (without_a_file, "one is missing between"),
        (with_other_layers, "layers.2.attention.wk.weight is missing or unknown"),
        (with_other_heads, "layers.0.attention.wk.weight lies in pieces of"),
        (without_params, "params.json can't be read"),
        (without_a_tokenizer, "tokenizer.model is missing"),
        (with_another_tokenizer, "is no tokenizer of SentencePiece nor of Llama 3"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_such_checkpoint_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = write_as_meta(made_up_model(), tmp_path / "meta", num_shards=2)
    write_sentencepiece(theirs / "tokenizer.model")
    spoil(theirs)
    with pytest.raises(InputError, match=said):
        convert(theirs, tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"meta"}, (
        "neither a half folder nor what the trap writes"
    )


def test_a_folder_that_is_in_use_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(ConfigError, match="is there already"):
        convert(tmp_path, tmp_path / "model")


# Tokenizers ---------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_llama_1_encodes_as_sentencepiece_does(tmp_path: Path) -> None:
    theirs = write_as_meta(made_up_model(), tmp_path / "meta", num_shards=1)
    judge = write_sentencepiece(theirs / "tokenizer.model")
    ours = AutoTokenizer.from_pretrained(convert(theirs, tmp_path / "model"))
    for text in TEXTS[:-1]:
        assert ours(text)["input_ids"] == [judge.bos_id(), *judge.encode(text)], text
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == text
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize("is_newer", [False, True], ids=["3", "3.1"])
def test_the_tokenizer_of_llama_3_encodes_as_tiktoken_does(tmp_path: Path, is_newer: bool) -> None:
    import tiktoken

    from trainer.meta_tokenizer import LLAMA_3_PATTERN

    ranks = {bytes([byte]): byte for byte in range(256)}
    for text in (b"th", b"the", b" the", b"ri", b"ver", b"river", b" river", b"12", b"123", b"\n\n", b"  "):
        ranks[text] = len(ranks)
    size = len(ranks) + 256
    theirs = write_as_meta(
        made_up_model(vocabulary=size),
        tmp_path / "meta",
        num_shards=1,
        use_scaled_rope=is_newer,
        rope_theta=5e5,
    )
    lines = (base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items())
    (theirs / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    specials = {name: len(ranks) + n for n, name in enumerate(llama_3_specials(is_newer=is_newer))}
    judge = tiktoken.Encoding("3", pat_str=LLAMA_3_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    ours = AutoTokenizer.from_pretrained(convert(theirs, tmp_path / "model"))
    for text in (*TEXTS, "<|eot_id|>the river<|start_header_id|>"):
        assert ours(text)["input_ids"] == [len(ranks), *judge.encode(text, allowed_special="all")], text
    assert len(ours) == size
    assert len(set(specials)) == 256
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == size
