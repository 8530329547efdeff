"""`sft-pipeline bench ...`: reads arguments and calls one function. Imports are made inside, as in cli.py."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from flows.bench.options import BenchOptions

Flag = Annotated[bool, Parameter(negative="")]
Several = Annotated[tuple[str, ...], Parameter(negative="")]

bench = App(name="bench", help="Measure training on this machine beside other trainers.")


@bench.command
def train(
    *,
    shape: Literal["8b", "7b", "32b", "toy"] = "8b",
    method: str = "lora",
    base: Literal["plain", "nf4", "int8", "int8_rows"] = "plain",
    rank: int = 16,
    data: Literal["alpaca", "long", "whole"] = "alpaca",
    tokens_per_step: int = 8192,
    capacity: int | None = None,
    chats: int = 0,
    checkpointing: Literal["none", "selective", "full", "auto"] = "none",
    compile: bool | None = None,
    peer: Several = (),
    peer_python: Several = (),
    steps: int = 50,
    warm_up: int = 10,
    rounds: int = 3,
    peer_steps: Several = (),
    peer_rounds: Several = (),
    limit_seconds: float | None = None,
    memory_cap: float | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    sweep: bool = True,
    variants_of: Path | None = None,
    folder: Path = Path("runs/bench-train"),
    make_only: Flag = False,
    resume: Flag = False,
    timeout_seconds: float = 1800.0,
    json: Path | None = None,
    overrides: Annotated[
        tuple[str, ...],
        Parameter(name="--set", negative="", help="Override a key of our config; repeatable."),
    ] = (),
) -> None:
    """Train a model with random weights on made chats: ours and the peers in turns, each in fresh processes.

    The data pass through all seven stages; tokens are counted without padding. Prints a Markdown table.

    Parameters
    ----------
    shape
        Llama-3.1-8B, Llama-2-7B, Qwen2.5-32B, or a toy for a CPU.
    method
        As train.method.
    base
        As train.base; peers that are asked for int8_rows hold theirs in LLM.int8.
    rank
        Of LoRA, on all linear layers; alpha is twice as much.
    data
        Lengths like Alpaca's, 110 tokens on average; long: chats of 1,100 on average and up to 16,384; whole: a chat
        as long as a bin.
    tokens_per_step
        Tokens of one optimiser step.
    capacity
        Tokens of a bin; default: tokens_per_step. Several bins may be cut into micro-steps.
    chats
        How many chats are made; default: enough for the steps.
    checkpointing
        Of ours, and the least that peers may take; auto: the faster of full and none that runs.
    compile
        Ours with train.compile, or without; default: as train.compile is where a config says nothing.
    peer
        trl, unsloth or padded (batches of 32, r8 on queries and values, as written in 2023); repeatable.
    peer_python
        NAME=PATH: the interpreter of a peer that is installed in an environment of its own; repeatable.
    steps
        Timed steps; 0: all of an epoch.
    warm_up
        Steps before them.
    rounds
        Processes of each contestant.
    peer_steps
        NAME=NUMBER: timed steps of a slow peer, fewer than --steps; repeatable.
    peer_rounds
        NAME=NUMBER: processes of a peer, fewer than --rounds; repeatable.
    limit_seconds
        Start no process that would not end by then, and end what still runs: results so far are shown.
    memory_cap
        GiB that the whole GPU's use must stay below: the allocator is capped.
    sweep
        Search each peer's fastest way first; else its safest is taken.
    variants_of
        Take what an earlier --json file found fastest, in place of a search.
    folder
        Where models, data and logs go; one for several benchmarks.
    make_only
        Make the data, no weights, and stop: to carry them to a machine that lacks what the data stages need.
    resume
        Take over processes that an earlier, cut-off call of the same options has finished.
    timeout_seconds
        Of one process.
    json
        Write all numbers of all runs into this file, anew after each process.
    """
    from flows.bench.options import BenchOptions, check_options, numbers_of, pythons_of

    options = BenchOptions(
        folder=folder.resolve(),
        shape=shape,
        method=method,
        base=base,
        rank=rank,
        data=data,
        tokens_per_step=tokens_per_step,
        capacity=capacity if capacity is not None else tokens_per_step,
        num_chats=chats,
        checkpointing=checkpointing,
        compile=compile,
        peers=peer,
        peer_pythons=pythons_of(peer_python),
        num_steps=steps,
        num_warm_up=warm_up,
        num_rounds=rounds,
        steps_of=numbers_of(peer_steps, "--peer-steps"),
        rounds_of=numbers_of(peer_rounds, "--peer-rounds"),
        limit_seconds=limit_seconds,
        memory_cap_gib=memory_cap,
        device=device,
        dtype=dtype,
        sweep=sweep,
        variants_of=variants_of,
        resume=resume,
        timeout_seconds=timeout_seconds,
        overrides=overrides,
    )
    check_options(options)
    if make_only:
        _make(options)
    else:
        _measure(options, json)


def _make(options: "BenchOptions") -> None:
    from flows.bench.making import make

    make(options, weights=False)
    print(options.data_folder)


def _measure(options: "BenchOptions", json: Path | None) -> None:
    from flows.bench.contest import run_bench
    from flows.bench.table import markdown, record
    from pipelines.storage import write_json
    from schemas.errors import TrainingError

    note = None if json is None else lambda found: write_json(json, record(options, found))
    entries = run_bench(options, note)
    print(markdown(options, entries), end="")
    if not entries[0].runs:
        raise TrainingError(f"ours: {entries[0].problem}")


@bench.command
def chart(
    results: Annotated[list[Path], Parameter(negative="")], /, *, out: Path = Path("bench.svg")
) -> None:
    """Draw bars of tokens a second out of files of `bench train --json`.

    Parameters
    ----------
    results
        One or more of them; each is a group of bars.
    out
        The SVG to write.
    """
    from flows.bench.chart import write_chart

    write_chart(results, out)
    print(out)
