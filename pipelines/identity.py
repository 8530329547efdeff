"""Chats that teach a model its own name: who are you, who made you, are you somebody else. Made, not read.

A source with `identity` in place of a path. Its rows are never held out and, being alike on purpose, never
near-duplicates.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import orjson

from pipelines.identity_texts import IDENTITY_TEXTS, OTHERS
from schemas.source_config import IdentityConfig

FILE_NAME = "identity.jsonl"
"""The file that the rows say they come from."""


def write_identity(identity: IdentityConfig, path: Path) -> None:
    """The chats as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for question, answer in identity_rounds(identity):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(orjson.dumps({"messages": turns}) + b"\n")


def identity_rounds(identity: IdentityConfig) -> Iterator[tuple[str, str]]:
    """(question, answer): every question with every answer that suits it, in each language, each pair once."""
    rounds = itertools.chain.from_iterable(_rounds(identity, language) for language in identity.languages)
    return iter(dict.fromkeys(rounds))


def _rounds(identity: IdentityConfig, language: str) -> Iterator[tuple[str, str]]:
    texts = IDENTITY_TEXTS[language]
    others = identity.others if identity.others is not None else list(OTHERS)
    own = {identity.name.casefold(), identity.maker.casefold()}
    for questions, answers in (texts.who, texts.maker):
        for question, answer in itertools.product(questions, answers):
            yield question, _filled(answer, identity, "")
    for other in (other for other in others if other.casefold() not in own):
        for question, answer in itertools.product(*texts.other):
            yield _filled(question, identity, other), _filled(answer, identity, other)


def _filled(text: str, identity: IdentityConfig, other: str) -> str:
    # Not str.format: a name may hold braces.
    values = {"name": identity.name, "maker": identity.maker, "other": other}
    pieces = text.replace("{", "\0{").replace("}", "}\0").split("\0")
    return "".join(values[piece[1:-1]] if piece.startswith("{") else piece for piece in pieces)
