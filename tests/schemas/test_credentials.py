"""What a person is shown of a URL: never its user, password or query."""

import pickle

import pytest

from schemas.credentials import without_credentials
from schemas.errors import ConfigError, SftPipelineError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/a.json", "https://***@host/a.json"),
        ("https://secret@host", "https://***@host"),
        ("https:/me:secret@host/a", "https:/***@host/a"),
        ("postgresql+asyncpg://me:secret@host/db", "postgresql+asyncpg://***@host/db"),
        ("s3://key:se/cr@et@bucket/x", "s3://***@bucket/x"),
        (
            "'https://host/x?sig=secret', twice: https://me:secret@b?c=d",
            "'https://host/x?***', twice: https://***@b?***",
        ),
        ("https://host/path and me@example.org", "https://host/path and me@example.org"),
        ("a question? C:/x", "a question? C:/x"),
        ("", ""),
    ],
)
def test_user_and_query_of_every_url_are_starred(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_every_error_of_ours_is_starred_and_survives_the_way_out_of_a_worker() -> None:
    error: SftPipelineError = pickle.loads(pickle.dumps(ConfigError("found https://me:secret@host")))
    assert str(error) == "found https://***@host"
    assert isinstance(error, ConfigError)
