"""Every refusal has a next step: its own, or the text of its code, but never a copy of that text."""

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import composer
import registry
from composer import errors
from composer.next_steps import NEXT_STEPS
from registry.errors import FAMILIES
from registry.errors.translation import CODES

USER_TEXTS = ("subject", "next_step")
TEXTS = {
    composer: NEXT_STEPS,
    registry: {code: text for codes in CODES.values() for code, text in codes.items()},
}
NAMES = {family.__name__ for family in (*FAMILIES, *errors.ComposerError.__subclasses__())}


def lines_without(source: str, texts: Mapping[str, str]) -> list[int]:
    """The lines where an error is made without a next step, neither of its own nor by its code."""
    return [call.lineno for call, code, own in errors_made(source) if own is None and not texts.get(code)]


def lines_that_repeat(source: str, texts: Mapping[str, str]) -> list[int]:
    """The lines where an error repeats the text of its code."""
    return [
        call.lineno
        for call, code, own in errors_made(source)
        if isinstance(own, ast.Constant) and own.value == texts.get(code)
    ]


@cache
def errors_made(source: str) -> list[tuple[ast.Call, str, ast.expr | None]]:
    """Each error with its code, empty unless it is a constant, and its own next step."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in NAMES]
    own = [next((keyword.value for keyword in call.keywords if keyword.arg == "next_step"), None) for call in made]
    codes = [str(getattr(call.args[0], "value", "")) if call.args else "" for call in made]
    return list(zip(made, codes, own, strict=True))


@cache
def user_arguments(source: str) -> dict[str, dict[int, str]]:
    """Function -> its arguments that a user reads, by position."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    names = {function.name: [argument.arg for argument in function.args.args] for function in functions}
    positions = {
        name: {index: one for index, one in enumerate(own) if one in USER_TEXTS} for name, own in names.items()
    }
    return {name: indices for name, indices in positions.items() if indices}


def lines_with_nothing(source: str, positions: dict[str, dict[int, str]]) -> list[int]:
    """The lines with an empty subject or next step."""
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
    silent = {file: lines_without(source, TEXTS[package]) for file, source in sources(package).items()}
    assert {file: lines for file, lines in silent.items() if lines} == {}


@pytest.mark.parametrize("package", [composer, registry], ids=lambda package: package.__name__)
def test_no_error_repeats_the_text_of_its_code(package: ModuleType) -> None:
    repeated = {file: lines_that_repeat(source, TEXTS[package]) for file, source in sources(package).items()}
    assert {file: lines for file, lines in repeated.items() if lines} == {}


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
    texts = {"busy": "Try again."}
    assert lines_without('raise Usage("code", "It makes no sense.")', texts) == [1]
    assert lines_without('raise InvalidFile("code", "It is damaged.", subject="file")', texts) == [1]
    assert lines_without('raise Conflict("busy", "Others write.")', texts) == []
    assert lines_that_repeat('raise Conflict("busy", "Others write.", next_step="Try again.")', texts) == [1]
    reads = "def read(path, code, next_step):\n    ...\n"
    assert lines_with_nothing(f'{reads}read(path, "missing", "")', user_arguments(reads)) == [3]
    assert lines_with_nothing('raise Usage("code", "No.", subject="x", next_step="")', {}) == [1]
