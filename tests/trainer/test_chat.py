"""A talk with a tiny model and one trained adapter: by the function line by line, and by the command through a pipe."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from schemas.conversation import Message
from schemas.pipeline_config import PipelineConfig
from tests.trainer.tiny_models import tiny_run, tiny_tokenizer
from trainer.answer import PieceStreamer, Sampling, answer
from trainer.chat import HELP, chat
from trainer.load_trained import LoadedModel, load_for_generation
from trainer.prompts import encode_prompt, printable
from trainer.train import train

ROOT = Path(__file__).parent.parent.parent
SHORT = Sampling(6)


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    config = tiny_run(tmp_path_factory.mktemp("trained"), evaluate={"max_new_tokens": 6})
    train(config)
    return config


def scripted(lines: list[str]) -> Callable[[], str]:
    remaining = iter(lines)

    def read() -> str:
        line = next(remaining, None)
        if line is None:
            raise EOFError
        return line

    return read


def chat_output(
    config: PipelineConfig, lines: list[str], *, adapter: str = "current", sampling: Sampling = SHORT
) -> str:
    """All that was written behind the first line."""
    written: list[str] = []
    chat(config, adapter=adapter, sampling=sampling, read=scripted(lines), write=written.append)
    return "".join(written).partition("\n")[2]


def said(loaded: LoadedModel, *messages: tuple[str, str]) -> str:
    chat = [Message(role, text) for role, text in messages]  # type: ignore[arg-type]
    return answer(loaded.model, loaded.tokenizer, chat, SHORT)


def lines_of(*texts: str) -> str:
    return "\n".join(map(printable, [*texts, ""]))


def test_chat_remembers_what_was_said_until_it_is_told_to_forget(trained_run: PipelineConfig) -> None:
    loaded = load_for_generation(trained_run, "current")
    first = said(loaded, ("user", "red"))
    second = said(loaded, ("user", "red"), ("assistant", first), ("user", "red"))
    assert first != second
    found = chat_output(trained_run, ["red", "red", "/reset", "red", "/quit", "never read"])
    assert found == lines_of(first, second, "forgotten", first)


def test_the_adapter_goes_off_and_on_in_the_same_chat(trained_run: PipelineConfig) -> None:
    with_adapter, base = (load_for_generation(trained_run, name) for name in ("current", "none"))
    first = said(with_adapter, ("user", "red"))
    talked = (("user", "red"), ("assistant", first), ("user", "red"))
    second = said(base, *talked)
    third = said(with_adapter, *talked, ("assistant", second), ("user", "red"))
    assert second != said(with_adapter, *talked)
    found = chat_output(trained_run, ["red", "/adapter off", "red", "/adapter on", "red"])
    assert found == lines_of(first, "adapter off: the base model answers", second, "adapter on", third)


@pytest.mark.stress
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_the_adapter_is_switched_over_a_base_of_few_bits_too(trained_run: PipelineConfig, base: str) -> None:
    train_settings = trained_run.train.model_copy(update={"base": base})
    config = trained_run.model_copy(update={"train": train_settings})
    with_adapter, without = (load_for_generation(config, name) for name in ("current", "none"))
    first = said(with_adapter, ("user", "red"))
    second = said(without, ("user", "red"), ("assistant", first), ("user", "red"))
    found = chat_output(config, ["red", "/adapter off", "red"])
    assert found == lines_of(first, "adapter off: the base model answers", second)


def test_a_system_prompt_is_set_changed_and_taken_away(trained_run: PipelineConfig) -> None:
    loaded = load_for_generation(trained_run, "current")
    with_blue = said(loaded, ("system", "blue"), ("user", "red"))
    with_cat = said(loaded, ("system", "cat"), ("user", "red"))
    without = said(loaded, ("user", "red"))
    assert len({with_blue, with_cat, without}) == 3
    typed = ["/system blue", "red", "/reset", "/system green", "/system cat", "red", "/reset", "/history"]
    typed += ["/system a", "/system", "red", "/history"]
    is_set = "system prompt set"
    assert chat_output(trained_run, typed) == lines_of(
        *(is_set, with_blue, "forgotten", is_set, is_set, with_cat, "forgotten", "nothing was said yet"),
        *(is_set, "no system prompt", without, "user: red", f"assistant: {without}"),
    )


def test_a_chat_is_saved_as_a_source_can_have_it(trained_run: PipelineConfig, tmp_path: Path) -> None:
    path = tmp_path / "saved.jsonl"
    found = chat_output(
        trained_run, ["/save x", "red", f"/save {path}", f"/save {tmp_path}", f"/save {path}"]
    )
    loaded = load_for_generation(trained_run, "current")
    messages = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": said(loaded, ("user", "red"))},
    ]
    assert [json.loads(line) for line in path.read_text().splitlines()] == 2 * [{"messages": messages}]
    assert found.startswith("/save needs a file and a chat")
    assert f"{tmp_path} can't be written" in found


def test_chat_goes_on_after_unknown_commands_and_prompts_that_are_too_long(
    trained_run: PipelineConfig,
) -> None:
    lines = ["/what\x1b", "0" * 300, "/adapter off", "/adapter upside", "", "/help"]
    found = chat_output(trained_run, lines, adapter="none")
    assert found.startswith("unknown command /what\N{REPLACEMENT CHARACTER}\n/adapter on|off")
    assert "shorten it" in found
    assert "has no adapter to switch" in found
    assert "/adapter upside: expected on or off" in found
    assert found.endswith(f"{HELP}\n")


def test_an_interrupted_answer_ends_alone(trained_run: PipelineConfig) -> None:
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 2:  # the first piece of the answer
            raise KeyboardInterrupt

    chat(
        trained_run,
        adapter="none",
        sampling=SHORT,
        read=scripted(["red", "/reset"]),
        write=write,
    )
    assert " [stopped]" in written
    assert "forgotten\n" in written


def test_draws_differ_from_turn_to_turn_and_repeat_with_the_seed(trained_run: PipelineConfig) -> None:
    def talk(seed: int) -> str:
        sampling = Sampling(6, temperature=2.0, seed=seed)
        return chat_output(trained_run, ["red", "/reset", "red"], sampling=sampling)

    assert talk(1) == talk(1)
    assert talk(1) != talk(2)


LEADING = (
    "{% for m in messages %}{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m.role] }}{{ m.content }}"
    "{{ '</s>' if m.role == 'assistant' else ' ' }}{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt }}"
)


def test_streamed_text_leaves_out_the_blank_that_the_template_writes_before_answers() -> None:
    """Else it would stand there twice in the next prompt."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = LEADING
    for text, expected in ((" red blue", "red blue"), ("red blue", "red blue"), ("  red", " red"), ("", "")):
        pieces: list[str] = []
        streamer = PieceStreamer(tokenizer, pieces.append)
        streamer.put(torch.tensor([encode_prompt(tokenizer, [Message("user", "cat")])]))
        for token in tokenizer.encode(text, add_special_tokens=False):
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert "".join(pieces) == expected


def test_the_command_talks_through_a_pipe(trained_run: PipelineConfig, tmp_path: Path) -> None:
    loaded = load_for_generation(trained_run, "current")
    config = tmp_path / "config.yaml"
    config.write_text(trained_run.model_dump_json(exclude_none=True))
    command = [sys.executable, "-m", "flows.cli", "chat", str(config), "--adapter", "current"]
    typed = "red\n/adapter off\n/quit\nnever read\n"
    result = subprocess.run(
        [*command, "--max-new-tokens", "6"],
        input=typed,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "default"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    first, _, rest = result.stdout.partition("\n")
    assert first.startswith("current adapter checkpoints/")
    assert rest == lines_of(said(loaded, ("user", "red")), "adapter off: the base model answers")
