"""Inspects an adapter directory: its facts, its fit to a base, and whether its numbers are sound."""

from dataclasses import dataclass
from pathlib import Path

from composer.findings import Finding, Severity
from composer.formats.adapters import facts, serving
from composer.formats.adapters.config.config import AdapterConfig
from composer.formats.adapters.facts import Adapter, AdapterFacts
from composer.formats.adapters.foreign import foreign_facts, read_foreign
from composer.formats.adapters.placement.placement import place
from composer.formats.adapters.placement.result import PlacementResult
from composer.formats.checkpoints.checkpoint import Architecture


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of an inspection. `findings` are those of the placement and of the check for NaN."""

    adapter: Adapter
    placed: PlacementResult
    facts: AdapterFacts
    findings: list[Finding]

    @property
    def name(self) -> str:
        return self.adapter.name

    @property
    def path(self) -> Path:
        return self.adapter.path

    @property
    def config(self) -> AdapterConfig:
        return self.adapter.config

    def loads_in(self, profile: str) -> serving.Loading:
        """Whether a server loads it."""
        return serving.loads_in(self.adapter.config, self.facts, self.placed, profile)


def inspect(directory: Path, architecture: Architecture | None) -> Inspection:
    """Inspects an adapter: before a push, in the registry that receives it, and for `adaptory inspect`. Without an
    architecture the fit is not checked. Raises InvalidFile and NotSupported for an unreadable one."""
    adapter = facts.read_adapter(directory)
    placed = place(adapter.config, adapter.header, architecture, adapter.name)
    summary = facts.facts(adapter.config, adapter.header, placed)
    return Inspection(adapter, placed, summary, [*placed.findings, *facts.health(adapter.weights_path, adapter.header)])


def inspect_foreign(path: Path, architecture: Architecture | None) -> tuple[AdapterFacts, list[Finding]]:
    """The facts and findings of an adapter in another layout that `convert` reads. Without an architecture the modules
    keep the file's names. Raises what `read_foreign` raises."""
    foreign = read_foreign(path, architecture)
    message = f"It is in the layout of {foreign.layout}; `adaptory convert` converts it to PEFT's."
    findings = [Finding("another_layout", Severity.NOTICE, foreign.weights_path.name, message)]
    return foreign_facts(foreign), [*findings, *facts.health(foreign.weights_path, foreign.header)]
