"""Everything a user can do wrong, as one tree.

    SftPipelineError            exit code 1: the work failed
    ├── InputError              a source or model is missing, empty or unreadable
    ├── IntegrityError          a file on disk is not the one that its manifest names
    ├── LimitError              more was dropped, or less was left, than the config allows
    ├── StorageError            a disk refused: full, failing, no permission, file gone
    ├── WorkerError             a worker process died or raised
    ├── TrainingError           training can't go on (loss not finite, nothing to train, ...)
    └── UsageError              exit code 2: refused before any work
        ├── ConfigError         unknown key, wrong value, missing file in the config
        ├── RefusedError        settings that can't work together (see trainer/support.py)
        ├── BusyError           another run holds this run root
        └── ForeignPackageError another distribution's package shadows one of ours

A message says what was found, what was expected and what to do, on one line.
"""

from schemas.credentials import without_credentials


class SftPipelineError(Exception):
    """Root of the tree. `exit_code` is what the command line returns.

    Messages end in logs, reports and Prefect's database: a URL in them loses its user, password and query.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(without_credentials(message))


class InputError(SftPipelineError):
    """A source, model or tokenizer is missing, empty or unreadable."""


class IntegrityError(SftPipelineError):
    """A file's bytes, rows or digest differ from what its manifest says."""


class LimitError(SftPipelineError):
    """A limit set by the user was passed: too many drops, zero rows left."""


class StorageError(SftPipelineError):
    """A disk or file system refused to read or write: full, failing, no permission, the file is gone."""


class WorkerError(SftPipelineError):
    """A worker process died or raised; the part it worked on is named."""


class TrainingError(SftPipelineError):
    """Training can't start or go on."""


class UsageError(SftPipelineError):
    """Refused before any work was done."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration names something unknown, wrong or missing."""


class RefusedError(UsageError):
    """Settings that are valid alone and can't work together."""


class BusyError(UsageError):
    """Another run holds the run root."""


class ForeignPackageError(UsageError):
    """A package of another distribution is imported in place of ours."""
