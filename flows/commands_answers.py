"""Commands for what comes after training: answers, chat, export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from flows.command_options import Flag, Overrides, Several

if TYPE_CHECKING:
    from schemas.pipeline_config import PipelineConfig

Device = Literal["auto", "cpu", "cuda", "mps"]
BaseForm = Literal["plain", "int8", "nf4"]
Adapter = Annotated[
    str,
    Parameter(
        help="promoted: the model in service; current: the newest trained; none: the base model; or a folder."
    ),
]


def generate(
    config: Path,
    prompt: Several = (),
    /,
    *,
    prompts: Path | None = None,
    answers: Path | None = None,
    adapter: Adapter = "promoted",
    before_after: Flag = False,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    beams: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    device: Device = "auto",
    processes: int | None = None,
    base: BaseForm | None = None,
    overrides: Overrides = (),
) -> None:
    """Answer prompts: those given, or a file of them, with the template of training.

    Parameters
    ----------
    prompts
        JSON lines of {"prompt": "..."}, {"messages": [...]} or any format that sources may have. A killed run goes on
        where it stopped.
    answers
        File to write for --prompts: a line for each line of it.
    before_after
        The base model answers too, side by side.
    max_new_tokens
        Default: evaluate.max_new_tokens.
    temperature
        0 takes the likeliest token.
    top_k
        Draw from so many of the likeliest tokens; 0 from all.
    top_p
        Draw from the likeliest tokens that have this share of the probability together.
    beams
        Beam search over so many; 1 is none.
    seed
        Of the draws; a line's answer hangs on it and on the line's number alone.
    batch_size
        Lines answered side by side; fewer where memory is too small.
    device
        auto: model.device, and Apple's GPU where there is no other.
    processes
        Each takes a share of the lines; default: one for each GPU.
    base
        In what form the base is held; default: train.base.
    """
    from trainer.launch import prepare_libraries

    prepare_libraries()
    from trainer.answer import Sampling
    from trainer.generate import run_generate

    settings = _settings(config, overrides, base)
    longest = max_new_tokens if max_new_tokens is not None else settings.evaluate.max_new_tokens
    run_generate(
        settings,
        Sampling(longest, temperature, top_k, top_p, seed, beams),
        prompts=prompt,
        input_path=prompts,
        output_path=answers,
        adapter=adapter,
        before_after=before_after,
        rows_at_once=batch_size,
        device=device,
        num_processes=processes,
    )


def chat(
    config: Path,
    /,
    *,
    adapter: Adapter = "promoted",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    device: Device = "auto",
    base: BaseForm | None = None,
    overrides: Overrides = (),
) -> None:
    """Talk to a model in the terminal, or through a pipe line by line; /help lists what else can be typed.

    Parameters
    ----------
    max_new_tokens
        Longest answer.
    temperature
        0 takes the likeliest token.
    top_k
        Draw from so many of the likeliest tokens; 0 from all.
    top_p
        Draw from the likeliest tokens that have this share of the probability together.
    seed
        Of the draws.
    device
        auto: model.device, and Apple's GPU where there is no other.
    base
        In what form the base is held; default: train.base.
    """
    from trainer.launch import prepare_libraries

    prepare_libraries()
    from trainer.answer import Sampling
    from trainer.chat import chat as talk

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    talk(_settings(config, overrides, base), adapter=adapter, sampling=sampling, device=device)


def _settings(config: Path, overrides: tuple[str, ...], base: BaseForm | None) -> "PipelineConfig":
    from schemas.config_file import load_config

    return load_config(config, (*overrides, f"train.base={base}") if base is not None else overrides)
