"""A process with everything imported that forks one child a command: a start costs milliseconds, not seconds.

Reads a JSON line a command, {"arguments", "page", "output", "limits", "learn"}, and answers with {"code"}.
Started by warm.py with the shim failnth.so preloaded and its page in FAILNTH_PAGE.
"""

import json
import os
import resource
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 300.0
EXIT_BUG = 70
"""An error came out of the command line's own last line of defence."""


def serve() -> None:
    """Until standard input ends. No command runs in this process: a library's threads would not survive the fork."""
    print(json.dumps({"pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "page" in request:
            with Path(os.environ["FAILNTH_PAGE"]).open(
                "r+b"
            ) as file:  # a new file would not be the mapped one
                file.write(bytes.fromhex(request["page"]))
        child = os.fork()
        if child == 0:
            run(request)
        code = wait(child)
        if request["learn"]:
            learn(Path(request["learn"]))
        print(json.dumps({"code": code}), flush=True)


def run(request: dict[str, Any]) -> None:
    """In the child: `sft-pipeline ARGUMENTS`, its output into a file; never returns."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    code = EXIT_BUG
    try:
        code = exit_code(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        if request["learn"]:
            Path(request["learn"]).write_text("\n".join(sys.modules), encoding="utf-8")
    except BaseException:  # noqa: BLE001 - the process ends here, and its exit code says that it was a bug
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(arguments: list[str]) -> int:
    from flows.cli import run_command
    from flows.exit_codes import exit_code_of

    try:
        return exit_code_of(run_command, arguments)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1


def learn(path: Path) -> None:
    """Import here what a child had to import: the next one finds it."""
    if not path.exists():
        return
    for name in path.read_text(encoding="utf-8").splitlines():
        try:
            __import__(name)
        except ImportError:  # made by an extension module on its way, under a name that can't be imported
            continue


def wait(child: int) -> int:
    """Exit code; negative for a signal."""
    watched = os.pidfd_open(child)
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    if not poll.poll(LIMIT_SECONDS * 1000):
        print(f"still running after {LIMIT_SECONDS} s: killed", file=sys.stderr)
        os.kill(child, signal.SIGKILL)
    os.close(watched)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    serve()
