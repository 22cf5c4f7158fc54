"""The form for a channel's policy, as text. It carries the revision that its page showed."""

import yaml
from fastapi import APIRouter, Response

from registry.api.http.problems import as_registry_error
from registry.api.pages.html.forms import FormOf, number_shown
from registry.api.pages.html.paths import CHANNEL, ChannelRequest, ChannelRequestOf
from registry.api.pages.html.render import page_about, redirect
from registry.api.pages.html.wire import ERRORS, PageAdmin, PageRoute
from registry.domain.catalog import repositories
from registry.domain.channels import policies
from registry.errors import RegistryError
from registry.formats.channel_policy import parse_policy

router = APIRouter(route_class=PageRoute)


@router.get(CHANNEL + "/policy")
def show_policy_form(asked: ChannelRequestOf, actor: PageAdmin) -> Response:
    """The policy that is set, to change."""
    with asked.resources.read() as session:
        policy, revision = policies.find(session, repositories.find(session, asked.named), asked.channel)
    return _page(asked, yaml.safe_dump(policy.to_json(), sort_keys=False, allow_unicode=True), revision)


@router.post(CHANNEL + "/policy")
def set_policy(asked: ChannelRequestOf, actor: PageAdmin, form: FormOf) -> Response:
    """Replaces the policy as REST does, and goes on to the channel's page. Raises Stale if it has changed since."""
    text, revision = form.get("policy", ""), number_shown(form, "revision")
    try:
        policy = parse_policy(text, "policy")
        with asked.resources.write() as session:
            repository = repositories.find(session, asked.named)
            policies.set_policy(session, actor, repository, asked.channel, policy, expected=revision)
    except ERRORS as error:
        return _page(asked, text, revision, as_registry_error(error))
    return redirect(asked.address)


def _page(asked: ChannelRequest, text: str, revision: int, error: RegistryError | None = None) -> Response:
    return page_about(
        asked.request, "policy.html", asked.named, error=error, channel=asked.channel, text=text, revision=revision
    )
