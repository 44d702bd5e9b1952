"""The documentation names what there is, and marks what there is not."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from reference import pages

from gradscope.attribution.methods import methods
from gradscope.cli import app
from gradscope.report.formats import BUILT_IN
from gradscope.report.rules import load_rules

GROUP: Any = typer.main.get_command(app)
COMMANDS = GROUP.commands
DOCS = Path(__file__).resolve().parents[1] / "docs"
CONTRACT = (DOCS / "contract.md").read_text()


def section(number: int) -> str:
    return CONTRACT.split(f"\n## {number}. ")[1].split("\n## ")[0]


def named(text: str) -> dict[str, bool]:
    """Names in backticks, and whether they are built: not marked with a dagger."""
    return {name: mark == "" for name, mark in re.findall(r"`([a-z0-9+-]+)`(†?)", text)}


def test_the_contract_lists_every_method_and_marks_those_to_come() -> None:
    listed = named(section(6).split(". The reference input")[0])

    assert [name for name, built in listed.items() if built] == list(methods())


def test_the_contract_lists_every_rule_and_marks_those_to_come() -> None:
    listed = named(section(7).split("\n\nA rule has")[0])

    built = {name for name, is_built in listed.items() if is_built}
    assert built == {rule.name for rule in load_rules().values()}


def test_the_contract_lists_every_command_and_marks_those_to_come() -> None:
    rows = re.findall(r"^\| (`gradscope .*?) \|", section(1), re.MULTILINE)
    listed = re.findall(r"`gradscope ([a-z]+)[^`]*`(†?)", " ".join(rows))

    assert {name for name, mark in listed if not mark} == set(COMMANDS)


def test_the_contract_lists_every_format_and_marks_those_to_come() -> None:
    listed = named(section(1).split("`--format` (stdout: ")[1].split("), `--report")[0])

    assert [name for name, built in listed.items() if built] == list(BUILT_IN)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_contract_lists_every_option_of_a_command(name: str) -> None:
    tables = section(1)
    short = {"--quiet": "-q", "--verbose": "-v", "--all": "layers"}
    options = [o for p in COMMANDS[name].params for o in p.opts if o.startswith("--")]

    assert [o for o in options if not re.search(rf"{short.get(o, o)}\b", tables)] == []


@pytest.mark.parametrize(("name", "made"), pages().items(), ids=pages())
def test_a_page_of_reference_says_what_the_program_registers(name: str, made: str) -> None:
    assert (DOCS / name).read_text() == made, "run `make docs`"


def test_pages_of_reference_link_to_headings_that_are_there() -> None:
    for page in pages().values():
        headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
        plain = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
        anchors = {f"{a}-{n}" if (n := plain[:i].count(a)) else a for i, a in enumerate(plain)}
        assert {link for link in re.findall(r"\]\(#(.*?)\)", page) if link not in anchors} == set()


#: Commands of the pages: at a prompt, indented, or a step of a job; without comment, redirection.
_LINE = re.compile(r"^(?:\$ | {4,}|[^'\n]*?(?:run|script): )gradscope ([^#>\n]*)", re.MULTILINE)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_the_commands_of_the_pages_are_understood(page: Path) -> None:
    for line in [] if page.name == "commands.md" else _LINE.findall(page.read_text()):
        # As a shell writes the files of a pattern.
        name, *words = shlex.split(
            re.sub(r"(?<= )([^ '\"]*)\*([^ '\"]*)", r"\g<1>1\2 \g<1>2\2", line)
        )
        COMMANDS[name].make_context(name, words)  # raises for what it has not


def test_the_commands_of_the_pages_are_found() -> None:
    found = {page.name: len(_LINE.findall(page.read_text())) for page in DOCS.glob("*.md")}

    assert all(found[name] >= 4 for name in ("weights.md", "drift.md", "flow.md", "explain.md"))
    assert found["gate.md"] >= 8


def test_the_index_lists_every_page_once() -> None:
    index = (DOCS / "README.md").read_text()

    assert sorted(re.findall(r"^\| \[([\w.]+)\]\(\1\) \|", index, re.MULTILINE)) == sorted(
        page.name for page in DOCS.glob("*.md") if page.name != "README.md"
    )


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_of_the_pages_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#\s]+)\)", page.read_text())

    assert [link for link in links if not (DOCS / link).exists()] == []
