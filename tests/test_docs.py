"""What the pages say is true: configs load, links lead somewhere, commands are typed or parsed, messages are ours.

No command line escapes: one in a console block is typed in a project of toy size, any other must be one that a
parser below accepts, with all its options.
"""

import ast
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows.cli import app
from flows.disk_need import STAGE_FACTORS
from pipelines.stage import run_stage
from schemas.config_file import load_config
from schemas.run import STAGE_FOLDERS, STAGES
from tests.integration import toy
from tests.markdown_blocks import (
    PAGES,
    ROOT,
    Block,
    blocks_of,
    command_lines,
    make_project,
    output_pattern,
    patch_of,
    typed,
)

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
LANGUAGES = {"yaml", "sh", "console", "python", "json", "diff", "text", "ini", ""}


def by_language(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=[block.place for block in chosen])


# Pages ------------------------------------------------------------------------------------------------------


def test_every_page_of_the_promise_is_there() -> None:
    names = {page.name for page in PAGES}
    assert names >= {"README.md", "CONTRIBUTING.md", "quickstart.md", "journey.md", "configuration.md"}
    assert names >= {"operations.md", "troubleshooting.md", "training.md", "decisions.md"}


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert {block.language for block in BLOCKS} <= LANGUAGES


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = [line.lstrip("# ") for line in page.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: no heading for {target}"


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [
        page.name for page in PAGES if page.parent.name == "docs" and f"docs/{page.name}" not in readme
    ] == []


def test_every_command_of_the_program_stands_in_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    commands = [name for name in app if not name.startswith("-")]
    assert len(commands) > 10
    assert [name for name in commands if f"sft-pipeline {name}" not in text] == []


# YAML -------------------------------------------------------------------------------------------------------

SMALL = {"run_root": "run", "sources": [{"name": "a", "path": "a.json"}], "model": {"path": "model"}}


@by_language("yaml")
def test_every_yaml_block_is_a_config_or_a_part_of_one(block: Block, tmp_path: Path) -> None:
    part = YAML(typ="safe").load(block.text)
    is_whole = "run_root" in part and "sources" in part
    assert is_whole == (block.about != "fragment"), f"{block.place}: say `yaml fragment` where it is a part"
    path = tmp_path / "config.yaml"
    if is_whole:
        path.write_text(block.text)
    else:
        with path.open("w") as file:
            YAML().dump(SMALL | part, file)
    load_config(path)


@by_language("python")
def test_every_python_block_is_python(block: Block) -> None:
    ast.parse(block.text)


# Commands: parsed -------------------------------------------------------------------------------------------

Words = list[str]


def check_ours(words: Words) -> None:
    app.parse_args(words, exit_on_error=False, print_error=False)


def check_prefect(words: Words) -> None:
    from prefect.cli._app import _app

    known = [word for word in words if word != "--no-prompt"]
    _app.parse_args(known, exit_on_error=False, print_error=False)


def check_make(words: Words) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets), f"the Makefile has {targets}"


def check_python(words: Words) -> None:
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif words[0] == "-m" and words[1] == "pytest":
        paths = [word for word in words[2:] if word.endswith(".py") or "/" in word]
        assert all((ROOT / path).exists() for path in paths), paths
    elif words[0] == "-m":
        importlib.import_module(words[1])
    else:
        check_script(words)


def check_script(words: Words) -> None:
    if words[0] in {block.about for block in BLOCKS if block.language == "python"}:
        return  # a page writes it before the line is typed
    text = (ROOT / words[0]).read_text()
    options = [word for word in words[1:] if word.startswith("--")]
    assert all(f'"{option}"' in text for option in options), options


def check_torchrun(words: Words) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    assert options.training_script == "trainer.launch"
    from trainer.launch import _parser

    _parser().parse_args(options.training_script_args)


def check_deepspeed(words: Words) -> None:
    from deepspeed.launcher.runner import parse_args

    options = parse_args(words)
    assert options.module
    assert options.user_script == "trainer.launch"
    from trainer.launch import _parser

    _parser().parse_args(["--local_rank=0", *options.user_args])


def check_sbatch(words: Words) -> None:
    assert (ROOT / words[0]).is_file()


def check_wandb(words: Words) -> None:
    from wandb.cli.cli import cli

    assert words[0] in cli.commands


def check_pip(words: Words) -> None:
    assert words[0] == "install"
    extras = {extra for word in words for extra in re.findall(r"\[(\w+)\]", word)}
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras), extras


def check_pre_commit(words: Words) -> None:
    assert words[0] in ("install", "run")


def check_activate(words: Words) -> None:
    assert words == [".venv/bin/activate"]


def check_export(words: Words) -> None:
    assert words
    for word in words:
        check_variable(word)


def check_variable(assignment: str) -> None:
    """A variable that somebody reads: Prefect, one of its settings; ours; or a well-known one."""
    name = assignment.partition("=")[0]
    if name.startswith("PREFECT_"):
        from prefect.settings import Settings

        names = prefect_names(Settings.model_json_schema())
        assert name in names, f"Prefect has no setting {name}"
    elif name.startswith("SFT_PIPELINE_"):
        assert any(name in path.read_text() for path in (ROOT / "flows").glob("*.py")), name
    else:
        assert name in {"CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE"}, f"who reads {name}?"


def prefect_names(schema: Any) -> set[str]:
    """Environment variables of all of Prefect's settings."""
    if isinstance(schema, dict):
        own = set(schema.get("supported_environment_variables", ()))
        return own.union(*(prefect_names(value) for value in schema.values()))
    if isinstance(schema, list):
        return set().union(*(prefect_names(value) for value in schema))
    return set()


def check_nothing(words: Words) -> None:
    """A program of the system, whose options are its own business."""


PROGRAMS: dict[str, Callable[[Words], None]] = {
    "sft-pipeline": check_ours,
    "prefect": check_prefect,
    "make": check_make,
    "python": check_python,
    "torchrun": check_torchrun,
    "deepspeed": check_deepspeed,
    "sbatch": check_sbatch,
    "wandb": check_wandb,
    "tensorboard": check_nothing,
    "pip": check_pip,
    "pre-commit": check_pre_commit,
    ".": check_activate,
    "export": check_export,
    "umask": check_nothing,
    "git": check_nothing,
    "tar": check_nothing,
    "head": check_nothing,
    "ls": check_nothing,
}


def check_line(line: str) -> None:
    """Raises where a command line would not even be understood."""
    words = shlex.split(line.partition(" > ")[0], comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        check_variable(words.pop(0))
    assert words, line
    program = Path(words[0]).name if words[0] != "." else "."
    assert program in PROGRAMS, (
        f"nothing checks {program!r}: add it to PROGRAMS, or type it in a console block"
    )
    PROGRAMS[program](words[1:])


@by_language("sh", "console")
def test_every_command_line_is_understood_with_its_options(block: Block) -> None:
    lines = command_lines(block)
    assert lines, f"{block.place}: a block of commands without one"
    for line in lines:
        try:
            check_line(line)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block.place}: {line}: {error}") from error


def test_commands_in_running_text_are_understood_too() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for line in re.findall(r"`((?:sft-pipeline|prefect|make) [^`]+)`", text):
            if page.name != "decisions.md" and "..." not in line and " | " not in line:
                check_mention(line)


def check_mention(line: str) -> None:
    """A command in prose: its bare name, or a whole line."""
    words = line.split()
    if words[0] == "sft-pipeline" and len(words) == 2 and not words[1].startswith("-"):
        assert words[1] in app, line
    else:
        check_line(line.replace("CONFIG", "config.yaml").replace("FOLDER", "dumps"))


@pytest.mark.parametrize(
    "line",
    [
        "sft-pipeline rnu config.yaml",
        "sft-pipeline run config.yaml --untill pack",
        "prefect deplyment run sft-pipeline",
        "prefect worker start --poool sft-pipeline",
        "make tests",
        "python benchmarks/no_such.py",
        "python benchmarks/etl.py --no-such-option",
        "python -m no_such_module",
        "pip install 'sft-pipeline[no_such_extra]'",
        "export PREFECT_NO_SUCH_SETTING=1",
        "curl https://example.org",
        "torchrun --nproc-per-node 2 -m trainer.launch trian --config x",
        "deepspeed --no_ssh --node_rnak 0 --module trainer.launch train --config x",
        "deepspeed --no_ssh --module trainer.launch train --confg x",
        "sbatch examples/slurm/tarin.sbatch config.json",
        "wandb snyc folder",
    ],
)
def test_a_command_that_is_wrong_does_not_pass(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        check_line(line)


# Commands: typed --------------------------------------------------------------------------------------------


def section(page: str, *headings: str) -> list[Block]:
    found = [block for block in BLOCKS if block.page == page and (not headings or block.section in headings)]
    assert any(block.language == "console" for block in found), f"{page} {headings} types nothing"
    return found


TYPED = {
    "a format": section("CONTRIBUTING.md", "Add a format"),
    "a filter rule": section("CONTRIBUTING.md", "Add a filter rule"),
    "a training method": section("CONTRIBUTING.md", "Add a training method"),
    "quick start": section("docs/quickstart.md"),
    "journey": section("docs/journey.md"),
}


def test_every_console_block_is_typed_by_a_test() -> None:
    followed = {block.place for blocks in TYPED.values() for block in blocks}
    assert [b.place for b in BLOCKS if b.language == "console" and b.place not in followed] == []


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a format", "a filter rule"])
def test_the_recipe_adds(tmp_path: Path, what: str) -> None:
    make_project(tmp_path, packages=True).follow(TYPED[what])


@pytest.mark.slow
def test_the_recipe_adds_a_training_method(tmp_path: Path) -> None:
    """The method trains what it says: nothing but the norms differs from the base."""
    from safetensors.numpy import load_file

    project = make_project(tmp_path, packages=True)
    toy.write_model(tmp_path / "model")
    config = toy.write_config(tmp_path).rename(tmp_path / "toy.yaml")
    for stage in STAGES:
        run_stage(stage, load_config(config))
    project.follow(TYPED["a training method"])
    (trained,) = tmp_path.glob("run/checkpoints/*/model/model.safetensors")
    before, after = load_file(tmp_path / "model" / "model.safetensors"), load_file(trained)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed
    assert all("norm" in name for name in changed)


@pytest.mark.slow
def test_the_quick_start_works_as_it_is_typed(tmp_path: Path) -> None:
    make_project(tmp_path, packages=False).follow(TYPED["quick start"])


@pytest.mark.stress
@pytest.mark.smollm
def test_the_journey_prints_what_the_page_says(tmp_path: Path) -> None:
    make_project(tmp_path, packages=False).follow(TYPED["journey"])


# What pages say of the code ---------------------------------------------------------------------------------


def test_every_file_that_contributing_names_is_there_with_its_function() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    prose = re.sub(r"```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    named = re.findall(
        r"`((?:schemas|pipelines|trainer|flows|tests|docs|configs|\.ci)/[\w/.-]*)(?:: (\w+))?`", prose
    )
    assert len(named) > 30
    for path, function in named:
        assert (ROOT / path).exists(), path
        assert not function or f"def {function}(" in (ROOT / path).read_text(), f"{path}: {function}"


def test_the_table_of_disk_in_operations_is_the_one_that_doctor_reckons_with() -> None:
    rows = re.findall(
        r"^\| `?(\w+)`? \| (\d+\.\d+) \| (\d+\.\d+) \|$",
        (ROOT / "docs" / "operations.md").read_text(),
        re.MULTILINE,
    )
    expected = [(STAGE_FOLDERS[stage], low, high) for stage, (low, high) in STAGE_FACTORS.items()]
    expected.append(("all", sum(low for _, low, _ in expected), sum(high for *_, high in expected)))
    assert rows == [(name, f"{low:.2f}", f"{high:.2f}") for name, low, high in expected]


def strings_of_the_code() -> Iterator[str]:
    """Every text that the code can print, with NUL where a value is put in."""
    for room in ("schemas", "pipelines", "trainer", "flows"):
        for path in (ROOT / room).rglob("*.py"):
            yield from (text for node in ast.walk(ast.parse(path.read_text())) if (text := literal(node)))


CONSTANTS = {"SAFETENSORS": "model.safetensors", "WEIGHTS_NAME": "model.safetensors"}
CONSTANTS |= {"WEIGHTS_INDEX_NAME": "model.safetensors.index.json"}


def literal(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            literal(part) if isinstance(part, ast.Constant) else CONSTANTS.get(name_of(part), "\0")
            for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal(node.left) + literal(node.right)
    return ""


def name_of(part: ast.AST) -> str:
    value = getattr(part, "value", None)
    return value.id if isinstance(value, ast.Name) else ""


MESSAGES = [b for b in BLOCKS if b.page == "docs/troubleshooting.md" and b.language == "text"]


@pytest.mark.parametrize("block", MESSAGES, ids=[block.place for block in MESSAGES])
def test_every_message_in_troubleshooting_is_one_that_the_code_can_print(block: Block) -> None:
    pieces = [re.escape(piece.strip("\n")) for piece in block.text.split("...")]
    pattern = re.compile(r"(?s:.*)".join(pieces))
    assert max(len(piece) for piece in pieces) > 12, "too short to recognise"
    assert any(pattern.search(text) for text in strings_of_the_code()), block.text


def test_every_reason_of_a_drop_is_in_troubleshooting_and_every_one_there_is_ours() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = page[page.index("| Reason |") : page.index("Answers full of backslashes")]
    documented = {
        word for line in table.splitlines() if line for word in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    sources = [path.read_text() for path in (ROOT / "pipelines").rglob("*.py")]
    given = {reason for text in sources for reason in re.findall(r"\bDrop\(\s*\"(\w+)\"", text)}
    assert len(given) > 20
    assert given <= documented
    assert all(any(f'"{reason}"' in text for text in sources) for reason in documented)


# Of the reader itself ---------------------------------------------------------------------------------------


def test_output_is_compared_line_by_line_with_wildcards() -> None:
    pattern = output_pattern("merge      in ...  kept 3  0.2 s\n...\nthe end\n")
    assert re.fullmatch(pattern, "merge      in 7  kept 3  N s\nx\ny\nthe end\n")
    assert re.fullmatch(pattern, "merge      in 7  kept 3  N s\nthe end\n")
    assert not re.fullmatch(pattern, "merge      in 7  kept 4  N s\nthe end\n")
    assert not re.fullmatch(pattern, "merge      in 7  kept 3  N s\nthe end\nmore\n")


def test_a_diff_is_read_and_commands_are_told_from_output() -> None:
    assert patch_of(" a\n-b\n+c\n") == ("a\nb\n", "a\nc\n")
    block = Block("page", 1, "console", "", "", "$ one\nout\n$ two\n")
    assert typed(block) == [("one", "out\n"), ("two", "")]
    assert command_lines(Block("page", 1, "sh", "", "", "# only this\na \\\n  b  # c\n")) == ["a    b  # c"]
