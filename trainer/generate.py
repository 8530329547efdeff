"""Talk to a model: a chat in the terminal, or a file of prompts.

    chat(config)                               terminal loop: /reset, /adapter on|off, /quit
    generate_file(config, prompts, answers)    JSON lines in, JSON lines out

How one answer is made stands in trainer/answer.py.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from pipelines.storage import durable_file
from schemas.conversation import ROLES
from schemas.errors import ConfigError, InputError, LimitError
from schemas.pipeline_config import PipelineConfig
from trainer.answer import LoadedModel, Write, answer, load_for_generation, printable

# Chat -------------------------------------------------------------------------------------------------------

CHAT_HELP = "/reset forgets the chat, /adapter on|off compares with the base model, /quit ends"


@dataclass(slots=True)
class _Chat:
    loaded: LoadedModel
    max_new_tokens: int
    temperature: float
    write: Write
    messages: list[dict[str, str]] = field(default_factory=list)
    adapter_on: bool = True


def chat(
    config: PipelineConfig,
    *,
    adapter: str | Path = "promoted",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    read: Callable[[str], str] = input,
    write: Write | None = None,
) -> None:
    """Chat in the terminal until /quit or end of input; Ctrl-C stops an answer."""
    show = write if write is not None else _write_to_stdout
    loaded = load_for_generation(config, adapter)
    state = _Chat(loaded, max_new_tokens, temperature, show)
    show(f"{loaded.description}. {CHAT_HELP}\n")
    while (line := _read_line(read)) != "/quit":
        if line.startswith("/"):
            show(_command(state, line) + "\n")
        elif line:
            _turn(state, line)


def _read_line(read: Callable[[str], str]) -> str:
    try:
        return read("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return "/quit"


def _command(state: _Chat, line: str) -> str:
    if line == "/reset":
        state.messages.clear()
        return "forgotten"
    if line in ("/adapter on", "/adapter off"):
        if not state.loaded.has_adapter:
            return f"{state.loaded.description} has no adapter to switch"
        state.adapter_on = line.endswith("on")
        return "adapter on" if state.adapter_on else "adapter off: the base model answers"
    return f"unknown command {printable(line)}: {CHAT_HELP}"


def _turn(state: _Chat, text: str) -> None:
    state.messages.append({"role": "user", "content": text})
    pieces: list[str] = []

    def on_text(piece: str) -> None:
        pieces.append(piece)
        state.write(printable(piece))

    try:
        with _adapter_switch(state):
            _answer_into(state, on_text)
    except KeyboardInterrupt:
        state.write(" [stopped]")
    except InputError as error:
        state.messages.pop()
        state.write(f"{error} (/reset forgets the chat)\n")
        return
    state.write("\n")
    state.messages.append({"role": "assistant", "content": "".join(pieces)})


def _answer_into(state: _Chat, on_text: Write) -> None:
    answer(
        state.loaded.model,
        state.loaded.tokenizer,
        state.messages,
        max_new_tokens=state.max_new_tokens,
        temperature=state.temperature,
        seed=len(state.messages),
        on_text=on_text,
    )


def _adapter_switch(state: _Chat) -> AbstractContextManager[None]:
    if state.adapter_on or not state.loaded.has_adapter:
        return nullcontext()
    without: AbstractContextManager[None] = state.loaded.model.disable_adapter()  # type: ignore[operator]
    return without


def _write_to_stdout(text: str) -> None:
    print(text, end="", flush=True)


# Files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GeneratedFile:
    """What came of a file of prompts. `bad_lines` are (line number from 1, what is wrong)."""

    path: Path
    num_answers: int
    bad_lines: tuple[tuple[int, str], ...]


def generate_file(
    config: PipelineConfig,
    input_path: Path,
    output_path: Path,
    *,
    adapter: str | Path = "promoted",
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
) -> GeneratedFile:
    """Answers each line of a JSON-lines file of {"messages": [...]} or {"prompt": "..."}.

    Each output line is {"line": number in the input, "messages": [..., the answer]}. Lines that can't be
    answered are left out and returned with what is wrong. The output appears whole, at the end.
    Raises InputError when there is no input, LimitError when no line of it could be answered.
    """
    if not input_path.is_file():
        raise InputError(f"no file of prompts at {input_path}")
    if output_path.exists() and output_path.samefile(input_path):
        raise ConfigError(f"{output_path} is the input as well: name another file for the answers")
    loaded = load_for_generation(config, adapter)
    num_tokens = max_new_tokens if max_new_tokens is not None else config.evaluate.max_new_tokens
    bad_lines: list[tuple[int, str]] = []
    num_answers = 0
    show = _every_few_seconds()
    with durable_file(output_path) as temporary, temporary.open("wb") as output:
        for number, line in _numbered_lines(input_path):
            try:
                record = _answered(loaded, line, number, max_new_tokens=num_tokens, temperature=temperature)
            except InputError as error:
                bad_lines.append((number, str(error)))
                continue
            output.write(orjson.dumps(record) + b"\n")
            num_answers += 1
            show(f"{num_answers} answers")
        if num_answers == 0:
            raise LimitError(f"{input_path}: no line could be answered{_first_bad_line(bad_lines)}")
    return GeneratedFile(output_path, num_answers, tuple(bad_lines))


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _answered(
    loaded: LoadedModel, line: bytes, number: int, *, max_new_tokens: int, temperature: float
) -> dict[str, Any]:
    messages = _prompt_messages(line)
    text = answer(
        loaded.model,
        loaded.tokenizer,
        messages,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=number,
    )
    return {"line": number, "messages": [*messages, {"role": "assistant", "content": text}]}


def _prompt_messages(line: bytes) -> list[dict[str, Any]]:
    """Raises InputError for anything but {"messages": [...]} or {"prompt": "..."}."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise InputError(f"not JSON: {error}") from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise InputError('expected {"messages": [...]} or {"prompt": "..."}')
    for message in messages:
        _check_message(message)
    return messages


def _check_message(message: object) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise InputError('a message is not {"role": ..., "content": "text"}')
    if message.get("role") not in ROLES:
        raise InputError(f"role {message.get('role')!r} is not one of {', '.join(ROLES)}")


def _first_bad_line(bad_lines: Sequence[tuple[int, str]]) -> str:
    return f"; line {bad_lines[0][0]}: {bad_lines[0][1]}" if bad_lines else ": it is empty"


def _every_few_seconds(seconds: float = 5.0) -> Write:
    """Progress on stderr, at most once in so many seconds."""
    begun = shown = time.monotonic()

    def show(text: str) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= seconds:
            shown = now
            print(f"{text} in {now - begun:.0f} s", file=sys.stderr, flush=True)

    return show


# The command ------------------------------------------------------------------------------------------------


def run_generate(
    config: PipelineConfig,
    *,
    prompts: Sequence[str] = (),
    input_path: Path | None = None,
    output_path: Path | None = None,
    adapter: str | Path = "promoted",
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
) -> None:
    """`sft-pipeline generate`: prints answers to prompts, or answers a file into a file."""
    if input_path is not None and output_path is not None:
        made = generate_file(
            config,
            input_path,
            output_path,
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        for number, problem in made.bad_lines:
            print(f"{input_path}:{number}: {printable(problem)}", file=sys.stderr)
        print(f"{made.num_answers} answers in {made.path}, {len(made.bad_lines)} bad lines left out")
        return
    if not prompts or input_path is not None or output_path is not None:
        raise ConfigError("generate needs a prompt, or both a file of prompts and a file for the answers")
    loaded = load_for_generation(config, adapter)
    num_tokens = max_new_tokens if max_new_tokens is not None else config.evaluate.max_new_tokens
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        text = answer(
            loaded.model, loaded.tokenizer, messages, max_new_tokens=num_tokens, temperature=temperature
        )
        print(printable(text))
