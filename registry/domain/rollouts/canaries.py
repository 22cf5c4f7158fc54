"""Canaries: a release gets a share of a channel's requests, and live figures decide whether it is promoted."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from math import ceil, inf, log, sqrt
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry.database.tables import Canary, CanaryFigures, Channel, Repository
from registry.domain.access import tokens
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import REGISTRY, Role, holds
from registry.domain.catalog import releases, repositories
from registry.domain.channels import moves, pending, promotions
from registry.domain.channels.policy import policies
from registry.domain.channels.policy.judging import PromotionRequest, PromotionVerdict
from registry.domain.channels.serving import ChannelMove, ChannelName, find_channel, locked_channel, served_version
from registry.domain.rollouts import fleet
from registry.domain.rollouts.sequential import ANY, RARE, Sample, above_limit, above_other
from registry.errors import Conflict, Invalid, NotAllowed, Refused, RegistryError
from registry.formats.references import parse_version
from registry.formats.watch import ERRORS, Watch, WatchRule

ALPHA = 0.01
"""The probability at most, over all rules and all time, that a canary ends although it breaks no rule."""
STALE = timedelta(minutes=5)
"""Without new figures for this long, a canary is held: its step begins anew with the next ones."""
BOUNDS_S = tuple(round(0.01 * 1.1**number, 4) for number in range(116))
"""The upper bounds of the histogram of times: 10 ms to about 10 minutes, 10 % apart."""
MAX_SOURCES, MAX_METRICS = 1_000, 50
STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class VersionFigures:
    """Counts of a version's requests. `seconds` are counts by index into `BOUNDS_S`, the last one for all above;
    `metrics` are values from 0 to 1."""

    requests: int = 0
    errors: int = 0
    seconds: Mapping[int, int] = field(default_factory=dict[int, int])
    metrics: Mapping[str, Sample] = field(default_factory=dict[str, Sample])

    @classmethod
    def of_json(cls, row: Mapping[str, Any]) -> "VersionFigures":
        seconds = {int(index): count for index, count in row["seconds"].items()}
        return cls(
            row["requests"], row["errors"], seconds, {name: Sample(**own) for name, own in row["metrics"].items()}
        )

    def plus(self, other: "VersionFigures", sign: int = 1) -> "VersionFigures":
        """The sum or, with the sign -1, the difference."""
        seconds = {
            index: self.seconds.get(index, 0) + sign * other.seconds.get(index, 0)
            for index in {*self.seconds, *other.seconds}
        }
        metrics = {name: self.sample(name).plus(other.sample(name), sign) for name in {*self.metrics, *other.metrics}}
        return VersionFigures(
            self.requests + sign * other.requests, self.errors + sign * other.errors, seconds, metrics
        )

    def grown_to(self, other: "VersionFigures") -> "VersionFigures":
        """The other figures, where they are larger: approximate counts may fall, and those here do not."""
        counts = {index: max(0, count - self.seconds.get(index, 0)) for index, count in other.seconds.items()}
        errors = max(0, other.errors - self.errors)
        requests = max(other.requests - self.requests, errors, sum(counts.values()))
        return self.plus(VersionFigures(requests, errors, counts))

    @property
    def is_sound(self) -> bool:
        """Whether these can be counts of requests: false for the difference to counts that have fallen."""
        samples = [self.sample(ERRORS), *self.metrics.values(), Sample(self.requests, sum(self.seconds.values()))]
        return min(self.seconds.values(), default=0) >= 0 and all(0 <= each.total <= each.n for each in samples)

    def sample(self, name: str) -> Sample:
        """The values of a figure that is a mean."""
        return Sample(self.requests, self.errors) if name == ERRORS else self.metrics.get(name, Sample())

    def slower_than(self, bound_s: float) -> Sample:
        """The requests that took longer than a time; those of the bucket that contains it count as faster."""
        slower = sum(count for index, count in self.seconds.items() if index > 0 and BOUNDS_S[index - 1] >= bound_s)
        return Sample(sum(self.seconds.values()), slower)

    def quantile_s(self, quantile: float) -> float | None:
        """The upper bound of the bucket with the quantile; None without requests, infinite above all bounds."""
        total, seen = sum(self.seconds.values()), 0
        for index in sorted(self.seconds):
            seen += self.seconds[index]
            if seen >= quantile * total:
                return BOUNDS_S[index] if index < len(BOUNDS_S) else inf
        return None


@dataclass(frozen=True, slots=True)
class Standing:
    """A rule and the figures of both releases; `broken` once the evidence against it suffices."""

    rule: str
    candidate: float | None
    served: float | None
    broken: bool


def judge(watch: Watch, candidate: VersionFigures, served: VersionFigures) -> list[Standing]:
    """Judges the rules. None is broken before `min` requests are in."""
    needed = log(len(watch.rules) / ALPHA)
    decides = candidate.requests + served.requests >= watch.least
    return [_standing(rule, candidate, served, needed, decides=decides) for rule in watch.parsed]


def _standing(
    rule: WatchRule, candidate: VersionFigures, served: VersionFigures, needed: float, *, decides: bool
) -> Standing:
    if rule.quantile is not None:
        evidence = _slower(rule, rule.quantile, candidate, served, needed)
        shown = candidate.quantile_s(rule.quantile), served.quantile_s(rule.quantile)
    else:
        own, other = candidate.sample(rule.name), served.sample(rule.name)
        shown = own.mean if own.n else None, other.mean if other.n else None
        worse = (own.inverted, other.inverted) if rule.at_least else (own, other)
        prior = RARE if rule.name == ERRORS else ANY
        if rule.limit is not None:
            evidence = above_limit(worse[0], 1 - rule.limit if rule.at_least else rule.limit, prior)
        else:
            evidence = above_other(*worse, rule.margin * (_error(*worse) if rule.in_errors else 1), prior)
    finite = [None if value is None or value == inf else round(value, 6) for value in shown]
    return Standing(rule.text, finite[0], finite[1], decides and evidence >= needed)


def _error(own: Sample, other: Sample) -> float:
    """The standard error of the difference of two means of values from 0 to 1: at most that of shares."""
    return sqrt(sum(sample.mean * (1 - sample.mean) / sample.n for sample in (own, other) if sample.n))


def _slower(
    rule: WatchRule, quantile: float, candidate: VersionFigures, served: VersionFigures, needed: float
) -> float:
    """The evidence that the candidate's quantile is above the limit. The served release's own is bounded from above by
    the first bound that surely no more than 1 - quantile of its requests exceed, at half the error."""
    if rule.limit is not None:
        return above_limit(candidate.slower_than(rule.limit), 1 - quantile)
    for bound_s in BOUNDS_S:
        faster = served.slower_than(bound_s).inverted
        if above_limit(faster, quantile) >= needed + log(2):
            return above_limit(candidate.slower_than(rule.factor * bound_s), 1 - quantile) - log(2)
    return -inf


# Canaries of channels.


def begin(session: Session, actor: Actor, wanted: PromotionRequest, weight: int) -> Canary:
    """Gives the release `weight` per cent of the channel's requests, if the promotion would pass now. Replaces a
    running canary. Raises Refused if a gate does not pass, if the channel serves nothing or the release already, or if
    no node splits its requests; Stale for another expected move."""
    repository = repositories.find(session, wanted.repository, wanted.kind)
    session.scalar(locked_channel(repository, wanted.channel))
    channel = find_channel(session, repository, wanted.channel)
    moves.check_expected(channel.move_id, served_version(session, channel), wanted.expected, wanted.subject)
    judged = promotions.judge(session, actor, wanted)
    if judged.error is not None:
        raise judged.error
    _refuse_unfit(wanted, judged)
    others = _not_splitting(session, actor.at, wanted)
    watch = policies.watch_of(session, policies.scope_of(repository, wanted.channel))
    earlier = pending.running_canary(session, channel.id)
    if earlier is not None:
        pending.close_canary(earlier, "replaced", f"{actor.name} began another canary.", actor.at)
        session.flush()
    release = releases.find(session, wanted.repository, wanted.version, wanted.kind)
    canary = Canary(
        channel_id=channel.id,
        served_id=channel.served_id,
        release=release,
        weight=weight,
        watch=watch.to_json() if watch else None,
        state=pending.RUNNING,
        report=[],
        why=f"{', '.join(others[:5])} split no requests: their users get {judged.served}." if others else "",
        actor=actor.name,
        token_id=actor.token_id,
        source=actor.source,
        reason=wanted.reason,
        created_at=actor.at,
        step_at=actor.at,
    )
    session.add(canary)
    session.flush()
    pending.record_canary(session, actor, canary, wanted.subject, Act.CHANNEL_CANARY, wanted.reason)
    return canary


def _refuse_unfit(wanted: PromotionRequest, judged: promotions.Judgement) -> None:
    if judged.served is None:
        raise Refused(
            "serves_nothing",
            f"{wanted.subject} serves nothing that a canary could stand beside.",
            subject=wanted.subject,
        )
    if judged.served == str(wanted.version):
        raise Refused("already_served", f"{wanted.subject} already serves {wanted.version}.", subject=wanted.subject)
    if judged.verdict is not PromotionVerdict.PASSES:
        open_rules = "; ".join(
            f"{result.rule}: {result.detail}" for result in judged.report.results if not result.passed
        )
        raise Refused(
            "gate_failed",
            f"A canary of {wanted.version} begins once its promotion to {wanted.subject} passes: {open_rules}.",
            subject=wanted.subject,
            findings=[result.to_json() for result in judged.report.results],
        )


def _not_splitting(session: Session, now: datetime, wanted: PromotionRequest) -> list[str]:
    """The nodes that follow the channel and do not split its requests. They do not prevent a canary, since a single
    agent could then prevent all. Raises Refused if no node splits them."""
    nodes = fleet.whether_split(session, ChannelName(wanted.repository, wanted.channel), now)
    if not any(nodes.values()):
        raise Refused(
            "nothing_splits",
            f"{wanted.subject} cannot have a canary: no node that reports splits its requests.",
            subject=wanted.subject,
            next_step="Run `adaptory mirror --front URL --group NAME` on each node.",
        )
    return [name for name, splits in nodes.items() if not splits]


def latest(session: Session, channel: Channel) -> Canary | None:
    """The channel's last canary, running or ended."""
    query = select(Canary).where(Canary.channel_id == channel.id).order_by(Canary.id.desc()).limit(1)
    return session.scalar(query)


def stop(session: Session, actor: Actor, repository: Repository, name: str, reason: str) -> Canary:
    """Ends the canary: all requests go to the served release again. Raises Conflict if none is running."""
    session.scalar(locked_channel(repository, name))
    canary = _running(session, repository, name)
    subject = f"{repositories.name_of(repository)}@{name}"
    pending.close_canary(canary, STOPPED, reason or f"{actor.name} stopped it.", actor.at)
    pending.record_canary(session, actor, canary, subject, Act.CHANNEL_CANARY, reason)
    return canary


def report(
    session: Session,
    actor: Actor,
    repository: Repository,
    name: str,
    source: str,
    counted: Mapping[str, VersionFigures],
) -> Canary:
    """Records what a source has counted by version since it started, and decides: a broken rule ends the canary, and a
    step that has lasted leads to the next one. Raises Conflict if no canary is running."""
    session.scalar(locked_channel(repository, name))
    canary = _running(session, repository, name)
    wanted = (canary.release.version, canary.served.version)
    row = session.get(CanaryFigures, (canary.id, actor.name, source))
    document = {version: asdict(figures) for version, figures in counted.items() if version in wanted}
    if row is None:
        own = (CanaryFigures.canary_id == canary.id, CanaryFigures.reporter == actor.name)
        if (session.scalar(select(func.count()).where(*own)) or 0) >= MAX_SOURCES:
            raise Refused(
                "too_many_sources",
                f"{actor.name} has reported figures of {MAX_SOURCES:,} sources, the most there may be.",
                subject=source,
            )
        row = CanaryFigures(
            canary_id=canary.id, reporter=actor.name, source=source, first=document, last=document, at=actor.at
        )
        session.add(row)
    _refuse_fewer(row, document)
    _refuse_twice(session, canary, row, document)
    grew = any(_of(row.last, version) != counted[version] for version in document)
    # A version that the source counts for the first time had no requests before.
    canary.totals = [
        asdict(total.plus(_of(document, version)).plus(_of(row.last, version), -1))
        for total, version in zip(figures(session, canary), wanted, strict=True)
    ]
    row.last, row.at = document, actor.at
    if canary.figures_at is None or (grew and actor.at - canary.figures_at > STALE):
        canary.step_at = actor.at
    if canary.figures_at is None or grew:
        canary.figures_at = actor.at
    session.flush()
    _decide(session, actor, canary, repository, name)
    return canary


@dataclass(frozen=True, slots=True)
class Watched:
    """A running canary with a `watch`. `versions` are those of the candidate and of the served release."""

    canary_id: int
    channel: ChannelName
    versions: tuple[str, str]
    began_at: datetime


def watched(session: Session) -> list[Watched]:
    """The running canaries that figures decide about."""
    query = select(Canary, Channel.name).join(Channel, Channel.id == Canary.channel_id)
    return [
        Watched(
            row.id,
            ChannelName(repositories.name_of(row.release.repository), name),
            (row.release.version, row.served.version),
            row.created_at,
        )
        for row, name in session.execute(query.where(Canary.state == pending.RUNNING).order_by(Canary.id))
        if row.watch is not None
    ]


def measure(
    session: Session,
    actor: Actor,
    watched: Watched,
    source: str,
    asked_at: datetime,
    counted: tuple[VersionFigures, VersionFigures],
) -> None:
    """Reports what another system has counted of both releases since the canary began, approximately. Does nothing if
    the canary has ended, or if newer figures of the source are in."""
    repository = session.get_one(Canary, watched.canary_id).release.repository
    session.scalar(locked_channel(repository, watched.channel.channel))
    canary = session.get_one(Canary, watched.canary_id, populate_existing=True)
    row = session.get(CanaryFigures, (canary.id, actor.name, source))
    if canary.state != pending.RUNNING or (row is not None and row.at > asked_at):
        return
    if row is None:
        row = CanaryFigures(canary_id=canary.id, reporter=actor.name, source=source, first={}, last={}, at=asked_at)
        session.add(row)
        session.flush()
    grown = {
        version: _of(row.last, version).grown_to(figures)
        for version, figures in zip(watched.versions, counted, strict=True)
    }
    report(session, actor, repository, watched.channel.channel, source, grown)


def _refuse_twice(session: Session, canary: Canary, row: CanaryFigures, document: Mapping[str, Any]) -> None:
    """Raises Refused if agents and the registry's own source, a Prometheus, both count requests: most would count
    twice. The first one goes on; figures without requests, such as those of a grader, always count."""
    if not any(figures["requests"] for figures in document.values()):
        return
    is_own = CanaryFigures.reporter == REGISTRY
    others = is_own if row.reporter != REGISTRY else ~is_own
    for other in session.scalars(select(CanaryFigures).where(CanaryFigures.canary_id == canary.id, others)):
        if any(_of(other.last, version).requests > _of(other.first, version).requests for version in other.last):
            raise Refused(
                "counted_twice",
                f"{other.source} already counts the requests of this canary, and {row.source} may count the same.",
                subject=row.source,
            )


def _refuse_fewer(row: CanaryFigures, document: Mapping[str, Any]) -> None:
    for version in row.last:
        if not _of(document, version).plus(_of(row.last, version), -1).is_sound:
            raise Invalid(
                "figures_fell",
                f"{row.source} counts less of {version} than before.",
                subject=row.source,
            )


def figures(session: Session, canary: Canary) -> tuple[VersionFigures, VersionFigures]:
    """The figures of the candidate and of the served release since the canary began, of all sources."""
    if canary.totals is not None:
        own, served = map(VersionFigures.of_json, canary.totals)
        return own, served
    rows = session.scalars(select(CanaryFigures).where(CanaryFigures.canary_id == canary.id)).all()
    own, served = VersionFigures(), VersionFigures()
    for row in rows:
        own = own.plus(_of(row.last, canary.release.version)).plus(_of(row.first, canary.release.version), -1)
        version = canary.served.version
        served = served.plus(_of(row.last, version)).plus(_of(row.first, version), -1)
    return own, served


def _of(document: Mapping[str, Any], version: str) -> VersionFigures:
    return VersionFigures.of_json(document[version]) if version in document else VersionFigures()


def _decide(session: Session, actor: Actor, canary: Canary, repository: Repository, name: str) -> None:
    subject = f"{repositories.name_of(repository)}@{name}"
    if canary.watch is None:
        return
    watch = Watch.model_validate(canary.watch)
    own, served = figures(session, canary)
    standings = judge(watch, own, served)
    canary.report = [asdict(standing) for standing in standings]
    if broken := [standing.rule for standing in standings if standing.broken]:
        pending.close_canary(canary, pending.ROLLED_BACK, f"broken: {'; '.join(broken)}", actor.at)
        pending.record_canary(session, actor, canary, subject, Act.CHANNEL_WATCH, canary.why)
    elif actor.at - canary.step_at >= timedelta(seconds=watch.step_s) and own.requests + served.requests >= watch.least:
        canary.why = why(canary, actor.at) if _is_stale(canary, actor.at) else _lacking(canary, watch, own, standings)
        if not canary.why:
            _proceed(session, actor, canary, subject, watch.after(canary.weight))


def _is_stale(canary: Canary, now: datetime) -> bool:
    return now - (canary.figures_at or canary.created_at) > STALE


def why(canary: Canary, now: datetime) -> str:
    """The end of a canary, or what holds it now: nobody may report any more."""
    is_held = canary.state == pending.RUNNING and canary.watch is not None and _is_stale(canary, now)
    return "held: no new requests" if is_held else canary.why


def _lacking(canary: Canary, watch: Watch, own: VersionFigures, standings: Sequence[Standing]) -> str:
    """What holds a canary at the end of a step; empty for nothing. A server may not have been able to load the
    candidate, or the program that reports a metric may not run."""
    needed = ceil(watch.least * canary.weight / 100)
    if own.requests < needed:
        return f"held: {canary.release.version} has answered {own.requests:,} of {needed:,} requests"
    unknown = (
        standing.rule
        for rule, standing in zip(watch.parsed, standings, strict=True)
        if standing.candidate is None or (rule.limit is None and standing.served is None)
    )
    return next((f"held: no figures for {rule}" for rule in unknown), "")


def _proceed(session: Session, actor: Actor, canary: Canary, subject: str, weight: int) -> None:
    """Goes to the next step. The last one is a promotion by the one who began the canary, with today's rights and
    gates; while it is refused, the canary is held."""
    if weight < 100:
        canary.weight, canary.step_at, canary.why = weight, actor.at, ""
        pending.record_canary(session, actor, canary, subject, Act.CHANNEL_CANARY, f"step to {weight} %")
        return
    release = canary.release
    by = tokens.actor_now(session, canary.actor, canary.token_id, canary.source, actor.at)
    name = repositories.name_of(release.repository)
    wanted = PromotionRequest(
        name,
        parse_version(release.version),
        subject.rpartition("@")[2],
        None,
        reason=canary.reason or "the canary passed",
    )
    try:
        if not holds(by, Role.RELEASER, name.namespace):
            raise NotAllowed("role_lost", f"{by.name} no longer has the role {Role.RELEASER} in {name.namespace}.")
        with session.begin_nested():
            outcome = moves.attempt(session, by, wanted)
    except RegistryError as error:
        canary.why = f"held: {error.detail}"
        return
    if isinstance(outcome, ChannelMove):
        pending.record_canary(session, actor, canary, subject, Act.CHANNEL_WATCH, "the last step has passed")
    else:
        canary.why = "held: the promotion waits for scores or approvals"


def _running(session: Session, repository: Repository, name: str) -> Canary:
    channel = find_channel(session, repository, name)
    canary = pending.running_canary(session, channel.id)
    if canary is None:
        subject = f"{repositories.name_of(repository)}@{name}"
        raise Conflict("no_canary", f"{subject} has no running canary.", subject=subject)
    return canary
