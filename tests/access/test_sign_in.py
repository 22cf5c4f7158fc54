"""Browser sessions: their beginning and end, the pages that accept them, and the forms that are refused."""

import logging
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, text, update

from registry.api.pages.html.forms import COOKIE, own_path
from registry.database.engine import Row
from registry.database.tables import AuditRow, Token
from registry.domain.access import tokens
from registry.domain.access.audit import MAX_REFUSALS
from registry.domain.access.sessions import LIFETIME
from tests import services
from tests.access.browser import HTML, ORIGIN, Browser
from tests.access.house import OTHER, PRIVATE, PUBLIC, House, copy_of, entered, new_house
from tests.scenarios.test_serve import served

PROXIED = {"ADAPTORY_ACCESS": "tokens", "ADAPTORY_TRUSTED_PROXIES": "127.0.0.1"}


@pytest.fixture(scope="module", params=services.ONE_PAIRING)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    built = new_house(request.param, tmp_path_factory.mktemp("house"))
    yield built
    built.close()


@pytest.fixture
def browser(house: House) -> Generator[Browser]:
    with Browser(house) as opened:
        yield opened


def new_token(house: House, **body: object) -> dict[str, Any]:
    made = house.ask("operator", "POST", "/v1/tokens", json={"user": "releaser", **body})
    assert made.status_code == 201, made.text
    return made.json()


def bearer(house: House, secret: str, path: str) -> int:
    return house.ask("nobody", "GET", path, headers={"Authorization": f"Bearer {secret}"}).status_code


def audited(house: House, act: str) -> list[AuditRow]:
    with house.resources.read() as session:
        return list(session.scalars(select(AuditRow).where(AuditRow.act == act).order_by(AuditRow.id)))


def test_somebody_signs_in_goes_back_to_the_page_and_signs_out(house: House, browser: Browser) -> None:
    refused = browser.open(f"/{PRIVATE}?cursor=")
    assert refused.status_code == 404
    assert 'href="/login?next=%2Facme%3Fcursor%3D"' in refused.text
    assert 'name="next" value="/acme?cursor="' in browser.open("/login?next=%2Facme%3Fcursor%3D").text

    begun = browser.post("/login", {"token": f" {house.secrets['releaser']}\n", "next": f"/{PRIVATE}"})
    assert (begun.status_code, begun.headers["location"]) == (303, f"/{PRIVATE}")
    cookie = begun.headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}=ads_")
    assert {"HttpOnly", "Secure", "SameSite=lax", "Path=/", "Max-Age=43200"} <= {
        part.strip() for part in cookie.split(";")
    }
    assert begun.headers["cache-control"] == "private, no-store"
    page = browser.open(f"/{PRIVATE}")
    assert page.status_code == 200
    assert '<a href="/account">releaser</a>' in page.text
    assert "no-store" in browser.open("/account").headers["cache-control"]

    out = browser.post("/logout")
    assert (out.status_code, out.headers["location"], browser.cookies) == (303, "/login", {})
    assert browser.open(f"/{PRIVATE}").status_code == 404
    secret = cookie.partition("=")[2].partition(";")[0]
    browser.http.cookies.set(COOKIE, secret, domain="registry.local", path="/")
    ended = browser.open(f"/{PUBLIC}")
    assert (ended.status_code, "Your session has ended" in ended.text, browser.cookies) == (401, True, {})
    assert browser.open(f"/{PUBLIC}").status_code == 200
    row = audited(house, "session:begin")[-1]
    assert (row.actor, row.token_id, row.namespace) == ("releaser", house.ids["releaser"], None)
    assert audited(house, "session:end")[-1].subject == row.subject
    assert house.ask("releaser", "GET", "/v1/whoami").status_code == 200, "the token goes on"


def test_a_session_is_worth_nothing_outside_pages_and_a_token_nothing_in_the_cookie(
    house: House, browser: Browser
) -> None:
    browser.sign_in(house.secrets["admin"])
    secret = browser.cookies[COOKIE]
    for path in ("/v1/whoami", f"/v1/adapters/{PRIVATE}/sql", f"/api/models/{PRIVATE}/sql", "/api/whoami-v2"):
        assert bearer(house, secret, path) == 401, path
    for scheme in ("session", "Session", "cookie", ""):
        header = {"Authorization": f"{scheme} {secret}"}
        assert house.ask("nobody", "GET", "/v1/whoami", headers=header).status_code == 401
    alone = house.ask("nobody", "GET", "/v1/whoami", headers={"Cookie": f"{COOKIE}={secret}"}).json()
    assert alone["user"] == "anonymous"
    with Browser(house) as other:
        other.http.cookies.set(COOKIE, house.secrets["admin"], domain="registry.local", path="/")
        assert other.open(f"/{PRIVATE}").status_code == 401
    with Browser(house) as other:
        assert other.open(f"/{PRIVATE}", Authorization=f"Bearer {house.secrets['admin']}").status_code == 404
        other.open("/login")
        assert other.post("/login", {"token": secret}).status_code == 401


def test_a_session_lies_nowhere_in_the_database_and_no_token_in_an_address_or_a_log(
    house: House, browser: Browser, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        begun = browser.sign_in(house.secrets["reader"])
        wrong = house.secrets["reader"][:-1]
        failed = browser.post("/login", {"token": wrong})
        asked = browser.open(f"/login?token={house.secrets['reader']}")
    assert (begun.status_code, failed.status_code, asked.status_code) == (303, 401, 400)
    secret = browser.cookies[COOKIE]
    written = capfd.readouterr()
    logged = "".join(
        record.getMessage() for record in caplog.records if record.name != "httpx2"
    )  # the test's own client
    for hidden in (secret, house.secrets["reader"], wrong):
        assert hidden[17:60] not in logged + written.out + written.err + failed.text + asked.text
        assert hidden not in str(begun.headers["location"])
    with house.resources.read() as session:
        rows = [row for table in Row.metadata.sorted_tables for row in session.execute(select(table))]
    assert not any(secret[17:60] in str(row) for row in rows)


def test_revoking_a_token_or_a_session_ends_the_session_at_once(house: House, browser: Browser) -> None:
    made = new_token(house)
    browser.sign_in(made["token"])
    listed = house.ask("operator", "GET", "/v1/tokens", params={"limit": 500}).json()["items"]
    (row,) = [token for token in listed if token["parent_id"] == made["id"]]
    assert (row["session"], row["user"], row["revoked_at"]) == (True, "releaser", None)
    assert not next(token for token in listed if token["id"] == made["id"])["session"]
    assert house.ask("operator", "DELETE", f"/v1/tokens/{row['id']}").status_code == 200
    assert browser.open(f"/{PRIVATE}").status_code == 401
    browser.sign_in(made["token"])
    assert browser.open(f"/{PRIVATE}").status_code == 200
    assert house.ask("operator", "DELETE", f"/v1/tokens/{made['id']}").status_code == 200
    assert browser.open(f"/{PRIVATE}").status_code == 401
    listed = house.ask("operator", "GET", "/v1/tokens", params={"limit": 500}).json()["items"]
    assert all(token["revoked_at"] for token in listed if made["id"] in (token["id"], token["parent_id"]))
    assert browser.sign_in(made["token"]).status_code == 401


def test_a_session_whose_token_was_revoked_by_an_older_server_has_ended(house: House, browser: Browser) -> None:
    """A server without sessions revokes only the row of the token."""
    made = new_token(house)
    browser.sign_in(made["token"])
    with house.resources.write() as session:
        session.execute(update(Token).where(Token.id == made["id"]).values(revoked_at=datetime.now(UTC)))
    assert browser.open(f"/{PRIVATE}").status_code == 401


def test_a_session_lasts_half_a_day_and_never_longer_than_its_token(house: House, browser: Browser) -> None:
    made = new_token(house, expires_in_days=0.01)
    browser.sign_in(made["token"])
    browser.open(f"/{PRIVATE}")
    with house.resources.read() as session:
        short = session.scalars(select(Token).where(Token.parent_id == made["id"])).one()
        assert short.expires_at == datetime.fromisoformat(made["expires_at"])
    assert browser.post("/account/tokens", {"expires_in_days": "1"}).status_code == 403, "it would outlive the token"
    browser.sign_in(new_token(house, scope={PRIVATE: "reader"})["token"])
    assert "It creates no others" in browser.open("/account").text
    assert browser.post("/account/tokens").status_code == 403
    browser.sign_in(house.secrets["releaser"])
    with house.resources.write() as session:
        query = select(Token).where(Token.parent_id == house.ids["releaser"]).order_by(Token.created_at.desc())
        row = session.scalars(query.limit(1)).one()
        assert row.expires_at == row.created_at + LIFETIME
        row.expires_at = datetime.now(UTC) - timedelta(seconds=1)
    assert browser.open(f"/{PRIVATE}").status_code == 401


def test_a_session_may_do_what_its_token_may(house: House, browser: Browser) -> None:
    browser.sign_in(house.secrets["narrowed"])
    assert browser.open(f"/{OTHER}").status_code == 200
    assert browser.open(f"/{PRIVATE}").status_code == 404
    account = browser.open("/account").text
    assert "limited by the token&#39;s scope" in account or "limited by the token's scope" in account
    assert browser.post(f"/{OTHER}/-/members", {"user": "eve", "role": "admin"}).status_code == 403
    with house.resources.read() as session:
        query = select(Token.id).where(Token.parent_id == house.ids["narrowed"])
        own = session.scalars(query.order_by(Token.created_at.desc())).first()
    assert browser.post(f"/account/tokens/{house.ids['operator']}/revoke").status_code == 404
    seen = house.ask("narrowed", "GET", "/v1/tokens").json()["items"]
    assert {house.ids["narrowed"], own} <= {row["id"] for row in seen}
    assert all(house.ids["narrowed"] in (row["id"], row["parent_id"]) for row in seen)


def test_signing_out_leaves_what_was_asked_for_and_a_revocation_stops_it(house: House, browser: Browser) -> None:
    def grants() -> dict[str, str]:
        with house.resources.read() as session:
            query = select(Token.id).where(Token.parent_id == house.ids["publisher"]).order_by(Token.created_at.desc())
            return tokens.grants_of(session, session.scalars(query.limit(1)).one())

    browser.sign_in(house.secrets["publisher"])
    browser.post("/logout")
    assert grants() == {PRIVATE: "publisher", PUBLIC: "publisher"}
    browser.sign_in(house.secrets["publisher"])
    own = max(line.partition("/revoke")[0] for line in browser.loaded.split("/account/tokens/")[1:2])
    assert browser.post(f"/account/tokens/{own}/revoke").status_code == 303
    assert grants() == {}
    assert browser.open("/account").status_code == 401


def test_a_second_sign_in_ends_the_first_session(house: House, browser: Browser) -> None:
    browser.sign_in(house.secrets["reader"])
    first = browser.cookies[COOKIE]
    assert browser.sign_in(house.secrets["publisher"]).status_code == 303
    assert browser.cookies[COOKIE] != first
    with Browser(house) as other:
        other.http.cookies.set(COOKIE, first, domain="registry.local", path="/")
        assert other.open("/").status_code == 401


def test_old_sessions_are_removed(house: House, browser: Browser) -> None:
    browser.sign_in(house.secrets["reader"])
    with house.resources.write() as session:
        old = datetime.now(UTC) - timedelta(days=31)
        session.execute(update(Token).where(Token.session, Token.user == "reader").values(expires_at=old))
    with Browser(house) as other:
        other.sign_in(house.secrets["reader"])
    with house.resources.read() as session:
        assert len(list(session.scalars(select(Token).where(Token.session, Token.user == "reader")))) == 1


def test_a_job_of_continuous_integration_does_not_sign_in(house: House, browser: Browser) -> None:
    made = new_token(house)
    with house.resources.write() as session:
        session.execute(
            text("INSERT INTO trusted_publishers (id, namespace, repository, issuer, project, created_at, created_by) "
                 "VALUES ('p', 'acme', 'sql', 'i', 'p', '2026-01-01 00:00:00+00:00', 'x')")
        )  # fmt: skip
        session.execute(update(Token).where(Token.id == made["id"]).values(publisher_id="p"))
    assert browser.sign_in(made["token"]).status_code == 403
    assert browser.cookies == {}


FOREIGN: list[dict[str, str]] = [
    {},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://registry"},
    {"Origin": f"{ORIGIN}.evil.example"},
    {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"},
    {"Origin": ORIGIN, "Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": "cross-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_form_of_another_site_changes_nothing(house: House, browser: Browser, headers: dict[str, str]) -> None:
    browser.sign_in(house.secrets["admin"])
    for path in ("/login", "/logout", "/account/tokens", f"/{PRIVATE}/-/members"):
        answer = browser.post(path, {"user": "eve", "role": "admin"}, headers=headers)
        assert (answer.status_code, "other_site" in answer.text) == (403, True), path
    assert browser.open("/account").status_code == 200
    assert "eve" not in house.ask("admin", "GET", f"/v1/namespaces/{PRIVATE}/members").json()["members"]


def test_a_form_without_the_token_of_its_session_changes_nothing(house: House, browser: Browser) -> None:
    with Browser(house) as other:
        other.sign_in(house.secrets["admin"])
        foreign = other.loaded.split('name="form_token" value="')[1][:64]
    browser.sign_in(house.secrets["admin"])
    member = {"user": "eve", "role": "admin"}
    for token in ("", "0" * 64, foreign, browser.cookies[COOKIE], "\u00e9"):
        answer = browser.post(f"/{PRIVATE}/-/members", {**member, "form_token": token})
        assert (answer.status_code, "form_token" in answer.text) == (403, True), token
    header = {"Origin": ORIGIN, "Content-Type": "text/plain"}
    plain = browser.http.post("/logout", content=b"form_token=x", headers=header)
    assert plain.status_code == 422
    long = browser.http.post("/logout", content=b"a=" + b"x" * 70_000, headers={**header})
    assert long.status_code == 413
    assert browser.post(f"/{PRIVATE}/-/members", member).status_code == 303
    assert browser.post(f"/{PRIVATE}/-/members", {"user": "eve", "role": ""}).status_code == 303


@pytest.mark.parametrize(
    ("asked", "led_to"),
    [
        ("/acme/sql?cursor=x#files", "/acme/sql?cursor=x#files"),
        ("", "/"),
        ("acme", "/"),
        ("https://evil.example/", "/"),
        ("//evil.example", "/"),
        ("///evil.example", "/"),
        ("/\\evil.example", "/"),
        ("\\\\evil.example", "/"),
        ("/\t/evil.example", "/"),
        (" //evil.example", "/"),
        ("/a\r\nSet-Cookie: x=y", "/"),
        ("javascript:alert(1)", "/"),
        ("//[", "/"),
        ("/\u2044evil.example", "/"),
        ("/" + "a" * 3000, "/"),
    ],
)
def test_signing_in_leads_to_a_path_of_this_server_alone(asked: str, led_to: str) -> None:
    assert own_path(asked) == led_to


def test_nobody_signs_in_by_http_but_on_this_machine(house: House) -> None:
    with Browser(house, "http://registry.example") as plain:
        page = plain.open("/login")
        assert "Signing in needs https" in page.text
        assert 'name="token"' not in page.text
        answer = plain.post("/login", {"token": house.secrets["admin"]})
        assert (answer.status_code, "sign_in_insecure" in answer.text) == (422, True)
    with Browser(house, "http://localhost:8000") as local:
        assert "Some browsers keep no session" in local.open("/login").text
        assert local.post("/login", {"token": house.secrets["admin"]}).status_code == 303


def test_guesses_are_counted_and_refusals_audited_as_far_as_a_flood_allows(house: House) -> None:
    limited = entered(house, house.environ, rate_limit="70/minute")
    before = len(audited(house, "session:refuse"))
    with Browser(limited) as browser:
        browser.open("/login")
        seen = [browser.post("/login", {"token": f"adp_{number}"}).status_code for number in range(71)]
        assert "too_many_requests" in browser.post("/login", {"token": house.secrets["reader"]}).text
    assert seen == [401] * 69 + [429] * 2
    assert limited.ask("reader", "GET", "/v1/whoami").status_code == 200, "a token counts alone"
    rows = audited(house, "session:refuse")
    assert len(rows) - before == MAX_REFUSALS
    assert (rows[-1].actor, rows[-1].detail["code"]) == ("anonymous", "token_invalid")
    assert "adp_" not in str(rows[-1].reason)
    limited.close()


def test_somebody_creates_a_token_sees_it_once_and_revokes_it(house: House, browser: Browser) -> None:
    browser.sign_in(house.secrets["releaser"])
    fields = {"name": "<b>ci</b>", "namespace": PRIVATE, "role": "reader", "expires_in_days": "2.5", "user": ""}
    made = browser.post("/account/tokens", fields)
    secret = made.text.partition("adp_")[2][:85]
    assert (made.status_code, len(secret)) == (201, 85)
    assert "no-store" in made.headers["cache-control"]
    house.secrets["made"] = f"adp_{secret}"
    assert house.ask("made", "GET", "/v1/whoami").json()["grants"] == {PRIVATE: "reader"}
    account = browser.open("/account").text
    assert secret[:12] in account
    assert "&lt;b&gt;ci&lt;/b&gt;" in account
    assert secret[13:60] not in account
    assert browser.post(f"/account/tokens/{secret[:12]}/revoke").status_code == 303
    assert house.ask("made", "GET", "/v1/whoami").status_code == 401
    for wrong in ({"expires_in_days": "x"}, {"role": "king"}, {"namespace": "NO/SUCH"}, {"expires_in_days": "-1"}):
        assert browser.post("/account/tokens", {**fields, **wrong}).status_code in (400, 422), wrong
    assert browser.post("/account/tokens", {**fields, "user": "admin"}).status_code == 403


def test_an_admin_adds_changes_and_removes_a_member_on_the_page(house: House, browser: Browser) -> None:
    browser.sign_in(house.secrets["admin"])
    members = f"/v1/namespaces/{PRIVATE}/members"
    for role in ("reader", "releaser", ""):
        browser.open(f"/{PRIVATE}/-/settings")
        answer = browser.post(f"/{PRIVATE}/-/members", {"user": "new", "role": role})
        assert (answer.status_code, answer.headers["location"]) == (303, f"/{PRIVATE}/-/settings")
        assert house.ask("admin", "GET", members).json()["members"].get("new", "") == role
    page = browser.open(f"/{PRIVATE}/-/settings").text
    assert "Add a member" in page
    for wrong in ({"user": "", "role": "reader"}, {"user": "a/b", "role": "reader"}, {"user": "x", "role": "king"}):
        assert browser.post(f"/{PRIVATE}/-/members", wrong).status_code == 422, wrong
    browser.sign_in(house.secrets["reader"])
    assert "Add a member" not in browser.open(f"/{PRIVATE}/-/settings").text
    browser.sign_in(house.secrets["operator"])
    assert browser.post("/nothing-there/-/members", {"user": "x", "role": "reader"}).status_code == 404


def post_members(http: httpx2.Client, role: str, own: dict[str, str]) -> set[int]:
    """The statuses of forms of one page, each over a connection of its own: every process answers some."""
    carried = http.get(f"/{PRIVATE}/-/settings").text.partition('name="form_token" value="')[2][:64]
    forms = [{"form_token": carried, "user": f"new{number}", "role": role} for number in range(8)]
    header = {**own, "Connection": "close"}
    return {http.post(f"/{PRIVATE}/-/members", data=form, headers=header).status_code for form in forms}


def home_of(house: House, home: Path) -> dict[str, str]:
    return {name: value for name, value in copy_of(house, home).items() if name != "ADAPTORY_HOME"}


@pytest.mark.long
def test_a_proxy_says_how_a_page_was_loaded_and_any_process_takes_its_forms(house: House, tmp_path: Path) -> None:
    """A real server with two processes, behind a proxy that speaks https with browsers."""
    house.resources.database.engine.dispose()
    environ = home_of(house, tmp_path / "home")
    tls = {"X-Forwarded-Proto": "https", "Host": "registry.example"}
    with (
        served(tmp_path / "home", "--processes", "2", **environ, **PROXIED) as (url, _, _),
        httpx2.Client(base_url=url, headers={**HTML, **tls}, timeout=30) as http,
    ):
        assert 'name="token"' in http.get("/login").text
        own = {"Origin": "https://registry.example", "Sec-Fetch-Site": "same-origin"}
        form = {"token": house.secrets["admin"], "next": f"/{PRIVATE}"}
        assert http.post("/login", data=form, headers={"Origin": "http://registry.example"}).status_code == 403
        begun = http.post("/login", data=form, headers=own)
        assert begun.status_code == 303, begun.text
        http.headers["Cookie"] = begun.headers["set-cookie"].partition(";")[0]
        assert post_members(http, "reader", own) == {303}


@pytest.mark.long
def test_any_process_of_a_server_with_one_user_takes_its_forms(house: House, tmp_path: Path) -> None:
    house.resources.database.engine.dispose()
    environ = home_of(house, tmp_path / "home")
    with (
        served(tmp_path / "home", "--processes", "2", **environ) as (url, _, _),
        httpx2.Client(base_url=url, headers=HTML, timeout=30) as http,
    ):
        assert post_members(http, "reader", {"Origin": url}) == {303}
        assert post_members(http, "reader", {"Origin": "http://localhost:9"}) == {403}
