"""Every refusal of the registry says what to do next."""

import ast
from pathlib import Path

import registry
from registry.errors import FAMILIES

NAMES = {family.__name__ for family in FAMILIES}


def lines_without(source: str) -> list[int]:
    """Where an error is made that says no next step."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in NAMES]
    return [call.lineno for call in made if all(given.arg != "next_step" for given in call.keywords)]


def test_every_error_of_the_registry_says_what_to_do_next() -> None:
    root = Path(registry.__file__).parent
    silent = {str(path.relative_to(root)): lines_without(path.read_text()) for path in sorted(root.rglob("*.py"))}
    assert {file: lines for file, lines in silent.items() if lines} == {}
    assert lines_without('raise Usage("code", "It makes no sense.")') == [1], "it would be seen"
