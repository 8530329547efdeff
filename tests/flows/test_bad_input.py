"""Models, tokenizers and adapters that can't work, through the command line: refused before a weight is loaded.

The numbers are cut out of every model file here, behind its header: whoever read a weight would say so.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.cli import run_command
from schemas.errors import UsageError
from schemas.pipeline_config import PipelineConfig
from tests.trainer.tiny_models import tiny_run, write_model
from trainer.train import train

CONFIG = """\
run_root: run
sources: [{name: chats, path: chats.json}]
split: {max_tokens: 64}
engine: {min_free_gib: 0.1}
"""


def refused(folder: Path, *, command: str = "train", **settings: Any) -> str:
    """What the command ends with. `settings` are train and model."""
    sections = {"model": {"path": "model"} | settings.pop("model", {}), **settings}
    path = folder / "config.yaml"
    path.write_text(CONFIG + "".join(f"{name}: {json.dumps(value)}\n" for name, value in sections.items()))
    (folder / "chats.json").write_text("[]")
    with pytest.raises(UsageError) as caught:
        run_command([command, str(path)])
    return str(caught.value)


def cut_off_numbers(path: Path) -> None:
    with path.open("r+b") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        file.truncate(8 + header_bytes)


def model(folder: Path, **settings: Any) -> Path:
    """A tiny model without its numbers."""
    write_model(folder / "model", **settings)
    cut_off_numbers(folder / "model" / "model.safetensors")
    return folder / "model"


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# LoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_porj"], "'q_porj'; nearest: q_proj"),
        (["q_proj", "fc1"], "'fc1'; known: down_proj"),
        (r".*\.attention\.q_proj", "nearest: q_proj"),
        (r"model\.layers\.(", "known: down_proj"),
    ],
    ids=str,
)
def test_a_target_that_matches_nothing_shows_the_nearest_names(
    tmp_path: Path, targets: Any, said: str
) -> None:
    model(tmp_path)
    message = refused(tmp_path, train={"lora": {"targets": targets}})
    assert "lora-targets: train.lora.targets names" in message
    assert said in message


@pytest.mark.parametrize(
    ("targets", "rank", "layer"),
    [("all-linear", 17, "k_proj is 16 x 32"), (["o_proj"], 33, "o_proj is 32 x 32")],
)
def test_a_rank_above_the_matrix_is_refused_with_the_matrix(
    tmp_path: Path, targets: Any, rank: int, layer: str
) -> None:
    model(tmp_path)
    message = refused(tmp_path, train={"lora": {"targets": targets, "rank": rank}})
    assert f"lora-rank: train.lora.rank is {rank}, model.layers.0.self_attn.{layer}" in message


# Bases that are quantised already -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq", "aqlm", "compressed-tensors"])
def test_a_base_of_another_quantiser_is_refused_by_its_name(tmp_path: Path, method: str) -> None:
    change(model(tmp_path) / "config.json", quantization_config={"quant_method": method, "bits": 4})
    assert f"the model's weights are quantised ({method})" in refused(tmp_path)


def test_gptq_whose_config_says_nothing_is_known_by_its_tensors(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")

    def packed(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.qweight"] = torch.zeros(4, 32, dtype=torch.int32)

    change_tensors(folder, packed)
    cut_off_numbers(folder / "model.safetensors")
    assert "q_proj.qweight, as GPTQ or AWQ leaves it" in refused(tmp_path)


# Heads and embeddings -----------------------------------------------------------------------------------------


def test_an_untied_model_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    change_tensors(folder, lambda tensors: tensors.__delitem__("lm_head.weight"))
    change(folder / "config.json", tie_word_embeddings=False)
    cut_off_numbers(folder / "model.safetensors")
    assert "no file holds lm_head.weight" in refused(tmp_path)


def test_a_tied_model_with_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    change(folder / "config.json", tie_word_embeddings=True)
    assert "lm_head.weight is another matrix than model.embed_tokens.weight" in refused(tmp_path)


def test_a_tied_model_whose_files_hold_the_matrix_twice_is_none_to_refuse(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")

    def twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(folder, twice)
    change(folder / "config.json", tie_word_embeddings=True)
    message = refused(tmp_path, train={"lora": {"rank": 999}})
    assert "lora-rank" in message
    assert "head" not in message


def test_a_vocabulary_of_another_size_than_the_embedding_is_refused(tmp_path: Path) -> None:
    change(model(tmp_path) / "config.json", vocab_size=400)
    assert "vocab_size 400, model.embed_tokens.weight has 320 rows" in refused(tmp_path)


def test_a_tokenizer_whose_ids_exceed_the_embedding_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    """Its own letters have ids that the model does not know."""
    model(tmp_path, vocab_size=100)
    message = refused(tmp_path, command="run")
    assert "has the id" in message
    assert "the model knows 100 ids" in message
    assert not (tmp_path / "run" / "01_merged").exists()


# Adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[PipelineConfig, Path]:
    """A training of one step, and its adapter."""
    config = tiny_run(tmp_path_factory.mktemp("trained"), train={"max_steps": 1, "lora": {"rank": 4}})
    result = train(config)
    return config, config.run_root / "checkpoints" / result.key / result.output


def test_an_adapter_of_another_base_is_known_by_the_digest_in_its_record(
    tmp_path: Path, trained: tuple[PipelineConfig, Path]
) -> None:
    """The same shapes, other numbers."""
    write_model(tmp_path / "model", seed=1)
    message = refused(tmp_path, model={"adapter": str(trained[1])})
    assert "adapter-base" in message
    assert "was trained over another base model" in message


def test_a_foreign_adapter_that_does_not_fit_is_known_by_its_shapes(
    tmp_path: Path, trained: tuple[PipelineConfig, Path]
) -> None:
    """Without a record beside it, as from another program."""
    model(tmp_path, hidden_size=64)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in trained[1].iterdir():
        os.link(path, adapter / path.name)
    message = refused(tmp_path, model={"adapter": str(adapter)})
    assert "changes model.layers.0.mlp.down_proj as 32 x 64, the model has 64 x 64" in message


def test_an_adapter_of_its_own_base_passes(tmp_path: Path, trained: tuple[PipelineConfig, Path]) -> None:
    """Refused for another reason alone: nothing to train on lies here."""
    assert trained[0].model is not None
    settings = {"path": trained[0].model.path, "adapter": str(trained[1])}
    message = refused(tmp_path, model=settings, train={"warmup_steps": 5, "max_steps": 5})
    assert "warm-up" in message
    assert "adapter" not in message.replace(str(trained[1]), "")
