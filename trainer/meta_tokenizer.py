"""Meta's tokenizer.model -> tokenizer.json and its settings. Two kinds: SentencePiece's protobuf of LLaMA 1 and 2,
and the list of Llama 3, a token in base64 and its rank on each line.

Both are byte-pair encodings, and both files leave out which pair makes a token: every pair of two known tokens does,
in the order of the tokens' scores or ranks. Read here by hand, so that neither library is needed.
"""

import base64
import binascii
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BPE_TYPE = 2
NORMAL, USER_DEFINED = 1, 4
SPACE = "▁"
LLAMA_3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NUM_LLAMA_3_SPECIALS = 256
LLAMA_3_NAMES = {
    0: "begin_of_text",
    1: "end_of_text",
    6: "start_header_id",
    7: "end_header_id",
    9: "eot_id",
}
LLAMA_31_NAMES = LLAMA_3_NAMES | {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
Pair = tuple[str, str]


def write_tokenizer(path: Path, folder: Path, *, is_newer: bool) -> None:
    """Of a tokenizer.model; `is_newer`: of Llama 3.1 and later. Raises InputError where it is neither kind."""
    if not path.is_file():
        raise InputError(
            f"{path} is missing: it lies beside the folders of Meta's models; copy it into this one"
        )
    data = path.read_bytes()
    tokenizer = _ranked(path, data, is_newer=is_newer) if _is_ranked(data) else _sentencepiece(path, data)
    tokenizer.save_pretrained(folder)


# LLaMA 1 and 2 ------------------------------------------------------------------------------------------------


def _sentencepiece(path: Path, data: bytes) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    try:
        pieces, model_type = read_pieces(data)
    except (struct.error, UnicodeDecodeError, IndexError, ValueError) as error:
        raise InputError(f"{path} is no tokenizer of SentencePiece nor of Llama 3 ({error})") from None
    if model_type != BPE_TYPE or not pieces:
        raise InputError(
            f"{path} holds {len(pieces)} pieces of type {model_type}; expected LLaMA's, of type {BPE_TYPE}"
        )
    ids = {text: number for number, (text, _, _) in enumerate(pieces)}
    mergeable = {text: -score for text, score, kind in pieces if kind in (NORMAL, USER_DEFINED)}
    unknown, begin, end = (text for text, _, _ in pieces[:3])
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids, merges=_pairs(mergeable, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    # A space before every text, also before one that begins with spaces.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(tokenizer, begin, end, unk_token=unknown)


def _finished(tokenizer: "Tokenizer", begin: str, end: str, **names: str) -> Any:
    """With the token that begins every text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B",
        special_tokens=[(begin, tokenizer.token_to_id(begin))],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, **names)


def _pairs(order: Mapping[str, float], ids: Mapping[str, int]) -> list[Pair]:
    """Which two tokens make each token, the first ones first; of one token the pair of lower ids first."""
    found: list[tuple[float, int, int, Pair]] = []
    for token, place in order.items():
        for middle in range(1, len(token)):
            left, right = token[:middle], token[middle:]
            if left in order and right in order:
                found.append((place, ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def read_pieces(data: bytes) -> tuple[list[tuple[str, float, int]], int]:
    """Text, score and kind of each piece, and the type of the model."""
    pieces: list[tuple[str, float, int]] = []
    model_type = 1
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, b"\0" * 4))
            pieces.append((piece[1].decode(), score, int(piece.get(3, NORMAL))))
        elif field == 2 and isinstance(value, bytes):
            model_type = int(dict(_fields(value)).get(3, 1))
    return pieces, model_type


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Of one protobuf message: its number, and a whole number or bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        length = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            length, place = _varint(data, place)
        if length is None or place + length > len(data):
            raise ValueError(f"odd bytes at {place}")
        yield key >> 3, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while data[place] & 0x80:
        number |= (data[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
    return number | data[place] << shift, place + 1


# Llama 3 ------------------------------------------------------------------------------------------------------


def _is_ranked(data: bytes) -> bool:
    words = data[:200].partition(b"\n")[0].split()
    return len(words) == 2 and words[1].isdigit()


def _ranked(path: Path, data: bytes, *, is_newer: bool) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    try:
        ranks = {
            base64.b64decode(word, validate=True): int(rank)
            for word, rank in map(bytes.split, data.splitlines())
        }
    except (ValueError, binascii.Error) as error:
        raise InputError(f"{path} is no list of tokens and ranks ({error}); download it again") from None
    letters = _letters()
    ids = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=_pairs(ids, ids), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = llama_3_specials(is_newer=is_newer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    return _finished(tokenizer, specials[0], specials[1])


def llama_3_specials(*, is_newer: bool) -> list[str]:
    """All of them by id: those with a name, and the numbered ones in the places between."""
    names = LLAMA_31_NAMES if is_newer else LLAMA_3_NAMES
    reserved = iter(range(NUM_LLAMA_3_SPECIALS))
    return [
        f"<|{names[place]}|>" if place in names else f"<|reserved_special_token_{next(reserved)}|>"
        for place in range(NUM_LLAMA_3_SPECIALS)
    ]


def _letters() -> dict[int, str]:
    """A printable letter for each byte, as GPT-2 and everything after it writes them."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
