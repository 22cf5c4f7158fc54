"""One register of errors: it has every code that is raised, with its family, and the documentation lists them all."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import composer
from registry.errors import FAMILIES, RegistryError
from registry.errors.translation import CODES, PREFIXES, family_of, is_registered
from tests.wire import snapshots

ROOT = Path(composer.__file__).parents[1]
OF_REGISTRY = {family.__name__: family for family in FAMILIES}
TAKES_A_CODE = {"read_json": 1, "untrusted": 0, "_unfit": 0}
"""Functions that raise an error with a given code, and the position of that argument."""
OF_COMPOSER = {"InvalidFile", "Mismatch", "NotSupported", "RefusedOutput"}
HEAD = """# Errors

Every error has a `code`, which is stable, and a family, which decides the exit code of the command line and the HTTP
status. Over REST an error is a problem document (RFC 9457): `code`, `family`, `subject` (what it is about), `detail`
(what is wrong) and `next` (what to do in this case). What to do in general is below.

This page is made from the codes of `registry/errors/`, and from `composer/next_steps.py`: `make snapshots` writes it.
"""


def trees() -> dict[Path, ast.Module]:
    files = [path for folder in ("registry", "composer") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}


def calls() -> Iterator[tuple[str, str, str]]:
    """(where, callee, code) of each call that names a code."""
    positions = dict.fromkeys((*OF_REGISTRY, *OF_COMPOSER), 0) | TAKES_A_CODE
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                callee = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                position = positions.get(callee)
                if position is not None and len(node.args) > position:
                    code = node.args[position]
                    if isinstance(code, ast.Constant) and isinstance(code.value, str):
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", callee, code.value


def test_every_code_that_is_raised_is_registered_with_its_family() -> None:
    wrong: list[str] = []
    raised: dict[str, set[str]] = defaultdict(set)
    for where, callee, code in calls():
        raised[code].add(callee)
        family = family_of(code)
        if not is_registered(code):
            wrong.append(f"{where}: {code} is not registered")
        elif callee in OF_REGISTRY and OF_REGISTRY[callee] is not family:
            wrong.append(f"{where}: {code} is {family.__name__}, not {callee}")
    assert wrong == []
    assert len(raised) > 250


def test_no_error_repeats_the_text_of_its_code() -> None:
    steps = {code: step for codes in CODES.values() for code, step in codes.items()}
    repeated: list[str] = []
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                given = [keyword.value for keyword in node.keywords if keyword.arg == "next_step"]
                texts = [value.value for value in given if isinstance(value, ast.Constant)]
                if steps.get(str(node.args[0].value)) in texts:
                    repeated.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert repeated == []


def test_every_error_states_what_to_do() -> None:
    """An error of the registry with a code of the composer has no text of its own."""
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (family := OF_REGISTRY.get(getattr(node.func, "id", "")))
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value not in family.codes
        and all(keyword.arg not in ("next_step", None) for keyword in node.keywords)
    ]
    assert silent == []


def test_no_code_is_registered_that_nothing_raises() -> None:
    text = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("registry", "composer")
        for path in (ROOT / folder).rglob("*.py")
        if path.parent.name != "errors" and path.name != "next_steps.py"
    )
    idle = [code for codes in CODES.values() for code in codes if f'"{code}"' not in text]
    assert idle == []


def test_a_code_of_a_file_belongs_to_the_family_of_its_beginning() -> None:
    assert {family_of(f"{prefix}x") for prefix in PREFIXES} == {OF_REGISTRY["Refused"]}


def test_the_documentation_lists_every_code() -> None:
    snapshots.check("../../docs/reference/errors.md", HEAD + "".join(map(_section, FAMILIES)))


def _section(family: type[RegistryError]) -> str:
    rows = [f"| `{code}` | {fix.replace('|', chr(92) + '|')} |" for code, fix in sorted(CODES[family].items())]
    title = f"## {family.title}: `{family.family}`, exit code {family.exit_code}, HTTP {family.status}"
    return "\n".join(["", title, "", "| code | what to do |", "|---|---|", *rows, ""])
