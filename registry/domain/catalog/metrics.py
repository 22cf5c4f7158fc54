"""Whether higher or lower is better for a suite's metric: stated in its file, or fixed by its author's first score.

The direction belongs to the suite's name, in all versions of its content. Scores by others do not fix it. A direction
known only from private scores is not shown to users who may not read them.
"""

from collections.abc import Collection, Mapping, Sequence
from math import inf

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from composer.formats.recipes.suite import Suite
from composer.formats.recipes.tasks import ANSWER_SCORERS
from registry.database.engine import insert_if_absent
from registry.database.tables import Release, Repository, Score, SuiteMetric, SuiteVersion
from registry.database.tables.catalog import new_stamp
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import EVERYWHERE, owns, readable_names
from registry.errors import Invalid, Refused

HIGHER_IS_BETTER = {"nll": False, "accuracy": True}
"""The metrics that `adaptory eval` measures, on every suite."""
RANGES = {"nll": (0.0, inf), "accuracy": (0.0, 1.0)}
"""The valid values of these metrics."""


def state(session: Session, actor: Actor, suite: str, metrics: Mapping[str, bool]) -> None:
    """Sets the directions that the author states, which everyone may read, and corrects existing scores.

    Raises Invalid if they contradict the metrics of `adaptory eval`.
    """
    for metric, better in metrics.items():
        if HIGHER_IS_BETTER.get(metric, better) != better:
            raise Invalid(
                "bad_metric",
                f"{suite}: {'lower' if better else 'higher'} {metric} is better on every suite.",
                subject=metric,
                next_step=f"Leave {metric} out of the suite's metrics: `adaptory eval` records it.",
            )
        if metric not in HIGHER_IS_BETTER:
            _set(session, actor, suite, metric, better)


def _set(session: Session, actor: Actor, suite: str, metric: str, better: bool) -> None:
    values = {"higher_is_better": better, "stated": True, "by": actor.name, "at": actor.at}
    before = None
    if not insert_if_absent(session, SuiteMetric, suite=suite, metric=metric, **values):
        row = session.get_one(SuiteMetric, (suite, metric), with_for_update=True, populate_existing=True)
        if row.stated and row.higher_is_better == better:
            return
        before = {"higher_is_better": row.higher_is_better} if row.higher_is_better != better else None
        row.higher_is_better, row.stated, row.by, row.at = better, True, actor.name, actor.at
    _align(session, suite, metric, better)
    audit.record(
        session,
        actor,
        Act.SUITE_METRIC,
        f"suite/{suite}",
        namespace=None,
        before=before,
        after={"higher_is_better": better},
        metric=metric,
    )


def _align(session: Session, suite: str, metric: str, better: bool) -> None:
    """Updates the direction of existing scores, and the stamps of their releases."""
    of_suite = Score.suite_id.in_(select(SuiteVersion.id).where(SuiteVersion.name == suite))
    wrong = of_suite & (Score.metric == metric) & (Score.higher_is_better != better)
    of_releases = Release.id.in_(select(Score.release_id).where(wrong))
    session.execute(update(Release).where(of_releases).values(stamp=new_stamp()))
    session.execute(update(Score).where(wrong).values(higher_is_better=better))


def check(
    session: Session, actor: Actor, suite: SuiteVersion, metric: str, better: bool, *, fixes: bool = True
) -> None:
    """Checks a score's direction. The author's first score of a metric fixes it if `fixes`; a reported one never does.

    Raises Invalid for a different direction, and for a metric whose direction is unknown as far as the actor may see.
    """
    if metric in HIGHER_IS_BETTER:
        expected = HIGHER_IS_BETTER[metric]
    elif (visible := _visible(session, actor, suite.name, metric)) is not None:
        expected = visible
    elif not fixes or not is_author(session, actor, suite.name):
        raise Invalid(
            "metric_unstated",
            f"{suite.name} does not state whether higher or lower {metric} is better.",
            subject=metric,
            next_step=f"Ask {suite.created_by} to add `metrics: {{{metric}: higher}}` (or lower) to the suite's file "
            "and run `adaptory suite add` again.",
        )
    else:
        expected = _fix(session, actor, suite.name, metric, better)
    if better != expected:
        raise Invalid(
            "bad_score",
            f"higher_is_better is {expected} for {metric} of {suite.name}.",
            subject=metric,
            next_step="Record it that way. The suite's author can correct it under `metrics` in the suite's file with "
            "`adaptory suite add`.",
        )


def _fix(session: Session, actor: Actor, suite: str, metric: str, better: bool) -> bool:
    """The direction fixed by the author's first score, which may not be this one."""
    values = {"higher_is_better": better, "stated": False, "by": actor.name, "at": actor.at}
    if insert_if_absent(session, SuiteMetric, suite=suite, metric=metric, **values):
        _align(session, suite, metric, better)
    row = session.get_one(SuiteMetric, (suite, metric), with_for_update={"read": True}, populate_existing=True)
    return row.higher_is_better


def _visible(session: Session, actor: Actor, suite: str, metric: str) -> bool | None:
    """The suite's fixed direction, if the actor may know it. Locks the row until the end of the transaction, so that no
    score is recorded against a correction."""
    query = select(SuiteMetric).where(SuiteMetric.suite == suite, SuiteMetric.metric == metric)
    row = session.scalar(query.with_for_update(read=True))
    if row is None or not (row.stated or is_measured(session, actor, suite, metric)):
        return None
    return row.higher_is_better


def is_known(session: Session, actor: Actor, suite: str, metric: str) -> bool:
    """Whether a search may name the metric: it is stated, or the actor may read a score of it."""
    stated = select(SuiteMetric.stated).where(SuiteMetric.suite == suite, SuiteMetric.metric == metric)
    return bool(metric in HIGHER_IS_BETTER or session.scalar(stated)) or is_measured(session, actor, suite, metric)


def known(session: Session, actor: Actor, suite: str) -> list[str]:
    """The suite's metrics that the actor may name: built-in, stated, and those of readable scores."""
    of_suite = select(SuiteMetric.metric).where(SuiteMetric.suite == suite).order_by(SuiteMetric.metric)
    others = [metric for metric in session.scalars(of_suite) if is_known(session, actor, suite, metric)]
    return [*HIGHER_IS_BETTER, *others]


def is_measured(session: Session, actor: Actor, suite: str, metric: str) -> bool:
    """Whether there is a score of a base, which every member may read, or of a release that the actor may read."""
    return _readable(session, actor, (SuiteVersion.name == suite) & (Score.metric == metric))


def has_readable_score(session: Session, actor: Actor, suite: SuiteVersion) -> bool:
    """Like `is_measured`, for any metric on this content."""
    return _readable(session, actor, Score.suite_id == suite.id)


def _readable(session: Session, actor: Actor, condition: ColumnElement[bool]) -> bool:
    scores = select(Score.id).join(SuiteVersion).where(condition)
    if (readable := readable_names(actor)) is not None:
        scores = scores.outerjoin(Release, Release.id == Score.release_id)
        scores = scores.outerjoin(Repository, Repository.id == Release.repository_id)
        scores = scores.where(Score.base_digest.is_not(None) | Repository.namespace.in_(readable))
    return session.scalar(scores.limit(1)) is not None


def is_author(session: Session, actor: Actor, suite: str) -> bool:
    """Whether the actor made the suite's current version, or is an admin of its namespace or of the registry."""
    current = session.scalar(select(SuiteVersion).where(SuiteVersion.name == suite, SuiteVersion.current))
    return current is not None and owns(actor, current.created_by, current.namespace or EVERYWHERE)


def is_higher_better(session: Session, suite: str, metric: str) -> bool:
    """The direction for sorting: the suite's, else that of its first score."""
    if metric in HIGHER_IS_BETTER:
        return HIGHER_IS_BETTER[metric]
    stated = select(SuiteMetric.higher_is_better).where(SuiteMetric.suite == suite, SuiteMetric.metric == metric)
    first = select(Score.higher_is_better).join(SuiteVersion).where(SuiteVersion.name == suite, Score.metric == metric)
    declared = session.scalar(stated)
    return bool(session.scalar(first.order_by(Score.id).limit(1)) if declared is None else declared)


def stated(session: Session, suites: Sequence[SuiteVersion]) -> dict[str, dict[str, bool]]:
    """The stated metrics of each suite, by its name: metric -> whether higher is better."""
    directions: dict[str, dict[str, bool]] = {suite.name: {} for suite in suites}
    query = (
        select(SuiteMetric).where(SuiteMetric.suite.in_(directions), SuiteMetric.stated).order_by(SuiteMetric.metric)
    )
    for row in session.scalars(query):
        directions[row.suite][row.metric] = row.higher_is_better
    return directions


# Python scorers of suites: workers run the ones that the operator has enabled.


def refuse_disabled(suite: SuiteVersion, enabled: Collection[str]) -> None:
    """Raises Refused for a suite with a Python scorer that is not enabled."""
    if name := disabled(suite, enabled):
        raise Refused(
            "scorer_disabled",
            f"The scorer {name} of {suite.name} is Python code, which this server has not enabled.",
            subject=name,
            next_step=f"If you trust it, set ADAPTORY_SCORERS={','.join([*enabled, name])} for the server and its "
            "workers, and install it where workers run.",
        )


def disabled(suite: SuiteVersion, enabled: Collection[str]) -> str | None:
    """The Python scorer of the suite's answers, if it has one that is not enabled."""
    if suite.task != "generation":
        return None
    chosen = Suite.from_json(suite.content).scoring
    name = chosen.name if chosen else "match"
    return None if name in ANSWER_SCORERS or name in enabled else name
