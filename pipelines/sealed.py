"""JSON records that carry a digest of themselves: manifests and pointers, which no other file vouches for.

One flipped bit in a count, a key or a path would read as other data without an error. `self_sha256` is the sha256
of the file as it would be without that line, so anybody can check it:

    grep -v '"self_sha256"' manifest.json | sha256sum      (true where the line is not the last one of the record)
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.errors import IntegrityError

DIGEST_NAME = "self_sha256"


def json_bytes(value: Any) -> bytes:
    """JSON with sorted keys: equal values give equal bytes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def sealed(record: Mapping[str, Any]) -> bytes:
    """The record as a file with its digest in it."""
    assert DIGEST_NAME not in record
    return json_bytes({**record, DIGEST_NAME: hashlib.sha256(json_bytes(record)).hexdigest()})


def unsealed(data: bytes, path: Path, *, cure: str) -> dict[str, Any]:
    """The record that was sealed. Raises IntegrityError, with `cure` as what to do, unless every byte is as written."""
    try:
        record = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"{path} ({len(data)} bytes) is not valid JSON ({error}); {cure}") from None
    if not isinstance(record, dict) or DIGEST_NAME not in record:
        raise IntegrityError(f"{path} has no {DIGEST_NAME}, expected the digest of its other lines; {cure}")
    digest = record.pop(DIGEST_NAME)
    if digest != hashlib.sha256(json_bytes(record)).hexdigest() or sealed(record) != data:
        raise IntegrityError(f"{path} ({len(data)} bytes) was changed since it was written; {cure}")
    return record
