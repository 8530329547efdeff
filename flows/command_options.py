"""Types of arguments that several commands share."""

from typing import Annotated, Literal

from cyclopts import Parameter

DataStage = Literal["merge", "clean", "filter", "dedup", "holdout", "split", "pack"]
Stage = Literal[DataStage, "train", "evaluate", "promote"]
BaseForm = Literal["plain", "int8", "int8_rows", "nf4"]
"""Those of train.base. Written again, as the stages are: schemas is imported only once it is seen to be ours."""
Overrides = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set", negative="", help="Override a key of the config: --set train.max_steps=5; repeatable."
    ),
]
Several = Annotated[tuple[str, ...], Parameter(negative="")]
Flag = Annotated[bool, Parameter(negative="")]
