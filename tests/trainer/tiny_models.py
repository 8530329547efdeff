"""Tiny models, a tokenizer, shards and plans, written as the stages before training write them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pipelines import storage
from schemas.dataset import PLAN, SHARD
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGE_FOLDERS, Manifest
from schemas.training_config import LoraConfig, TrainConfig
from trainer import methods
from trainer.shard_reader import Example

VOCABULARY = 320
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


# Models -----------------------------------------------------------------------------------------------------


def tiny_model(
    model_type: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> PreTrainedModel:
    """Two layers, 32 wide, grouped queries, random but always the same."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | settings
    if model_type.startswith(("gemma", "qwen3")):
        settings.setdefault("head_dim", 8)
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    # The library's small initial weights hide differences: make the model say something.
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    cast: PreTrainedModel = model.to(dtype)
    return cast


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained in this process, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["red blue green cat dog runs sleeps near far the a"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = TEMPLATE
    return fast


def write_model(folder: Path, model_type: str = "llama", **settings: Any) -> Path:
    """A model folder with a tokenizer beside the weights."""
    model = tiny_model(model_type, **settings)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# Documents --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """Ids and trained spans of one example: (start, end, weight)."""

    ids: list[int]
    spans: list[tuple[int, int, float]]
    source: str = "tiny/chats.json"
    language: str = "en"


def learnable_documents(count: int, *, seed: int = 0, longest: int = 40) -> list[Document]:
    """Each token follows from the one before it, so a few steps teach it; the last two thirds are trained."""
    draws = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        ids = [int(draws.integers(3, 60))]
        for _ in range(int(draws.integers(6, longest)) - 1):
            ids.append((ids[-1] * 5 + 7) % 57 + 3)
        start = len(ids) // 3
        documents.append(Document(ids, [(start, len(ids), 1.0)]))
    return documents


def random_documents(lengths: Sequence[int], *, seed: int = 0) -> list[Document]:
    """Random ids, two trained spans each, of different weights."""
    draws = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        ids = draws.integers(3, VOCABULARY, length).tolist()
        half = length // 2
        spans = [(1, max(half - 1, 1), 1.0), (max(half, 1), length, 0.5)]
        documents.append(Document(ids, [span for span in spans if span[0] < span[1]]))
    return documents


def example_of(document: Document, row: int = 0) -> Example:
    starts, ends, weights = zip(*document.spans, strict=True) if document.spans else ((), (), ())
    return Example(
        row=row,
        input_ids=np.array(document.ids, np.int32),
        span_starts=np.array(starts, np.int32),
        span_ends=np.array(ends, np.int32),
        span_weights=np.array(weights, np.float32),
    )


# A run root as stages 6 and 7 leave it ------------------------------------------------------------------------


def write_shards(
    run_root: Path, splits: Mapping[str, Sequence[Document]], *, rows_per_batch: int = 7
) -> Path:
    """06_shards: a DatasetDict folder of Arrow streams and its manifest."""
    folder = run_root / STAGE_FOLDERS["split"]
    files = []
    for split, documents in splits.items():
        path = folder / split / "data-00000-of-00001.arrow"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist([_shard_row(d, n) for n, d in enumerate(documents)], schema=SHARD)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SHARD) as writer:
            for batch in table.to_batches(max_chunksize=rows_per_batch):
                writer.write_batch(batch)
        state = folder / split / "state.json"
        state.write_text(json.dumps({"_data_files": [{"filename": path.name}], "_split": split}))
        files.append(storage.file_entry(path, folder=folder, num_rows=len(documents)))
        files.append(storage.file_entry(state, folder=folder))
    storage.write_manifest(folder, _manifest("split", files))
    return folder


def write_plans(
    run_root: Path, splits: Mapping[str, Sequence[Document]], *, epochs: int = 1, capacity: int = 64
) -> Path:
    """07_plan: next-fit packing, another order of rows in each epoch; held-out splits have epoch 0 alone."""
    folder = run_root / STAGE_FOLDERS["pack"]
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for split, documents in splits.items():
        for epoch in range(epochs if split == "train" else 1):
            table = plan_table(documents, epoch=epoch, capacity=capacity)
            path = folder / f"{split}-epoch-{epoch:04d}.arrow"
            storage.write_arrow(path, table)
            files.append(storage.file_entry(path, folder=folder, num_rows=table.num_rows))
    storage.write_manifest(folder, _manifest("pack", files))
    return folder


def plan_table(documents: Sequence[Document], *, epoch: int = 0, capacity: int = 64) -> pa.Table:
    order = np.random.default_rng(epoch).permutation(len(documents)).tolist()
    rows, current, filled = [], 0, 0
    for example in order:
        num_tokens = len(documents[example].ids)
        if filled and filled + num_tokens > capacity:
            current, filled = current + 1, 0
        spans = [(end - max(start, 1), weight) for start, end, weight in documents[example].spans]
        row = {"bin": current, "example": example, "offset": filled, "num_tokens": num_tokens}
        sums = {
            "num_trained_tokens": sum(length for length, _ in spans),
            "weight_sum": float(sum(length * weight for length, weight in spans)),
        }
        rows.append(row | {"first_token": 0} | sums)
        filled += num_tokens
    return pa.Table.from_pylist(rows, schema=PLAN)


def tiny_run(
    folder: Path,
    *,
    train: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    model_type: str = "llama",
    num_documents: int = 40,
    epochs: int = 1,
    **sections: Any,
) -> PipelineConfig:
    """A run root ready to train, with a model folder beside it; returns its config."""
    model_folder = folder / f"model-{model_type}"
    if not model_folder.exists():
        write_model(model_folder, model_type)
    splits = {
        "train": learnable_documents(num_documents),
        "validation": learnable_documents(6, seed=1),
        "test": learnable_documents(6, seed=2),
    }
    run_root = folder / "run"
    write_shards(run_root, splits)
    write_plans(run_root, splits, epochs=epochs)
    settings = {
        "run_root": run_root,
        "sources": [{"name": "tiny", "path": "chats.json"}],
        "split": {"max_tokens": 64},
        "model": {"path": str(model_folder), "dtype": "float32", "device": "cpu", **(model or {})},
        "train": {
            "epochs": epochs,
            "bins_per_step": 2,
            "learning_rate": 1e-2,
            "checkpoint_every_steps": 4,
            **(train or {}),
        },
        **sections,
    }
    return PipelineConfig.model_validate(settings)


def _shard_row(document: Document, number: int) -> dict[str, Any]:
    starts, ends, weights = zip(*document.spans, strict=True) if document.spans else ((), (), ())
    num_trained_tokens = sum(ends) - sum(starts)
    return {
        "input_ids": document.ids,
        "span_starts": list(starts),
        "span_ends": list(ends),
        "span_weights": list(weights),
        "num_tokens": len(document.ids),
        "num_trained_tokens": num_trained_tokens,
        "num_trained_bytes": 3 * num_trained_tokens,
        "row_id": f"{number:032x}",
        "piece": 0,
        "first_message": 0,
        "end_message": 2,
        "source": document.source,
        "language": document.language,
    }


def _manifest(stage: str, files: list[Any]) -> Manifest:
    return Manifest(
        stage=stage,
        stage_version=1,
        key="tiny",
        inputs={STAGE_FOLDERS["split"]: "tiny"} if stage == "pack" else {},
        config={},
        versions={},
        parts=(),
        files=tuple(files),
        num_rows_in=0,
        num_rows_out=0,
        num_pieces_cut=0,
        drops={},
    )


def tiny_lora(model: PreTrainedModel, *, std: float = 0.05) -> Any:
    """LoRA of rank 4 over all linear layers, its second matrices not zero, so that it says something."""
    lora = methods.lora.apply(model, TrainConfig(lora=LoraConfig(rank=4, alpha=8)))
    torch.manual_seed(1)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return lora
