"""The adapters that a result is made of: the files that determine its bytes, and their form in a note."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.formats.adapters.layouts import CONFIG_FILE, WEIGHTS_FILE
from composer.formats.checkpoints.hashing import hash_file
from composer.formats.recipes.weights import Weight, parse_weight


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter in use. `digest` is the sha256 of its weights file, `config` that of its config, whose scales also
    determine the bytes (None in a note from before it was recorded)."""

    name: str
    weight: Weight
    digest: str
    config: str | None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "weight": self.weight.to_json(), "digest": self.digest, "config": self.config}


def files_of(adapters: Iterable[Path]) -> list[Path]:
    """The weights and config file of each adapter."""
    return [path / file for path in adapters for file in (WEIGHTS_FILE, CONFIG_FILE)]


def adapter_use(path: Path, weight: Weight | float) -> AdapterUse:
    """An adapter with its weight and the digests of its files, for a note."""
    name = path.resolve().name
    return AdapterUse(name, parse_weight(weight), hash_file(path / WEIGHTS_FILE), hash_file(path / CONFIG_FILE))


def parse_use(row: Mapping[str, Any]) -> AdapterUse:
    """Parses a note's entry. Raises KeyError or TypeError for a missing or wrong field, and what `parse_weight`
    raises.
    """
    name, weight, digest = row["name"], row["weight"], row["digest"]
    return AdapterUse(str(name), parse_weight(weight), str(digest), str(row["config"]) if "config" in row else None)
