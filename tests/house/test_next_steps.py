"""Every refusal says what to do next."""

import ast
from pathlib import Path
from types import ModuleType

import pytest

import composer
import registry
from composer import errors
from registry.errors import FAMILIES

USER_TEXTS = ("subject", "next_step")
NAMES = {family.__name__ for family in (*FAMILIES, *errors.ComposerError.__subclasses__())}


def lines_without(source: str) -> list[int]:
    """Where an error is made that says no next step."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in NAMES]
    return [call.lineno for call in made if all(given.arg != "next_step" for given in call.keywords)]


def user_arguments(source: str) -> dict[str, dict[int, str]]:
    """Function -> its arguments that a user reads, by position."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    names = {one.name: [argument.arg for argument in one.args.args] for one in functions}
    positions = {
        name: {index: one for index, one in enumerate(own) if one in USER_TEXTS} for name, own in names.items()
    }
    return {name: indices for name, indices in positions.items() if indices}


def lines_with_nothing(source: str, positions: dict[str, dict[int, str]]) -> list[int]:
    """Where a subject or a next step is given that is empty."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    empty: list[int] = []
    for call in calls:
        own = positions.get(call.func.id, {}) if isinstance(call.func, ast.Name) else {}
        given = [keyword.value for keyword in call.keywords if keyword.arg in USER_TEXTS]
        given += [value for index, value in enumerate(call.args) if index in own]
        empty += [value.lineno for value in given if isinstance(value, ast.Constant) and value.value == ""]
    return empty


def sources(package: ModuleType) -> dict[str, str]:
    root = Path(str(package.__file__)).parent
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*.py"))}


@pytest.mark.parametrize("package", [composer, registry], ids=lambda package: package.__name__)
def test_every_error_says_what_to_do_next(package: ModuleType) -> None:
    silent = {file: lines_without(source) for file, source in sources(package).items()}
    assert {file: lines for file, lines in silent.items() if lines} == {}


@pytest.mark.parametrize("package", [composer, registry], ids=lambda package: package.__name__)
def test_no_error_is_about_nothing_or_says_nothing(package: ModuleType) -> None:
    indices: dict[str, dict[int, str]] = {}
    for source in [*sources(composer).values(), *sources(registry).values()]:
        indices |= user_arguments(source)
    empty = {
        file: lines_with_nothing(source, indices | user_arguments(source)) for file, source in sources(package).items()
    }
    assert {file: lines for file, lines in empty.items() if lines} == {}


def test_an_error_that_says_none_would_be_seen() -> None:
    assert lines_without('raise Usage("code", "It makes no sense.")') == [1]
    assert lines_without('raise InvalidFile("code", "It is damaged.", subject="file")') == [1]
    reads = "def read(path, code, next_step):\n    ...\n"
    assert lines_with_nothing(f'{reads}read(path, "missing", "")', user_arguments(reads)) == [3]
    assert lines_with_nothing('raise Usage("code", "No.", subject="x", next_step="")', {}) == [1]
