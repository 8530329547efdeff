"""Personal data and secrets -> placeholders, the same for the same value throughout a chat: [EMAIL_1], [PHONE_2].

Found by pattern and, where there is one, by check digit: card numbers by Luhn, IBANs by their country's length and
modulo 97, addresses by what the registries reserve. Names, streets and numbers without a telling form are not found:
this makes leaks rarer, it does not make a data set anonymous. Code stays as it is unless the settings say otherwise;
keys that stay in it are counted.
"""

import ipaddress
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipelines.markdown import code_of, map_outside_code

KINDS = ("key", "email", "iban", "card", "ip", "phone")
"""In the order in which they are looked for: what one took, the next doesn't see."""


def redact(texts: Sequence[str], kinds: Sequence[str], *, in_code: bool, repairs: Counter[str]) -> list[str]:
    """The texts of one chat with placeholders. Counts redacted_<kind> in `repairs`."""
    placeholders = Placeholders.after(texts)
    return [_redacted(text, kinds, placeholders, in_code=in_code, repairs=repairs) for text in texts]


def num_keys_in_code(texts: Sequence[str]) -> int:
    """API keys that stand in the code of a chat."""
    return sum(len(list(_keys(code_of(text)))) for text in texts if "`" in text and _may_hold_keys(text))


@dataclass(slots=True)
class Placeholders:
    """Numbers of the values of one chat, by kind. Numbers go on behind those that the chat came with."""

    numbers: dict[str, dict[str, int]]
    next_numbers: Counter[str]

    @classmethod
    def after(cls, texts: Sequence[str]) -> "Placeholders":
        used: Counter[str] = Counter()
        for text in texts:
            for kind, number in _PLACEHOLDER.findall(text) if "_" in text else ():
                used[kind.lower()] = max(used[kind.lower()], int(number))
        return cls(defaultdict(dict), used)

    def of(self, kind: str, value: str) -> str:
        numbers = self.numbers[kind]
        if value not in numbers:
            self.next_numbers[kind] += 1
            numbers[value] = self.next_numbers[kind]
        return f"[{kind.upper()}_{numbers[value]}]"


_PLACEHOLDER = re.compile(rf"\[({'|'.join(kind.upper() for kind in KINDS)})_(\d{{1,6}})\]")


def _redacted(
    text: str, kinds: Sequence[str], placeholders: Placeholders, *, in_code: bool, repairs: Counter[str]
) -> str:
    for kind in KINDS:
        if kind not in kinds or not _MAY_HOLD[kind](text):
            continue

        def replace(piece: str, kind: str = kind) -> str:
            pieces, position = [], 0
            for start, end, value in FINDERS[kind](piece):
                pieces += [piece[position:start], placeholders.of(kind, value)]
                position = end
                repairs[f"redacted_{kind}"] += 1
            return "".join([*pieces, piece[position:]])

        text = replace(text) if in_code else map_outside_code(text, replace)
    return text


# ------------------------------------------------------------------------------------------------- finders

Found = Iterator[tuple[int, int, str]]
"""Start, end, and the value as it is compared: two spellings of one number are one."""

_LETTERS = "A-Za-z0-9_\u00c0-\u024f"  # and no others: Chinese puts no blank before an address
_EMAIL = re.compile(
    rf"(?<![{_LETTERS}.+/@-])[{_LETTERS}+-][{_LETTERS}.+-]{{0,63}}@"
    rf"(?:[A-Za-z0-9-]{{1,63}}\.){{1,6}}[A-Za-z]{{2,24}}(?![{_LETTERS}@-])"
)
_RESERVED_DOMAIN = re.compile(
    r"@(?:.*\.)?(?:example\.(?:com|org|net)|example|test|invalid|localhost|local)$", re.I
)

_ADDRESS_BEFORE = re.compile(r"://\S*$")  # user:password@host


def _emails(text: str) -> Found:
    for match in _EMAIL.finditer(text):
        value = match[0].lower()
        in_address = _ADDRESS_BEFORE.search(text[max(0, match.start() - 200) : match.start()])
        if not _RESERVED_DOMAIN.search(value) and not value.startswith("git@") and not in_address:
            yield match.start(), match.end(), value


_IPV4 = re.compile(
    r"(?<![\w.:/-])(?:\d{1,3}\.){3}\d{1,3}(?![\w.-]|/\d)|(?<=//)(?:\d{1,3}\.){3}\d{1,3}(?![\w.-])",
    re.ASCII,
)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:.])", re.ASCII)
_VERSION_BEFORE = re.compile(r"(?:\bv|version|release|build|chapter|section|§)[\s:.]*$", re.IGNORECASE)


def _ips(text: str) -> Found:
    """Addresses that somebody can have: not private, local, reserved for documentation; no versions."""
    matches = sorted([*_IPV4.finditer(text), *_IPV6.finditer(text)], key=re.Match.start)
    for match in matches:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            continue
        before = text[max(0, match.start() - 12) : match.start()]
        if address.is_global and not _VERSION_BEFORE.search(before) and not _is_section(text, match):
            yield match.start(), match.end(), str(address)


def _is_section(text: str, match: re.Match[str]) -> bool:
    """Whether "3.3.2.1" numbers the heading that stands behind it."""
    line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
    is_small = all(part.isdigit() and int(part) < 100 for part in match[0].split("."))
    return is_small and not line.strip(" #*>|-\t") and text[match.end() : match.end() + 1] == " "


_CARD = re.compile(
    r"(?<![\w.+-])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -]?)\d{6}\2\d{5})(?![\w-]|\.\d)",
    re.ASCII,
)
_CARD_BRAND = re.compile(
    r"(?:4\d{12}(?:\d{3}(?:\d{3})?)?|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}|3(?:0[0-5]|[68]\d)\d{11})$"
)


def _cards(text: str) -> Found:
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if _CARD_BRAND.match(digits) and _luhn(digits):
            yield match.start(), match.end(), digits


def _luhn(digits: str) -> bool:
    doubled = (int(d) * (1 + place % 2) for place, d in enumerate(reversed(digits)))
    return sum(n - 9 * (n > 9) for n in doubled) % 10 == 0


_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_IBAN_CHARS = dict(
    pair.split(":")
    for pair in (
        "AD:24 AE:23 AL:28 AT:20 AZ:28 BA:20 BE:16 BG:22 BH:22 BR:29 BY:28 CH:21 CR:22 CY:28 CZ:24 DE:22 DK:18 DO:28 EE:20 "
        "EG:29 ES:24 FI:18 FO:18 FR:27 GB:22 GE:22 GI:23 GL:18 GR:27 GT:28 HR:21 HU:28 IE:22 IL:23 IQ:23 IS:26 IT:27 JO:30 "
        "KW:30 KZ:20 LB:28 LC:32 LI:21 LT:20 LU:20 LV:21 LY:25 MC:27 MD:24 ME:22 MK:19 MR:27 MT:31 MU:30 NL:18 NO:15 PK:24 "
        "PL:28 PS:29 PT:25 QA:29 RO:24 RS:22 SA:24 SC:31 SE:24 SI:19 SK:24 SM:27 ST:25 SV:28 TL:23 TN:24 TR:26 UA:29 VA:22 "
        "VG:24 XK:20"
    ).split()
)


def _ibans(text: str) -> Found:
    for match in _IBAN.finditer(text):
        value = match[0].replace(" ", "")
        length = int(_IBAN_CHARS.get(value[:2], "0"))
        # A word in capitals may follow: only so much as the country's length belongs to it.
        if not length or len(value) < length or not _mod_97(value[:length]):
            continue
        end = match.start()
        for _ in range(length):
            end += 1 + (text[end] == " ")
        if len(value) == length or text[end : end + 1] == " ":
            yield match.start(), end, value[:length]


def _mod_97(iban: str) -> bool:
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97 == 1


_PHONE = re.compile(
    r"(?<![\w.+/=&?#@:-])(?:"
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"  # international
    r"|(?<!\d )(?:"
    r"\(\d{3}\) ?\d{3}[-. ]\d{4}|[2-9]\d{2}([-.])[2-9]\d{2}\1\d{4}"  # North America
    r"|1[3-9]\d{9}|1[3-9]\d[ -]\d{4}[ -]\d{4}"  # China, mobile
    r"|0[1-9](?:[ .-]\d{2}){4}"  # France
    r"|0\d{4} \d{6}|0\d{3} \d{3} \d{4}|07\d{3} ?\d{6}"  # United Kingdom
    r"|01[016-9]-\d{3,4}-\d{4}|0\d{1,3}-\d{2,4}-\d{4}"  # Korea, Japan
    r"|\(\d{2}\) ?9?\d{4}-\d{4}"  # Brazil
    r"|0\d{2,4}[ /]\d{3,5}[ -]?\d{2,4}"  # Germany
    r")(?! \d))(?![\w-]|[.,/:]\d)",
    re.ASCII,
)


def _phones(text: str) -> Found:
    for match in _PHONE.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if 9 <= len(digits) <= 15 and len(set(digits)) > 2 and not _LOOKS_LIKE_DATE.match(match[0]):
            yield match.start(), match.end(), digits


_LOOKS_LIKE_DATE = re.compile(r"\d{2,4}[-./ ]\d{1,2}[-./ ]\d{1,4}$")

_KEY = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"sk-(?:proj-|ant-(?:api\d\d-)?|svcacct-|or-v1-)?[A-Za-z0-9_-]{20,200}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}|ya29\.[0-9A-Za-z_-]{20,200}"
    r"|gh[pousr]_[A-Za-z0-9]{36,100}|github_pat_[A-Za-z0-9_]{40,120}|glpat-[A-Za-z0-9_-]{20,60}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,200}|(?:sk|pk|rk)_(?:live|test)_[0-9A-Za-z]{16,120}|whsec_[A-Za-z0-9]{24,80}"
    r"|hf_[A-Za-z0-9]{30,60}|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,250}|dop_v1_[a-f0-9]{64}"
    r"|SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{30,60}|\d{8,10}:AA[A-Za-z0-9_-]{33}"
    r"|eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,1000}"
    r")(?![A-Za-z0-9_-])"
    r"|-----BEGIN (?:[A-Z]{2,10} ){0,2}PRIVATE KEY-----[\s\S]{40,8000}?-----END (?:[A-Z]{2,10} ){0,2}PRIVATE KEY-----"
)
_KEY_STARTS = tuple(
    "sk- AKIA ASIA AIza ya29. ghp_ gho_ ghu_ ghs_ ghr_ github_pat_ glpat- xox sk_ pk_ rk_ whsec_ hf_ npm_ pypi- dop_v1_ SG. :AA "
    "eyJ PRIVATE".split()
)
_NO_KEY = re.compile(r"example|your|xxxx|\*\*\*|\.\.\.|1234567|abcdefg|placeholder|dummy", re.IGNORECASE)


def _keys(text: str) -> Found:
    """Secrets by the forms that their makers gave them; not those that only show the form."""
    for match in _KEY.finditer(text):
        if not _NO_KEY.search(match[0]) and len(set(match[0][-24:])) >= 8:
            yield match.start(), match.end(), match[0]


def _may_hold_keys(text: str) -> bool:
    return any(start in text for start in _KEY_STARTS)


def _may_hold_digits(text: str) -> bool:
    return re.search(r"\d[\d .()/-]{5,}\d", text) is not None


FINDERS: dict[str, Callable[[str], Found]] = {
    "key": _keys,
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "ip": _ips,
    "phone": _phones,
}
_MAY_HOLD: dict[str, Callable[[str], bool]] = {
    "key": _may_hold_keys,
    "email": lambda text: "@" in text,
    "iban": lambda text: re.search(r"[A-Z]{2}\d\d", text) is not None,
    "card": _may_hold_digits,
    "ip": lambda text: ":" in text or text.count(".") > 2,
    "phone": _may_hold_digits,
}
