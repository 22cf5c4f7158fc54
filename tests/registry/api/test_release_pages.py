"""What can be done on the pages of a repository: comparisons and the policy of a channel."""

from collections.abc import Generator

import pytest

from registry.formats.references import RepositoryName
from tests.access.browser import Browser
from tests.access.house import PRIVATE, House

NAME = RepositoryName(PRIVATE, "sql")
POLICY = f"/{NAME}@prod/policy"


@pytest.fixture
def admin(house: House) -> Generator[Browser]:
    with Browser(house) as browser:
        browser.sign_in(house.secrets["admin"])
        yield browser


def test_ticked_releases_are_compared_oldest_first(admin: Browser) -> None:
    page = admin.open(f"/{NAME}").text
    assert page.count('form="compare"') == 2
    answer = admin.http.get(f"/{NAME}/compare?with=1.1.0&with=1.0.0")
    assert answer.headers["location"] == f"/{NAME}/compare/1.0.0...1.1.0"
    for ticked in ("", "?with=1.0.0", "?with=1.0.0&with=1.0.0"):
        few = admin.open(f"/{NAME}/compare{ticked}")
        assert (few.status_code, "you ticked" in few.text) == (400, True)
    alone = admin.open(f"/{NAME}/compare/1.0.0")
    assert (alone.status_code, "two to 4" in alone.text) == (400, True)


def test_an_admin_changes_a_policy_and_no_change_of_another_is_lost(house: House, admin: Browser) -> None:
    assert f'href="{POLICY}"' in admin.open(f"/{NAME}@prod").text
    assert 'name="revision" value="0"' in admin.open(POLICY).text
    wrong = admin.post(POLICY, {"policy": "version: 1\nsoka: []\n", "revision": "0"})
    assert (wrong.status_code, "soka" in wrong.text, "Did you mean soak" in wrong.text) == (422, True, True)
    document = "version: 1\nrules:\n- exact.nll <= 9\n"
    done = admin.post(POLICY, {"policy": document, "revision": "0"})
    assert (done.status_code, done.headers["location"]) == (303, f"/{NAME}@prod")
    assert house.ask("admin", "GET", f"/v1/adapters/{NAME}/channels/prod/policy").json()["revision"] == 1
    late = admin.post(POLICY, {"policy": "version: 1\n", "revision": "0"})
    assert (late.status_code, "has changed since you looked" in late.text) == (412, True)
    kept = house.ask("admin", "GET", f"/v1/adapters/{NAME}/channels/prod/policy").json()
    assert (kept["revision"], kept["policy"]["rules"]) == (1, ["exact.nll <= 9"])
