"""Every strategy beside `single`: losses and gradient norms of each step, speed and memory, on the GPUs of a machine.

    python benchmarks/strategies.py --folder NEW_FOLDER [--processes 2] [--steps 50] [--only lora-ddp lora-fsdp2]

A Llama with random weights learns made documents, in bfloat16, once by each strategy; `single-again` is the noise of
two equal runs. Rows are tokens/s over the second half of the steps and the most GiB that the first process reserved.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # also as a script, the packages of this checkout

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainer.tiny_models import (
    learnable_documents,
    tiny_run,
    tiny_tokenizer,
    write_plans,
    write_shards,
)

LORA: dict[str, Any] = {"learning_rate": 2e-4, "lora": {"rank": 16}}
FULL: dict[str, Any] = {"method": "full", "learning_rate": 1e-5}
WAYS: dict[str, dict[str, Any]] = {
    "single": {},
    "single-again": {},
    "ddp": {"strategy": "ddp"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3"},
    "zero3-offload": {"strategy": "zero3", "offload": "all"},
    "fsdp2": {"strategy": "fsdp2", "shard_base": "always"},
    "fsdp2-whole-base": {"strategy": "fsdp2", "shard_base": "never"},
    "pipeline": {"strategy": "pipeline"},
}
METHODS = {"lora": LORA, "nf4": LORA | {"base": "nf4"}, "full": FULL}
ONE_PROCESS = ("single", "single-again", "pipeline")


def main() -> None:
    options = parse_arguments()
    options.folder.mkdir(parents=True)
    write_model(options)
    print(
        "| | loss, first and last step | validation | loss differs by, largest share | norm | tokens/s | GiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for method, settings in METHODS.items():
        reference: list[dict[str, Any]] = []
        for way, place in WAYS.items():
            name = f"{method}-{way}"
            if options.only and name not in options.only and way != "single":
                continue
            lines = trained(name, settings | place, options, one_process=way in ONE_PROCESS)
            reference = reference or lines
            print(row(name, lines, reference), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", help="such as lora-fsdp2; the single beside it always runs")
    return parser.parse_args()


def write_model(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=options.hidden, intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers, num_attention_heads=max(options.hidden // 128, 1),
        num_key_value_heads=max(options.hidden // 512, 1), max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(options.folder / "model")
    tiny_tokenizer().save_pretrained(options.folder / "model")


def trained(
    name: str, settings: dict[str, Any], options: argparse.Namespace, *, one_process: bool
) -> list[dict[str, Any]]:
    """The lines of its metrics."""
    config = tiny_run(
        options.folder / name,
        train=settings
        | {"max_steps": options.steps, "bins_per_step": 4, "checkpoint_every_steps": 100_000}
        | ({} if one_process else {"num_processes": options.processes}),
        model={"path": str(options.folder / "model"), "dtype": "bfloat16", "device": options.device},
        split={"max_tokens": 2048},
    )
    documents = {
        "train": learnable_documents(600, longest=1500),
        "validation": learnable_documents(8, seed=1),
    }
    write_shards(config.run_root, documents)
    write_plans(config.run_root, documents, capacity=2048)
    path = config.run_root / "config.json"
    path.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "trainer.launch", "train", "--config", str(path)]
    with (options.folder / f"{name}.log").open("w") as log:
        subprocess.run(
            command, check=True, stdout=log, stderr=log, cwd=Path(__file__).parent.parent, env=os.environ
        )
    (metrics,) = (config.run_root / "checkpoints").glob("*/metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def row(name: str, lines: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    steps, beside = ([line for line in found if "loss" in line] for found in (lines, reference))
    loss = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(steps, beside, strict=True))
    norm = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(steps, beside, strict=True))
    late = steps[len(steps) // 2 :]
    speed = sum(s["num_tokens"] for s in late) / sum(s["seconds"] for s in late)
    validation = next(line["validation_loss"] for line in reversed(lines) if "validation_loss" in line)
    return (
        f"| {name} | {steps[0]['loss']:.4f}, {steps[-1]['loss']:.4f} | {validation:.4f} | {loss:.2%} | {norm:.2%} "
        f"| {speed:,.0f} | {steps[-1]['memory_gib']:.2f} |"
    )


if __name__ == "__main__":
    main()
