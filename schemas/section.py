"""What every section of the config file is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the config file: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )
