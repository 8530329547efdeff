"""Paths in a config: on this machine, never a URL."""

from typing import Annotated

from pydantic import AfterValidator


def refuse_url(path: str) -> str:
    """`path`, unless it is a URL: one with a password would be kept by every manifest and report."""
    if "://" in path:
        raise ValueError("this is a URL; download it and name the local path")
    return path


LocalPath = Annotated[str, AfterValidator(refuse_url)]
