"""The documents agree with the code: commands, options, exit codes, folders, and links between pages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import casfs
from casfs.cli.app import VERBS
from casfs.cli.app import casfs as command_line
from tests.unit.test_layout import LAYERS

PROJECT = Path(casfs.__file__).parent.parent
README = (PROJECT / "README.md").read_text("utf-8")
PAGES = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *PROJECT.glob("bench/*.md")])


def code_blocks(text: str) -> Iterator[str]:
    """Yield the code blocks of a page that name no language, or a shell."""
    language: str | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("```") and language is None:
            language, lines = line[3:], []
        elif line.startswith("```"):
            if language in ("", "console", "sh"):
                yield "\n".join(lines)
            language = None
        else:
            lines.append(line)


def commands_in(text: str) -> list[list[str]]:
    """Return the words of every casfs command in the code blocks of a page."""
    found = []
    for block in code_blocks(text):
        prompted = re.search(r"^[#$] casfs ", block, re.MULTILINE) is not None
        for line in block.splitlines():
            plain = line.removeprefix("# ").removeprefix("$ ")
            # In a block with prompts, a line without a prompt is output.
            if plain.startswith("casfs ") and (plain != line or not prompted):
                words = shlex.split(re.sub(r"\[|\]|…", "", plain), comments=True)
                found.append(words[1:])
    return found


def unknown_parts(words: list[str]) -> list[str]:
    """Return the commands and options among the words that casfs does not have."""
    group: click.Command = command_line
    unknown: list[str] = []
    taken = False
    for word in words:
        if taken:
            taken = False
        elif word == "--":
            return unknown  # what follows are arguments, such as another program's command
        elif word.startswith("-"):
            options = {
                name: option
                for option in group.params
                if isinstance(option, click.Option)
                for name in (*option.opts, *option.secondary_opts)
            }
            option = options.get(word.partition("=")[0])
            if option is None:
                unknown.append(word)
            else:
                taken = not option.is_flag and "=" not in word
        elif isinstance(group, click.Group):
            found = group.get_command(click.Context(group), word)
            if found is None:
                return [*unknown, word]
            group = found
    return unknown


def test_every_command_and_option_in_the_documents_exists() -> None:
    # Another test types the commands of the terminal's page, with mistakes among them.
    pages = [page for page in PAGES if page.name != "terminal.md"]
    commands = [(page.name, words) for page in pages for words in commands_in(page.read_text())]
    assert len(commands) > 30
    wrong = [
        (page, words, unknown) for page, words in commands if (unknown := unknown_parts(words))
    ]
    assert wrong == []


def test_a_command_and_an_option_that_do_not_exist_are_found() -> None:
    assert unknown_parts(["backup", "--attempts", "3", "/home", "--no-such"]) == ["--no-such"]
    assert unknown_parts(["key", "lose"]) == ["lose"]
    assert unknown_parts(["bakcup", "--tag", "x"]) == ["bakcup"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists() and there.is_relative_to(PROJECT), target
        if anchor:
            assert anchor in anchors_of(there), target


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as forges derive them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_code_refers_to_no_readme_because_an_installed_casfs_has_none() -> None:
    sources = [*PROJECT.glob("casfs/**/*.py"), *PROJECT.glob("mount/**/*.py")]
    assert len(sources) > 100
    referring = [path for path in sources if re.search(r"\bthe README\b", path.read_text("utf-8"))]
    assert referring == []


def test_the_table_of_the_code_names_every_folder_and_no_file() -> None:
    table = README.partition("## The code")[2]
    names = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in row.split(", ")
    }
    folders = {name.strip("`") for name in names}
    packages = {
        f"{path.parent.relative_to(PROJECT)}/" for path in PROJECT.glob("casfs/*/__init__.py")
    }
    top = {
        f"{path.name}/"
        for path in PROJECT.iterdir()
        if path.is_dir() and not path.name.startswith(".") and any(path.glob("**/*.py"))
    }
    assert packages <= folders
    assert {folder.partition("/")[0] + "/" for folder in folders} >= top & TRACKED
    assert all(folder.endswith("/") and (PROJECT / folder).is_dir() for folder in folders)


TRACKED = {"bench/", "casfs/", "mount/", "tests/", "docs/", "tools/"}


def test_the_command_line_page_lists_every_command() -> None:
    text = (PROJECT / "docs" / "command-line.md").read_text("utf-8")
    listed = set(re.findall(r"`([a-z-]+)\b[^`]*`", text.partition("## Commands")[2]))
    assert set(VERBS) <= listed


def test_the_documents_list_the_exit_codes_of_the_command_line() -> None:
    from casfs.cli import app

    codes = {value for name, value in vars(app).items() if name.startswith("EXIT_")}
    rows = set(map(int, re.findall(r"^\| (\d+) \|", README, re.MULTILINE)))
    assert codes <= rows


def test_the_architecture_page_shows_the_layers_that_the_layout_test_holds() -> None:
    text = (PROJECT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", text, re.MULTILINE)
    shown = {int(number): re.findall(r"`([\w.]+)`", names) for number, names in rows}
    assert shown == {number: list(layer) for number, layer in enumerate(LAYERS, start=1)}


def test_every_module_that_the_architecture_page_names_exists() -> None:
    text = (PROJECT / "docs" / "architecture.md").read_text("utf-8")
    named = re.findall(r"`((?:casfs|mount|tests)/[\w/.]+)`", text)
    assert len(named) > 15
    assert [name for name in named if not (PROJECT / name).exists()] == []


@pytest.mark.parametrize(
    ("flow", "modules"),
    [
        ("A file becomes blobs", 8),
        ("A read in the mount becomes bytes", 7),
        ("How prune decides", 5),
    ],
)
def test_each_flow_leads_through_few_modules(flow: str, modules: int) -> None:
    text = (PROJECT / "docs" / "architecture.md").read_text("utf-8")
    section = text.partition(f"## {flow}\n")[2].partition("\n## ")[0]
    named = re.findall(r"`((?:casfs|mount)/[\w/]+\.py)`", section)
    assert 0 < len(set(named)) <= modules
