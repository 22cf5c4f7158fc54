"""Sign-in through an OpenID provider: valid answers, and everything that makes an answer invalid."""

from collections.abc import Generator
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, urlencode, urlsplit

import httpx2
import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import delete, select

from registry.api.app import create_app
from registry.api.pages.accounts.provider import ATTEMPT_COOKIE
from registry.api.pages.html.forms import COOKIE
from registry.client.inprocess import InProcessTransport
from registry.database.tables import AuditRow, Member, ProviderUser, Token
from registry.domain.access import namespaces, people
from registry.domain.access.people import Person
from registry.domain.access.roles import Role
from registry.environment.settings import SignInSettings
from registry.transfer import issuer_keys
from tests import services
from tests.access.browser import Browser
from tests.access.house import HOST, OTHER, PRIVATE, PUBLIC, House, entered, new_house
from tests.access.provider import CLIENT, SECRET, Provider, provider, visit

ROLES = (
    f"ml-team={PRIVATE}:publisher, ml-team={OTHER}:reader,/odd=group={OTHER}:admin,platform=*:admin,"
    f"serving={PRIVATE}:agent"
)


@pytest.fixture(scope="module")
def running() -> Generator[Provider]:
    with provider() as local:
        yield local


@pytest.fixture
def idp(running: Provider) -> Provider:
    running.reset()
    return running


def settings_of(idp: Provider, **changed: Any) -> SignInSettings:
    given = {"issuer": idp.url, "client_id": CLIENT, "client_secret": SecretStr(SECRET), "roles": ROLES}
    return SignInSettings(**{**given, **changed})


@pytest.fixture(scope="module", params=services.ONE_PAIRING)
def house(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, running: Provider
) -> Generator[House]:
    built = new_house(request.param, tmp_path_factory.mktemp("house"))
    built.transport.close()
    house = entered(built, built.environ, sign_in=settings_of(running))
    with house.resources.write() as session:
        namespaces.set_member(session, HOST, PUBLIC, "ann", Role.RELEASER)
        people.link(session, HOST, Person(running.url, "4711", "ann"))
    yield house
    house.close()
    built.resources.close()


@pytest.fixture
def browser(house: House) -> Generator[Browser]:
    with Browser(house) as opened:
        yield opened


def begin(browser: Browser, following: str = "/") -> str:
    """The address that the provider sends the browser back to, without its origin."""
    sent = browser.open(f"/login/provider?{urlencode({'next': following})}")
    assert sent.status_code == 303, sent.text
    back = urlsplit(visit(sent.headers["location"]))
    return f"{back.path}?{back.query}"


def changed(path: str, **fields: str | None) -> str:
    before, _, query = path.partition("?")
    given = {**dict(parse_qsl(query)), **fields}
    return f"{before}?{urlencode({name: value for name, value in given.items() if value is not None})}"


def audited(house: House, act: str) -> list[AuditRow]:
    with house.resources.read() as session:
        return list(session.scalars(select(AuditRow).where(AuditRow.act == act).order_by(AuditRow.id)))


def signed_in(browser: Browser) -> bool:
    return COOKIE in browser.cookies


def test_a_user_of_the_provider_signs_in_with_the_roles_of_its_groups_beside_its_own(
    house: House, browser: Browser, idp: Provider
) -> None:
    assert "Sign in with 127.0.0.1:" in browser.open("/login").text
    back = begin(browser, f"/{PRIVATE}?cursor=")
    ended = browser.open(back)
    assert (ended.status_code, ended.headers["location"]) == (303, f"/{PRIVATE}?cursor=")
    assert set(browser.cookies) == {COOKIE}, "the attempt is over"
    account = browser.open("/account").text
    for namespace, role in {PRIVATE: "publisher", PUBLIC: "releaser", OTHER: "reader"}.items():
        assert f'<a href="/{namespace}">{namespace}</a></th><td>{role}</td>' in account
    assert browser.open(f"/{PRIVATE}").status_code == 200
    assert browser.post(f"/{PRIVATE}/-/members", {"user": "eve", "role": "reader"}).status_code == 403
    with house.resources.read() as session:
        rows = list(session.scalars(select(Member).where(Member.user == "ann")))
        (token,) = session.scalars(select(Token).where(Token.user == "ann"))
    assert [(row.namespace, row.role) for row in rows] == [(PUBLIC, "releaser")], "nothing is written to members"
    assert (token.session, token.parent_id) == (True, None)
    row = audited(house, "session:begin")[-1]
    assert (row.actor, row.subject) == ("ann", f"token/{token.id}")
    assert row.after["roles"] == {PRIVATE: "publisher", OTHER: "reader"}
    (fields,) = idp.redeemed
    assert "client_secret" not in fields

    listed = house.ask("operator", "GET", "/v1/tokens", params={"limit": 500}).json()["items"]
    assert token.id in {row["id"] for row in listed if row["session"]}
    assert house.ask("operator", "DELETE", f"/v1/tokens/{token.id}").status_code == 200
    assert browser.open(f"/{PRIVATE}").status_code == 401


def test_a_token_that_such_a_user_creates_has_its_own_roles_alone(
    house: House, browser: Browser, idp: Provider
) -> None:
    idp.claims = {"groups": ["platform"]}
    browser.open(begin(browser))
    browser.open("/account")
    made = browser.post("/account/tokens", {"name": "mine", "role": "admin"})
    house.secrets["ann"] = "adp_" + made.text.partition("adp_")[2][:85]
    assert house.ask("ann", "GET", "/v1/whoami").json()["grants"] == {PUBLIC: "releaser"}


def test_groups_give_the_higher_role_and_only_where_the_operator_says(
    house: House, browser: Browser, idp: Provider
) -> None:
    seen: dict[str, Any] = {}
    for number, groups in enumerate(
        (["ml-team", "/odd=group"], ["serving", "ml-team"], "platform", None, 7, ["ML-TEAM", 1, None, ["platform"]])
    ):
        idp.claims = {"groups": groups, "preferred_username": f"user{number}", "sub": f"sub{number}"}
        assert browser.open(begin(browser)).status_code == 303
        seen[str(groups)] = audited(house, "session:begin")[-1].after.get("roles")
    assert seen == {
        "['ml-team', '/odd=group']": {PRIVATE: "publisher", OTHER: "admin"},
        "['serving', 'ml-team']": {PRIVATE: "publisher+agent", OTHER: "reader"},
        "platform": {"*": "admin"},
        "None": None,
        "7": None,
        "['ML-TEAM', 1, None, ['platform']]": None,
    }


def test_the_answer_to_another_attempt_signs_nobody_in(house: House, browser: Browser, idp: Provider) -> None:
    back = begin(browser)
    state = dict(parse_qsl(back.partition("?")[2]))["state"]
    for spoilt in (
        changed(back, state="x"),
        changed(back, state=None),
        changed(back, state=state[:-1]),
        "/login/callback",
    ):
        back = begin(browser)
        refused = browser.open(spoilt)
        assert (refused.status_code, "another attempt" in refused.text) == (401, True), spoilt
        assert not signed_in(browser)
        assert browser.open(back).status_code == 401, "the attempt is over"
    with Browser(house) as attacker:
        stolen = begin(attacker)
    begin(browser)
    assert browser.open(stolen).status_code == 401
    assert not signed_in(browser)
    assert idp.redeemed == [], "no code was sent for any of them"
    row = audited(house, "session:refuse")[-1]
    assert (row.actor, row.detail["code"]) == ("anonymous", "sign_in_refused")


def test_an_answer_is_taken_once(house: House, browser: Browser, idp: Provider) -> None:
    back = begin(browser)
    attempt = browser.cookies[ATTEMPT_COOKIE]
    assert browser.open(back).status_code == 303
    browser.post("/logout")
    assert browser.open(back).status_code == 401
    with Browser(house) as thief:  # also with the cookie
        thief.http.cookies.set(ATTEMPT_COOKIE, attempt, domain="registry.local", path="/")
        again = thief.open(back)
        assert (again.status_code, "invalid_grant" in again.text, signed_in(thief)) == (401, True, False)


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"nonce": "x"}, "nonce"),
        ({"nonce": None}, "nonce"),
        ({"aud": "another client"}, "not meant for"),
        ({"aud": [CLIENT, "another client"]}, "not meant for"),
        ({"aud": None}, "not meant for"),
        ({"azp": "another client"}, "azp"),
        ({"iss": "https://evil.example"}, "comes from https://evil.example"),
        ({"iat": 1_600_000_000, "exp": 1_600_000_300}, "expired"),
        ({"exp": None}, "exp"),
        ({"nbf": 9_000_000_000}, "not valid yet"),
        ({"preferred_username": None}, "preferred_username"),
        ({"preferred_username": ""}, "preferred_username"),
        ({"preferred_username": ["ann"]}, "preferred_username"),
        ({"preferred_username": "github/acme"}, "preferred_username"),
        ({"preferred_username": "*"}, "preferred_username"),
        ({"preferred_username": "a\nb"}, "preferred_username"),
        ({"preferred_username": " ann"}, "preferred_username"),
        ({"preferred_username": "a" * 129}, "preferred_username"),
    ],
    ids=str,
)
def test_an_id_token_that_is_not_right_signs_nobody_in(
    house: House, browser: Browser, idp: Provider, claims: dict[str, Any], why: str
) -> None:
    idp.claims = claims
    refused = browser.open(begin(browser))
    assert (refused.status_code, signed_in(browser)) == (401, False), refused.text
    assert why in refused.text
    assert "You are not signed in" in refused.text
    assert audited(house, "session:refuse")[-1].detail["code"] == "sign_in_refused"


def test_nobody_is_anonymous_by_name(house: House, browser: Browser, idp: Provider) -> None:
    idp.claims = {"preferred_username": "Anonymous"}
    assert browser.open(begin(browser)).status_code == 422
    assert not signed_in(browser)


def test_a_token_that_another_key_has_signed_signs_nobody_in(house: House, browser: Browser, idp: Provider) -> None:
    idp.key = "other"
    refused = browser.open(begin(browser))
    assert (refused.status_code, "signature is not valid" in refused.text, signed_in(browser)) == (401, True, False)


def test_what_the_provider_refuses_is_said(house: House, browser: Browser, idp: Provider) -> None:
    back = begin(browser)
    denied = browser.open(changed(back, error="access_denied<script>", code=None, error_description="no"))
    assert (denied.status_code, "access_denied&lt;script&gt;" in denied.text) == (401, True)
    back = begin(browser)
    assert "from another provider" in browser.open(changed(back, iss="https://evil.example")).text
    back = begin(browser)
    assert "no code" in browser.open(changed(back, code=None)).text
    assert not signed_in(browser)


@pytest.mark.parametrize("following", ["https://evil.example", "//evil.example", "/\\evil.example"])
def test_the_way_back_stays_on_this_server(house: House, browser: Browser, idp: Provider, following: str) -> None:
    assert browser.open(begin(browser, following)).headers["location"] == "/"
    back = begin(browser)
    secret = browser.cookies[ATTEMPT_COOKIE].partition(".")[0]
    browser.http.cookies.clear()
    browser.http.cookies.set(ATTEMPT_COOKIE, f"{secret}.{quote(following, safe='')}", domain="registry.local", path="/")
    assert browser.open(back).headers["location"] == "/"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>"),
        (200, b"[]"),
        (200, b"{}"),
        (200, b'{"id_token": 7}'),
        (200, b" " * (300 << 10)),
        (500, b"{}"),
        (302, b""),
    ],
    ids=lambda value: str(value)[:20],
)
def test_garbage_for_a_token_signs_nobody_in(
    house: House, browser: Browser, idp: Provider, status: int, body: bytes
) -> None:
    idp.answers["/token"] = (status, body)
    failed = browser.open(begin(browser))
    assert (failed.status_code, "issuer_unavailable" in failed.text, signed_in(browser)) == (503, True, False)
    assert failed.headers["cache-control"] == "private, no-store"
    idp.answers.clear()
    assert browser.open(begin(browser)).status_code == 303


def test_a_provider_that_hangs_is_given_up(
    house: House, browser: Browser, idp: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(issuer_keys, "_STEP_S", 0.2)
    back = begin(browser)
    idp.hangs_at = "/token"
    assert browser.open(back).status_code == 503
    for path, body in (("/.well-known/openid-configuration", b"{}"), ("/keys", b"<html>")):
        idp.reset()
        idp.hangs_at = path
        with _fresh(house, idp) as other:
            assert other.open("/login/provider").status_code == 503, path
        idp.reset()
        idp.answers[path] = (200, body)
        with _fresh(house, idp) as other:
            assert other.open("/login/provider").status_code == 503, path


class _fresh(Browser):  # noqa: N801
    """A provider object that knows nothing of the provider yet."""

    def __init__(self, house: House, idp: Provider, **changed: Any) -> None:
        settings = house.resources.settings.model_copy(update={"sign_in": settings_of(idp, **changed)})
        self.transport = InProcessTransport(create_app(replace(house.resources, settings=settings), tokens=True))
        super().__init__(replace(house, transport=self.transport))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.transport.close()


def test_an_address_that_is_not_https_is_not_trusted(
    house: House, idp: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("authorization_endpoint", "jwks_uri"):
        monkeypatch.setattr(Provider, "description", _described(Provider.description, **{name: "http://evil.example/"}))
        with _fresh(house, idp) as browser:
            assert browser.open("/login/provider").status_code == 503, name
        monkeypatch.undo()


def _described(of: Any, **changed: str) -> Any:
    return lambda self: {**of(self), **changed}


def test_clients_of_each_kind_are_known_to_the_provider(house: House, idp: Provider) -> None:
    idp.methods = ["client_secret_post"]
    with _fresh(house, idp) as browser:
        assert browser.open(begin(browser)).status_code == 303
    assert idp.redeemed[-1]["client_secret"] == SECRET
    with _fresh(house, idp, client_secret=None) as browser:
        refused = browser.open(begin(browser))
        assert (refused.status_code, "invalid_client" in refused.text) == (401, True)
    assert (idp.redeemed[-1]["client_id"], "client_secret" in idp.redeemed[-1]) == (CLIENT, False)


def test_an_address_is_a_name_only_if_the_provider_has_verified_it(house: House, idp: Provider) -> None:
    for verified, status in ((True, 303), (False, 401), (None, 401), ("true", 401)):
        idp.claims = {"email": "ann@acme.example", "email_verified": verified}
        with _fresh(house, idp, user_claim="email") as browser:
            assert browser.open(begin(browser)).status_code == status, verified


def test_another_process_finishes_what_one_began(house: House, browser: Browser, idp: Provider) -> None:
    back = begin(browser)
    with _fresh(house, idp) as other:
        other.http.cookies.set(ATTEMPT_COOKIE, browser.cookies[ATTEMPT_COOKIE], domain="registry.local", path="/")
        assert other.open(back).status_code == 303
        assert signed_in(other)


def test_neither_the_code_nor_a_secret_is_in_a_page(house: House, browser: Browser, idp: Provider) -> None:
    sent = browser.open("/login/provider")
    secret = browser.cookies[ATTEMPT_COOKIE].partition(".")[0]
    address = sent.headers["location"]
    query = parse_qs(urlsplit(address).query)
    assert secret not in address
    assert len({query["state"][0], query["nonce"][0], query["code_challenge"][0]}) == 3
    idp.claims = {"nonce": "x"}
    back = urlsplit(visit(address))
    code = parse_qs(back.query)["code"][0]
    refused = browser.open(f"{back.path}?{back.query}")
    for hidden in (code, secret, SECRET):
        assert hidden not in refused.text
    assert set(browser.cookies) == set()


def test_without_a_provider_there_is_none_and_by_http_nobody_goes_to_one(house: House, idp: Provider) -> None:
    with Browser(house, "http://registry.example") as plain:
        assert plain.open("/login/provider").status_code == 422
    without = entered(house, house.environ)
    with Browser(without) as browser:
        assert "Sign in with" not in browser.open("/login").text
        for path in ("/login/provider", "/login/callback?code=x&state=y"):
            answer = browser.open(path)
            assert (answer.status_code, "sign_in_disabled" in answer.text) == (422, True)
    without.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"issuer": "http://login.example"},
        {"issuer": "login.example"},
        {"issuer": ""},
        {"issuer": "https://a.example,https://b.example"},
        {"issuer": "github:https://a.example"},
        {"client_id": ""},
        {"roles": "ml-team"},
        {"roles": "ml-team=acme"},
        {"roles": "ml-team=acme:king"},
        {"roles": "ml-team=acme:agent+publisher"},
        {"roles": "ml-team=Acme:reader"},
        {"roles": "=acme:reader"},
        {"roles": "a=acme:reader,"},
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        SignInSettings(**{"issuer": "https://login.example", "client_id": "x", **wrong})
    assert SignInSettings(issuer="https://login.example/", client_id="x").issuer == "https://login.example/"


def test_the_provider_is_real(idp: Provider) -> None:
    """The test provider refuses wrong requests, so that its acceptance proves something."""
    wrong = httpx2.post(f"{idp.url}/token", data={"code": "x", "code_verifier": "y"}, auth=(CLIENT, "wrong"))
    assert (wrong.status_code, wrong.json()) == (401, {"error": "invalid_client"})


def test_a_user_of_the_provider_with_the_name_of_another_here_is_nobody_until_an_admin_links_them(
    house: House, browser: Browser, idp: Provider
) -> None:
    idp.claims = {"preferred_username": "operator", "sub": "mallory"}
    refused = browser.open(begin(browser))
    assert (refused.status_code, signed_in(browser)) == (403, False)
    assert "adaptory user link operator --subject mallory" in refused.text
    assert audited(house, "session:refuse")[-1].detail["code"] == "name_taken"
    path, body = "/v1/users/operator/person", {"subject": "mallory"}
    assert house.ask("admin", "PUT", path, json=body).status_code == 403, "an admin of a namespace"
    assert house.ask("operator", "PUT", path, json=body).json()["issuer"] == idp.url
    assert browser.open(begin(browser)).status_code == 303
    taken = house.ask("operator", "PUT", "/v1/users/reader/person", json=body)
    assert (taken.status_code, taken.json()["code"]) == (409, "subject_linked")
    row = audited(house, "user:link")[-1]
    assert (row.actor, row.subject, row.after["subject"]) == ("operator", "user/operator", "mallory")


def test_a_person_stays_the_same_user_under_another_name_and_the_name_is_nobody_elses(
    house: House, browser: Browser, idp: Provider
) -> None:
    idp.claims = {"preferred_username": "kim", "sub": "kim-1"}
    assert browser.open(begin(browser)).status_code == 303
    idp.claims = {"preferred_username": "kimberly", "sub": "kim-1"}
    assert browser.open(begin(browser)).status_code == 303
    assert audited(house, "session:begin")[-1].actor == "kim"
    idp.claims = {"preferred_username": "kim", "sub": "kim-2"}
    assert browser.open(begin(browser)).status_code == 403
    idp.claims = {"preferred_username": "kimberly", "sub": "kim-2"}
    assert browser.open(begin(browser)).status_code == 303, "a name that nobody has"


def test_who_signed_in_before_people_had_subjects_signs_in_again_unless_the_name_was_older(
    house: House, browser: Browser, idp: Provider
) -> None:
    for name, older in (("lena", False), ("otto", True)):
        if older:
            with house.resources.write() as session:
                namespaces.set_member(session, HOST, OTHER, name, Role.READER)
                people.link(session, HOST, Person(idp.url, f"{name}-0", name))
        idp.claims = {"preferred_username": name, "sub": f"{name}-0"}
        assert browser.open(begin(browser)).status_code == 303
        with house.resources.write() as session:
            namespaces.set_member(session, HOST, PUBLIC, name, Role.READER)
            session.execute(delete(ProviderUser).where(ProviderUser.user == name))  # as before migration 0022
        assert browser.open(begin(browser)).status_code == (403 if older else 303)
