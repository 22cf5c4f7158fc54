"""The rules of the house that no linter knows, read from the syntax tree and from the files that git tracks."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
TOP_LEVEL = {
    "pyproject.toml", "README.md", "Makefile", "LICENSE", "CHANGELOG.md", "constraints.txt", ".ci", "registry",
    "composer", "migrations", "deploy", "tests", "benchmarks", "examples", "docs", "zensical.toml",
}  # fmt: skip
FORBIDDEN_MODULES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers", "service"}
FORBIDDEN_CLASSES = re.compile(r".*(Manager|Service|Helper|Utils?)$")
# Places of one machine; the brackets keep this file from naming them itself.
MACHINE_PATHS = re.compile(r"(?<![\w.}])/[w]ork/(?:main|shared)" r"|\.\./shared[/]" r"|/tmp/[v]env" r"|/root[/]")


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["/usr/bin/env", "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def python_files(*folders: str) -> list[Path]:
    return [
        path
        for path in tracked()
        if path.suffix == ".py" and (not folders or path.relative_to(ROOT).parts[0] in folders)
    ]


class Name(NamedTuple):
    """A name that a file introduces, or a method that it calls. `lines` and `parameters` are those of a function."""

    kind: str
    text: str
    line: int
    lines: int = 0
    parameters: frozenset[str] = frozenset()


@cache
def names(path: Path) -> tuple[Name, ...]:
    """Read once for all tests: parsing every file takes seconds."""
    return tuple(filter(None, map(_name, ast.walk(ast.parse(path.read_text(encoding="utf-8"))))))


def _name(node: ast.AST) -> Name | None:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            taken = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            return Name("function", node.name, node.lineno, lines, frozenset(argument.arg for argument in taken))
        case ast.ClassDef():
            return Name("class", node.name, node.lineno)
        case ast.arg():
            return Name("parameter", node.arg, node.lineno)
        case ast.Name(ctx=ast.Store()):
            return Name("variable", node.id, node.lineno)
        case ast.Call(func=ast.Attribute(attr=method)):
            return Name("call", method, node.lineno)
    return None


def named(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(ROOT)}:{line}" if line else str(path.relative_to(ROOT))


def test_no_file_is_longer_than_500_lines() -> None:
    lengths = {named(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert {name: count for name, count in lengths.items() if count > MAX_FILE_LINES} == {}
    assert len(lengths) > 100, "the files are found at all"


def test_no_function_is_longer_than_60_lines() -> None:
    long = [
        f"{named(path, name.line)} {name.text}"
        for path in python_files()
        if path.parent != ROOT / "migrations" / "versions"  # alembic writes those, and a migration is never changed
        for name in names(path)
        if name.lines > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_no_module_and_no_class_has_a_name_that_says_nothing() -> None:
    modules = [named(path) for path in python_files() if FORBIDDEN_MODULES & {path.stem, *path.relative_to(ROOT).parts}]
    classes = [
        named(path, name.line)
        for path in python_files()
        for name in names(path)
        if name.kind == "class" and FORBIDDEN_CLASSES.match(name.text)
    ]
    assert modules + classes == []


def test_no_function_takes_a_session_and_a_store() -> None:
    both = [
        named(path, name.line)
        for path in python_files("registry")
        for name in names(path)
        if "session" in name.parameters and name.parameters & {"store", "resources"}
    ]
    assert both == []


def test_only_the_database_commits() -> None:
    commits = {
        named(path)
        for path in python_files("registry", "composer")
        for name in names(path)
        if (name.kind, name.text) == ("call", "commit")
    }
    assert commits == {"registry/database/engine.py"}


def test_the_top_level_holds_what_was_agreed_and_nothing_else() -> None:
    folders = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {name for name in folders if not name.startswith(".") or name == ".ci"} == TOP_LEVEL


def test_nothing_names_a_place_on_somebodys_machine() -> None:
    naming = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights
        naming += [named(path, text[: match.start()].count("\n") + 1) for match in MACHINE_PATHS.finditer(text)]
    assert naming == []


@pytest.mark.parametrize("package", ["registry", "composer"])
def test_the_map_of_a_package_names_only_what_is_there_and_every_folder(package: str) -> None:
    folder = ROOT / package
    named_there = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    folders = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert folders <= set(re.findall(r"(\w+)/", named_there))
    assert set(re.findall(r"(\w+)/(?=[\s;,(.]|$)", named_there)) <= folders
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    if package == "registry":  # the rooms of composer have names of their own
        assert {name for name in modules if not re.search(rf"\b{name}\b", named_there)} == set()


# The brackets keep this file from using the words itself.
PRIVATE_WORDS = re.compile(r"(?<![a-z])(?:[t]old|[a]side|[w]hoever)(?![a-z])", re.IGNORECASE)
"""Words that named a dozen things each: use translate, document, note, staging or spill, or name the person."""


def test_no_private_word_is_in_the_code_or_the_documentation() -> None:
    pages = [path for path in tracked() if path.suffix == ".md" and path.name != "CHANGELOG.md"]
    lines = [
        named(path, number)
        for path in (*python_files("registry", "composer", "benchmarks", "examples", "tests"), *pages)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if PRIVATE_WORDS.search(line)
    ]
    assert lines == []


VAGUE_NAMES = re.compile(r"(?:^|_)(?:whole|places?|found)(?:$|_)", re.IGNORECASE)
"""Say total, overall or full; slot, path or position; and name the thing that was found."""
PLACING = re.compile(r"^_?place(?:_[a-z]+)*$|(?:^|_)in_place$|^not_found$", re.IGNORECASE)
"""The verb of placement, and the field's own terms."""
PHRASES = re.compile(
    r"\b(?:is no [a-z]+ of|(?<!, )of which|who (?:asks|takes)|so many|takes an admin|way out)\b", re.IGNORECASE
)
"""Constructions that a reader stumbles over: a free relative as subject, an inverted clause, `is no` for `is not a`."""


def test_no_vague_name_is_in_the_code() -> None:
    """The names of tests are sentences, in which these words are plain English."""
    vague = {
        f"{named(path, name.line)}: {name.text}"
        for path in python_files("registry", "composer", "benchmarks", "examples", "tests")
        for name in names(path)
        if VAGUE_NAMES.search(name.text) and not PLACING.search(name.text)
        if name.kind != "call" and not name.text.startswith("test_")
    }
    assert vague == set()


def test_no_test_has_a_vague_folder_or_file() -> None:
    paths = [path.relative_to(ROOT) for path in python_files("tests")]
    assert [str(path) for path in paths if VAGUE_NAMES.search("_".join(path.with_suffix("").parts))] == []


def test_no_stumbling_phrase_is_in_the_code_or_the_documentation() -> None:
    pages = [path for path in tracked() if path.suffix == ".md" and path.name != "CHANGELOG.md"]
    phrases = [
        f"{named(path, number)}: {match.group()}"
        for path in (*python_files("registry", "composer"), *pages)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if (match := PHRASES.search(line))
    ]
    assert phrases == []
