"""Python runs this as it starts, in every process of a killed run: it marks phases, and ends the run in one.

    SFT_KILL_LOG   file that gets a line at the begin and the end of each phase; without it nothing happens here
    SFT_KILL       JSON: phase, file (pattern, "" for any), call (from 1), event (from 1), whom

The process dies at the n-th event of its call: an event is any call or return of a Python or C function on its
way. In phases of files only events count at which the temporary file is open in this process. In `backward`
events are nodes of the graph, counted from the loss. One kill a run: whoever comes first to create LOG.hit.
"""

import fnmatch
import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

from places import FUNCTIONS, WRITER, phase_of_file

LOG = os.environ.get("SFT_KILL_LOG", "")
KILL: dict[str, Any] | None = json.loads(os.environ.get("SFT_KILL", "null"))
MISSING_EXIT_CODE = 98

num_calls: Counter[str] = Counter()


def mark(what: str, **more: Any) -> None:
    """One line of the log. A single write of an appending file: lines of several processes don't mix."""
    line = json.dumps({"what": what, "pid": os.getpid(), "time": time.time(), **more}) + "\n"
    _write(LOG, os.O_APPEND, line)


def _write(path: str, flags: int, text: str) -> None:
    # Without fsync: kill -9 takes a process, not what it has handed to the system.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    os.write(descriptor, text.encode())
    os.close(descriptor)


# Killing ----------------------------------------------------------------------------------------------------


@contextmanager
def phase(name: str, path: str, *, temporary: str | None = None) -> Iterator[bool]:
    """The work of one call; yields whether this is the one to die in. A path is what the call writes, if any."""
    mark(f"in {name}", path=path)
    is_chosen = _is_chosen(name, path)
    if is_chosen:
        sys.setprofile(_countdown(name, temporary))
    try:
        yield is_chosen
    finally:
        if is_chosen:
            sys.setprofile(None)
            die(name, event="its end", temporary=temporary)
        mark(f"after {name}", path=path)


def _is_chosen(name: str, path: str) -> bool:
    if KILL is None or KILL["phase"] != name or not fnmatch.fnmatch(path, KILL["file"] or "*"):
        return False
    num_calls[name] += 1
    return num_calls[name] == KILL["call"] and not os.path.exists(f"{LOG}.hit")


def _countdown(name: str, temporary: str | None) -> Callable[[FrameType, str, Any], None]:
    left = KILL["event"] if KILL else 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if temporary is not None and not is_open(temporary):
            return
        left -= 1
        if left == 0:
            sys.setprofile(None)
            place = f"{event} at {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
            die(name, event=place, temporary=temporary)

    return count


def is_open(path: str) -> bool:
    """Whether this process has that file open."""
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}") == path:
                return True
        except OSError:  # the descriptor of the listing itself
            continue
    return False


def die(name: str, *, temporary: str | None = None, **more: Any) -> None:
    """Say where, then kill -9. Of several processes that get here the first one has its way."""
    about_file: dict[str, Any] = {}
    if temporary is not None and os.path.exists(temporary):
        about_file = {"is_open": is_open(temporary), "num_bytes": os.path.getsize(temporary)}
    ids = {"pid": os.getpid(), "parent": os.getppid(), "group": os.getpgid(0)}
    about = {"phase": name, "call": num_calls[name], **ids, "path": temporary, **about_file, **more}
    try:
        _write(f"{LOG}.hit", os.O_EXCL, json.dumps(about))
    except FileExistsError:
        return
    if KILL is not None:
        _KILLS[KILL["whom"]]()


_KILLS: dict[str, Callable[[], None]] = {
    "alone": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "group": lambda: os.killpg(os.getpgid(0), signal.SIGKILL),
    # The process itself goes on, and must end by its own means.
    "parent": lambda: os.kill(os.getppid(), signal.SIGKILL),
}


# Wrapping ---------------------------------------------------------------------------------------------------


def wrapped_function(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is a phase of its own."""

    @functools.wraps(original)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        paths = [value for value in (*arguments, *named.values()) if isinstance(value, (str, os.PathLike))]
        with phase(name, os.fspath(paths[0]) if paths else ""):
            return original(*arguments, **named)

    return wrapper


def wrapped_writer(original: Callable[..., Any]) -> Callable[..., Any]:
    """durable_file: which phase it is, is told by the path."""

    @functools.wraps(original)
    @contextmanager
    def wrapper(path: Any, **options: Any) -> Iterator[Any]:
        real_path = os.path.realpath(path)
        with original(path, **options) as temporary:
            real_temporary = os.path.realpath(temporary)
            with phase(phase_of_file(real_path), real_path, temporary=real_temporary):
                yield temporary

    return wrapper


def wrapped_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.backward works in C++, where no event is seen: a node of the graph tells when it is reached."""

    @functools.wraps(original)
    def wrapper(loss: Any, *arguments: Any, **named: Any) -> Any:
        with phase("backward", "") as is_chosen:
            if is_chosen and KILL is not None:
                sys.setprofile(None)
                node = _node_at_depth(loss, KILL["event"])
                node.register_prehook(lambda gradients: die("backward", event=f"node {node.name()}"))
            return original(loss, *arguments, **named)

    return wrapper


def _node_at_depth(loss: Any, depth: int) -> Any:
    node = loss.grad_fn
    for _ in range(depth):
        deeper = [found for found, _ in node.next_functions if found is not None]
        node = deeper[0] if deeper else node
    return node


def wrap(module: ModuleType, qualified_name: str, wrapper: Callable[[Any], Any]) -> None:
    """Put a wrapper in the place of a function; the process ends when there is none of that name."""
    *outer, name = qualified_name.split(".")
    try:
        owner: Any = functools.reduce(getattr, outer, module)
        setattr(owner, name, wrapper(getattr(owner, name)))
    except AttributeError:
        _write(LOG, os.O_APPEND, json.dumps({"what": f"missing {module.__name__}:{qualified_name}"}) + "\n")
        sys.stderr.write(f"kill test: {module.__name__} has no {qualified_name}: mend killing/places.py\n")
        os._exit(MISSING_EXIT_CODE)


def wrappers_by_module() -> dict[str, list[tuple[str, Callable[[Any], Any]]]]:
    """module -> [(qualified name, what wraps it)]."""
    found: dict[str, list[tuple[str, Callable[[Any], Any]]]] = {}
    places = [
        (place, wrapped_backward if name == "backward" else functools.partial(wrapped_function, name))
        for name, place in FUNCTIONS.items()
    ]
    for place, wrapper in [*places, (WRITER, wrapped_writer)]:
        module, _, qualified_name = place.partition(":")
        found.setdefault(module, []).append((qualified_name, wrapper))
    return found


class Finder(importlib.abc.MetaPathFinder):
    """Finds modules as the finders behind it do; those with phases are wrapped right after they have run."""

    def __init__(self) -> None:
        self.wrappers = wrappers_by_module()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.wrappers:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def run_and_wrap(module: ModuleType) -> None:
            run_module(module)
            for qualified_name, wrapper in self.wrappers[name]:
                wrap(module, qualified_name, wrapper)

        spec.loader.exec_module = run_and_wrap  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Wrap what is loaded already, and the rest as it comes."""
    mark("start", command=" ".join(sys.orig_argv[-3:]))
    finder = Finder()
    for name, wrappers in finder.wrappers.items():
        if name in sys.modules:
            for qualified_name, wrapper in wrappers:
                wrap(sys.modules[name], qualified_name, wrapper)
    sys.meta_path.insert(0, finder)


if LOG:
    install()
