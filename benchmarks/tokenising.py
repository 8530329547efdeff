"""Chats to token ids with masks: the stage split beside `datasets.map(num_proc=2)` with transformers' own templates.

    python benchmarks/tokenising.py chats=sharegpt.json alpaca=alpaca_data.json --model qwen --folder NEW [--rounds 3]

Both get the same rows (what the stages before have left), the same ChatML template with generation blocks, and write
ids and masks of all rows to the disk; each run is a process with two workers, its start included, ours and theirs by
turns. Ours runs with gigatoken, where it is installed and knows the tokenizer, and without it.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # also as a script, the packages of this checkout

from benchmarks.measure import Cost, run_measured

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PEER = """
import sys
from pathlib import Path

import datasets
from transformers import AutoTokenizer

if __name__ == "__main__":
    folder, model, template, out = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = Path(template).read_text()

    def tokenise(row):
        chat = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)

    rows = datasets.load_dataset("parquet", data_files=f"{folder}/train/*.parquet", split="train", cache_dir=out)
    done = rows.map(tokenise, num_proc=2, remove_columns=rows.column_names)
    print(len(done), sum(map(len, done["input_ids"])))
"""
BEFORE = ("merge", "holdout")


def main() -> None:
    options = parse_arguments()
    options.folder.mkdir(parents=True)
    config = write_config(options)
    program = str(Path(sys.executable).parent / "sft-pipeline")
    run_measured([program, "step", BEFORE[0], str(config), "--until", BEFORE[1]])
    hidden = options.folder / "without" / "gigatoken"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('left out by the benchmark')\n")
    ours = [program, "step", "split", str(config)]
    ways: dict[str, tuple[list[str], dict[str, str]]] = {
        "datasets.map": (peer_command(options), {}),
        "sft-pipeline": (ours, {}),
        "sft-pipeline without gigatoken": (ours, {"PYTHONPATH": str(hidden.parent)}),
    }
    print(
        f"{', '.join(f'{name} {version(name)}' for name in ('datasets', 'transformers', 'tokenizers', 'gigatoken'))}"
    )
    print("\n| round | who | seconds | CPU s | peak PSS MiB |\n|---|---|---|---|---|")
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for number in range(options.rounds):
        for name, (command, environment) in ways.items():
            shutil.rmtree(options.folder / "run" / "06_shards", ignore_errors=True)
            shutil.rmtree(options.folder / "cache", ignore_errors=True)
            cost = run_measured(command, watch=True, environment=os.environ | environment)
            costs[name].append(cost)
            print(
                f"| {number} | {name} | {cost.seconds:.1f} | {cost.cpu_seconds:.1f} | {cost.peak_mib:,.0f} |",
                flush=True,
            )
    theirs = statistics.median(cost.seconds for cost in costs.pop("datasets.map"))
    for name, found in costs.items():
        print(f"{name}: {theirs / statistics.median(cost.seconds for cost in found):.2f} times as fast")


def peer_command(options: argparse.Namespace) -> list[str]:
    script, template = options.folder / "peer.py", options.folder / "template.jinja"
    script.write_text(PEER)
    rows = options.folder / "run" / "05_held_out"
    return [
        sys.executable,
        str(script),
        str(rows),
        str(options.model),
        str(template),
        str(options.folder / "cache"),
    ]


def write_config(options: argparse.Namespace) -> Path:
    template = options.folder / "template.jinja"
    template.write_text(TEMPLATE)
    sources = [{"name": name, "path": str(Path(path).resolve())} for name, path in options.sources]
    config = {
        "run_root": str((options.folder / "run").resolve()),
        "sources": sources,
        "model": {"path": str(options.model.resolve())},
        "holdout": {"validation": 0, "test": 0},
        "split": {"max_tokens": 131_072, "chat_template": str(template.resolve())},
        "engine": {"workers": 2},
    }
    path = options.folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources", nargs="+", type=lambda text: tuple(text.split("=", 1)), metavar="NAME=FILE"
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of a tokenizer with ChatML's tokens"
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
