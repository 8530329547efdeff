"""The JSON schema and the reference page: true to the models, and the page in docs/ is the one they give."""

import json
from pathlib import Path
from typing import Any, get_origin

import jsonschema
import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from flows.reference import reference_page, schema_text
from schemas.pipeline_config import PipelineConfig

ROOT = Path(__file__).parent.parent.parent
SCHEMA = json.loads(schema_text())


def test_the_page_in_docs_is_the_one_that_the_models_give() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference_page(), "run: sft-pipeline schema --markdown > docs/configuration.md"


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        inner = [
            argument
            for argument in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if isinstance(argument, type) and issubclass(argument, BaseModel)
        ]
        if inner:
            keys += keys_of(
                inner[0], f"{prefix}{name}{'[]' if get_origin(field.annotation) is list else ''}."
            )
        else:
            keys.append(f"{prefix}{name}")
    return keys


def test_every_key_stands_on_the_page_once_with_what_it_does() -> None:
    rows = [line.strip("|").split(" | ") for line in reference_page().splitlines() if line.startswith("| `")]
    assert sorted(row[0].strip(" `") for row in rows) == sorted(keys_of(PipelineConfig))
    assert all(row[-1].strip(" |") for row in rows), [row[0] for row in rows if not row[-1].strip(" |")]


def test_the_schema_is_one_and_takes_the_demos_config() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(YAML(typ="safe").load(ROOT / "configs" / "demo.yaml"), SCHEMA)


SMALL: dict[str, Any] = {"run_root": "run", "sources": [{"name": "a", "path": "a.json"}]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"train": {"max_step": 3}},
        {"train": {"epochs": 0}},
        {"model": {"dtype": "float8", "path": "m"}},
        {"sources": []},
        {"surces": []},
        {"run_root": None},
    ],
)
def test_what_a_model_refuses_the_schema_refuses(wrong: dict[str, Any]) -> None:
    jsonschema.validate(SMALL, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(SMALL | wrong, SCHEMA)
    with pytest.raises(ValueError):  # noqa: PT011 - pydantic's own error, of whatever kind
        PipelineConfig.model_validate(SMALL | wrong)
