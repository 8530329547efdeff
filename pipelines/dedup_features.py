"""What stage 4 needs to know of each row: keys of its turns, what survivors are chosen by, and gram sets."""

import hashlib
import json
import re
from array import array
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.grams import GRAMS_TYPE, compared_text, folded, gram_sets, spoken, to_column
from pipelines.rules.prose import MIN_CODE_LINES, prose_of
from schemas.conversation import Conversation, utf8
from schemas.pipeline_config import PipelineConfig

FEATURES = pa.schema(
    [
        pa.field("row_id", pa.large_string(), nullable=False),
        pa.field("num_chars", pa.int64(), nullable=False),  # user and assistant text, white space folded
        pa.field("date_us", pa.int64(), nullable=False),  # since 1970, UTC; NO_DATE where the record has none
        pa.field("source_rank", pa.int64(), nullable=False),  # 0 is the best
        pa.field("first_prompt_key", pa.uint64(), nullable=False),  # hash of the first user turn; 0 for none
        pa.field("answers_key", pa.uint64(), nullable=False),  # hash of all assistant turns; 0 for none
        # Hash of the first 1, 2, ... turns: the last names the whole chat, the others its beginnings.
        pa.field("turn_keys", pa.large_list(pa.uint64()), nullable=False),
        # Rows that share it are never near-duplicates of each other; 0: of none.
        pa.field("exempt_group", pa.uint64(), nullable=False),
        pa.field("grams", GRAMS_TYPE, nullable=False),  # empty where near-duplicates are not looked for
        pa.field("has_code", pa.bool_(), nullable=False),
        pa.field("prose_grams", GRAMS_TYPE, nullable=False),  # of what is no code; empty where there is none
    ]
)

NO_DATE = -(2**63)


def features(rows: Iterable[Conversation], config: PipelineConfig) -> pa.Table:
    """What `decide` needs of each row, in the order of the rows; schema FEATURES."""
    ranks = {name: rank for rank, name in enumerate(config.dedup.source_rank)}
    ids: list[str] = []
    numbers = {name: array("q") for name in ("num_chars", "date_us", "source_rank", "num_turns")}
    keys = {name: array("Q") for name in ("turn", "exempt_group", "first_prompt_key", "answers_key")}
    texts, proses = [], []
    for row in rows:
        turns = [(message.role, spoken(message)) for message in row.messages]
        turn_keys = _turn_keys(turns, row.meta.get("tools"))
        ids.append(row.row_id)
        keys["turn"].extend(turn_keys)
        keys["exempt_group"].append(_exempt_group(row))
        keys["first_prompt_key"].append(_texts_key([text for role, text in turns if role == "user"][:1]))
        keys["answers_key"].append(_texts_key([text for role, text in turns if role == "assistant"]))
        numbers["num_turns"].append(len(turn_keys))
        numbers["num_chars"].append(sum(len(said) for role, said in turns if role in ("user", "assistant")))
        numbers["date_us"].append(_microseconds(row.meta.get("date")))
        numbers["source_rank"].append(ranks.get(row.source.partition("/")[0], len(ranks)))
        is_compared = config.dedup.near and row.meta.get("near_exempt") is not True
        texts.append(compared_text(turns) if is_compared else "")
        proses.append(_prose_beside_code(row) if is_compared else None)
    ends = np.cumsum(np.array(numbers.pop("num_turns"), np.int64))
    turn_column = to_column(np.concatenate([[0], ends]), np.array(keys.pop("turn"), np.uint64))
    columns = {
        "row_id": pa.array(ids, pa.large_string()),
        **{name: pa.array(np.array(values, np.int64)) for name, values in numbers.items()},
        **{name: pa.array(np.array(values, np.uint64)) for name, values in keys.items()},
        "turn_keys": turn_column,
        "grams": _grams(texts),
        "has_code": pa.array([prose is not None for prose in proses], pa.bool_()),
        "prose_grams": _grams([prose or "" for prose in proses]),
    }
    return pa.table({name: columns[name] for name in FEATURES.names}, schema=FEATURES)


def _turn_keys(turns: Iterable[tuple[str, str]], tools: Any) -> list[int]:
    """Hash of the first 1, 2, ... turns. Tools offered and empty system prompts: as the model would see them."""
    digest = hashlib.blake2b(digest_size=8)
    if tools:
        digest.update(b"tools" + json.dumps(tools, sort_keys=True).encode())
    keys = []
    for role, text in turns:
        if role == "system" and not text:
            continue
        turn = utf8(text)
        digest.update(f"\n{role} {len(turn)}\n".encode() + turn)
        keys.append(int.from_bytes(digest.digest(), "little"))
    return keys


def _exempt_group(row: Conversation) -> int:
    """Paths of one tree."""
    if not row.meta.get("group"):
        return 0
    return int.from_bytes(
        hashlib.blake2b(utf8(f"group {row.meta['group']}"), digest_size=8).digest(), "little"
    )


def _texts_key(texts: list[str]) -> int:
    """Hash of texts, 0 where there is nothing in them."""
    if not any(texts):
        return 0
    digest = hashlib.blake2b(digest_size=8)
    for text in map(utf8, texts):
        digest.update(f"{len(text)} ".encode() + text)
    return int.from_bytes(digest.digest(), "little")


# Unfenced code: lines that end in a brace or a semicolon, or are indented. A look before the slow one.
_CODE_LINE = re.compile(r"[{};][ \t]*$|^(?: {4}|\t)", re.MULTILINE)


def _prose_beside_code(row: Conversation) -> str | None:
    """The user and assistant turns without code, None where there is none in them."""
    said = [message for message in row.messages if message.role in ("user", "assistant")]
    if not any(_holds_code(message.content) for message in said):
        return None
    return " ".join(folded(prose_of(message.content)) for message in said)


def _holds_code(text: str) -> bool:
    return "```" in text or "~~~" in text or len(_CODE_LINE.findall(text)) >= MIN_CODE_LINES


_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def _microseconds(date: Any) -> int:
    """An ISO date as microseconds since 1970; without a zone it is UTC. Anything else is no date."""
    try:
        parsed = datetime.fromisoformat(str(date).strip().replace("Z", "+00:00"))
    except ValueError:
        return NO_DATE
    aware = parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)
    return (aware - _EPOCH) // timedelta(microseconds=1)


def _grams(texts: list[str]) -> pa.LargeListArray:
    sets = gram_sets(texts)
    return to_column(sets.starts, sets.hashes)
