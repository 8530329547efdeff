"""Commands for what comes after training: answers, chat, export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from flows.command_options import BaseForm, Flag, Overrides, Several

if TYPE_CHECKING:
    from schemas.pipeline_config import PipelineConfig

Device = Literal["auto", "cpu", "cuda", "mps"]
AnsweringDevice = Annotated[
    Device, Parameter(help="auto: model.device, and Apple's GPU where there is no other.")
]
Base = Annotated[BaseForm | None, Parameter(help="In what form the base is held; default: train.base.")]
Temperature = Annotated[float, Parameter(help="0 takes the likeliest token.")]
TopK = Annotated[int, Parameter(help="Draw from so many of the likeliest tokens; 0 from all.")]
TopP = Annotated[
    float, Parameter(help="Draw from the likeliest tokens that have this share of the probability together.")
]
Beams = Annotated[int, Parameter(help="Beam search over so many; 1 is none.")]
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
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    beams: Beams = 1,
    seed: int = 0,
    batch_size: int = 16,
    device: AnsweringDevice = "auto",
    processes: int | None = None,
    base: Base = None,
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
    seed
        Of the draws; a line's answer hangs on it and on the line's number alone.
    batch_size
        Lines answered side by side; fewer where memory is too small.
    processes
        Each takes a share of the lines; default: one for each GPU.
    """
    _prepare_libraries()
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
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: int = 0,
    device: AnsweringDevice = "auto",
    base: Base = None,
    overrides: Overrides = (),
) -> None:
    """Talk to a model in the terminal, or through a pipe line by line; /help lists what else can be typed.

    Parameters
    ----------
    max_new_tokens
        Longest answer.
    seed
        Of the draws.
    """
    _prepare_libraries()
    from trainer.answer import Sampling
    from trainer.chat import chat as talk

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    talk(_settings(config, overrides, base), adapter=adapter, sampling=sampling, device=device)


def export(
    config: Path,
    /,
    *,
    out: Path,
    form: Literal["adapter", "merged", "model"] | None = None,
    adapter: Adapter = "promoted",
    checkpoint: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_gb: float = 5.0,
    max_difference: float | None = None,
    check: bool = True,
    device: Device = "auto",
    overrides: Overrides = (),
) -> None:
    """Write a folder to hand on: adapter, merged model or whole model, with tokenizer and model card.

    Parameters
    ----------
    out
        Folder to write.
    form
        adapter: beside its base; merged: base and adapter as one model, an adapter over 4 or 8 bits with the numbers
        that these stand for; model: trained whole. Default: what training left.
    checkpoint
        In place of --adapter: latest, best or step-<n> of the newest training, or the folder of a checkpoint.
    dtype
        Of a merged model; default: what training computed in.
    max_shard_gb
        Largest file of a merged model.
    max_difference
        Refuse a merged model whose logits differ by a larger share of their spread; default 0.05, over int8 0.1.
    check
        Compare the merged model with base and adapter; it needs memory for one of them at a time.
    device
        Where they are compared.
    """
    _prepare_libraries()
    from trainer.export import MergeSettings, run_export

    merge = MergeSettings(dtype, int(max_shard_gb * 10**9), max_difference, check, device)
    settings = _settings(config, overrides, None)
    run_export(settings, out, form=form, adapter=adapter, checkpoint=checkpoint, merge=merge)


def harness(
    config: Path,
    tasks: Several,
    /,
    *,
    task_folder: Path | None = None,
    adapter: Adapter = "promoted",
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    chat_template: bool = True,
    seed: int = 0,
    device: AnsweringDevice = "auto",
    base: Base = None,
    overrides: Overrides = (),
) -> None:
    """Measure a model under tasks of lm-evaluation-harness, offline; the extra lm-eval installs it.

    Parameters
    ----------
    tasks
        Names of tasks.
    task_folder
        Folder with their YAML files; default: the library's own, with data out of the local cache. A YAML may name
        Python functions: run only tasks that you trust as code.
    limit
        So many examples of each task.
    fewshot
        Solved examples before each question; default: the task's own number.
    batch_size
        Requests side by side.
    chat_template
        Ask with the chat template of training.
    seed
        Of the choice of solved examples.
    """
    _prepare_libraries()
    from trainer.harness import HarnessSettings, run_harness

    settings = HarnessSettings(task_folder, limit, fewshot, batch_size, chat_template, seed)
    run_harness(_settings(config, overrides, base), tasks, settings, adapter=adapter, device=device)


def _prepare_libraries() -> None:
    """Before any of them is imported."""
    from trainer.launch import prepare_libraries

    prepare_libraries()


def _settings(config: Path, overrides: tuple[str, ...], base: BaseForm | None) -> "PipelineConfig":
    from schemas.config_file import load_config

    return load_config(config, (*overrides, f"train.base={base}") if base is not None else overrides)
