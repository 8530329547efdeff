"""The search for planted secrets finds one that is there: else its silence would prove nothing."""

import base64
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.planted import forms, found_in, texts_of

SECRETS = ["abcdefgh-12345678", 'oddly+/"é" =%~ 87654321']


@pytest.mark.parametrize("form", [name for name, _ in forms("any-secret")])
@pytest.mark.parametrize("secret", SECRETS)
def test_the_search_finds_a_secret_however_it_is_written(tmp_path: Path, form: str, secret: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"\0before " + dict(forms(secret))[form] + b" after\n")
    assert any(
        f"folder/file: {secret[:8]}..., {form}" in found for found in found_in(texts_of(tmp_path), [secret])
    )
    assert found_in(texts_of(tmp_path), ["another-12345678"]) == []


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("neighbour", ["", "a", "ab", "abc"])
def test_base64_is_found_wherever_in_the_text_the_secret_began(
    tmp_path: Path, secret: str, neighbour: str
) -> None:
    text = base64.b64encode(f"{neighbour}{secret}{neighbour} and more".encode())
    (tmp_path / "file").write_bytes(text)
    assert found_in(texts_of(tmp_path), [secret])


def test_a_secret_that_lies_on_two_pages_of_a_database_is_found(tmp_path: Path) -> None:
    secret = "s" * 6000 + "12345678"
    with closing(sqlite3.connect(tmp_path / "prefect.db")) as connection:
        connection.execute("create table kept (value)")
        connection.execute("insert into kept values (?)", [secret])
        connection.commit()
    assert found_in({"pages": (tmp_path / "prefect.db").read_bytes()}, [secret]) == []
    assert found_in(texts_of(tmp_path), [secret])
