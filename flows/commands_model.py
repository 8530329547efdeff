"""Commands that train and judge a model."""

from pathlib import Path

from flows.command_options import Overrides


def train(config: Path, /, *, overrides: Overrides = ()) -> None:
    """Train on the finished shards, in this process."""
    from flows.commands import run_trainer_here

    run_trainer_here("train", config, overrides)


def evaluate(config: Path, /, *, overrides: Overrides = ()) -> None:
    """Measure the newest model on the held-out side; writes evaluation.json."""
    from flows.commands import run_trainer_here

    run_trainer_here("evaluate", config, overrides)


def promote(config: Path, /, *, withdrawn_too: bool = False, overrides: Overrides = ()) -> None:
    """Put the evaluated model into service if it is better than the one there; writes promoted.json.

    Parameters
    ----------
    withdrawn_too
        Also a model that was rolled back before.
    """
    from flows.commands import run_trainer_here

    run_trainer_here("promote", config, overrides, *(["--withdrawn-too"] if withdrawn_too else []))


def rollback(config: Path, /, *, overrides: Overrides = ()) -> None:
    """Put the model before the current one back into service."""
    from flows.commands import run_trainer_here

    run_trainer_here("promote", config, overrides, "--rollback")


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


def from_meta(folder: Path, /, *, out: Path, max_positions: int | None = None) -> None:
    """Turn LLaMA's weights as Meta gave them away into a model folder.

    Parameters
    ----------
    folder
        Folder with params.json, consolidated.*.pth and tokenizer.model.
    out
        Folder to write.
    max_positions
        Longest text of the model in tokens; default: what its generation has.
    """
    from trainer.meta_weights import convert

    print(convert(folder, out, max_positions=max_positions))
