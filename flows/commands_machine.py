"""Commands about this machine, the config file and the Prefect server."""

from pathlib import Path

from flows.command_options import Flag, Overrides, Several, Stage


def doctor(
    config: Path | None = None,
    /,
    *,
    until: Stage | None = None,
    json: Flag = False,
    overrides: Overrides = (),
) -> int:
    """Look for what is missing or wrong on this machine; exit code 1 if the pipeline would not run.

    Parameters
    ----------
    config
        Also check this config: its sources, its model, disk and memory for them.
    until
        Ask only about the stages up to this one, as of run --until.
    json
        Print one JSON object.
    """
    from flows.doctor import Question, report

    return report(Question(config, overrides, until), as_json=json)


def support(
    *,
    strategy: Several = (),
    method: Several = (),
    base: Several = (),
    dtype: Several = (),
    packing: Several = (),
    checkpointing: bool | None = None,
    compile: bool | None = None,
    json: Flag = False,
    markdown: Flag = False,
) -> None:
    """Print what works together: strategies, methods, bases, precisions; repeat an option for several values.

    Parameters
    ----------
    strategy
        Only these of train.strategy.
    method
        Only these of train.method.
    base
        Only these of train.base.
    dtype
        Only these of model.dtype.
    packing
        Only these of pack.mode.
    checkpointing
        Only with, or without, train.gradient_checkpointing.
    compile
        Only with, or without, train.compile.
    json
        Print a JSON list with an object for each combination.
    markdown
        Print docs/support-matrix.md in its place.
    """
    from flows.support_page import support_text

    switches = {"checkpointing": checkpointing, "compile": compile}
    chosen: dict[str, tuple[str | bool, ...]] = {
        "strategy": strategy,
        "method": method,
        "base": base,
        "dtype": dtype,
        "packing": packing,
    }
    chosen |= {axis: (switch,) for axis, switch in switches.items() if switch is not None}
    given = {axis: values for axis, values in chosen.items() if values}
    print(support_text(given, as_json=json, as_markdown=markdown), end="")


def schema(*, markdown: Flag = False) -> None:
    """Print the JSON schema of a config, for editors.

    Parameters
    ----------
    markdown
        Print docs/configuration.md in its place.
    """
    from flows.reference import reference_page, schema_text

    print(reference_page() if markdown else schema_text(), end="")


def deploy(*, prefect_file: Path = Path("prefect.yaml")) -> None:
    """Create the work pool and all deployments on the Prefect server."""
    from flows.deploy import deploy_all

    deploy_all(prefect_file)


def undeploy() -> None:
    """Remove the deployments, the work pool and the automation from the Prefect server."""
    from flows.deploy import undeploy_all

    undeploy_all()
