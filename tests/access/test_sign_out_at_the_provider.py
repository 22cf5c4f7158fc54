"""Who signs out at the OpenID provider has no session here any more; a user is shown with what is in force."""

import time
import uuid

import httpx2
import pytest

from registry.transfer.openid import LOGOUT
from tests.access.browser import Browser
from tests.access.house import PRIVATE, PUBLIC, House
from tests.access.issuer import key_of, signed
from tests.access.provider import CLIENT, Provider
from tests.access.test_openid_sign_in import audited, begin, browser, house, idp, running

__all__ = ["browser", "house", "idp", "running"]


def logout_token(idp: Provider, **claims: object) -> str:
    now = int(time.time())
    made = {
        "iss": idp.url, "aud": CLIENT, "sub": "4711", "iat": now, "exp": now + 120, "jti": uuid.uuid4().hex,
        "events": {LOGOUT: {}},
    }  # fmt: skip
    kept = {name: value for name, value in (made | claims).items() if value is not None}
    return signed(kept, key=key_of(idp.key))


def log_out(house: House, text: str) -> httpx2.Response:
    return house.ask("nobody", "POST", "/v1/sign-in/logout", data={"logout_token": text})


def test_who_signs_out_at_the_provider_has_no_session_here_any_more(
    house: House, browser: Browser, idp: Provider
) -> None:
    browser.open(begin(browser))
    assert browser.open("/account").status_code == 200
    with Browser(house) as other:
        other.sign_in(house.secrets["admin"])
        text, before = logout_token(idp), len(audited(house, "session:end"))
        answer = log_out(house, text)
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store"), answer.text
        assert browser.open("/account").status_code == 401
        assert other.open("/account").status_code == 200, "somebody else's session goes on"
    ended = audited(house, "session:end")[before:]
    assert {row.actor for row in ended} == {"ann"}
    browser.open(begin(browser))
    assert log_out(house, text).status_code == 400, "a token counts once"
    assert browser.open("/account").status_code == 200


@pytest.mark.parametrize(
    "claims",
    [
        {"events": None}, {"events": {}}, {"events": {LOGOUT: None}}, {"nonce": "x"}, {"sub": None}, {"aud": "other"},
        {"iss": "https://evil.example"}, {"exp": 1}, {"jti": 4},
    ],
    ids=str,
)  # fmt: skip
def test_other_tokens_end_no_session(house: House, browser: Browser, idp: Provider, claims: dict[str, object]) -> None:
    browser.open(begin(browser))
    refused = log_out(house, logout_token(idp, **claims))
    assert (refused.status_code, refused.json()["code"]) == (400, "logout_refused"), refused.text
    assert browser.open("/account").status_code == 200
    assert log_out(house, "").status_code == 400


def test_a_user_is_shown_with_the_sources_of_the_roles_and_what_is_in_force(house: House, browser: Browser) -> None:
    browser.open(begin(browser))
    shown = house.ask("operator", "GET", "/v1/users/ann").json()
    assert shown["person"]["subject"] == "4711"
    assert {(row["namespace"], row["role"], row["source"]) for row in shown["roles"]} >= {
        (PUBLIC, "releaser", "grant"),
        (PRIVATE, "publisher", "provider"),
    }
    assert {row["session"] for row in shown["tokens"]} == {True}
    assert house.ask("operator", "GET", "/v1/users/ghost").status_code == 404
    assert house.ask("admin", "GET", "/v1/users/ann").status_code == 403
