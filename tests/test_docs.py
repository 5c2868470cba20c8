"""README and documentation: Python blocks run, and commands in shell blocks exist with their flags.

On the line before a block, `<!-- skip: reason -->` leaves it out, and `<!-- file: name.py -->`
writes it to that file, from which later blocks import. The Python blocks of a page share a
namespace.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import jsonargparse
import pytest

from experiments.cli import main
from ood import DETECTORS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"""^(?:<!--\ (?P<mark>skip|file):\ (?P<note>.+)\ -->\n)?
    ```(?P<language>.*)\n(?P<code>(?s:.*?))^```$""",
    re.MULTILINE | re.VERBOSE,
)


class Block(NamedTuple):
    language: str
    code: str
    line: int
    file: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(
            match["language"],
            match["code"],
            text.count("\n", 0, match.start("code")),
            match["note"] if match["mark"] == "file" else "",
        )
        for match in BLOCK.finditer(text)
        if match["mark"] != "skip"
    ]


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each `rewardmodels` or `make` line of the shell blocks."""
    for block in blocks(page):
        if block.language in ("", "sh", "console"):
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words and words[0] in ("rewardmodels", "make"):
                    yield words


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, from which Python imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    with patch.dict(DETECTORS):  # a page may register its own
        yield tmp_path
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name)
def test_python_blocks_run(page, folder):
    namespace = {"__name__": page.stem}
    for block in python_blocks(page):
        if block.file:
            (folder / block.file).write_text(block.code)
        else:
            exec(compile("\n" * block.line + block.code, page, "exec"), namespace)


class Parsed(Exception):
    """Raised in place of running a command."""


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=name)
def test_commands_exist(page, folder, monkeypatch, capsys):
    parse = jsonargparse.ArgumentParser.parse_args

    def parse_only(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_only)
    for block in python_blocks(page):
        if block.file:
            (folder / block.file).write_text(block.code)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command, *arguments in commands(page):
        if command == "make":
            assert set(arguments) <= set(targets), arguments
            continue
        try:
            status = main(arguments)
        except Parsed:
            status = 0
        assert status == 0, f"{shlex.join(arguments)}: {capsys.readouterr().err}"
