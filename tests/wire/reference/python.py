"""docs/reference/python.md, from the signatures and docstrings of the exports of `registry.sdk`."""

import ast
import inspect
import re
from collections.abc import Iterator
from doctest import DocTestParser, Example
from pathlib import Path

from registry import sdk
from tests.wire.reference.markdown import code, fence, joined, table

HEAD = """# Python API

What `registry.sdk` exports: a registry as an object, what it answers, and a callback for trainers.
[Python](../how-to/python.md) shows how it is used. This page is made from the docstrings: `make snapshots` writes it.

Releases and scores are frozen dataclasses, the others the documents of REST as types. `document` of each has all
that REST answers. Every call raises the errors of
`registry.errors`: their family is the class, and `code` is stable ([Errors](errors.md)). A local file that cannot be
read as an adapter or a checkpoint raises one of `composer.errors`. The package is typed (`py.typed`).

"""
FOLDER = Path(sdk.__file__).parent
ORDER = ("Registry", "AdaptoryCallback", "Release", "Score", "Move", "Promotion", "Rollout", "Composition")
DOCUMENTS = {"Move": "MoveOut", "Promotion": "PromotionOut", "Rollout": "RolloutOut", "Composition": "CompositionOut"}
"""Names of documents of the API, and of their classes."""
IMPORT = re.compile("import |from ")


def page() -> str:
    assert set(ORDER) == set(sdk.__all__)
    classes = {
        node.name: node
        for path in sorted([*FOLDER.glob("*.py"), *FOLDER.with_name("wire").glob("*.py")])
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    return joined(HEAD, *(part for name in ORDER for part in _class(name, classes[DOCUMENTS.get(name, name)])))


def _class(name: str, node: ast.ClassDef) -> Iterator[str]:
    yield f"## {name}\n\n"
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    begin = [method for method in methods if method.name == "__init__"]
    if begin:
        yield fence(_signature(name, begin[0]), "python") + "\n"
    yield _text(ast.get_docstring(node) or "")
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
    yield table(
        ("field", "type", "default"),
        [
            (code(ast.unparse(field.target)), code(ast.unparse(field.annotation)), code(_default(field.value)))
            for field in fields
        ]
        + [
            (code(method.name), code(_type(method.returns)), "")
            for method in methods
            if _decorators(method) & {"property"}
        ],
    ) + ("\n" if fields else "")
    for method in methods:
        if (
            method.name.startswith("_")
            or _decorators(method) & {"classmethod", "property"}
            or method.name.startswith("on_")
        ):
            continue
        yield f"### {name}.{method.name}\n\n"
        yield fence(_signature(method.name, method), "python") + "\n"
        yield _text(ast.get_docstring(method) or "")


def _decorators(method: ast.FunctionDef) -> set[str]:
    return {ast.unparse(decorator) for decorator in method.decorator_list}


def _default(value: ast.expr | None) -> str:
    return "" if value is None or isinstance(value, ast.Call) else ast.unparse(value)


def _signature(name: str, node: ast.FunctionDef) -> str:
    """The signature for a caller: without `self`; on several lines if it is too long for one."""
    arguments = node.args
    left = arguments.args[1:]
    defaults = [None] * (len(left) - len(arguments.defaults)) + list(arguments.defaults)
    parts = [_argument(one, value) for one, value in zip(left, defaults, strict=True)]
    if arguments.vararg:
        parts.append("*" + _argument(arguments.vararg, None))
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_argument(one, value) for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        parts.append("**" + _argument(arguments.kwarg, None))
    returns = f" -> {_type(node.returns)}" if node.returns and node.name != "__init__" else ""
    line = f"{name}({', '.join(parts)}){returns}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def _argument(one: ast.arg, default: ast.expr | None) -> str:
    given = f"{one.arg}: {_type(one.annotation)}" if one.annotation else one.arg
    return given if default is None else f"{given} = {ast.unparse(default)}"


def _type(node: ast.expr | None) -> str:
    """Names that are only imported for types are quoted in the code."""
    return re.sub(r"""(?<![\w\[])['"]([\w.\[\], |]+)['"]""", r"\1", ast.unparse(node)) if node else ""


def _text(docstring: str) -> str:
    """Paragraphs unchanged, and examples as code."""
    shown: list[str] = []
    for part in DocTestParser().parse(inspect.cleandoc(docstring)):
        if isinstance(part, Example):
            if shown and shown[-1].startswith("```python"):
                before = shown[-1].removeprefix("```python\n").removesuffix("```\n")
                ends_imports = IMPORT.match(before.splitlines()[-1]) and not IMPORT.match(part.source)
                shown[-1] = fence(before + "\n" * bool(ends_imports) + part.source, "python")
            else:
                shown.append(fence(part.source, "python"))
        else:
            shown += [" ".join(paragraph.split()) + "\n" for paragraph in part.split("\n\n") if paragraph.strip()]
    return "\n".join(shown) + "\n"
