"""One record's bytes -> its JSON object, with what had to be repaired, and what it says of itself."""

import json
import re
from codecs import BOM_UTF8
from datetime import datetime, timedelta, timezone
from typing import Any

import orjson

from pipelines.formats.turns import is_plain
from schemas.conversation import Drop

_ID_KEYS = ("id", "conversation_id")
_DATE_KEYS = ("create_time", "created_at", "date", "timestamp")
_MIN_SECONDS = 1e8  # 1973: smaller numbers are no dates
_MIN_MILLISECONDS = 1e11  # 1973 in milliseconds, the year 5138 in seconds


def parse_record(raw: bytes) -> tuple[dict[str, Any], int] | Drop:
    """The record and how many lone surrogates in it became U+FFFD; or why it is none.

    orjson refuses lone surrogates and NaN; the standard library reads them (NaN becomes null).
    """
    num_repairs = 0
    raw = raw.removeprefix(BOM_UTF8)
    try:
        record = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        parsed = _parse_leniently(raw, error)
        if isinstance(parsed, Drop):
            return parsed
        record, num_repairs = parsed
    if not isinstance(record, dict):
        return Drop("not_an_object", f"the record is {type(record).__name__}, expected an object")
    return record, num_repairs


def record_meta(record: dict[str, Any]) -> dict[str, Any]:
    """Id, date, set, model, tools and the length of an input, where a record has them."""
    meta: dict[str, Any] = {}
    if original_id := next(filter(None, (_id_text(record[key]) for key in _ID_KEYS if key in record)), ""):
        meta["id"] = original_id
    if date := next(filter(None, (iso_date(record[key]) for key in _DATE_KEYS if key in record)), None):
        meta["date"] = date
    if record.get("set") == "train":
        meta["set"] = "train"
    if isinstance(record.get("model"), str) and record["model"]:
        meta["model"] = record["model"]
    given = record.get("input")
    if "instruction" in record and isinstance(given, str) and given.strip():
        meta["input_chars"] = len(given)
    tools = record.get("tools")
    if isinstance(tools, (str, list)) and tools and is_plain(tools):
        meta["tools"] = tools
    return meta


def iso_date(value: Any) -> str | None:
    """Seconds or milliseconds since 1970, or an ISO date, as ISO date and time in UTC; None for anything else."""
    try:
        moment = _from_text(value.strip()) if isinstance(value, str) else _from_number(value)
        return moment.astimezone(timezone.utc).isoformat(timespec="seconds") if moment else None
    except (ValueError, OverflowError):
        return None


def _parse_leniently(raw: bytes, error: orjson.JSONDecodeError) -> tuple[Any, int] | Drop:
    if "depth limit" in str(error):
        return Drop("invalid_json", "nested deeper than 1,024 brackets")
    num_repairs = [0]
    try:
        value = json.loads(raw.decode("utf-8", "surrogatepass"), parse_constant=lambda _: None)
        return _without_lone_surrogates(value, num_repairs), num_repairs[0]
    except UnicodeDecodeError as problem:
        return Drop("invalid_utf8", f"byte {problem.start} of the record: {problem.reason}")
    except RecursionError:
        return Drop("invalid_json", f"nested too deep to be repaired: {error}")
    except ValueError:
        return Drop("invalid_json", f"{error}, counted in the record")


def _without_lone_surrogates(value: Any, num_repairs: list[int]) -> Any:
    if isinstance(value, str):
        if value.isascii():
            return value
        # Through UTF-16 two halves that stand together become their character.
        text = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        num_repairs[0] += text.count("\ufffd") - value.count("\ufffd")
        return text
    if isinstance(value, list):
        return [_without_lone_surrogates(item, num_repairs) for item in value]
    if isinstance(value, dict):
        return {
            _without_lone_surrogates(key, num_repairs): _without_lone_surrogates(item, num_repairs)
            for key, item in value.items()
        }
    return value


def _id_text(value: Any) -> str:
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""


def _from_number(value: Any) -> datetime | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= _MIN_SECONDS:
        return None
    seconds = value / 1000 if value >= _MIN_MILLISECONDS else value
    return datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=seconds)


# datetime.fromisoformat reads another set of texts in each version of Python.
_ISO = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d))?(?:[.,]\d+)?)? ?(?:Z|UTC|([+-])(\d\d):?(\d\d))?",
    re.ASCII,
)


def _from_text(text: str) -> datetime | None:
    if re.fullmatch(r"\d{9,13}(\.\d{1,9})?", text, re.ASCII):
        return _from_number(float(text))
    if not (match := _ISO.fullmatch(text)):
        return None
    numbers = [int(digits or 0) for digits in match.groups()[:6]]
    moment = datetime(*numbers, tzinfo=timezone.utc)  # type: ignore[arg-type,misc]
    offset = timedelta(hours=int(match[8] or 0), minutes=int(match[9] or 0))
    return moment + offset if match[7] == "-" else moment - offset
