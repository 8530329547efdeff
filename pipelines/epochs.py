"""Which examples stand in an epoch, how often and in which order: weights, temperature, curriculum.

Every draw hangs on hash(seed, epoch, key of the example), never on its place: new data elsewhere changes nothing.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

_COPY_STEP = 0x9E3779B97F4A7C15  # odd, so that the copies of an example get different keys


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """`codes` int32 [examples] are numbers of `names`, the names of the sources (not of their files)."""

    names: tuple[str, ...]
    codes: np.ndarray

    def counts(self) -> np.ndarray:
        """Examples of each source, int64 [names]."""
        return np.bincount(self.codes, minlength=len(self.names))


def read_sources(table: pa.Table) -> Sources:
    """Of a split's examples. Nothing is done example by example: files are few."""
    column = table["source"].dictionary_encode().unify_dictionaries()
    files = column.chunk(0).dictionary.to_pylist() if column.num_chunks else []
    named = [str(file).split("/", 1)[0] for file in files]
    names = tuple(dict.fromkeys(named))
    numbers = np.array([names.index(name) for name in named], np.int32)
    codes = [numbers[chunk.indices.to_numpy()] for chunk in column.chunks]
    return Sources(names, np.concatenate([np.zeros(0, np.int32), *codes]))


def epoch_weights(
    sources: Sources, weights: Mapping[str, float], *, temperature: float = 1.0
) -> dict[str, float]:
    """How often each example of a source stands in an epoch.

    With a temperature T the shares of the sources are as their weighted numbers of examples to the power 1/T; the
    epoch keeps its length.
    """
    asked = np.array([weights.get(name, 1.0) for name in sources.names])
    counts = sources.counts()
    if temperature == 1.0:
        return dict(zip(sources.names, asked.tolist(), strict=True))
    wanted = counts * asked
    powers = np.where(wanted > 0, np.maximum(wanted, 1e-300) ** (1.0 / temperature), 0.0)
    shares = powers / max(powers.sum(), 1e-300)
    copies = wanted.sum() * shares / np.maximum(counts, 1)
    return dict(zip(sources.names, copies.tolist(), strict=True))


def examples_of_epoch(
    sources: Sources, keys: np.ndarray, weights: Mapping[str, float], *, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which examples stand in an epoch, and a key for each: int32 and uint64 [examples of the epoch].

    A weight's whole part is a number of copies. Its fraction f gives one more to round(f x examples) of the
    source, and the epochs take turns: in 1/f epochs every example has had its turn, up to rounding.
    """
    asked = [weights.get(name, 1.0) for name in sources.names]
    if all(weight == 1.0 for weight in asked):
        return np.arange(len(keys), dtype=np.int32), keys
    copies = np.array([int(weight) for weight in asked], np.int32)[sources.codes]
    for code, weight in enumerate(asked):
        if fraction := weight % 1.0:
            own = np.flatnonzero(sources.codes == code)
            copies[own[_turn(keys[own], fraction, seed=seed, epoch=epoch)]] += 1
    examples = np.repeat(np.arange(len(keys), dtype=np.int32), copies)
    number = np.arange(len(examples)) - np.repeat(np.cumsum(copies) - copies, copies)
    return examples, keys[examples] + number.astype(np.uint64) * np.uint64(_COPY_STEP)


def _turn(keys: np.ndarray, fraction: float, *, seed: int, epoch: int) -> np.ndarray:
    """Places of the examples whose turn it is: a window on one shuffled ring, moved on in each epoch."""
    ring = np.argsort(mixed(keys, salt_of(f"{seed}/turns")), kind="stable")
    first, end = (int(number * fraction * len(keys) + 0.5) for number in (epoch, epoch + 1))
    return ring[np.arange(first, end) % len(keys)]


# Keys -------------------------------------------------------------------------------------------------------


def row_keys(table: pa.Table) -> np.ndarray:
    """Keys of a split's examples, uint64 [examples]: row id and piece, nothing of their place."""
    keys = np.empty(table.num_rows, np.uint64)
    start = 0
    for batch in table.select(["row_id", "piece"]).to_batches():
        hashed = _hashed(batch.column(0))
        pieces = batch.column(1).to_numpy().astype(np.uint64)
        keys[start : start + len(hashed)] = mixed(hashed + pieces * np.uint64(_COPY_STEP), 1)
        start += len(hashed)
    return keys


def _hashed(texts: pa.Array) -> np.ndarray:
    """A 64-bit hash of each string. Row ids are 32 hex digits; any other strings work too."""
    texts = texts.cast(pa.large_string())
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    lengths = np.diff(offsets)
    hashes = np.empty(len(texts), np.uint64)
    for length in np.unique(lengths).tolist():
        which = np.flatnonzero(lengths == length)
        padded = np.zeros((len(which), -(-length // 8) * 8), np.uint8)
        padded[:, :length] = data[offsets[which][:, None] + np.arange(length)]
        running = np.full(len(which), length, np.uint64)
        for word in padded.view("<u8").T:
            running = mixed(running ^ word, 0)
        hashes[which] = running
    return hashes


def as_keys(keys: np.ndarray | Sequence[bytes], num_examples: int) -> np.ndarray:
    """Keys as uint64, where they may be bytes of any length."""
    if not isinstance(keys, np.ndarray):
        keys = np.frombuffer(b"".join(_digest(key) for key in keys), "<u8")
    if len(keys) != num_examples:
        raise ValueError(f"{len(keys)} row keys for {num_examples} examples")
    return keys.astype(np.uint64, copy=False)


def salt_of(text: str) -> int:
    """A 64-bit number for a text such as "<seed>/<epoch>"."""
    return int.from_bytes(_digest(text.encode()), "little")


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=8).digest()


def mixed(keys: np.ndarray, salt: int) -> np.ndarray:
    """A hash of (key, salt), uint64: splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    state = keys ^ np.uint64(salt)
    state += np.uint64(_COPY_STEP)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state ^= state >> np.uint64(shift)
        state *= np.uint64(factor)
    state ^= state >> np.uint64(31)
    return state
