"""A channel's policy in words, and the form that changes it."""

import yaml
from fastapi import APIRouter, Response

from registry.api.http.problems import as_registry_error
from registry.api.pages.html.forms import FormOf, number_shown
from registry.api.pages.html.render import page_about, redirect
from registry.api.pages.html.wire import CHANNEL, ERRORS, ChannelRequest, ChannelRequestOf, PageAdmin, PageRoute
from registry.domain.catalog import repositories
from registry.domain.channels.policy import policies
from registry.errors import RegistryError
from registry.formats.channel_policy import ChannelPolicy, Combination, Licenses, ScoreRule, parse_policy
from registry.formats.references import PolicyScope


def stated(policy: ChannelPolicy) -> list[tuple[str, list[str]]]:
    """The requirements of a promotion: a heading and its lines for each part of the policy."""
    needs = {
        "Scores": [_rule(policy, rule) for rule in policy.rules],
        "Served before": [f"by {soak.channel} for {_hours(soak.hours)}, and not rolled back" for soak in policy.soak],
        "Approval": _approval(policy),
        "Signature": [f"by a key of the namespace, covering the {policy.signature}"] if policy.signature else [],
        "Licences": _licenses(policy.licenses) if policy.licenses else [],
        "Conflict check": [f"at worst {policy.verdict}, of a composed release"] if policy.verdict else [],
        "Loads in": list(policy.loads_in),
        "Origin": ["composed by a worker, which attests it"] if policy.origin else [],
    }
    listed = [(heading, lines) for heading, lines in needs.items() if lines]
    return [*listed, *_how(policy)] if listed else []


def _how(policy: ChannelPolicy) -> list[tuple[str, list[str]]]:
    missing = {"evaluate": "is measured, and the promotion waits", "refuse": "refuses the promotion"}
    force = "never" if policy.forced_by == "never" else f"with the role {policy.forced_by} or higher, and a reason"
    how = [("A missing score", [missing[policy.missing]])] if policy.rules else []
    return [*how, ("Force", [force]), ("Waits", [f"at most {_hours(policy.expires_hours)}"])]


_MEASURED = {False: [], True: ["measured, not reported"], "worker": ["measured by a worker"]}


def _rule(policy: ChannelPolicy, row: ScoreRule) -> str:
    least, measured = policy.of_rule(row)
    conditions = [f"from at least {least} examples"] if least > 1 else []
    return ", ".join([row.rule, *conditions, *_MEASURED[measured]])


def _approval(policy: ChannelPolicy) -> list[str]:
    if policy.approval is None:
        return []
    people = "1 person" if policy.approval.count == 1 else f"{policy.approval.count} people"
    return [f"by {people} with the role {policy.approval.role} or higher, other than the one who promotes"]


def _licenses(asked: Licenses) -> list[str]:
    lines = [f"stated for: {', '.join(asked.stated)}"] if asked.stated else []
    if asked.allow is not None:
        lines.append(f"allowed: {', '.join(asked.allow)}")
    return lines + [f"refused: {_refused(rule)}" for rule in asked.refuse]


def _refused(rule: str | Combination) -> str:
    return rule if isinstance(rule, str) else " with ".join(f"{part} {name}" for part, name in rule.given().items())


def _hours(count: float) -> str:
    return f"{count:g} hour{'' if count == 1 else 's'}"


router = APIRouter(route_class=PageRoute)


@router.get(CHANNEL + "/policy")
def show_policy_form(asked: ChannelRequestOf, actor: PageAdmin) -> Response:
    """The current policy, in a form that changes it."""
    with asked.resources.read() as session:
        repositories.find(session, asked.named)
        stored = policies.find(session, _scope(asked))
    text = yaml.safe_dump(stored.policy.to_json(), sort_keys=False, allow_unicode=True)
    return _page(asked, text, stored.revision)


@router.post(CHANNEL + "/policy")
def set_policy(asked: ChannelRequestOf, actor: PageAdmin, form: FormOf) -> Response:
    """Replaces the policy as REST does, then redirects to the channel's page. Raises Stale if the policy has changed
    since."""
    text, revision = form.get("policy", ""), number_shown(form, "revision")
    try:
        policy = parse_policy(text, "policy")
        with asked.resources.write() as session:
            repositories.find(session, asked.named)
            policies.set_policy(session, actor, _scope(asked), policy, expected=revision)
    except ERRORS as error:
        return _page(asked, text, revision, as_registry_error(error))
    return redirect(asked.address)


def _scope(asked: ChannelRequest) -> PolicyScope:
    return PolicyScope(asked.named.namespace, asked.named.name, asked.channel)


def _page(asked: ChannelRequest, text: str, revision: int, error: RegistryError | None = None) -> Response:
    return page_about(
        asked.request, "policy.html", asked.named, error=error, channel=asked.channel, text=text, revision=revision
    )
