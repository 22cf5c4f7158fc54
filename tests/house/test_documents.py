"""The commands that README.md, docs/ and deploy/ show to readers."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import typer

from registry.cli.start import load_commands
from registry.environment.settings import Settings

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "adaptory.service"


def test_the_unit_starts_the_server_and_runs_nothing_before_it() -> None:
    (line,) = [line for line in UNIT.read_text().splitlines() if line.startswith("Exec")]
    assert line.startswith("ExecStart=/opt/adaptory/bin/adaptory ")
    name, *options = shlex.split(line)[1:]
    adaptory = typer.main.get_command(load_commands())
    # Below its parent, as on a command line: commands are built once per process, and remember how their help was
    # requested.
    parent = adaptory.make_context("adaptory", [name])
    assert name == "serve"
    assert adaptory.commands[name].make_context(name, options, parent).params["port"] == 8470  # type: ignore[attr-defined]


def test_every_command_in_a_fence_of_the_documentation_is_a_command_of_ours() -> None:
    adaptory = typer.main.get_command(load_commands())
    counted = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if page.name in ("cli.md", "demo.md"):  # recorded, and compared with the program itself
            continue
        for words in commands_of(page.read_text()):
            context, command = adaptory.make_context("adaptory", ["--help"], resilient_parsing=True), adaptory
            while hasattr(command, "commands") and words and not words[0].startswith("-"):
                name = words.pop(0)
                assert name in command.commands, f"{page.name}: {name}"  # type: ignore[attr-defined]
                command = command.commands[name]  # type: ignore[attr-defined]
            if words:
                command.make_context(command.name, words, context)
            counted += 1
    assert counted > 60


def commands_of(page: str) -> Iterator[list[str]]:
    """The words after each `adaptory` in the fences of a page, also behind other commands and within `$(…)`."""
    for fence in re.findall(r"^```(?:console|sh)?[^\n]*\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for line in fence.replace("\\\n", " ").splitlines():
            if "adaptory " in line and not line.startswith(("registry:", "error:", "next:")):
                yield from _calls(line.partition(" #")[0])


def _calls(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();&|<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] | None = None
    for word in (*lexer, ";"):
        if set(word) <= set("();&|<>"):
            if words is not None:
                yield words
            words = None
        elif words is not None:
            words.append(word)
        elif word == "adaptory":
            words = []


def test_no_document_names_a_setting_that_does_not_exist() -> None:
    known = Settings.variables() | {"ADAPTORY_REQUIRE_SERVICES"}
    unknown = {
        f"{path.name}: {name}"
        for path in (UNIT, *(ROOT / "docs").rglob("*.md"))
        for name in re.findall(r"ADAPTORY_[A-Z_0-9]*[A-Z0-9]", path.read_text())
        if name not in known and not name.startswith("ADAPTORY_TEST_")
    }
    assert unknown == set()


def test_the_recipes_for_contributors_name_files_and_names_that_are_there() -> None:
    recipes = (ROOT / "docs" / "contributing.md").read_text().split("\n## ")[1:]
    missing = [f"{recipe.splitlines()[0]}: {name}" for recipe in recipes for name in _missing(recipe)]
    assert (missing, len(recipes)) == ([], 17)


def _missing(recipe: str) -> list[str]:
    quoted = re.findall(r"`([\w./]+)`", recipe.replace("\n", " "))
    paths = [ROOT / name for name in quoted if "/" in name and "NAME" not in name]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]) if file.is_file()]
    text = "".join(file.read_text() for file in files)
    known = {file.name for file in files} | set(re.findall(r"\w+", text))
    absent = [str(path.relative_to(ROOT)) for path in paths if not path.exists()]
    return absent + [name for name in quoted if "/" not in name and name not in known and name not in text]


def test_no_page_loads_or_unloads_a_name_that_can_change_what_it_stands_for() -> None:
    """A server that unloads a channel's name and loads it anew can die, with its base's requests, as asks.md shows."""
    pages = {path: path.read_text() for path in (ROOT / "docs").rglob("*.md") if path.name != "asks.md"}
    loaded = [
        (path.name, name)
        for path, text in pages.items()
        for listed in re.findall(
            r'lora_name\\?": \\?"([^"\\]+)|RESOLVER_HF_REPO_LIST=(\S+)|--lora-modules (\S+?)=', text
        )
        for name in "".join(listed).split(",")
    ]
    assert [(page, name) for page, name in loaded if not re.search(r"\d+\.\d+\.\d+$", name)] == []
    assert len(loaded) > 5
