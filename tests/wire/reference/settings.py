"""docs/reference/settings.md, from the models of the settings and the texts below their fields."""

import ast
import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from registry.environment.settings import STORAGES, EngineSettings, PrometheusSettings, Settings, SignInSettings
from tests.wire.reference.markdown import code, joined, table

HEAD = """# Settings

Settings are environment variables. Two underscores join the names of nested ones. A misspelt name is an error that
suggests the right one, and so is any unknown name with two underscores. Other unknown `ADAPTORY_` names are ignored,
since container runtimes add some of their own (a service's host and port).

This page is made from `registry/environment/`: `make snapshots` writes it.

"""
SECTIONS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("All processes", "", Settings),
    *((f"Storage: `{storage.model_fields['kind'].default}`", "storage__", storage) for storage in STORAGES),
    ("Engine", "engine__", EngineSettings),
    ("Figures of canaries", "prometheus__", PrometheusSettings),
    ("Signing in to pages", "sign_in__", SignInSettings),
)


def page() -> str:
    return joined(HEAD, *(_section(title, prefix, model) + "\n" for title, prefix, model in SECTIONS))


def _section(title: str, prefix: str, model: type[BaseModel]) -> str:
    texts = texts_of(model)
    rows = [
        (code(f"ADAPTORY_{prefix}{name}".upper()), _default(name, field), texts[name])
        for name, field in sorted(model.model_fields.items())
        if not _nested(field) and (name != "kind" or prefix != "storage__")
    ]
    about = " ".join((inspect.getdoc(model) or "").split()) if prefix else ""
    if prefix == "storage__":
        about = f"`ADAPTORY_STORAGE__KIND={model.model_fields['kind'].default}`. {about}"
    return f"## {title}\n\n" + (f"{about}\n\n" if about else "") + table(("variable", "default", "meaning"), rows)


def texts_of(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field of a class of settings."""
    tree = ast.parse(Path(inspect.getfile(model)).read_text(encoding="utf-8"))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == model.__name__]
    return {
        field.target.id: text.value.value
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _nested(field: FieldInfo) -> bool:
    """Whether the field is a group of settings, which have a section of their own."""
    kinds = (field.annotation, *get_args(field.annotation))
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds) or "Storage" in str(kinds)


def _default(name: str, field: FieldInfo) -> str:
    value: Any = field.default
    if value is PydanticUndefined:
        return "login name" if field.default_factory else "required"
    if value is None or value == "" or isinstance(value, SecretStr):
        return "none"
    if isinstance(value, bool):
        return code(str(value).lower())
    if name.endswith("_bytes"):
        power = max(power for power in range(4) if value % 1024**power == 0)
        return code(f"{value // 1024**power} {('bytes', 'KiB', 'MiB', 'GiB')[power]}")
    if isinstance(value, float) and value == int(value):
        value = int(value)
    return code(f"{value:,}" if isinstance(value, int) else str(value))
