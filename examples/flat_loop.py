"""The whole fine-tuning in one loop, on one device, with nothing of sft-pipeline's trainer: read it, copy it, change it.

    python examples/flat_loop.py runs/first [--steps 100] [--output my-adapter]

It reads shards, plan and resolved config of a run root, trains LoRA or all weights, and its losses are those of
`sft-pipeline train`, which adds packed rows in place of padded ones, several devices, 8 bits, checkpoints, evaluation.

1. A token is a target if it stands in a trained span; the state before it predicts it.
2. A step's loss is a sum over its targets, divided by the sum of their weights. The plan has that divisor before the
   step runs, so micro-batches of any size give the same gradient. Means of means would not.
3. Which examples meet in a step is a file (07_plan), not the state of a sampler.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main() -> None:
    arguments = read_arguments()
    config = json.loads((arguments.run_root / "config.json").read_text())
    train = config["train"]
    shards = read_shards(arguments.run_root / "06_shards" / "train")
    plans = sorted((arguments.run_root / "07_plan").glob("train-epoch-*.arrow"))
    steps = [step for plan in plans for step in read_steps(plan, train["bins_per_step"])]
    steps = steps[: arguments.steps or train["max_steps"]]
    model = load_model(config["model"], train)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.dim() >= 2], "weight_decay": train["weight_decay"]},
            {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(train["adam_beta1"], train["adam_beta2"]),
        eps=train["adam_epsilon"],
    )
    for number, step in enumerate(steps):
        divisor = sum(document["weight_sum"] for documents in step for document in documents)
        loss = 0.0
        for documents in step:  # one bin after the other: only this much is in memory
            summed = weighted_loss(model, *batch_of(shards, documents)) / max(divisor, 1e-30)
            summed.backward()
            loss += summed.item()
        norm = torch.nn.utils.clip_grad_norm_(weights, train["max_grad_norm"] or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, number, len(steps))
        if divisor > 0 and math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"step": number + 1, "loss": loss, "grad_norm": float(norm)}), flush=True)
    if arguments.output:
        model.save_pretrained(arguments.output)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run_root", type=Path)
    parser.add_argument("--steps", type=int, help="default: train.max_steps, or all")
    parser.add_argument("--output", type=Path, help="folder for the trained weights")
    return parser.parse_args()


# Data -------------------------------------------------------------------------------------------------------


def read_shards(folder: Path) -> pa.Table:
    """All examples, memory-mapped. schemas/dataset.py says what the columns are; `datasets` opens them too."""
    files = json.loads((folder / "state.json").read_text())["_data_files"]
    return pa.concat_tables([read_stream(folder / file["filename"]) for file in files])


def read_stream(path: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def read_steps(plan: Path, bins_per_step: int) -> Iterator[list[list[dict[str, Any]]]]:
    """Steps of an epoch; a step is some bins, a bin some documents (rows of the plan)."""
    bins: list[list[dict[str, Any]]] = []
    for document in read_stream(plan).to_pylist():
        if document["bin"] == len(bins):
            bins.append([])
        bins[-1].append(document)
    for first in range(0, len(bins), bins_per_step):
        yield bins[first : first + bins_per_step]


def batch_of(shards: pa.Table, documents: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights of the documents of a bin, [documents, longest], padded on the right; weight 0 is no target."""
    longest = max(document["num_tokens"] for document in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    weights = torch.zeros(len(documents), longest)
    for row, document in enumerate(documents):
        example = {name: shards[name][document["example"]].as_py() for name in shards.column_names[:4]}
        first, num_tokens = (
            document["first_token"],
            document["num_tokens"],
        )  # a long text stands in several bins
        ids[row, :num_tokens] = torch.tensor(example["input_ids"][first : first + num_tokens])
        spans = zip(example["span_starts"], example["span_ends"], example["span_weights"], strict=True)
        for start, end, weight in spans:
            weights[row, max(start - first, 1) : min(max(end - first, 0), num_tokens)] = weight
    return ids, weights


# Model ------------------------------------------------------------------------------------------------------


def load_model(settings: dict[str, Any], train: dict[str, Any]) -> torch.nn.Module:
    dtype = torch.float32 if settings["dtype"] == "auto" else getattr(torch, settings["dtype"])
    device = "cuda" if settings["device"] != "cpu" and torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(settings["path"], dtype=dtype).to(device).train()
    if train["method"] == "full":
        return model
    lora, _ = train["lora"], torch.manual_seed(train["seed"])  # of the fresh matrices
    sizes = {"r": lora["rank"], "lora_alpha": lora["alpha"], "lora_dropout": lora["dropout"]}
    return get_peft_model(model, LoraConfig(**sizes, target_modules=lora["targets"], task_type="CAUSAL_LM"))


def weighted_loss(model: torch.nn.Module, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over all targets of weight x cross entropy. Attention looks back only: padding behind disturbs nobody."""
    device = next(model.parameters()).device
    ids, weights = ids.to(device), weights.to(device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights[:, 1:]).sum()


def learning_rate(train: dict[str, Any], step: int, num_steps: int) -> float:
    """Warm-up in equal parts, then constant, linear or cosine down to a floor."""
    warmup = train["warmup_steps"]
    warmup = math.ceil(train["warmup_share"] * num_steps) if warmup is None else min(warmup, num_steps)
    if step < warmup:
        return float(train["learning_rate"] * (step + 1) / (warmup + 1))
    done = (step - warmup) / max(num_steps - warmup, 1)
    left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    floor = 0.0 if train["schedule"] == "constant" else train["min_learning_rate_share"]
    return float(train["learning_rate"] * (floor + (1.0 - floor) * left[train["schedule"]]))


if __name__ == "__main__":
    main()
