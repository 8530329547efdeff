"""Fenced blocks of a Markdown page, and a project in which their commands are typed for real.

What follows the language says what a block is:

    ```console                 lines with $ are typed, their output is compared: ... stands for anything
    ```sh                      command lines for people
    ```yaml, ```yaml fragment  a config, or a part of one
    ```python FILE             written to FILE before the next commands; so with json and yaml
    ```diff FILE               applied to FILE
    ```text                    output to recognise
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.integration import toy

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
_FENCE = re.compile(r"^```(\S*)[ \t]*(.*)$")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block; `about` is what stands behind the language, `section` the heading above it."""

    page: str
    line: int
    language: str
    about: str
    section: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    blocks, opened, lines, section = [], None, [], ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and line.startswith("#"):
            section = line.lstrip("# ")
        elif opened is None and fence:
            opened, lines = (number, fence[1], fence[2].strip()), []
        elif opened is not None and line.startswith("```"):
            page = path.relative_to(ROOT).as_posix()
            blocks.append(Block(page, *opened, section, "\n".join(lines) + "\n"))
            opened = None
        elif opened is not None:
            lines.append(line)
    assert opened is None, f"{path}: the block of line {opened} is never closed"
    return blocks


def command_lines(block: Block) -> list[str]:
    """The command lines of a block for a shell: comments and continuations resolved."""
    if block.language == "console":
        return [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
    text = block.text.replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if shlex.split(line, comments=True)]


# A project to type in ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Project:
    """A folder with dumps/, models/my-model, examples/, configs/, and, where wanted, a copy of our packages."""

    folder: Path
    has_packages: bool = False

    def follow(self, blocks: Sequence[Block]) -> None:
        """Do what the blocks say, in order. Raises AssertionError naming the line of the page."""
        for block in blocks:
            if block.language == "console":
                self._type(block)
            elif block.language == "diff" and block.about:
                self._patch(block)
            elif block.about and block.about != "fragment":
                path = self.folder / block.about
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text, encoding="utf-8")

    def run(self, line: str) -> "subprocess.CompletedProcess[str]":
        """A command line in a shell, with no settings of this machine's Prefect."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        packages = self.folder if self.has_packages else ROOT
        environment = kept | {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
            "PYTHONPATH": str(packages),
            "HOME": str(self.folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
        }
        return subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )

    def _type(self, block: Block) -> None:
        for command, expected in typed(block):
            result = self.run(command)
            assert result.returncode == 0, f"{block.place}: {command}\n{result.stdout}"
            pattern = output_pattern(expected)
            assert re.fullmatch(pattern, comparable(result.stdout)), (
                f"{block.place}: {command}\n--- the page says\n{expected}--- it printed\n{result.stdout}"
            )

    def _patch(self, block: Block) -> None:
        path = self.folder / block.about
        old, new = patch_of(block.text)
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, (
            f"{block.place}: these lines stand {text.count(old)} times in {path}:\n{old}"
        )
        path.write_text(text.replace(old, new), encoding="utf-8")


def make_project(folder: Path, *, packages: bool) -> Project:
    """Dumps and a model of toy size; our packages copied where a page changes them."""
    toy.write_dumps(folder / "dumps", num_chats=60, num_records=40)
    toy.write_model(folder / "models" / "my-model")
    for name in ("examples", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    if (ROOT / ".cache").is_dir():
        (folder / ".cache").symlink_to(ROOT / ".cache")
    for name in ("schemas", "pipelines", "trainer", "flows") if packages else ():
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = folder / "bin" / "sft-pipeline"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m flows.cli "$@"\n')
    command.chmod(0o755)
    return Project(folder, packages)


def typed(block: Block) -> list[tuple[str, str]]:
    """Commands of a console block, each with the output below it."""
    found: list[tuple[str, str]] = []
    for line in block.text.splitlines(keepends=True):
        if line.startswith("$ "):
            found.append((line[2:].strip(), ""))
        else:
            assert found, f"{block.place}: output before the first command"
            found[-1] = (found[-1][0], found[-1][1] + line)
    return found


def patch_of(diff: str) -> tuple[str, str]:
    """What stands in the file before and after."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if not line.startswith("+"))
    new = "".join(line[1:] for line in lines if not line.startswith("-"))
    return old, new


def comparable(output: str) -> str:
    """Output without times, which are never the same, and without what a slow machine says to pass them."""
    output = re.sub(r"^\w+ +\d+ of \d+ parts .*\n", "", output, flags=re.MULTILINE)
    return re.sub(r"\d+\.\d s\b", "N s", output)


def output_pattern(expected: str) -> str:
    """`...` stands for anything in a line; alone on a line, for any number of lines."""
    lines = []
    for line in comparable(expected).splitlines():
        if line == "...":
            lines.append(r"(?:.*\n)*?")
        else:
            lines.append(r"[^\n]*".join(map(re.escape, line.split("..."))) + r"\s*?\n")
    return "".join(lines) + r"\s*"
