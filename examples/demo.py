"""The whole journey on examples/, on this machine's CPU: `make demo`.

Runs the flow `sft-pipeline` as `sft-pipeline run configs/demo.yaml` would, then shows what came of it. What has
not changed since the last time is skipped.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).parent.parent
CONFIG = Path("configs/demo.yaml")
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Run, show, say what to try next; returns the exit code of the run."""
    started = time.monotonic()
    command = [str(Path(sys.executable).parent / "sft-pipeline"), "run", str(CONFIG)]
    console.print(f"[bold]$ sft-pipeline run {CONFIG}[/bold]", markup=True)
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if result.returncode != 0:
        return result.returncode
    run_root = Path(result.stdout.strip().splitlines()[-1])
    evaluation = json.loads((run_root / "evaluation.json").read_text())
    show_answers(evaluation)
    show_held_out(evaluation)
    show_places(run_root, evaluation)
    console.print(f"\nDone in {time.monotonic() - started:.0f} s.")
    return 0


def show_answers(evaluation: dict[str, Any]) -> None:
    """The demo's questions, answered by the base model and by the tuned one."""
    facts = {
        q["question"]: q["fact"] for q in json.loads((ROOT / "examples/demo.json").read_text())["questions"]
    }
    console.print(
        "\n[bold]Two questions, before and after training[/bold] (the second stands nowhere in examples/)"
    )
    for answers in evaluation["answers"]:
        fact = facts[answers["question"]]
        console.print(f"\n  {answers['question']}")
        for label, key in (("before", "base"), ("after", "candidate")):
            answer = " ".join(answers[key].split())
            mark = "green" if fact in answer else "red"
            console.print(Text(f"    {label:7}", "dim") + Text(answer, mark))


def show_held_out(evaluation: dict[str, Any]) -> None:
    """Loss on chats that were set aside before training."""
    table = Table("held-out side", "chats", "loss (nats/token)", "bits per byte", title_justify="left")
    for model in evaluation["models"]:
        total = model["total"]
        name = {"base": "before: base model", "candidate": "after: candidate"}.get(
            model["label"], model["label"]
        )
        table.add_row(
            name, str(total["num_examples"]), f"{total['loss']:.3f}", f"{total['bits_per_byte']:.3f}"
        )
    console.print()
    console.print(table)


def show_places(run_root: Path, evaluation: dict[str, Any]) -> None:
    """Where everything lies, and what to try next."""
    root = run_root.relative_to(ROOT) if run_root.is_relative_to(ROOT) else run_root
    promoted = (run_root / "promoted.json").exists()
    console.print("[bold]Where it lies[/bold]")
    console.print(f"  report     {root}/evaluation.json" + (f", {root}/promoted.json" if promoted else ""))
    console.print(f"  adapter    {root}/{evaluation['candidate']['path']}")
    console.print(f"  shards     {root}/06_shards (open with datasets.load_from_disk)")
    console.print(f"  drops      {root}/0*/dropped-*.parquet, each row with its reason")
    console.print("\n[bold]Try next[/bold]")
    for command in (
        f"sft-pipeline show --config {CONFIG} --shards 3",
        f"sft-pipeline chat {CONFIG}",
        f"sft-pipeline run {CONFIG} --set train.max_tokens=120000",
        "sft-pipeline init FOLDER   # with your own dumps",
    ):
        console.print(f"  .venv/bin/{command}")


if __name__ == "__main__":
    sys.exit(main())
