"""Types of the flows' parameters.

Prefect keeps the parameters of a run in clear, so a URL with a user or password in it must not become one: the
schema says so, and Prefect's server refuses the run before it stores anything.
"""

from typing import Annotated, Any

from pydantic import Field

URL_WITH_USER = r"://[^\s/]+@"


def no_url_with_user(levels: int) -> dict[str, Any]:
    """JSON schema: no such text here, and none in so many levels of objects and lists below."""
    rule: dict[str, Any] = {"not": {"type": "string", "pattern": URL_WITH_USER}}
    if levels > 0:
        rule["additionalProperties"] = rule["items"] = no_url_with_user(levels - 1)
    return rule


ConfigPath = Annotated[str, Field(json_schema_extra=no_url_with_user(0))]
Overrides = Annotated[dict[str, Any] | list[str] | None, Field(json_schema_extra=no_url_with_user(3))]
