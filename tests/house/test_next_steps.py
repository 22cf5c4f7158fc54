"""Every refusal says what to do next."""

import ast
from pathlib import Path
from types import ModuleType

import pytest

import composer
import registry
from composer import errors
from registry.errors import FAMILIES

NAMES = {family.__name__ for family in (*FAMILIES, *errors.ComposerError.__subclasses__())}


def lines_without(source: str) -> list[int]:
    """Where an error is made that says no next step."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in NAMES]
    return [call.lineno for call in made if all(given.arg != "next_step" for given in call.keywords)]


@pytest.mark.parametrize("package", [composer, registry], ids=lambda package: package.__name__)
def test_every_error_says_what_to_do_next(package: ModuleType) -> None:
    root = Path(str(package.__file__)).parent
    silent = {str(path.relative_to(root)): lines_without(path.read_text()) for path in sorted(root.rglob("*.py"))}
    assert {file: lines for file, lines in silent.items() if lines} == {}


def test_an_error_that_says_none_would_be_seen() -> None:
    assert lines_without('raise Usage("code", "It makes no sense.")') == [1]
    assert lines_without('raise InvalidFile("code", "It is damaged.", subject="file")') == [1]
