"""Paths in a config: on this machine; only sources may be URLs, and these without credentials."""

from typing import Annotated

from pydantic import AfterValidator


def refuse_url(path: str) -> str:
    """`path`, unless it is a URL: one with a password would be kept by every manifest and report."""
    if "://" in path:
        raise ValueError("this is a URL; download it and name the local path")
    return path


def refuse_credentials(path: str) -> str:
    """`path`, unless it is a URL that could hold a password or a key, or one that chains file systems."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return path
    if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest:
        raise ValueError(
            "this URL has a user, a password or a query: set keys in the environment, never in the URL"
        )
    if "::" in path or not scheme.isalnum():
        raise ValueError("one scheme is expected, such as s3://, gs://, https:// or hf://datasets/OWNER/NAME")
    return path


LocalPath = Annotated[str, AfterValidator(refuse_url)]
SourcePath = Annotated[str, AfterValidator(refuse_credentials)]
