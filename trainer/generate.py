"""`sft-pipeline generate`: answers to prompts on the command line, or to a file of them; before and after if asked.

One answer is made in trainer/answer.py, a file's in trainer/answer_files.py and trainer/answer_shares.py.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from schemas.conversation import Message
from schemas.errors import ConfigError
from schemas.pipeline_config import PipelineConfig
from trainer.answer import Sampling, answer
from trainer.answer_files import AnsweredFile, FileWork, answer_file
from trainer.answer_shares import answer_lines
from trainer.load_trained import Choice, Device, LoadedModel, choose, load_choice
from trainer.prompts import printable


def run_generate(
    config: PipelineConfig,
    sampling: Sampling,
    *,
    prompts: Sequence[str] = (),
    input_path: Path | None = None,
    output_path: Path | None = None,
    adapter: str = "promoted",
    before_after: bool = False,
    rows_at_once: int = 16,
    device: Device = "auto",
    num_processes: int | None = None,
) -> None:
    """Prints answers to prompts, or answers a file into a file. Raises ConfigError when it is asked for neither."""
    is_file = input_path is not None and output_path is not None and not prompts
    if not is_file and (not prompts or input_path is not None or output_path is not None):
        raise ConfigError("generate needs prompts, or both a file of prompts and a file for the answers")
    if before_after and adapter == "none":
        raise ConfigError("--before-after compares with the base model, and --adapter none is the base model")
    choice = choose(config, adapter)
    if input_path is not None and output_path is not None:
        work = FileWork(
            input_path=input_path,
            output_path=output_path,
            choice=choice,
            base=choose(config, "none"),
            sampling=sampling,
            before_after=before_after,
            rows_at_once=rows_at_once,
            device=device,
            num_processes=num_processes,
        )
        _report(generate_file(config, work), input_path)
        return
    show = _print_before_after if before_after else _print_answers
    show(config, choice, prompts, sampling, device)


def generate_file(config: PipelineConfig, work: FileWork) -> AnsweredFile:
    """Answers each line; see answer_file."""
    return answer_file(config, work, partial(answer_lines, config, work))


def _report(made: AnsweredFile, input_path: Path) -> None:
    for number, problem in made.bad_lines:
        print(f"{input_path}:{number}: {printable(problem)}", file=sys.stderr)
    taken_over = f", {made.num_taken_over} of them of an earlier run" if made.num_taken_over else ""
    print(f"{made.num_answers} answers in {made.path}{taken_over}, {len(made.bad_lines)} bad lines")


def _print_answers(
    config: PipelineConfig, choice: Choice, prompts: Sequence[str], sampling: Sampling, device: Device
) -> None:
    loaded = load_choice(config, choice, device=device)
    for prompt in prompts:
        print(_said(loaded.model, loaded, prompt, sampling))


def _print_before_after(
    config: PipelineConfig, choice: Choice, prompts: Sequence[str], sampling: Sampling, device: Device
) -> None:
    """An adapter is switched off and on; of whole models one after the other is in memory."""
    if choice.is_adapter:
        loaded = load_choice(config, choice, device=device)
        with loaded.without_adapter() as base:
            befores = [_said(base, loaded, prompt, sampling) for prompt in prompts]
    else:
        loaded = load_choice(config, choose(config, "none"), device=device)
        befores = [_said(loaded.model, loaded, prompt, sampling) for prompt in prompts]
        del loaded
        loaded = load_choice(config, choice, device=device)
    for prompt, before in zip(prompts, befores, strict=True):
        after = _said(loaded.model, loaded, prompt, sampling)
        print(f"{printable(prompt)}\n  before: {before}\n  after:  {after}")


def _said(model: torch.nn.Module, loaded: LoadedModel, prompt: str, sampling: Sampling) -> str:
    return printable(answer(model, loaded.tokenizer, [Message("user", prompt)], sampling))
