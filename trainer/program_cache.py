"""Where compiled programs are kept, so that the next training of the same shapes starts in seconds."""

import os
from pathlib import Path

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Of torch's compiler and of kernels in Triton, each with its folder; read when the first program is made."""


def keep_programs(folder: str | None) -> None:
    """In this folder, unless the user's own variables say another; None leaves it to the libraries."""
    if folder is None:
        return
    for variable, name in VARIABLES.items():
        os.environ.setdefault(variable, str(Path(folder) / name))
