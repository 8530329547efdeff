"""The command `sft-pipeline`: reads arguments and calls one function.

The commands stand in flows/commands_*.py, one function each. Results go to stdout, talk goes to stderr. Imports are
made inside the commands: `--help` must answer before a library is loaded.
"""

import sys
from collections.abc import Sequence

from cyclopts import App, Group

from flows import commands_answers, commands_data, commands_machine, commands_model
from flows.exit_codes import exit_code_of

HELP = """Raw chats and instructions in, a fine-tuned and gated language model out.

CONFIG is a YAML file; `sft-pipeline init FOLDER` writes one. Every command takes --debug, which shows where an
error comes from.
"""
COMMANDS = {
    "Data, and the whole way": (
        commands_data.init,
        commands_data.recipes,
        commands_data.run,
        commands_data.step,
        commands_data.show,
    ),
    "Model": (
        commands_model.download,
        commands_model.train,
        commands_model.evaluate,
        commands_model.promote,
        commands_model.rollback,
        commands_model.consolidate,
        commands_answers.generate,
        commands_answers.chat,
        commands_answers.export,
        commands_answers.harness,
    ),
    "Machine": (
        commands_machine.doctor,
        commands_machine.support,
        commands_machine.schema,
        commands_machine.deploy,
        commands_machine.undeploy,
    ),
}
"""By the heading that they stand under in --help."""


def main() -> None:
    """Entry point of the console script."""
    if sys.argv[1:2] == ["step"]:
        from pipelines.left_out import prepare_data_alone

        prepare_data_alone()
    sys.exit(exit_code_of(run_command, sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Parse and run; raises cyclopts' errors and ours."""
    code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    return code if isinstance(code, int) else 0


def version() -> str:
    """Version of the installed distribution."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        return installed_version("sft-pipeline")
    except PackageNotFoundError:
        return "unknown: sft-pipeline is not installed, this is a bare checkout"


def _app() -> App:
    built = App(name="sft-pipeline", help=HELP, version=version, suppress_keyboard_interrupt=False)
    groups = {heading: Group.create_ordered(heading) for heading in COMMANDS}
    for heading, functions in COMMANDS.items():
        for function in functions:
            built.command(function, group=groups[heading])
    # `bench` has commands of its own; their module is read when one of them is called.
    about = "Measure training on this machine, beside other trainers."
    built.command("flows.bench.command:bench", name="bench", group=groups["Machine"], help=about)
    weights = App(
        name="weights", help="Turn weights of other forms into a model folder.", group=groups["Model"]
    )
    weights.command(commands_model.from_meta, name="from-meta")
    built.command(weights)
    return built


app = _app()


if __name__ == "__main__":
    main()
