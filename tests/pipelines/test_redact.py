"""Personal data and secrets: what is found, what only looks like it, and that one value has one placeholder."""

from collections import Counter

import pytest

from pipelines.redact import KINDS, num_keys_in_code, redact

OPENAI_KEY = "sk-" + "aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xY3zA5bC7dE9fG1h"


def redacted(*texts: str, kinds: tuple[str, ...] = KINDS, in_code: bool = False) -> list[str]:
    return redact(texts, kinds, in_code=in_code, repairs=Counter())


FOUND = {
    "email": ["ann.lee+x@mail.co.uk", "müller@firma.de", "a_b@c-d.org"],
    "phone": ["+49 30 1234567", "+1 (415) 555-2671", "(415) 555-2671", "415-555-2671", "13912345678", "06 12 34 56 78",
              "010-1234-5678", "03-1234-5678", "+8613912345678", "07700 900123", "(11) 94469-9087", "+44 20 7946 0958"],
    "ip": ["75.75.75.75", "8.8.8.8", "2a00:1450:4001:81b::200e"],
    "card": ["4111 1111 1111 1111", "5500-0055-5555-5559", "378282246310005", "6011000990139424"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "FR1420041010050500013M02606", "NO93 8601 1117 947"],
    "key": [
        OPENAI_KEY, "sk-ant-api03-" + "Qw3rTy7uIoP9aSdF2gHjK4lZxC6vBnM8" * 2, "AKIA" + "Q3EGT7UZP2XWRMN5",
        "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8", "AIza" + "SyD3fG7hJ2kL9mN4pQ6rS8tU1vW5xY0zAbC",
        "xoxb-" + "2837465-9182736-aKdJfHgUeYrT", "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNmQwErTyUi",
        "sk_live_" + "51Hq7Zx3Vb9Nm2Kl5Jh8", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjMifQ.Zk9xQ2bV7nM3kL5jH8gF1dS4aP6oI0u",
        "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA3Tz2mr7SZiAMfQyuvBjM9OiJjRazXBZ1BjP5CE\n" * 2 + "-----END RSA PRIVATE KEY-----",
    ],
}  # fmt: skip
NOT_FOUND = [
    "me@example.com", "git@github.com:a/b.git", "pkg@1.2.3", "@user", "smtp://user:pass@smtp.mail.io:25", "a@b",
    "version 1.2.3.4", "v8.8.4.4", "192.168.1.12", "127.0.0.1", "10.0.0.1", "203.0.113.7", "999.1.1.1", "1.2.3",
    "3.3.2.1 A heading", "12:30:45", "::1", "std::vector::size", "4111 1111 1111 1112", "1234 5678 9012 3456",
    "0000000000000000", "DE89 3704 0044 0532 0130 01", "XX00 1234 5678 9012 3456", "2023-05-12", "12.05.2023", "1,234,567",
    "978-3-16-148410-0", "3.14159265358979", "100 000 000", "1684921600", "2 + 20 300 400", "555-1234", "12345678901234567890",
    "sk-your-api-key-goes-here-please", "sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "AKIAIOSFODNN7EXAMPLE", "sk-learn", "task-based",
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "value"), [(kind, value) for kind, values in FOUND.items() for value in values]
)
def test_every_form_is_found(kind: str, value: str) -> None:
    name = kind.upper()
    assert redacted(f"It is {value}, ok?") == [f"It is [{name}_1], ok?"]
    assert redacted(f"是{value}。") == [f"是[{name}_1]。"]
    others = tuple(other for other in KINDS if other != kind)
    assert redacted(f"It is {value}, ok?", kinds=others) == [f"It is {value}, ok?"]


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert redacted(text) == [text]


def test_one_value_has_one_placeholder_throughout_a_chat() -> None:
    texts = redacted(
        "Ann@Mail.de or bob@mail.de, +49 30 123-4567", "to ann@mail.de: +49301234567", "bob@mail.de"
    )
    assert texts == ["[EMAIL_1] or [EMAIL_2], [PHONE_1]", "to [EMAIL_1]: [PHONE_1]", "[EMAIL_2]"]
    assert redacted(*texts) == texts
    assert redacted("[EMAIL_7] and c@d.org") == ["[EMAIL_7] and [EMAIL_8]"]


def test_code_stays_but_its_keys_are_counted_and_go_where_asked() -> None:
    text = f"mail a@b.org\n```\nkey = '{OPENAI_KEY}'\nto = 'a@b.org'\n```\nand `{OPENAI_KEY}`"
    assert redacted(text) == [text.replace("a@b.org\n```", "[EMAIL_1]\n```", 1)]
    assert num_keys_in_code([text, OPENAI_KEY]) == 2
    (everywhere,) = redacted(text, in_code=True)
    assert everywhere == "mail [EMAIL_1]\n```\nkey = '[KEY_1]'\nto = '[EMAIL_1]'\n```\nand `[KEY_1]`"


def test_what_was_redacted_is_counted() -> None:
    repairs: Counter[str] = Counter()
    redact(["a@b.org a@b.org 8.8.8.8"], ["email", "ip"], in_code=False, repairs=repairs)
    assert repairs == {"redacted_email": 2, "redacted_ip": 1}
