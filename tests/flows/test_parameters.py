"""The schema that Prefect's server checks parameters with lets no URL with a user in it through."""

from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate

from flows.sft_pipeline import sft_pipeline
from flows.steps import step_merge

URL = "https://me:secret@host/a.json"


@pytest.mark.parametrize("flow", [sft_pipeline, step_merge], ids=["sft-pipeline", "step-merge"])
@pytest.mark.parametrize(
    ("parameters", "is_taken"),
    [
        ({}, True),
        (
            {"config_path": "a@b/config.yaml", "overrides": {"train.max_steps": 5, "model": {"path": "m"}}},
            True,
        ),
        ({"overrides": ["train.max_steps=5", "evaluate.questions=[Who is me@example.org?]"]}, True),
        ({"overrides": None}, True),
        ({"config_path": URL}, False),
        ({"overrides": {"sources.0.path": URL}}, False),
        ({"overrides": {"sources": [{"name": "a", "path": URL}]}}, False),
        ({"overrides": [f"sources.0.path={URL}"]}, False),
        ({"overrides": 5}, False),
    ],
)
def test_a_url_with_a_user_is_no_parameter(flow: Any, parameters: dict[str, Any], is_taken: bool) -> None:
    schema = parameter_schema(flow).model_dump()
    if is_taken:
        validate(parameters, schema, raise_on_error=True)
    else:
        with pytest.raises(ValidationError):
            validate(parameters, schema, raise_on_error=True)
