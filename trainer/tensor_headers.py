"""Headers of safetensors files: which tensor lies where. Light: no torch, and no weight is read."""

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

from schemas.errors import InputError

MAX_HEADER_BYTES = 100 * 2**20
BLOCK_BYTES = 1 << 22
INDEX_NAME, WEIGHTS_NAME = "model.safetensors.index.json", "model.safetensors"

UNREADABLE = (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError)


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Name -> dtype, shape and data_offsets, and where the numbers begin. Raises one of UNREADABLE."""
    (num_bytes,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(min(num_bytes, MAX_HEADER_BYTES)))
    header.pop("__metadata__", None)
    return header, 8 + num_bytes


def unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is no readable safetensors file ({error}); download the model again")


def weight_paths(folder: Path) -> list[Path]:
    """The files that the index names, or the one there is by default."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return [folder / WEIGHTS_NAME]
    return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]


def same_bytes(folder: Path, first: str, second: str) -> bool:
    """Whether two tensors of a model are equal to the bit; reads them only as far as they are."""
    places = [_place(folder, name) for name in (first, second)]
    lengths = {end - start for _, start, end in places}
    if len(lengths) > 1:
        return False
    with places[0][0].open("rb") as one, places[1][0].open("rb") as other:
        one.seek(places[0][1])
        other.seek(places[1][1])
        left = lengths.pop()
        while left > 0:
            count = min(left, BLOCK_BYTES)
            if one.read(count) != other.read(count):
                return False
            left -= count
    return True


def _place(folder: Path, name: str) -> tuple[Path, int, int]:
    """File, first byte and the byte behind the last one."""
    for path in weight_paths(folder):
        try:
            with path.open("rb") as file:
                header, data_start = read_header(file)
        except UNREADABLE as error:
            raise unreadable(path, error) from None
        if name in header:
            start, end = header[name]["data_offsets"]
            return path, data_start + start, data_start + end
    raise InputError(f"{folder} holds no tensor {name}; download the model again")
