"""The command `sft-pipeline`: reads arguments, calls one function, turns errors into a line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or refused, 130 interrupted, 143 terminated. Results go to stdout, talk
goes to stderr. Imports are made inside the commands: `--help` must answer before a library is loaded.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Group, Parameter

from flows.packages import OUR_FOLDER, foreign_package

DataStage = Literal["merge", "clean", "filter", "dedup", "holdout", "split", "pack"]
Stage = Literal[DataStage, "train", "evaluate", "promote"]
Overrides = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set", negative="", help="Override a key of the config: --set train.max_steps=5; repeatable."
    ),
]
HELP = """Raw chats and instructions in, a fine-tuned and gated language model out.

CONFIG is a YAML file; `sft-pipeline init FOLDER` writes one. Every command takes --debug, which shows where an
error comes from.
"""
DEBUG_FLAG = "--debug"
EXIT_REFUSED, EXIT_INTERRUPTED = 2, 130


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code and never lets an error out."""
    problem = foreign_package(OUR_FOLDER)
    if problem is not None:
        return _say_error(problem, EXIT_REFUSED)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    debug = DEBUG_FLAG in arguments
    try:
        return _dispatch([argument for argument in arguments if argument != DEBUG_FLAG], debug=debug)
    except KeyboardInterrupt:
        return _say_error("interrupted; run the same command again to go on", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our stdout has gone, as `| head` does: Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: Sequence[str], *, debug: bool) -> int:
    from schemas.errors import SftPipelineError

    os.environ["SFT_PIPELINE_DEBUG"] = "1" if debug else ""
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return code if isinstance(code, int) else 0
    except CycloptsError as error:
        return _say_error(" ".join(str(error).split()), EXIT_REFUSED)
    except SftPipelineError as error:
        if debug:
            traceback.print_exc()
        return _say_error(str(error), error.exit_code)
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - the last line of defence: told on one line, exit code 1
        if debug:
            traceback.print_exc()
        return _say_error(_unexpected(error), 1)


def _unexpected(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"unexpected {type(error).__name__}: {error} ({place.filename}:{place.lineno}); "
        f"run again with {DEBUG_FLAG} for the whole story"
    )


def _say_error(message: str, code: int) -> int:
    sys.stderr.write(f"sft-pipeline: error: {' '.join(message.split())}\n")
    return code


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    # By default neither `finally` nor temporary folders' clean-up runs on these two.
    sys.exit(128 + number)


def version() -> str:
    """Version of the installed distribution."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        return installed_version("sft-pipeline")
    except PackageNotFoundError:
        return "unknown: sft-pipeline is not installed, this is a bare checkout"


PIPELINE = Group.create_ordered("Data, and the whole way")
MODEL = Group.create_ordered("Model")
MACHINE = Group.create_ordered("Machine")
app = App(name="sft-pipeline", help=HELP, version=version, suppress_keyboard_interrupt=False)


@app.command(group=PIPELINE)
def init(
    folder: Path, *, model: Path | None = None, out: Path = Path("sft-pipeline.yaml"), force: bool = False
) -> None:
    """Look at the dumps in a folder and write a commented config.

    Parameters
    ----------
    folder
        Folder with .json, .jsonl or .parquet files, also .gz and .zst.
    model
        Folder of the model to train.
    out
        Where to write the config.
    force
        Overwrite a config that is already there.
    """
    from flows.init_config import write_config

    print(write_config(folder, model=model, out=out, force=force))


@app.command(group=PIPELINE)
def run(
    config: Path,
    *,
    first: Annotated[Stage | None, Parameter(name="--from")] = None,
    until: Stage | None = None,
    dry_run: bool = False,
    overrides: Overrides = (),
) -> None:
    """Run the whole pipeline: merge to promote. What has not changed is skipped.

    Parameters
    ----------
    first
        Start at this stage; the ones before must be finished.
    until
        Stop after this stage.
    dry_run
        Only say which stages would run, and why.
    """
    from flows.commands import dry_run_pipeline, run_pipeline

    (dry_run_pipeline if dry_run else run_pipeline)(config, overrides, first=first, last=until)


@app.command(group=PIPELINE)
def step(stage: DataStage, config: Path, *, overrides: Overrides = ()) -> None:
    """Run one stage of the data, without Prefect."""
    from flows.commands import run_step

    run_step(stage, config, overrides)


@app.command(group=MODEL)
def train(config: Path, *, overrides: Overrides = ()) -> None:
    """Train on the finished shards, in this process."""
    from flows.commands import run_trainer_here

    run_trainer_here("train", config, overrides)


@app.command(group=MODEL)
def evaluate(config: Path, *, overrides: Overrides = ()) -> None:
    """Measure the newest model on the held-out side; writes evaluation.json."""
    from flows.commands import run_trainer_here

    run_trainer_here("evaluate", config, overrides)


@app.command(group=MODEL)
def promote(config: Path, *, overrides: Overrides = ()) -> None:
    """Put the evaluated model into service if it is better than the one there; writes promoted.json."""
    from flows.commands import run_trainer_here

    run_trainer_here("promote", config, overrides)


@app.command(group=MODEL)
def rollback(config: Path, *, overrides: Overrides = ()) -> None:
    """Put the model before the current one back into service."""
    from flows.commands import run_trainer_here

    run_trainer_here("rollback", config, overrides)


@app.command(group=MODEL)
def generate(
    config: Path,
    prompt: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    *,
    model: Literal["promoted", "newest", "base"] = "promoted",
    overrides: Overrides = (),
) -> None:
    """Answer prompts, one after another; without one, each line of stdin is a prompt.

    Parameters
    ----------
    model
        The model in service, the newest one trained, or the base model.
    """
    from flows.commands import generate_answers

    generate_answers(config, overrides, prompts=prompt, model=model)


@app.command(group=MODEL)
def chat(
    config: Path, *, model: Literal["promoted", "newest", "base"] = "promoted", overrides: Overrides = ()
) -> None:
    """Talk to a model: an empty line ends, /new starts over."""
    from flows.commands import chat_at_terminal

    chat_at_terminal(config, overrides, model=model)


@app.command(group=PIPELINE)
def show(
    row: str | None = None,
    *,
    config: Path | None = None,
    run_root: Path | None = None,
    shards: int | None = None,
    color: bool | None = None,
) -> None:
    """Follow a row through the stages, or show what is trained.

    Parameters
    ----------
    row
        Id of a row, or its first characters.
    config
        Config whose run root is looked at.
    run_root
        Run root to look at, in place of --config.
    shards
        Show so many training examples, what is trained in colour or between [[ and ]].
    color
        Colour; default: only on a terminal, and never with NO_COLOR.
    """
    from flows.show import show_command

    show_command(row, config=config, run_root=run_root, num_examples=shards, color=color)


@app.command(group=MACHINE)
def doctor(config: Path | None = None) -> int:
    """Look for what is missing or wrong on this machine; exit code 1 if the pipeline would not run.

    Parameters
    ----------
    config
        Also check this config: its sources, its model, its run root.
    """
    from flows.doctor import report

    return report(config)


@app.command(group=MACHINE)
def deploy(*, prefect_file: Path = Path("prefect.yaml")) -> None:
    """Create the work pool and all deployments on the Prefect server."""
    from flows.deploy import deploy_all

    deploy_all(prefect_file)


if __name__ == "__main__":
    main()
