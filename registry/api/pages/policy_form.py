"""The form for a channel's policy, as text. It carries the revision that its page showed."""

import yaml
from fastapi import APIRouter, Request, Response

from registry.api.http.request import ResourcesOf
from registry.api.pages.forms import FormOf, number_shown
from registry.api.pages.paths import ChannelOf, RepositoryOf
from registry.api.pages.render import form_page, link, redirect
from registry.api.pages.wire import ERRORS, PageAdmin, PageRoute, as_registry_error
from registry.domain.catalog import repositories
from registry.domain.channels import policies
from registry.formats.channel_policy import parse_policy

router = APIRouter(route_class=PageRoute)

POLICY = "/{namespace}/{name}@{channel}/policy"


@router.get(POLICY)
def show_policy_form(
    named: RepositoryOf, channel: ChannelOf, request: Request, resources: ResourcesOf, actor: PageAdmin
) -> Response:
    """The policy that is set, to change."""
    with resources.read() as session:
        policy, revision = policies.find(session, repositories.find(session, named), channel)
    text = yaml.safe_dump(policy.to_json(), sort_keys=False, allow_unicode=True)
    return form_page(request, "policy.html", named, None, channel=channel, text=text, revision=revision)


@router.post(POLICY)
def set_policy(
    named: RepositoryOf, channel: ChannelOf, request: Request, resources: ResourcesOf, actor: PageAdmin, form: FormOf
) -> Response:
    """Replaces the policy as REST does, and goes on to the channel's page. Raises Stale if it has changed since."""
    text, revision = form.get("policy", ""), number_shown(form, "revision")
    try:
        policy = parse_policy(text, "policy")
        with resources.write() as session:
            repository = repositories.find(session, named)
            policies.set_policy(session, actor, repository, channel, policy, expected=revision)
    except ERRORS as error:
        values = {"channel": channel, "text": text, "revision": revision}
        return form_page(request, "policy.html", named, as_registry_error(error), **values)
    return redirect(link(str(named), channel=channel))
