"""Which answers are trained: FastChat's and Alpaca's routines and this program, on the same records.

    python benchmarks/masks.py --tokenizer mistral-v1 --chats sharegpt.json zh.jsonl --instructions alpaca_data.json

The routines are written again from what they do, for a Llama-like tokenizer with BOS and `</s>`:

FastChat (train.py, vicuna v1.1): the text is split at `</s>` and at `ASSISTANT: `, the pieces are encoded again, and
their lengths, corrected by one or two, are added up. Where the sum is not the length of the whole, the sample is
ignored. It has a correction for tokenizers that are not "legacy"; the setting that does better is shown.
Alpaca (train.py): the prompt is encoded alone, and as many ids of the whole are ignored.

The judge knows where the answers stand because it has put the text together: a token is to be trained if all its
characters are an answer's, the blank before it or its `</s>`, and a sample is right if exactly these tokens are
trained. Answers behind the limit, which both routines cut off, are counted apart.
"""

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from pipelines.encode import ChatEncoder, build_encoder
from pipelines.split import SplitResult, split_chat
from schemas.conversation import Conversation, Message
from schemas.pipeline_config import SplitConfig

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA = (
    f"{{{{ bos_token }}}}{SYSTEM}"
    "{% for message in messages %}{% if message.role == 'user' %}{{ ' USER: ' if loop.first else 'USER: ' }}"
    "{{ message.content }}{% else %}{{ ' ASSISTANT: ' + message.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
ALPACA_HEAD = "Below is an instruction that describes a task"
ALPACA_TAIL = "Write a response that appropriately completes the request."
ALPACA_PROMPT = (
    f"{ALPACA_HEAD}. {ALPACA_TAIL}\n\n### Instruction:\n{{instruction}}\n\n### Response:",
    f"{ALPACA_HEAD}, paired with an input that provides further context. {ALPACA_TAIL}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
)
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}

Turns = list[tuple[str, str]]

PLANTED = {
    "a literal ASSISTANT:": ("Whose line is it?", "It says: ASSISTANT: hello."),
    "a literal </s>": ("What ends a text?", "The token </s> does."),
    "a literal <unk>": ("What is <unk>?", "An unknown word."),
    "an empty question": ("", "Hello! How can I help?"),
    "an answer that begins with a colon": ("Sign?", ': or "'),
}
"""Chats of two rounds that have one of these as their first."""


@dataclass(frozen=True, slots=True)
class Written:
    """A text, and the characters [start, end) of its answers with the blank before them and their end token."""

    text: str
    answers: list[tuple[int, int]]


def main() -> None:
    arguments = _arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    eos = tokenizer.eos_token
    chats = [turns for path in arguments.chats for turns in chats_of(path)]
    print(f"transformers {version('transformers')}, tokenizers {version('tokenizers')}, {len(chats)} chats")
    for name, first in PLANTED.items():
        turns = list(zip(("user", "assistant") * 2, (*first, "And now?", "Good bye."), strict=True))
        text = vicuna_text(turns, eos)
        found = {
            fastchat(tokenizer, text, legacy=legacy, limit=arguments.max_tokens) for legacy in (True, False)
        }
        print(f"  {name}: FastChat {' or '.join(sorted(found))}, this program {ours(turns, tokenizer, 2048)}")
    written = [vicuna_text(turns, eos) for turns in chats]
    for legacy in (True, False):
        results = [fastchat(tokenizer, text, legacy=legacy, limit=arguments.max_tokens) for text in written]
        report(f"FastChat, {'' if legacy else 'not '}legacy", results)
    report("this program", [ours(turns, tokenizer, arguments.max_tokens) for turns in chats])
    records = [record for path in arguments.instructions for record in read(path)]
    print(f"{len(records)} instructions")
    report("Alpaca", [alpaca(tokenizer, record, limit=512) for record in records])
    report("this program", [ours(alpaca_turns(record), tokenizer, 512) for record in records])


def report(name: str, results: Sequence[str]) -> None:
    """One line: the share of the samples of each kind."""
    counts = Counter(results)
    told = ", ".join(f"{kind} {count:,} ({count / len(results):.2%})" for kind, count in counts.most_common())
    print(f"  {name}: {told}", flush=True)


# The judge --------------------------------------------------------------------------------------------------


def vicuna_text(turns: Turns, eos: str) -> Written:
    """The text as FastChat writes it, with the places of the answers."""
    text, answers = SYSTEM, []
    for number, (role, content) in enumerate(turns):
        if role == "user":
            text += (" " if number == 0 else "") + f"USER: {content}"
        else:
            start = len(text) + len(" ASSISTANT:")
            text += f" ASSISTANT: {content}{eos}"
            answers.append((start, len(text)))
    return Written(text, answers)


def to_train(tokenizer: Any, written: Written) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a text and, for each, whether all of its characters are an answer's."""
    encoded = tokenizer(written.text, return_offsets_mapping=True)
    places = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    wanted = np.zeros(len(places), bool)
    for start, end in written.answers:
        wanted |= (places[:, 0] >= start) & (places[:, 1] <= end) & (places[:, 1] > places[:, 0])
    return np.array(encoded["input_ids"]), wanted


def judged(trained: np.ndarray, wanted: np.ndarray, limit: int) -> str:
    """What became of a sample: the tokens behind the limit are cut off in both."""
    if not wanted[:limit].any():
        return "no answer before the limit"
    if not trained.any():
        return "ignored"
    if not np.array_equal(trained, wanted[:limit]):
        return "wrong tokens trained"
    return "right, answers cut off" if wanted[limit:].any() else "right"


# FastChat's routine, and Alpaca's ---------------------------------------------------------------------------


def fastchat(tokenizer: Any, written: Written, *, legacy: bool, limit: int) -> str:
    """What FastChat trains of a text."""
    ids, wanted = to_train(tokenizer, written)
    trained = np.ones(min(len(ids), limit), bool)
    correction = 0 if legacy else 1
    cursor = 1
    trained[:cursor] = False
    for number, turn in enumerate(written.text.split(tokenizer.eos_token)):
        parts = turn.split(" ASSISTANT: ")
        if turn == "" or len(parts) != 2:
            break
        later = correction if number else 0
        num_asked = len(tokenizer(f"{parts[0]} ASSISTANT: ")["input_ids"]) - 2 - later
        trained[cursor : cursor + num_asked] = False
        cursor += len(tokenizer(turn)["input_ids"]) - later
    trained[cursor:] = False
    num_seen = int(np.count_nonzero(ids[:limit] != tokenizer.unk_token_id))  # padding is <unk> there
    if cursor < limit and cursor != num_seen:
        trained[:] = False
    return judged(trained, wanted, limit)


def alpaca(tokenizer: Any, record: dict[str, Any], *, limit: int) -> str:
    """What Alpaca trains of a record."""
    prompt = ALPACA_PROMPT[record.get("input", "") != ""].format_map(record)
    text = f"{prompt}{record['output']}{tokenizer.eos_token}"
    ids, wanted = to_train(tokenizer, Written(text, [(len(prompt), len(text))]))
    trained = np.ones(min(len(ids), limit), bool)
    trained[: min(limit, len(tokenizer(prompt)["input_ids"]))] = False
    return judged(trained, wanted, limit)


# This program -----------------------------------------------------------------------------------------------

_encoders: dict[int, ChatEncoder] = {}


def ours(turns: Turns, tokenizer: Any, limit: int) -> str:
    """What this program trains of a chat, all of its pieces together, judged by the same offsets."""
    encoder = _encoders.get(id(tokenizer)) or _encoders.setdefault(id(tokenizer), _encoder(tokenizer))
    messages = [Message(role, content) for role, content in turns]  # type: ignore[arg-type]
    row = Conversation(row_id="0" * 32, source="s/f", record=0, messages=messages, meta={})
    result = split_chat(encoder, SplitConfig(max_tokens=limit), row)
    if not isinstance(result, SplitResult):
        return f"dropped, {result.reason}"
    for example in result.examples:
        piece = turns[example.first_message : example.end_message]
        trained = np.zeros(len(example.input_ids), bool)
        for start, end in zip(example.span_starts, example.span_ends, strict=True):
            trained[start:end] = True
        ids, wanted = to_train(tokenizer, vicuna_text(piece, tokenizer.eos_token))
        if np.array_equal(ids, example.input_ids):
            if not np.array_equal(trained, wanted):
                return "wrong tokens trained"
        elif not _says_the_answers(tokenizer, example.input_ids[trained], piece):
            return "wrong tokens trained"
    return "right, overlong rounds left out" if result.counts.get("rounds_overlong") else "right"


def _encoder(tokenizer: Any) -> ChatEncoder:
    tokenizer.chat_template = VICUNA
    return build_encoder(tokenizer)


def _says_the_answers(tokenizer: Any, ids: np.ndarray, piece: Turns) -> bool:
    """For texts with control strings, which the judge's plain encoding reads as control tokens."""
    said = [f"{content}{tokenizer.eos_token}" for role, content in piece if role == "assistant"]
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return "".join(decoded.split()) == "".join("".join(said).split())


# Data -------------------------------------------------------------------------------------------------------


def alpaca_turns(record: dict[str, Any]) -> Turns:
    question = "\n".join(text for text in (record["instruction"], record.get("input", "")) if text)
    return [("user", question), ("assistant", record["output"])]


def chats_of(path: Path) -> Iterator[Turns]:
    """Chats that both can render: roles in turn from the first question on, as FastChat cuts them."""
    for record in read(path):
        turns = [(ROLES.get(turn["from"], ""), turn["value"]) for turn in record["conversations"]]
        while turns and turns[0][0] != "user":
            turns = turns[1:]
        if turns and all(role == ("user", "assistant")[n % 2] for n, (role, _) in enumerate(turns)):
            if len(turns) % 2:
                turns = turns[:-1]
            yield turns


def read(path: Path) -> list[Any]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode()
    return (
        json.loads(text)
        if text.lstrip().startswith("[")
        else [json.loads(line) for line in text.splitlines()]
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="folder of a Llama-like tokenizer")
    parser.add_argument(
        "--chats", nargs="*", default=[], type=Path, help="ShareGPT files, .json, .jsonl, .gz"
    )
    parser.add_argument("--instructions", nargs="*", default=[], type=Path, help="Alpaca files")
    parser.add_argument("--max-tokens", type=int, default=2048, help="longest chat (FastChat's recipe: 2048)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
