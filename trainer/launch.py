"""`python -m trainer.launch {train,evaluate,promote,generate} --config <resolved config.json>`: the trainer's door.

Light until a command is chosen. Called as a module it prints errors as one line and ends with their exit code;
`main` called as a function raises them.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.run_lock import Lock
    from schemas.pipeline_config import PipelineConfig

OUR_PACKAGES = ("schemas", "pipelines", "trainer", "flows")

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Set before the libraries are imported, unless the user set them: no network, no telemetry, no chatter."""

ERROR_FD_VARIABLE = "SFT_PIPELINE_RANK_ERROR_FD"
"""Where one of several processes leaves its last words."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command under the lock of its run root. Raises errors of schemas.errors."""
    check_packages()
    options = _parser().parse_args(arguments)
    _set_environment()
    from pipelines.run_lock import exit_with_parent, hold_run_root
    from trainer.launchers import is_first, take_place
    from trainer.signals import leave_signals_to_starter

    take_place(os.environ, local_rank=options.local_rank)
    leave_signals_to_starter()
    exit_with_parent()
    config = read_config(options.config)
    with ExitStack() as stack:
        lock: Lock = ()
        if is_first():  # it holds the run root for the others
            wait_seconds = config.engine.lock_wait_seconds
            lock = stack.enter_context(hold_run_root(config.run_root, wait_seconds=wait_seconds))
        COMMANDS[options.command](config, options, lock)


def read_config(path: Path) -> "PipelineConfig":
    """The resolved config that a run leaves in its run root. Raises ConfigError."""
    from pydantic import ValidationError

    from schemas.errors import ConfigError
    from schemas.pipeline_config import PipelineConfig

    try:
        return PipelineConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"no config at {path}; give the config.json of a run root") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{path}: {error.error_count()} wrong values, first {place!r}: {first['msg']}"
        ) from None


def check_packages() -> None:
    """The four packages must lie side by side: their names are everybody's. Raises ForeignPackageError."""
    ours = Path(__file__).resolve().parent.parent
    for name in OUR_PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
        if found != ours / name:
            _refuse_foreign(
                f"package {name!r} is found in {found}, expected in {ours / name}: another distribution shadows "
                "it; install sft-pipeline in a virtual environment of its own"
            )


def _refuse_foreign(problem: str) -> None:
    try:
        from schemas.errors import ForeignPackageError
    except ImportError:  # schemas itself is the foreign one
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    raise ForeignPackageError(problem)


# Commands ---------------------------------------------------------------------------------------------------


def _train(config: "PipelineConfig", options: argparse.Namespace, lock: "Lock") -> None:
    from trainer.launchers import is_first, is_one_of_several
    from trainer.rank_processes import count_processes, train_in_processes
    from trainer.support import check_supported

    check_supported(config)
    if not is_one_of_several() and (num_processes := count_processes(config)) > 1:
        train_in_processes(options.config.resolve(), num_processes, lock=lock)
        return
    _silence_libraries()
    from schemas.run import CHECKPOINTS_FOLDER
    from trainer.train import train

    result = train(config)
    if is_first():
        print(config.run_root / CHECKPOINTS_FOLDER / result.key / result.output)


def _evaluate(config: "PipelineConfig", options: argparse.Namespace, lock: "Lock") -> None:
    _silence_libraries()
    from pipelines.run_lock import PARENT_FD_VARIABLE
    from trainer.evaluation import run_evaluate

    # What a child of a flow prints ends in Prefect's log, which carries counts and never text.
    run_evaluate(config, show_answers=PARENT_FD_VARIABLE not in os.environ)


def _promote(config: "PipelineConfig", options: argparse.Namespace, lock: "Lock") -> None:
    from trainer.promotion import run_promote, run_rollback

    if options.rollback:
        run_rollback(config)
    else:
        run_promote(config, withdrawn_too=options.withdrawn_too)


def _generate(config: "PipelineConfig", options: argparse.Namespace, lock: "Lock") -> None:
    _silence_libraries()
    from trainer.answer import Sampling
    from trainer.generate import run_generate

    run_generate(
        config,
        Sampling(options.max_new_tokens or config.evaluate.max_new_tokens, options.temperature),
        prompts=options.prompt,
        input_path=options.input,
        output_path=options.output,
        adapter=options.adapter,
    )


COMMANDS: dict[str, Callable[["PipelineConfig", argparse.Namespace, "Lock"], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "promote": _promote,
    "generate": _generate,
}


def prepare_libraries() -> None:
    """For commands that need no run root of their own: no network, no chatter. Before the libraries are imported."""
    _set_environment()
    _silence_libraries()


def _set_environment() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _silence_libraries() -> None:
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # PEFT loads bitsandbytes where it is installed, and that asks for a package that 4-bit inference would use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.launch", description="Train, evaluate, promote and try a model."
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the deepspeed launcher")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=text) for name, text in _HELP.items()}
    for command in parsers.values():
        command.add_argument("--config", type=Path, required=True, help="config.json of a run root")
    parsers["promote"].add_argument("--rollback", action="store_true", help="put the one before into service")
    parsers["promote"].add_argument(
        "--withdrawn-too", action="store_true", help="also a model that was rolled back before"
    )
    generate = parsers["generate"]
    generate.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    generate.add_argument("--input", type=Path, help="JSON lines with prompts")
    generate.add_argument("--output", type=Path, help="where the answers go")
    generate.add_argument("--adapter", default="promoted", help="promoted, current, none or a folder")
    generate.add_argument("--max-new-tokens", type=int)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    return parser


_HELP = {
    "train": "shards and plan in, adapter out; goes on where a killed run stopped",
    "evaluate": "loss of base, incumbent and candidate on held-out chats",
    "promote": "put the candidate into service if it is better",
    "generate": "answer prompts with a trained model",
}


def run_as_module() -> None:
    """What `python -m` runs: one line on standard error and the error's exit code in place of a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from pipelines.disk_errors import is_disk_error, storage_error

        if is_disk_error(error):
            error = storage_error(error, f"trainer {' '.join(sys.argv[1:2])}")
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:  # a bug of ours: its traceback is wanted
            raise
        say_last_words(f"error: {' '.join(str(error).split())}\n")
        sys.exit(exit_code)


def say_last_words(line: str) -> None:
    """To people, or to the process that started us as one of several: it says them once for all."""
    descriptor = os.environ.get(ERROR_FD_VARIABLE)
    if descriptor is None:
        sys.stderr.write(line)
    else:
        os.write(int(descriptor), line.encode())


if __name__ == "__main__":
    run_as_module()
