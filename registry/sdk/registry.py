"""A registry as a Python object."""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from registry.client import channel_moves
from registry.client.api import Api
from registry.client.cache import BlobCache
from registry.client.follow import ChannelChange, follow
from registry.client.pull import cached, pull
from registry.client.push import ReleaseRequest
from registry.client.rollout import rollout, wait_for_nodes
from registry.client.selection import select_files
from registry.client.signing import Publication, read_public_key, verify_release
from registry.errors import Refused, Usage
from registry.errors.translation import of_row
from registry.formats.references import parse_channel_reference, parse_reference, single_version
from registry.sdk.conflicts import AdapterGroup
from registry.sdk.connection import Connection, load_settings, open_registry
from registry.sdk.display import Quiet
from registry.sdk.fit import fitting_base
from registry.sdk.local_files import publish
from registry.sdk.results import Composition, Move, Promotion, Release, Rollout, Score
from registry.wire.catalog import ReleaseOut
from registry.wire.quality import SuiteOut
from registry.wire.search import FoundOut, ResolvedRelease

if TYPE_CHECKING:
    from composer.conflicts.report import ConflictReport
    from composer.formats.recipes.policy import Policy
    from composer.formats.recipes.weights import Weight

_POLL_S = 0.5


class Registry:
    """The registry at `url`, of a profile that `adaptory login` saved, of the environment (`ADAPTORY_PROFILE`, or else
    `ADAPTORY_URL` with `ADAPTORY_TOKEN`), of the profile in use, or else the embedded one: the first that is given.

    Use it in a `with` statement, or close it. Every method raises the errors of `registry.errors`, whose `code` is
    stable (docs/reference/errors.md).

    >>> with Registry() as registry:
    ...     release = registry.push("out", "acme/sql", bump="auto", base="smollm2")
    ...     registry.promote(release, "prod")
    ...     directory = registry.pull("acme/sql@prod")
    """

    def __init__(self, url: str | None = None, token: str | None = None, profile: str | None = None) -> None:
        given = {"url": url, "token": token, "profile": profile}
        named: dict[str, str | None] = {name: value for name, value in given.items() if value is not None}
        if url is not None:
            named["profile"] = None
        self._stack = ExitStack()
        self._connection: Connection = self._stack.enter_context(open_registry(load_settings(**named)))
        self.api: Api = self._connection.api
        """The REST client, for what has no method here."""

    def close(self) -> None:
        """Closes the connections; an embedded registry's database too."""
        self._stack.close()

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def resolve(self, ref: str | Release) -> Release:
        """The release that REPO, REPO:VERSION, REPO:RANGE, REPO@CHANNEL or REPO#COMMIT names, with facts and scores.
        Warns of a yanked or deprecated one.

        >>> release = registry.resolve("acme/sql@prod")
        >>> print(release.version, release.base, release.document["adapter"]["rank_max"])
        """
        return Release.of(self.api.get(self._resolved(ref).path, ReleaseOut))

    def push(  # noqa: PLR0913
        self,
        directory: Path | str,
        target: str,
        *,
        bump: str | None = None,
        base: str | None = None,
        kind: str = "adapter",
        include: Sequence[str] = (),
        notes: str = "",
        provenance: Mapping[str, Any] | None = None,
        allow_breaking: str | None = None,
        sign: Path | str | None = None,
        strict: bool = False,
    ) -> Release:
        """Checks an adapter (or a merged model) against its base, sends what the store lacks, publishes the release.

        `target` is REPO:VERSION, or REPO with a `bump` (auto, patch, minor or major). `provenance` has the keys of
        `adaptory push --provenance`; `include` are globs of further files; `sign` is a private key; `strict` makes
        warnings errors. Pushing the same files to the same version again changes nothing.

        >>> registry.push("out", "acme/sql:1.1.0", base="smollm2", provenance={"data": [{"name": "acme/queries"}]})
        """
        reference = single_version(target, bump)
        request: ReleaseRequest = {
            "version": str(reference.version) if reference.version else None,
            "bump": bump,
            "notes": notes,
            "allow_breaking": allow_breaking,
            "provenance": provenance,
            "base": fitting_base(self.api, Path(directory), base, kind, strict=strict),
            "strict": strict,
        }
        selection = select_files(Path(directory), kind, include)
        wanted = Publication(reference.repository, kind, request)
        published, _ = publish(self.api, selection, wanted, Quiet(), Path(sign) if sign else None)
        for finding in published.warnings:
            warnings.warn(finding["message"], stacklevel=2)
        return Release.of(published.release)

    def pull(
        self,
        ref: str | Release,
        output: Path | str | None = None,
        *,
        verify: Path | str | None = None,
        force: bool = False,
    ) -> Path:
        """Fetches a release, verifies every file, and returns its directory: `output`, or one in the cache that is not
        to be changed. The same release into the same place is only verified. `verify` is the public key that must have
        signed it; `force` replaces a different release in `output`.

        >>> directory = registry.pull("acme/sql@prod")
        """
        release, key = self._resolved(ref), read_public_key(Path(verify)) if verify else None

        def check(directory: Path) -> None:
            if key:
                verify_release(self.api, release, parse_reference(str(ref)), directory, key)

        if output is None:
            directory = cached(self.api, release, self._connection.cache, _ignore)
            check(directory)
            return directory
        blobs = BlobCache(self._connection.cache / "blobs")
        return pull(self.api, release, Path(output), _ignore, blobs, check, replace=force)

    def search(self, *words: str, **filters: Any) -> Iterator[Release]:
        """The matching releases, best first, fetched a page at a time. `filters` are those of GET /v1/releases:
        `base`, `max_rank`, `score` ("sql-exact.accuracy>=0.8"), `loads_in`, `latest` and more.

        >>> names = [str(hit) for hit in registry.search("migration", base="smollm2", max_rank=16, loads_in="vllm:32")]
        """
        yield from map(Release.of, self.api.pages("/v1/releases", FoundOut, text=" ".join(words) or None, **filters))

    def promote(
        self, ref: str | Release, channel: str, *, reason: str = "", force: bool = False, wait: bool = True
    ) -> Move | Promotion:
        """Moves a channel to a release if the channel's policy lets it; raises Refused with each rule otherwise.

        A release that lacks only what may still come waits for it. With `wait`, returns the move once that is there;
        otherwise the promotion, which goes on by itself.

        >>> move = registry.promote("acme/sql:1.1.0", "prod", reason="better on joins")
        """
        release = self._resolved(ref)
        answer, _ = channel_moves.promote(self.api, release, channel, reason, force=force)
        if isinstance(answer, Promotion) and wait:
            with self._connection.worker(answer.job):
                return channel_moves.wait_for(self.api, answer, release.kind)
        return answer

    def rollback(self, channel: str, *, to: str | None = None, reason: str = "") -> Move:
        """Returns REPO@CHANNEL to the release that it served before, or to `to`, a version that it served before that
        and was not rolled back from since.

        >>> registry.rollback("acme/sql@prod", reason="wrong quoting")
        """
        line, name = self._line(channel)
        move, _ = channel_moves.roll_back(self.api, line, name, {"to": to, "reason": reason})
        return move

    def history(self, channel: str) -> Iterator[Move]:
        """The moves of REPO@CHANNEL, the newest first.

        >>> for move in registry.history("acme/sql@prod"):
        ...     print(move.at, move.kind, move.to_version, move.actor, move.reason)
        """
        line, name = self._line(channel)
        yield from self.api.pages(f"{line}/channels/{name}/history", Move)

    def follow(self, *channels: str) -> Iterator[ChannelChange]:
        """Yields what each REPO@CHANNEL serves, then every change of it, without end: also after an outage.

        >>> changes = registry.follow("acme/sql@prod")
        >>> first = next(changes)  # each further one waits until the channel serves something else
        >>> print(first.channel, "serves", first.now.version)
        """
        yield from follow(self.api, channels)

    def rollout(self, channel: str, *, wait_s: float | None = None) -> Rollout:
        """The release that REPO@CHANNEL serves, and what each node that follows it gives users.

        With `wait_s`, waits until all nodes that report follow. Raises Refused when the time is up, with a finding for
        each node that does not follow.

        >>> rollout = registry.rollout("acme/sql@prod", wait_s=300)
        >>> print(rollout.totals, [node.node for node in rollout.nodes])
        """
        return rollout(self.api, channel) if wait_s is None else wait_for_nodes(self.api, channel, wait_s)

    def record_scores(self, ref: str | Release, scores: Iterable[Score]) -> None:
        """Records scores of a release on registered suites, each on the suite's current content.

        >>> registry.record_scores("acme/sql:1.1.0", [Score(suite="sql-exact", metric="accuracy", value=0.8, n=32)])
        """
        digests: dict[str, str] = {}
        rows: list[dict[str, Any]] = []
        for score in scores:
            if score.suite not in digests:
                digests[score.suite] = self.api.get(f"/v1/suites/{quote(score.suite, safe='')}", SuiteOut).digest
            own = {name: getattr(score, name) for name in Score.__slots__ if name not in ("suite", "phrase")}
            rows.append({"suite_digest": digests[score.suite], **own})
        self.api.post(f"{self._resolved(ref).path}/scores", {"scores": rows, "results": []})

    def conflicts(  # noqa: PLR0913
        self,
        *adapters: str | Release | Path,
        weights: "Sequence[float | Weight] | None" = None,
        method: str = "stack",
        settings: Mapping[str, Any] | None = None,
        probe: int = 0,
        probe_max: int | None = None,
        suites: Sequence[str | Path] = (),
        guards: Sequence[str | Path] = (),
        prompts: Sequence[str] = (),
        base: str | Path | None = None,
        base_directory: Path | str | None = None,
        policy: "Policy | None" = None,
        device: str = "auto",
    ) -> "ConflictReport":
        """The effects of two or more adapters, releases or directories, on each other, combined by the method with the
        weights. Needs the extra `composer`; a measurement needs `models` and the base's weights on this machine.

        With `probe`, measures on that many examples of each adapter's suite (`ok` needs 8 or more), and on `probe_max`
        if those are inconclusive. `suites` are names or files, one for each adapter; by default those that the releases
        were evaluated on. `prompts` compare activations where no suites are known. Changes nothing.

        >>> report = registry.conflicts("acme/sql@prod", "acme/terraform@prod", weights=[1.0, 0.5])
        >>> print(report.verdict, [finding.message for finding in report.findings])
        """
        from composer.formats.recipes.methods import parse_settings
        from composer.formats.recipes.policy import Policy

        names = [str(adapter) for adapter in adapters]
        given = [1.0] * len(names) if weights is None else list(weights)
        if len(given) != len(names):
            message = f"{len(given)} weights were given for {len(names)} adapters."
            raise Usage("bad_weights", message, next_step="Give one for each adapter, in their order.")
        where = Path(base_directory) if base_directory else None
        group = AdapterGroup(lambda: self._connection, names, str(base) if base else None, where, Quiet())
        effort = (probe, probe_max)
        evidence = group.evidence(list(map(str, suites)), list(map(str, guards)), effort, prompts, device)
        return group.examine(given, parse_settings(method, settings or {}), evidence, policy or Policy())

    def compose(self, recipe: Path | str | Mapping[str, Any], *, plan: bool = False, wait: bool = True) -> Composition:
        """Combines adapters by a recipe, a YAML file or its content: lock, check, evaluate, gate, merge, publish. With
        `plan`, only locks and checks. Waits for the end, or leaves it to the server's workers; an embedded registry
        always waits. Raises the error that ended it.

        >>> planned = registry.compose("assistant.yaml", plan=True)
        >>> composition = registry.compose("assistant.yaml")
        >>> print(planned.verdict, composition.published)
        """
        from composer.formats.recipes.recipe import MAX_FILE_BYTES, load_recipe, parse_recipe
        from composer.formats.untrusted import read_text

        given = (
            parse_recipe(dict(recipe))
            if isinstance(recipe, Mapping)
            else load_recipe(read_text(Path(recipe), MAX_FILE_BYTES), str(recipe))
        )
        composition = self.api.post("/v1/compositions", {"recipe": given.to_json(), "plan": plan}, Composition)
        if wait or plan or self._connection.resources is not None:
            with self._connection.worker(composition.job):
                while composition.state in ("queued", "running"):
                    time.sleep(_POLL_S)
                    composition = self.api.get(f"/v1/compositions/{composition.id}", Composition)
        if composition.error is not None:
            raise of_row(composition.error)
        if composition.state == "cancelled":
            message = f"The composition {composition.id} was cancelled."
            raise Refused("composition_cancelled", message)
        return composition

    def _resolved(self, ref: str | Release) -> ResolvedRelease:
        answer = self.api.resolve(parse_reference(str(ref)))
        if answer.warning:
            warnings.warn(answer.warning, stacklevel=3)
        return answer.release

    def _line(self, channel: str) -> tuple[str, str]:
        """The route of the repository of REPO@CHANNEL, and the channel's name."""
        repository, name = parse_channel_reference(channel)
        return self.api.repository_path(str(repository)), name


def _ignore(_count: int) -> None:
    """Progress that nobody watches."""
