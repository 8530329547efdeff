"""Commands of the data, and of the whole way from dumps to a promoted model."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from flows.command_options import DataStage, Flag, Overrides, Stage


def init(
    folder: Path | None = None,
    /,
    *,
    recipe: str | None = None,
    model: Path | None = None,
    out: Path = Path("sft-pipeline.yaml"),
    force: Flag = False,
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


def recipes(name: str | None = None, /) -> None:
    """List recipes: short configs of whole routes, by method, model and cards.

    Parameters
    ----------
    name
        Print this one.
    """
    from flows.recipe import print_recipes

    print_recipes(name)


def run(
    config: Path,
    /,
    *,
    first: Annotated[Stage | None, Parameter(name="--from")] = None,
    until: Stage | None = None,
    dry_run: Flag = False,
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
