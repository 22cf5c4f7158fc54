"""The modules that an adapter changes, by kind and layer, with the measures of its spectrum."""

import re
from collections.abc import Mapping
from typing import Any

from registry.api.pages.html.drawings import Cell
from registry.database.engine import Session
from registry.database.tables import Base
from registry.domain.catalog import bases

MAX_ROWS = 256
"""Modules in the table of a release's page, of 40 kB; more have a page of their own."""
MAX_TENSORS, MAX_KINDS = 5_000, 40
"""Of a base whose modules a map shows whether they are adapted or not: one of many experts has more."""
_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)")


def cells(spectrum: Mapping[str, Any] | None, measure: str) -> dict[Cell, float]:
    """A measure of the modules by kind and layer; modules outside of layers are left to the table."""
    cells: dict[Cell, float] = {}
    for module in spectrum["modules"] if spectrum else ():
        if cell := cell_of(module["module"]):
            cells[cell] = float(module[measure])
    return cells


def frame_of(session: Session, base: Base) -> set[Cell]:
    """The matrices of a base's layers, which an adapter could change; empty for a base with more than a map shows."""
    if base.tensor_count > MAX_TENSORS:
        return set()
    tensors = bases.architecture(session, base.digest).tensors
    matrices = (name.removesuffix(".weight") for name, spec in tensors.items() if len(spec.shape) == 2)
    cells = {cell for cell in map(cell_of, matrices) if cell}
    return cells if len({kind for kind, _ in cells}) <= MAX_KINDS else set()


def cell_of(module: str) -> Cell | None:
    """Kind and layer of a module; None for one outside of layers."""
    match = _LAYER.search(module)
    return (match[2].removeprefix("self_attn.").removeprefix("mlp."), int(match[1])) if match else None


def short(module: str) -> str:
    """A module in words: `layer 20 q_proj`."""
    cell = cell_of(module)
    return f"layer {cell[1]} {cell[0]}" if cell else module
