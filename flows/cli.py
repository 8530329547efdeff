"""The command `sft-pipeline`: reads arguments and calls one function.

Results go to stdout, talk goes to stderr. Imports are made inside the commands: `--help` must answer before a
library is loaded.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Group, Parameter

from flows.exit_codes import exit_code_of

DataStage = Literal["merge", "clean", "filter", "dedup", "holdout", "split", "pack"]
Stage = Literal[DataStage, "train", "evaluate", "promote"]
Overrides = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set", negative="", help="Override a key of the config: --set train.max_steps=5; repeatable."
    ),
]
Several = Annotated[tuple[str, ...], Parameter(negative="")]
HELP = """Raw chats and instructions in, a fine-tuned and gated language model out.

CONFIG is a YAML file; `sft-pipeline init FOLDER` writes one. Every command takes --debug, which shows where an
error comes from.
"""


def main() -> None:
    """Entry point of the console script."""
    if sys.argv[1:2] == ["step"]:
        from pipelines.left_out import prepare_data_alone

        prepare_data_alone()
    sys.exit(exit_code_of(run_command, sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Parse and run; raises cyclopts' errors and ours."""
    code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    return code if isinstance(code, int) else 0


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
    folder: Path | None = None,
    /,
    *,
    recipe: str | None = None,
    model: Path | None = None,
    out: Path = Path("sft-pipeline.yaml"),
    force: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Look at the dumps in a folder and write a commented config, or take a recipe.

    Parameters
    ----------
    folder
        Folder with .json, .jsonl or .parquet files, also .gz, .zst, .bz2 and .xz.
    recipe
        Write this one of `sft-pipeline recipes`, with the dumps of the folder for sources if one is given.
    model
        Folder of the model to train.
    out
        Where to write the config.
    force
        Overwrite a config that is already there.
    """
    from flows.init_config import write_config

    print(write_config(folder, model=model, out=out, force=force, recipe=recipe))


@app.command(group=PIPELINE)
def recipes(name: str | None = None, /) -> None:
    """List recipes: short configs of whole routes, by method, model and cards.

    Parameters
    ----------
    name
        Print this one.
    """
    from flows.recipe import print_recipes

    print_recipes(name)


@app.command(group=PIPELINE)
def run(
    config: Path,
    /,
    *,
    first: Annotated[Stage | None, Parameter(name="--from")] = None,
    until: Stage | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
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
def step(
    stage: DataStage, config: Path, /, *, until: DataStage | None = None, overrides: Overrides = ()
) -> None:
    """Run one stage of the data, without Prefect.

    Parameters
    ----------
    stage
        The stage.
    until
        Also the stages after it, as far as this one.
    """
    from flows.commands import run_step

    run_step(stage, config, overrides, last=until or stage)


@app.command(group=MODEL)
def train(config: Path, /, *, overrides: Overrides = ()) -> None:
    """Train on the finished shards, in this process."""
    from flows.commands import run_trainer_here

    run_trainer_here("train", config, overrides)


@app.command(group=MODEL)
def evaluate(config: Path, /, *, overrides: Overrides = ()) -> None:
    """Measure the newest model on the held-out side; writes evaluation.json."""
    from flows.commands import run_trainer_here

    run_trainer_here("evaluate", config, overrides)


@app.command(group=MODEL)
def promote(config: Path, /, *, withdrawn_too: bool = False, overrides: Overrides = ()) -> None:
    """Put the evaluated model into service if it is better than the one there; writes promoted.json.

    Parameters
    ----------
    withdrawn_too
        Also a model that was rolled back before.
    """
    from flows.commands import run_trainer_here

    run_trainer_here("promote", config, overrides, *(["--withdrawn-too"] if withdrawn_too else []))


@app.command(group=MODEL)
def rollback(config: Path, /, *, overrides: Overrides = ()) -> None:
    """Put the model before the current one back into service."""
    from flows.commands import run_trainer_here

    run_trainer_here("promote", config, overrides, "--rollback")


@app.command(group=MODEL)
def consolidate(config: Path, /, *, out: Path, checkpoint: str = "latest", overrides: Overrides = ()) -> None:
    """Write a Hugging Face folder, adapter or model, from a checkpoint of any strategy; needs no GPU.

    Parameters
    ----------
    out
        Folder to write.
    checkpoint
        latest, best or step-<n> of the newest training, or the folder of a checkpoint.
    """
    from schemas.config_file import load_config
    from trainer.consolidate import run_consolidate

    run_consolidate(load_config(config, overrides), checkpoint=checkpoint, out=out)


@app.command(group=MODEL)
def generate(
    config: Path,
    prompt: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    /,
    *,
    prompts: Path | None = None,
    answers: Path | None = None,
    adapter: str = "promoted",
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    overrides: Overrides = (),
) -> None:
    """Answer prompts: those given, or a file of them.

    Parameters
    ----------
    prompts
        JSON lines of {"prompt": "..."} or {"messages": [...]}.
    answers
        File to write for --prompts.
    adapter
        promoted: the model in service; current: the newest trained; none: the base model; or a folder.
    max_new_tokens
        Default: evaluate.max_new_tokens.
    temperature
        0 takes the likeliest token.
    """
    from schemas.config_file import load_config
    from trainer.generate import run_generate

    run_generate(
        load_config(config, overrides),
        prompts=prompt,
        input_path=prompts,
        output_path=answers,
        adapter=adapter,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


@app.command(group=MODEL)
def chat(
    config: Path,
    /,
    *,
    adapter: str = "promoted",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    overrides: Overrides = (),
) -> None:
    """Talk to a model in the terminal.

    Parameters
    ----------
    adapter
        promoted: the model in service; current: the newest trained; none: the base model; or a folder.
    max_new_tokens
        Longest answer.
    temperature
        0 takes the likeliest token.
    """
    from schemas.config_file import load_config
    from trainer.generate import chat as chat_at_terminal

    chat_at_terminal(
        load_config(config, overrides),
        adapter=adapter,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


@app.command(group=MODEL)
def download(name: str, /, *, revision: str | None = None) -> None:
    """Download a model from the hub into the local cache and print what goes into the config.

    Parameters
    ----------
    name
        Owner and name, such as HuggingFaceTB/SmolLM2-135M-Instruct.
    revision
        Commit, tag or branch; default: the newest commit, which is printed.
    """
    from flows.download import download as download_model

    download_model(name, revision)


@app.command(group=PIPELINE)
def show(
    row: str | None = None,
    /,
    *,
    config: Path | None = None,
    run_root: Path | None = None,
    shards: int | None = None,
    html: Path | None = None,
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
    html
        Write the examples into one HTML page; 50 of them, if --shards says no other number.
    color
        Colour; default: only on a terminal, and never with NO_COLOR.
    """
    from flows.show import show_command

    show_command(row, config=config, run_root=run_root, num_examples=shards, color=color, html=html)


@app.command(group=MACHINE)
def doctor(
    config: Path | None = None,
    /,
    *,
    until: Stage | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    overrides: Overrides = (),
) -> int:
    """Look for what is missing or wrong on this machine; exit code 1 if the pipeline would not run.

    Parameters
    ----------
    config
        Also check this config: its sources, its model, disk and memory for them.
    until
        Ask only about the stages up to this one, as of run --until.
    json
        Print one JSON object.
    """
    from flows.doctor import Question, report

    return report(Question(config, overrides, until), as_json=json)


@app.command(group=MACHINE)
def support(
    *,
    strategy: Several = (),
    method: Several = (),
    base: Several = (),
    dtype: Several = (),
    packing: Several = (),
    checkpointing: bool | None = None,
    compile: bool | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    markdown: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Print what works together: strategies, methods, bases, precisions; repeat an option for several values.

    Parameters
    ----------
    strategy
        Only these of train.strategy.
    method
        Only these of train.method.
    base
        Only these of train.base.
    dtype
        Only these of model.dtype.
    packing
        Only these of pack.mode.
    checkpointing
        Only with, or without, train.gradient_checkpointing.
    compile
        Only with, or without, train.compile.
    json
        Print a JSON list with an object for each combination.
    markdown
        Print docs/support-matrix.md in its place.
    """
    from flows.support_page import support_text

    switches = {"checkpointing": checkpointing, "compile": compile}
    chosen: dict[str, tuple[str | bool, ...]] = {
        "strategy": strategy,
        "method": method,
        "base": base,
        "dtype": dtype,
        "packing": packing,
    }
    chosen |= {axis: (switch,) for axis, switch in switches.items() if switch is not None}
    given = {axis: values for axis, values in chosen.items() if values}
    print(support_text(given, as_json=json, as_markdown=markdown), end="")


@app.command(group=MACHINE)
def schema(*, markdown: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Print the JSON schema of a config, for editors.

    Parameters
    ----------
    markdown
        Print docs/configuration.md in its place.
    """
    from flows.reference import reference_page, schema_text

    print(reference_page() if markdown else schema_text(), end="")


@app.command(group=MACHINE)
def deploy(*, prefect_file: Path = Path("prefect.yaml")) -> None:
    """Create the work pool and all deployments on the Prefect server."""
    from flows.deploy import deploy_all

    deploy_all(prefect_file)


@app.command(group=MACHINE)
def undeploy() -> None:
    """Remove the deployments, the work pool and the automation from the Prefect server."""
    from flows.deploy import undeploy_all

    undeploy_all()


if __name__ == "__main__":
    main()
