"""Every page, with every kind of caller, on a private and a public namespace; every form, as other sites would send it.
The pages are listed from the application: a new one is tried automatically, and fails without a rule, or if its rule
differs from `STATED_PAGES`."""

import re
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from registry.api.app import page_routers
from registry.api.http.request import SAFE_METHODS
from registry.api.http.rules import Where, rules_of
from registry.api.pages.html import render
from registry.api.pages.html.wire import PageRoute, PageRule
from registry.domain.access.roles import Role, at_least
from tests.access.browser import Browser
from tests.access.house import CALLERS, PRIVATE, PUBLIC, ROLES, House, Things, copy_of, entered
from tests.access.stated_pages import STATED_PAGES

SIGNED_IN = tuple(caller for caller in CALLERS if caller not in ("nobody", "revoked", "expired"))
SOMEWHERE = "+"
ELSEWHERE = {"stranger": Role.ADMIN, "narrowed": Role.READER}
"""Roles in a namespace that no page here is about."""
TEMPLATES = Path(render.__file__).parents[1] / "templates"


@pytest.fixture(scope="module")
def readers(unchanged: House) -> Generator[dict[str, Browser]]:
    """A browser of each caller, in which the caller has signed in: that takes three times as long as a page."""
    with ExitStack() as stack:
        yield {caller: stack.enter_context(_signed_in(unchanged, caller)) for caller in ("nobody", *SIGNED_IN)}


def _signed_in(house: House, caller: str) -> Browser:
    browser = Browser(house)
    if caller == "nobody":
        browser.open("/login")
    else:
        browser.sign_in(house.secrets[caller])
    return browser


def pages() -> list[tuple[str, Any]]:
    """Method and route of each page."""
    routes = [route for router in page_routers() for route in router.routes]
    # HEAD is GET without a body, in every way.
    return [
        (method, route) for route in routes for method in sorted({*(getattr(route, "methods", ()) or ())} - {"HEAD"})
    ]


PAGES = pages()
FORMS = [route.path for method, route in PAGES if method not in SAFE_METHODS]


def test_every_page_has_the_rule_that_is_stated() -> None:
    assert {(method, route.path): _summary(method, route) for method, route in PAGES} == STATED_PAGES


def _summary(method: str, route: Any) -> str:
    """The rule as stated; a page's own decisions are not visible from outside."""
    rules = rules_of(route.dependant)
    if not rules:
        return "open"
    assert all(isinstance(rule, PageRule) for rule in rules), f"{route.path} is a page, and takes tokens"
    assert len(set(rules)) == 1, f"{route.path} has several rules"
    inside, role = STATED_PAGES.get((method, route.path), ""), str(rules[0].role)
    return {Where.NAMESPACE: role, Where.ANYWHERE: f"{role} {SOMEWHERE}"}.get(rules[0].where, inside)


def test_whatever_changes_something_is_a_page_route() -> None:
    """PageRoute is the only class that checks forms."""
    changing = [(method, route) for method, route in PAGES if method not in SAFE_METHODS]
    assert changing
    for method, route in changing:
        assert (method, type(route)) == ("POST", PageRoute), route.path


def test_every_form_that_is_posted_carries_its_token_and_goes_to_a_page() -> None:
    forms = [
        (path.name, match.group(0))
        for path in TEMPLATES.glob("*.html")
        for match in re.finditer(r"<form\b[^>]*>.*?</form>", path.read_text(), re.DOTALL)
    ]
    posting = re.compile(r"<form[^>]*method=\W?post", re.IGNORECASE)
    posted = [(name, text) for name, text in forms if posting.match(text)]
    assert len(posted) >= 6
    for name, text in posted:
        assert text.count("{{ parts.csrf() }}") == 1, f"{name}: {text[:80]}"
        action = re.sub(r"\{\{.*?\}\}", "x", text.partition('action="')[2].partition('"')[0])
        assert any(re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", path), action) for path in FORMS), action
    assert not any("csrf" in text for form in forms if form not in posted for text in form), "a token in an address"


@pytest.mark.parametrize("path", FORMS)
def test_a_form_is_refused_without_its_token_and_from_other_sites(path: str, house: House) -> None:
    """Tries each route, found without being named, as a caller who may use it."""
    with Browser(house) as browser:
        browser.sign_in(house.secrets["operator"])
        filled = _filled(path, PRIVATE, house.things[PRIVATE])
        without = browser.post(filled, {"form_token": ""})
        assert (without.status_code, "form_token" in without.text) == (403, True), without.text
        for headers in ({}, {"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            foreign = browser.post(filled, headers=headers)
            assert (foreign.status_code, "other_site" in foreign.text) == (403, True), headers
        assert not (browser.post(filled).status_code == 403 and path != "/login"), "it is let in with both"


@pytest.mark.parametrize("path", [path for method, path in STATED_PAGES if method == "GET"])
def test_a_page_is_shown_to_those_that_its_rule_names_and_to_nobody_else(
    path: str, unchanged: House, readers: dict[str, Browser]
) -> None:
    for caller, browser in readers.items():
        for namespace in (PRIVATE, PUBLIC):
            answer = browser.open(_filled(path, namespace, unchanged.things[namespace]))
            _answers_as_stated(answer, "GET", path, caller, namespace)


@pytest.mark.parametrize("path", [path for method, path in STATED_PAGES if method == "POST"])
def test_a_form_is_taken_from_those_that_its_rule_names_and_from_nobody_else(path: str, house: House) -> None:
    for caller in ("nobody", *SIGNED_IN):
        for namespace in (PRIVATE, PUBLIC):
            with _signed_in(house, caller) as browser:
                filled = _filled(path, namespace, house.things[namespace])
                answer = browser.post(filled, {"user": "x", "role": ""})
            _answers_as_stated(answer, "POST", path, caller, namespace)


def _answers_as_stated(answer: httpx2.Response, method: str, path: str, caller: str, namespace: str) -> None:
    seen = f"{caller} {method} {path} in {namespace}: {answer.status_code} {answer.text[:2000]}"
    expected = _expected(STATED_PAGES[method, path], caller, namespace)
    assert answer.status_code < 500, seen
    if expected == "allowed":
        assert not _denied(answer), seen
    else:
        assert answer.status_code == expected, seen
    _is_protected(answer, path)


def _is_protected(answer: httpx2.Response, path: str) -> None:
    if not path.startswith("/static/"):
        assert answer.headers["cache-control"] == "private, no-store"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def _expected(whom: str, caller: str, namespace: str) -> int | str:
    if whom in ("open", "everybody"):
        return "allowed"
    if whom == "operator":
        return "allowed" if caller == "operator" else 401 if caller == "nobody" else 403
    if whom == "user":
        return 401 if caller == "nobody" else "allowed"
    role, somewhere = Role(whom.removesuffix(f" {SOMEWHERE}")), whom.endswith(SOMEWHERE)
    held = ROLES.get(caller) or (somewhere and ELSEWHERE.get(caller)) or None
    if caller == "operator" or (held and at_least(held, role)):
        return "allowed"
    if not (somewhere or caller in ROLES or namespace == PUBLIC):
        return 404
    if role == Role.READER and not somewhere:
        return "allowed"
    return 401 if caller == "nobody" else 403


def _denied(answer: httpx2.Response) -> bool:
    """Whether the page denied access. A token that does not work, one that is not the caller's to revoke, a release
    without a spectrum, a commit without a release and an unknown webhook do not count as denials."""
    for code in (
        "token_invalid",
        "token_unknown",
        "token_not_allowed",
        "spectrum_unknown",
        "no_match",
        "webhook_unknown",
        "change_unknown",
    ):
        if f"<code>{code}</code>" in answer.text or "You are not signed in" in answer.text:
            return False
    return answer.status_code in (401, 403, 404) and "content-security-policy" in answer.headers


def _filled(path: str, namespace: str, things: Things | None = None) -> str:
    values = {"{namespace}": namespace, "{name}": "sql", "{version}": "1.0.0", "{token_id}": "aaaaaaaaaaaa"}
    values |= {"{webhook_id}": "aaaaaaaaaaaa", "{change_id}": "4000"}
    values |= {"{base:path}": "tiny", "{suite:path}": "exact", "{channel}": "prod", "{versions}": "1.0.0...1.1.0"}
    values |= {"{commit}": "c0ffee0", "{path:path}": "weights.safetensors"}
    if things is not None:
        values |= {"{job_id}": str(things.job_id), "{composition_id}": str(things.composition_id)}
    for name, value in {
        **values,
        "{digest}": "0" * 16,
        "{code}": "gate_failed",
    }.items():
        path = path.replace(name, value)
    assert "{" not in path, f"say here what {path} is filled with"
    return path


def test_a_reference_as_commands_write_it_leads_to_the_page_of_the_release(house: House) -> None:
    commit = house.ask("reader", "GET", f"/v1/adapters/{PRIVATE}/sql/releases/1.0.0").json()["commit"]
    with Browser(house) as browser:
        browser.sign_in(house.secrets["reader"])
        for rest in (":1.0.0", ":~1.0", "/~1.0", f"/commit/{commit[:9]}", f"/commit/{commit}"):
            answer = browser.open(f"/{PRIVATE}/sql{rest}")
            leads_to = "1.1.0" if "commit" in rest else "1.0.0"  # both have the same files
            assert (answer.status_code, answer.headers["location"]) == (302, f"/{PRIVATE}/sql/{leads_to}"), rest


def test_a_file_is_an_attachment(house: House) -> None:
    with Browser(house) as browser:
        browser.sign_in(house.secrets["reader"])
        answer = browser.open(f"/{PRIVATE}/sql/1.0.0/files/weights.safetensors")
        assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''weights.safetensors"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert browser.open(f"/{PRIVATE}/sql/1.0.0/files/nothing").status_code == 404


def test_links_lead_only_to_pages_that_the_viewer_may_see(house: House) -> None:
    for caller in ("nobody", "narrowed", "reader", "publisher", "operator"):
        with Browser(house) as browser:
            if caller != "nobody":
                browser.sign_in(house.secrets[caller])
            links = re.findall(r'<li><a href="(/[a-z]+)"', browser.open("/").text)
            assert ("/compose" in links) == (caller in ("publisher", "operator")), caller
            assert {link: browser.open(link).status_code for link in links} == dict.fromkeys(links, 200), caller


def test_a_private_page_and_one_that_is_not_there_answer_a_stranger_alike(house: House) -> None:
    for caller in ("nobody", "stranger", "narrowed"):
        with Browser(house) as browser:
            if caller != "nobody":
                browser.sign_in(house.secrets[caller])
            for path in ("/{}", "/{}/sql", "/{}/sql/1.0.0"):
                seen = [browser.open(path.format(name)) for name in (PRIVATE, "ghost")]
                assert [answer.status_code for answer in seen] == [404, 404], (caller, path)
                assert seen[0].text.replace(PRIVATE, "ghost") == seen[1].text, (caller, path)


def test_the_only_user_of_a_server_needs_no_session_and_its_forms_are_checked_too(
    furnished: House, tmp_path: Path
) -> None:
    from dataclasses import replace

    from registry.api.app import create_app
    from registry.client.inprocess import InProcessTransport

    house = entered(furnished, copy_of(furnished, tmp_path / "home"))
    house.transport.close()
    single = replace(house, transport=InProcessTransport(create_app(house.resources)))
    with Browser(single, "http://127.0.0.1:8000") as browser:
        user = house.resources.settings.user
        assert f'<a href="/account">{user}</a>' in browser.open(f"/{PRIVATE}").text
        assert "needs no token here" in browser.open("/login").text
        browser.open(f"/{PRIVATE}/-/settings")
        member = {"user": "new", "role": "reader"}
        assert browser.post("/login", {"token": house.secrets["reader"]}).status_code == 422
        assert browser.post(f"/{PRIVATE}/-/members", member).status_code == 303
        for refused in (
            browser.post(f"/{PRIVATE}/-/members", {**member, "form_token": ""}),
            browser.post(f"/{PRIVATE}/-/members", member, headers={}),
            browser.post(f"/{PRIVATE}/-/members", member, headers={"Origin": "http://localhost:9000"}),
        ):
            assert refused.status_code == 403
    single.close()
