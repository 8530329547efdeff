"""Records of every family, spoiled by a seeded draw: types, keys, depth, sizes, characters, markup, bytes."""

import json
import random
from collections.abc import Callable
from typing import Any

USER, ANSWER = (
    {"role": "user", "content": "What is a river?"},
    {"role": "assistant", "content": "Water that flows."},
)
HUMAN, GPT = (
    {"from": "human", "value": "What is a <b>?"},
    {"from": "gpt", "value": "<div class='markdown'><p>It is</p></div>"},
)

FAMILIES: list[dict[str, Any]] = [
    {"id": "x", "conversations": [HUMAN, GPT, HUMAN, GPT]},
    {"items": [HUMAN, GPT], "plugins": [], "model": "gpt-4"},
    {"conversation": [{"human": "hi there", "assistant": "good day"}], "conversation_id": "c"},
    {"messages": [USER, ANSWER], "created_at": 1708776632},
    {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]},
    {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]], "system": "s"},
    {"instruction": "Add.", "instances": [{"input": "1", "output": "2"}, {"input": "3", "output": "4"}]},
    {"prompt": "Say it.", "completion": "It is said.", "label": True},
    {"prompt": "Say it.", "chosen": "It is said.", "rejected": "No."},
    {"messages": [USER, ANSWER], "label": False},
    {"prompt": {"text": "q", "role": "prompter", "replies": [{"text": "A", "role": "assistant", "rank": 0, "replies": []}, {"text": "B", "role": "assistant"}]}},
    {
        "mapping": {
            "a": {"message": None, "parent": None, "children": ["b"]},
            "b": {"message": {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["q"]}}, "parent": "a", "children": ["c"]},
            "c": {"message": {"author": {"role": "assistant"}, "content": {"content_type": "text", "parts": ["A"]}}, "parent": "b", "children": []},
        },
        "current_node": "c",
    },
    {"chat": {"turn_1": {"Human": "<|Human|>: q<eoh>", "MOSS": "<|MOSS|>: a<eom>"}}, "meta_instruction": "m"},
    {"messages": [{"sender": "a", "text": "hi"}, {"sender": "b", "text": "ho"}]},
    {"text": "# A title\n\nA paragraph. Another sentence.\n\n" * 3, "title": "A title"},
    {"unknown": "keys"},
]  # fmt: skip

NASTY_TEXTS = [
    "\ud800", "\udfff\ud800", "\0", "\x1b[31m", "\ufeff", "\u200b", "\u202eabc", "\U0010ffff", "e\u0301" * 50, "你好" * 30,
    "<div>" * 3000, "<a " * 3000, "&lt;" * 500, "```\n" * 100, "1. x\n" * 100, "x" * 30_000, "\n" * 5000, "0" * 500,
    "<p>" * 400 + "deep" + "</p>" * 400, "<table><tr><td>" * 60, "Human: a\nAssistant:", "<|im_end|></s>", "{{name}}", " ", "",
]  # fmt: skip
NASTY_VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1e308,
    float("nan"),
    float("inf"),
    10**40,
    [],
    {},
    [[]],
    [None],
    "x",
    {"a": {"b": []}},
]
MAX_CHARS = 400_000
DEEP = "deep-value-goes-here"


def mutated_line(draw: random.Random) -> bytes:
    """A record on one line, whole or spoiled in its values, never in its bytes: JSON with NaN and lone surrogates."""
    record = json.loads(json.dumps(draw.choice(FAMILIES)))
    record["nr"] = draw.randrange(10**9)  # few records are alike
    for _ in range(draw.choice([0, 0, 1, 1, 2, 4])):
        draw.choice(MUTATIONS)(record, draw)
    text = json.dumps(record, ensure_ascii=draw.random() < 0.8)
    depth = draw.choice([5, 200, 600, 1100, 5000])
    text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    # Several repetitions of something large would make gigabytes.
    return text.encode("utf-8", "surrogatepass") if len(text) < MAX_CHARS else mutated_line(draw)


def spoiled_line(draw: random.Random) -> bytes:
    """A line that is cut, has other bytes in it, or is no object at all."""
    line = mutated_line(draw)
    at = draw.randrange(1, len(line))
    spoiled = draw.choice(
        [
            line[:at],
            line[:at]
            + draw.choice([b"\xff", b"\xc3", b"\0", b'"', b"}", b"{", b"]", b"\\", b"\r"])
            + line[at:],
            line[:at] + line[at + 1 :],
            b"[" + line + b"]",
            b"17",
            b'"text"',
            b"null",
            b"\xef\xbb\xbf" + line,
        ]
    )
    return spoiled if spoiled.strip(b" \t\r\n") else b"0"


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a record."""
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        inner = stack.pop()
        keys = (
            list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else []
        )
        for key in keys:
            places.append((inner, key))
            stack.append(inner[key])
    return places


def _replace(record: dict[str, Any], draw: random.Random, values: list[Any]) -> None:
    if places := _places(record):
        container, key = draw.choice(places)
        container[key] = json.loads(json.dumps(draw.choice(values)))


def _other_value(record: dict[str, Any], draw: random.Random) -> None:
    _replace(record, draw, NASTY_VALUES)


def _other_text(record: dict[str, Any], draw: random.Random) -> None:
    _replace(record, draw, NASTY_TEXTS)


def _deep(record: dict[str, Any], draw: random.Random) -> None:
    _replace(record, draw, [DEEP])


def _without_key(record: dict[str, Any], draw: random.Random) -> None:
    if places := [(c, k) for c, k in _places(record) if isinstance(c, dict) and k != "nr"]:
        container, key = draw.choice(places)
        del container[key]


def _renamed_key(record: dict[str, Any], draw: random.Random) -> None:
    if places := [(c, k) for c, k in _places(record) if isinstance(c, dict) and k != "nr"]:
        container, key = draw.choice(places)
        container[draw.choice(["messages", "role", "text", "value", "x", "", "id"])] = container.pop(key)


def _repeated(record: dict[str, Any], draw: random.Random) -> None:
    if lists := [c[k] for c, k in _places(record) if isinstance(c[k], list) and c[k]]:
        chosen = draw.choice(lists)
        chosen.extend(chosen[: draw.choice([1, 5])] * draw.choice([1, 60]))


def _large(record: dict[str, Any], draw: random.Random) -> None:
    _replace(record, draw, ["large " * (50_000 if draw.random() < 0.03 else 1000)])


MUTATIONS: list[Callable[[dict[str, Any], random.Random], None]] = [
    _other_value, _other_text, _other_text, _deep, _without_key, _renamed_key, _repeated, _large,
]  # fmt: skip
