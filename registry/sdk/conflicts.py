"""Adapters to compare, local or registered, and what may be measured of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from registry.errors import Refused, Usage
from registry.sdk.connection import Connection
from registry.sdk.display import Display
from registry.sdk.local_files import base_checkpoint, release_directory, resolved
from registry.sdk.suites import fetch_suite

if TYPE_CHECKING:
    from composer.conflicts.examine import Evidence
    from composer.conflicts.report import ConflictReport
    from composer.deltas.variants.load import LoadedAdapter
    from composer.evaluation.calibration import Calibration
    from composer.evaluation.model import LoadedModel
    from composer.formats.checkpoints.checkpoint import Checkpoint
    from composer.formats.recipes.methods import AnySettings
    from composer.formats.recipes.policy import Policy
    from composer.formats.recipes.suite import CalibrationSet, Suite
    from composer.formats.recipes.weights import Weight
    from registry.wire.catalog import BaseOut
    from registry.wire.search import ResolvedRelease


class AdapterGroup:
    """The adapters to compare, and the base that they share.

    A name is a directory or the reference of a release; `base` a directory or a registered base; `base_directory` is
    where the base's weights are. Raises Usage for fewer than `least` adapters and for releases of different bases.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        names: Sequence[str],
        base: str | None,
        base_directory: Path | None,
        display: Display,
        *,
        least: int = 2,
    ) -> None:
        if len(names) < least:
            raise Usage("too_few", "Conflicts need two or more adapters.")
        self._connect, self._display = connect, display
        self.names, self.base_directory = names, base_directory
        self.releases: list[ResolvedRelease | None] = [
            None if Path(name).is_dir() else resolved(self.connection, name, display.warn) for name in names
        ]
        digests = {release.base.digest for release in self.releases if release}
        if len(digests) > 1:
            raise Usage("bases_differ", "These adapters were made for different bases.")
        self.base: BaseOut | None = None
        if base and Path(base).is_dir():
            self.base_directory = Path(base)
        elif base or digests:
            self.base = self.connection.api.base(base or next(iter(digests)))

    @cached_property
    def connection(self) -> Connection:
        """Opened on first use: directories need no registry."""
        return self._connect()

    def load(self) -> "list[LoadedAdapter]":
        """The adapters' deltas, in their order."""
        from composer.deltas.variants.load import load_deltas
        from composer.formats.checkpoints.checkpoint import open_checkpoint

        architecture = None
        if self.base:
            architecture = self.connection.api.architecture(self.base.digest)
        elif self.base_directory:
            architecture = open_checkpoint(self.base_directory).architecture
        return [
            replace(load_deltas(directory, architecture), name=name)
            for directory, name in zip(self.directories, self.names, strict=True)
        ]

    @cached_property
    def directories(self) -> list[Path]:
        """The adapters' directories; a release's files are fetched, and verified once."""
        return [
            release_directory(self.connection, release, self._display) if release else Path(name)
            for name, release in zip(self.names, self.releases, strict=True)
        ]

    def content(self) -> str:
        """Names the contents of the base and the adapters by their digests."""
        from composer.formats.adapters.layouts import CONFIG_FILE, WEIGHTS_FILE
        from composer.formats.checkpoints.checkpoint import open_checkpoint
        from composer.formats.checkpoints.hashing import hash_checkpoint, hash_file

        adapters = [
            release.commit if release else [hash_file(Path(name) / file) for file in (CONFIG_FILE, WEIGHTS_FILE)]
            for name, release in zip(self.names, self.releases, strict=True)
        ]
        base = self.base.digest if self.base else hash_checkpoint(open_checkpoint(self.directory)).weights_digest
        return f"{base} {adapters}"

    def evidence(
        self,
        own: Sequence[str],
        guards: Sequence[str],
        effort: tuple[int, int | None],
        prompts: Sequence[str],
        device: str,
    ) -> "Evidence":
        """The evidence to measure: the adapters' suites (`own`, or those that they were evaluated on) and the guards on
        `effort` examples, or activations on the prompts. The known suites' prompts are always compared."""
        from composer.conflicts.evidence.probe import usual_most
        from composer.conflicts.examine import Evidence
        from composer.evaluation.model import load_model

        k, most = effort
        if not k and (own or guards):
            raise Usage("idle_suite", "--suite and --guard have no effect without --probe.")
        if (k or prompts) and self.base is None and self.base_directory is None:
            raise Usage("base_missing", "This needs the base's weights.")
        return Evidence(
            load=cache(lambda: load_model(self.directory, device)),
            suites=self._suites(own, required=bool(k) and not prompts),
            guards=[self.suite(name) for name in guards] if k else [],
            k=k,
            most=usual_most(k) if most is None else most,
            prompts=prompts,
        )

    def examine(
        self, weights: "Sequence[Weight | float]", settings: "AnySettings", evidence: "Evidence", policy: "Policy"
    ) -> "ConflictReport":
        """The conflict report of the combination with these weights and this method."""
        from composer.conflicts.examine import examine

        calibration = calibration_of(settings, evidence.load, evidence.suites, guards=evidence.guards)
        checkpoint = self._checkpoint(measured=bool(evidence.k or evidence.prompts))
        with self._display.progress("probe", None, "examples") as bar:
            evidence = replace(evidence, calibration=calibration, progress=bar)
            return examine(
                self.load(),
                weights,
                settings,
                evidence=evidence,
                base=checkpoint,
                policy=policy,
                base_names=self._base_names,
            )

    @property
    def _base_names(self) -> list[str]:
        """The names of a registered base."""
        return [self.base.name, *self.base.aliases] if self.base else []

    def _checkpoint(self, *, measured: bool) -> "Checkpoint | None":
        """The base's weights, if a directory was named or a measurement needs them anyway."""
        from composer.formats.checkpoints.checkpoint import open_checkpoint

        if not measured and self.base_directory is None:
            return None
        return open_checkpoint(self.directory)

    @cached_property
    def directory(self) -> Path:
        """The base's directory, verified once if the base is registered."""
        if self.base:
            return base_checkpoint(self.base, self.base_directory, self._display).path
        return self.base_directory or Path()

    def _suites(self, own: Sequence[str], *, required: bool) -> "list[Suite | None]":
        names = own or [release and self.own_suite(release) for release in self.releases]
        if required and (len(names) != len(self.names) or not all(names)):
            lacking = [name for name, suite in zip(self.names, names, strict=False) if not suite]
            known = f"none is known for {', '.join(lacking)}" if lacking else f"--suite was given {len(names)} times"
            raise Usage(
                "suite_missing",
                f"A probe needs a suite for each of the {len(self.names)} adapters; {known}.",
                next_step="Run `adaptory eval REF --suite S`, name one --suite per adapter, or give --prompts F alone.",
            )
        return [self.suite(str(name)) if name else None for name in names]

    def suite(self, name: str) -> "Suite":
        """A registered suite by its name, or a file, which needs no registry, if the text cannot be a name."""
        from composer.formats.recipes.suite import NAME, parse_suite

        return fetch_suite(self.connection, name) if NAME.fullmatch(name) else parse_suite(name)

    def own_suite(self, release: "ResolvedRelease") -> str | None:
        """The target suite that the release was measured on."""
        from registry.wire.catalog import TargetSuiteOut

        return self.connection.api.get(f"{release.path}/target-suite", TargetSuiteOut).target_suite


def calibration_of(
    settings: "AnySettings",
    load: "Callable[[], LoadedModel]",
    suites: "Sequence[Suite | None]",
    prompts: Sequence[tuple[str, ...]] = (),
    guards: "Sequence[Suite]" = (),
) -> "Calibration | None":
    """The calibration of a fitted method, with the guards on which it leaves the base as it is; None for other methods,
    and if an adapter has neither a suite nor prompts. Raises Refused for a suite that would have no examples left for
    evaluation."""
    from composer.formats.recipes.methods import Regmean

    if not isinstance(settings, Regmean):
        return None
    from composer.evaluation.calibration import Calibration
    from composer.formats.recipes.suite import CalibrationSet, guard_sets

    sets = [CalibrationSet(prompts=texts) for texts in prompts]
    sets = sets or [calibration_set(suite, settings.examples) for suite in suites if suite]
    if len(sets) < max(len(suites), len(prompts), 1):
        return None
    return Calibration(cache(load), sets, settings, guards=guard_sets(guards))


def calibration_set(suite: "Suite", count: int, phrase: str = "") -> "CalibrationSet":
    """The first `count` examples of a suite. Raises Refused if none would be left for evaluation."""
    from composer.formats.recipes.suite import CalibrationSet

    if len(suite.examples) <= count:
        message = f"{suite.name} has {len(suite.examples)} examples: fitting on {count} leaves none to evaluate on."
        raise Refused("suite_too_small", message, subject=suite.name)
    return CalibrationSet.of_member(suite, count, phrase)
