"""`sft-pipeline chat`: a talk with a model, streamed, in a terminal or from a pipe, line by line.

Prompts are training's own. The adapter can be switched off and on between two questions of one chat.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson
import torch

from schemas.conversation import Conversation, Message
from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig
from trainer.answer import Sampling, Write, answer, seed_of
from trainer.load_trained import Device, LoadedModel, load_for_generation
from trainer.prompts import printable, prompt_messages

HELP = """\
/adapter on|off  switch the adapter; off, the base model answers
/system TEXT     set the system prompt; without a text there is none
/history         show the chat so far
/save FILE       append the chat to a file of JSON lines, as sources may have it
/reset           forget the chat, the system prompt as well
/quit            end; so does the end of the input"""


@dataclass(slots=True)
class _Chat:
    config: PipelineConfig
    loaded: LoadedModel
    sampling: Sampling
    write: Write
    messages: list[Message] = field(default_factory=list)
    adapter_on: bool = True


def chat(
    config: PipelineConfig,
    *,
    adapter: str | Path = "promoted",
    sampling: Sampling,
    device: Device = "auto",
    read: Callable[[], str] | None = None,
    write: Write | None = None,
) -> None:
    """Talk until /quit or the end of input; Ctrl-C stops an answer."""
    show = write if write is not None else _write_to_stdout
    read_line = read if read is not None else _line_reader()
    loaded = load_for_generation(config, adapter, device=device)
    state = _Chat(config, loaded, sampling, show)
    show(f"{printable(loaded.description)}. /help lists what else can be typed\n")
    while (line := _next_line(read_line)) != "/quit":
        if line.startswith("/"):
            show(_command(state, line) + "\n")
        elif line:
            _turn(state, line)


def _line_reader() -> Callable[[], str]:
    """With a prompt, and lines that can be edited and called back, where a person types; bare from a pipe."""
    if not sys.stdin.isatty():
        return input
    with suppress(ImportError):
        import readline  # noqa: F401 - input() uses it once it is there
    return lambda: input("> ")


def _next_line(read: Callable[[], str]) -> str:
    try:
        return read().strip()
    except (EOFError, KeyboardInterrupt):
        return "/quit"


def _write_to_stdout(text: str) -> None:
    print(text, end="", flush=True)


# A question -------------------------------------------------------------------------------------------------


def _turn(state: _Chat, text: str) -> None:
    state.messages.append(Message("user", text))
    pieces: list[str] = []

    def on_text(piece: str) -> None:
        pieces.append(piece)
        state.write(printable(piece))

    try:
        with _answering(state) as model:
            _answer_into(state, model, on_text)
    except KeyboardInterrupt:
        state.write(" [stopped]")
    except InputError as error:
        state.messages.pop()
        state.write(f"{error} (/reset forgets the chat)\n")
        return
    state.write("\n")
    state.messages.append(Message("assistant", "".join(pieces)))


def _answer_into(state: _Chat, model: torch.nn.Module, on_text: Write) -> None:
    tokenizer, number = state.loaded.tokenizer, len(state.messages)
    asked = prompt_messages(tokenizer, state.config.split, Conversation("", "", 0, state.messages))
    sampling = replace(state.sampling, seed=seed_of(state.sampling.seed, number))
    answer(model, tokenizer, asked, sampling, on_text=on_text)


@contextmanager
def _answering(state: _Chat) -> Iterator[torch.nn.Module]:
    if state.adapter_on or not state.loaded.has_adapter:
        yield state.loaded.model
    else:
        with state.loaded.without_adapter() as base:
            yield base


# Commands ---------------------------------------------------------------------------------------------------


def _command(state: _Chat, line: str) -> str:
    name, _, rest = line.partition(" ")
    command = _COMMANDS.get(name)
    if command is None:
        return f"unknown command {printable(line)}\n{HELP}"
    return command(state, rest.strip())


def _help(state: _Chat, rest: str) -> str:
    return HELP


def _switch_adapter(state: _Chat, rest: str) -> str:
    if rest not in ("on", "off"):
        return f"/adapter {printable(rest)}: expected on or off"
    if not state.loaded.has_adapter:
        return f"{printable(state.loaded.description)} has no adapter to switch"
    state.adapter_on = rest == "on"
    return "adapter on" if state.adapter_on else "adapter off: the base model answers"


def _set_system(state: _Chat, rest: str) -> str:
    if state.messages[:1] and state.messages[0].role == "system":
        del state.messages[0]
    if rest:
        state.messages.insert(0, Message("system", rest))
    return "system prompt set" if rest else "no system prompt"


def _show_history(state: _Chat, rest: str) -> str:
    lines = [f"{message.role}: {printable(message.content)}" for message in state.messages]
    return "\n".join(lines) or "nothing was said yet"


def _save(state: _Chat, rest: str) -> str:
    if not rest or not state.messages:
        return "/save needs a file and a chat to save"
    messages = [{"role": message.role, "content": message.content} for message in state.messages]
    try:
        with Path(rest).open("ab") as file:
            file.write(orjson.dumps({"messages": messages}) + b"\n")
    except OSError as error:
        return f"{printable(rest)} can't be written: {error.strerror}"
    return f"{len(messages)} messages appended to {printable(rest)}"


def _reset(state: _Chat, rest: str) -> str:
    state.messages.clear()
    return "forgotten"


_COMMANDS: dict[str, Callable[[_Chat, str], str]] = {
    "/help": _help,
    "/adapter": _switch_adapter,
    "/system": _set_system,
    "/history": _show_history,
    "/save": _save,
    "/reset": _reset,
}
