"""Beside others' tools, in one run and by turns: FastChat's cleaning chain, datatrove, data-juicer.

    python benchmarks/peers.py fastchat sharegpt_html.json.gz --megabytes 1000 --peer-python PEER/bin/python \\
        --model MODEL --folder NEW_FOLDER [--shards] [--rounds 3]
    python benchmarks/peers.py datatrove sharegpt.json.gz --megabytes 100 --peer-python PEER/bin/python --folder NEW_FOLDER
    python benchmarks/peers.py data-juicer sharegpt.json.gz --megabytes 100 --peer-python PEER/bin/python --folder NEW_FOLDER

The dump is made larger by enlarge.py. Each peer has an environment of its own, made beforehand; all may share one
Python, none is ever installed beside this program:

    uv pip install --no-deps fschat markdownify beautifulsoup4 soupsieve six tqdm typing-extensions polyglot pycld2 pyicu
    uv pip install transformers                                                  # for --shards
    uv pip install 'datatrove[io]' nltk regex fasttext-numpy2-wheel numpy
    uv pip install py-data-juicer fasttext-predict

fastchat: raw HTML -> 04_deduplicated against clean_sharegpt, optional_clean and filter_wrong_format; with --shards to
06_shards against the same and split_long_conversation with the same tokenizer and limit. Languages are judged on both
sides (optional_clean with --skip-lang of a language that nobody has). Near-duplicates are looked for on our side only.
datatrove, data-juicer: language, repetition and exact duplicates of chats in plain text, both with the same model file.
Ours reads chats and runs merge, clean, filter, dedup; theirs get one text a chat. Every process counts from its start.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from enlarge import MEGABYTE, copies, read_records, write_array
from measure import Cost, run_measured

from pipelines.rules.languages import model_path

STAGES = ("merge", "clean", "filter", "dedup")
SHARD_STAGES = (*STAGES, "holdout", "split")
Commands = list[tuple[list[str], dict[str, str]]]
"""Each with what it adds to the environment."""
REPETITION = {"max_repeated_line_share": 0.3, "max_repeated_ngram_share": 0.2, "max_character_run": 50}


def main() -> None:
    options = parse_arguments()
    options.folder.mkdir(parents=True)
    data = options.folder / "large.json"
    num_chats = write_array(copies(read_records(options.file)), data, num_bytes=options.megabytes * MEGABYTE)
    num_bytes = data.stat().st_size
    print(machine(options), f"{num_chats:,} chats, {num_bytes / 1e6:.0f} MB\n")
    print(
        "| round | who | seconds | CPU s | MB/s | MB per CPU s | peak PSS MiB |\n|---|---|---|---|---|---|---|"
    )
    sides = {"sft-pipeline": OURS[options.peer], options.peer: PEERS[options.peer]}
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for number in range(options.rounds):
        for name, commands in sides.items():
            cost = total(commands(options, data, options.folder / f"{number}-{name}"), options)
            costs[name].append(cost)
            print(f"| {number} | {name} | {line(cost, num_bytes)} |", flush=True)
    ours, theirs = (sorted(found, key=lambda cost: cost.seconds)[len(found) // 2] for found in costs.values())
    print(
        f"\n{options.peer} takes {theirs.seconds / ours.seconds:.2f} times our time by the clock, "
        f"{theirs.cpu_seconds / ours.cpu_seconds:.2f} times our CPU time (medians by the clock)"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("file", type=Path)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="new; everything is written here")
    parser.add_argument("--model", type=Path, help="its tokenizer is used; needed with --shards")
    parser.add_argument("--shards", action="store_true")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="watch memory, which takes CPU time from both")
    return parser.parse_args()


def total(commands: Commands, options: argparse.Namespace) -> Cost:
    whole = Cost(0, 0, 0)
    for command, environment in commands:
        whole += run_measured(command, watch=options.memory, environment=os.environ | environment)
    return whole


def line(cost: Cost, num_bytes: int) -> str:
    megabytes = num_bytes / 1e6
    return (
        f"{cost.seconds:.1f} | {cost.cpu_seconds:.1f} | {megabytes / cost.seconds:.1f} | "
        f"{megabytes / cost.cpu_seconds:.2f} | {cost.peak_mib:,.0f}"
    )


def machine(options: argparse.Namespace) -> str:
    names = {"fastchat": ["fschat", "markdownify", "PyICU", "transformers"], "datatrove": ["datatrove"]}
    wanted = names.get(options.peer, ["py-data-juicer"])
    code = f"import importlib.metadata as m\nfor n in {wanted}:\n try: print(n, m.version(n))\n except Exception: print(n, 'absent')"
    theirs = subprocess.run(
        [options.peer_python, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    ours = ", ".join(
        f"{name} {version(name)}" for name in ("pyarrow", "html-to-markdown", "fasttext-predict")
    )
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    return (
        f"{platform.system()} {platform.machine()}, {psutil.cpu_count()} cores, load before {load}, Python "
        f"{platform.python_version()}; {ours}; {', '.join(theirs.splitlines())}; {options.workers} workers;"
    )


# Ours ---------------------------------------------------------------------------------------------------------


def our_chain(options: argparse.Namespace, data: Path, folder: Path) -> Commands:
    return _our_stages(options, data, folder, SHARD_STAGES if options.shards else STAGES, {})


def our_text_chain(options: argparse.Namespace, data: Path, folder: Path) -> Commands:
    settings = {"filter": REPETITION, "dedup": {"near": False, "branches": False}}
    return _our_stages(options, data, folder, STAGES, settings)


def _our_stages(
    options: argparse.Namespace, data: Path, folder: Path, stages: Sequence[str], settings: dict[str, Any]
) -> Commands:
    folder.mkdir()
    config = {
        "run_root": str((folder / "run").resolve()),
        "sources": [{"name": "chats", "path": str(data.resolve())}],
        "model": {"path": str((options.model or folder).resolve())},
        "engine": {"workers": options.workers},
        "split": {"max_tokens": options.max_tokens},
        **settings,
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    program = str(Path(sys.executable).parent / "sft-pipeline")
    return [([program, "step", stages[0], str(path), "--until", stages[-1]], {})]


# Theirs -------------------------------------------------------------------------------------------------------


def fastchat_chain(options: argparse.Namespace, data: Path, folder: Path) -> Commands:
    folder.mkdir()
    cleaned, chosen, right, cut = (str(folder / f"{number}.json") for number in range(4))
    steps = [
        ["clean_sharegpt", "--in-file", str(data), "--out-file", cleaned],
        ["optional_clean", "--in-file", cleaned, "--out-file", chosen, "--skip-lang", "xx"],
        ["filter_wrong_format", "--in-file", chosen, "--out-file", right],
    ]
    if options.shards:
        model = ["--model-name-or-path", str(options.model), "--max-length", str(options.max_tokens)]
        steps.append(["split_long_conversation", "--in-file", right, "--out-file", cut, *model])
    return [
        ([str(options.peer_python), "-m", f"fastchat.data.{name}", *arguments], {})
        for name, *arguments in steps
    ]


def datatrove_chain(options: argparse.Namespace, data: Path, folder: Path) -> Commands:
    texts = _texts(data, folder / "texts", num_files=options.workers)
    script = str(Path(__file__).with_name("peer_datatrove.py"))
    arguments = [str(texts), str(folder / "out"), str(model_path()), str(options.workers)]
    return [([str(options.peer_python), script, *arguments], {})]


def data_juicer_chain(options: argparse.Namespace, data: Path, folder: Path) -> Commands:
    texts = _texts(data, folder / "texts", num_files=1)
    models = folder / "models"
    models.mkdir()
    (models / "lid.176.bin").symlink_to(model_path())  # it knows the model by this name alone
    config = {
        "project_name": "peer",
        "dataset_path": str(texts / "00000.jsonl"),
        "export_path": str(folder / "out.jsonl"),
        "np": options.workers,
        "open_tracer": False,
        "use_cache": False,
        "op_fusion": True,
        "process": [
            {"language_id_score_filter": {"lang": "", "min_score": 0.0}},
            {"character_repetition_filter": {"rep_len": 10, "max_ratio": 1.0}},
            {"word_repetition_filter": {"lang": "en", "tokenization": False, "rep_len": 8, "max_ratio": 1.0}},
            {"document_deduplicator": {}},
        ],
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    environment = {
        "DATA_JUICER_EXTERNAL_MODELS_HOME": str(models),
        "DATA_JUICER_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    return [([str(options.peer_python.parent / "dj-process"), "--config", str(path)], environment)]


def _texts(data: Path, folder: Path, *, num_files: int) -> Path:
    """One text a chat, as JSONL in so many files. Not timed."""
    folder.mkdir(parents=True)
    files = [(folder / f"{number:05d}.jsonl").open("w") for number in range(num_files)]
    for number, record in enumerate(read_records(data)):
        text = "\n\n".join(turn["value"] for turn in record["conversations"])
        files[number % num_files].write(json.dumps({"text": text, "id": str(record["id"])}) + "\n")
    for file in files:
        file.close()
    return folder


Chain = Callable[[argparse.Namespace, Path, Path], Commands]
OURS: dict[str, Chain] = {"fastchat": our_chain, "datatrove": our_text_chain, "data-juicer": our_text_chain}
PEERS: dict[str, Chain] = {
    "fastchat": fastchat_chain,
    "datatrove": datatrove_chain,
    "data-juicer": data_juicer_chain,
}

if __name__ == "__main__":
    main()
