"""What the command returns, and the one line that it says when something is wrong.

0 done, 1 failed, 2 wrong usage or refused, 130 interrupted, 143 terminated. A traceback only with --debug.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType

from flows.packages import OUR_FOLDER, foreign_package, use_ours

DOCTOR = "doctor"
"""The one command that runs beside a foreign package: it names it among the rest."""
DEBUG_FLAG = "--debug"
DEBUG_VARIABLE = "SFT_PIPELINE_DEBUG"
EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130

Command = Callable[[Sequence[str]], int]


def exit_code_of(command: Command, arguments: Sequence[str]) -> int:
    """Run a command with its arguments; never lets an error out."""
    problem = foreign_package(OUR_FOLDER)
    if problem is not None:
        if arguments[:1] != [DOCTOR]:
            return _say_error(problem, EXIT_REFUSED)
        use_ours()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    if DEBUG_FLAG in arguments:
        os.environ[DEBUG_VARIABLE] = "1"
    try:
        return _told(command, [argument for argument in arguments if argument != DEBUG_FLAG])
    except KeyboardInterrupt:
        return _say_error("interrupted; run the same command again to go on", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our stdout has gone, as `| head` does: Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def debugging() -> bool:
    """True when the user asked for --debug."""
    return bool(os.environ.get(DEBUG_VARIABLE))


def _told(command: Command, arguments: Sequence[str]) -> int:
    from cyclopts import CycloptsError

    from schemas.errors import SftPipelineError

    try:
        return command(arguments)
    except CycloptsError as error:
        return _say_error(str(error), EXIT_REFUSED)
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - the last line of defence: told on one line, never swallowed
        if debugging():
            traceback.print_exc()
        from pipelines.disk_errors import is_disk_error, storage_error

        if is_disk_error(error):
            error = storage_error(error, f"sft-pipeline {' '.join(arguments[:2])}")
        if isinstance(error, SftPipelineError):
            return _say_error(str(error), error.exit_code)
        return _say_error(_unexpected(error), EXIT_FAILED)


def _unexpected(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"unexpected {type(error).__name__}: {error} ({place.filename}:{place.lineno}); "
        f"run again with {DEBUG_FLAG} for the whole story"
    )


def _say_error(message: str, code: int) -> int:
    sys.stderr.write(f"sft-pipeline: error: {' '.join(message.split())}\n")
    return code


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    # By default neither `finally` nor the clean-up of temporary folders runs on these two.
    sys.exit(128 + number)
