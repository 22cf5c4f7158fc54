"""Actions on the pages of a repository: comparisons, the policy of a channel, and waiting promotions."""

import re
from collections.abc import Generator

import pytest

from registry.api.pages.catalog.compare import score_rows
from registry.formats.references import RepositoryName
from registry.wire.catalog import ReleaseOut
from registry.wire.quality import ScoreOut
from tests.access.browser import Browser
from tests.access.house import PRIVATE, House

NAME = RepositoryName(PRIVATE, "sql")
POLICY = f"/{NAME}@prod/policy"


@pytest.fixture
def admin(house: House) -> Generator[Browser]:
    with Browser(house) as browser:
        browser.sign_in(house.secrets["admin"])
        yield browser


def test_selected_releases_are_compared_oldest_first(admin: Browser) -> None:
    page = admin.open(f"/{NAME}").text
    assert page.count('form="compare"') == 2
    answer = admin.http.get(f"/{NAME}/compare?with=1.1.0&with=1.0.0")
    assert answer.headers["location"] == f"/{NAME}/compare/1.0.0...1.1.0"
    for selected in ("", "?with=1.0.0", "?with=1.0.0&with=1.0.0"):
        few = admin.open(f"/{NAME}/compare{selected}")
        assert (few.status_code, "you selected" in few.text) == (400, True)
    alone = admin.open(f"/{NAME}/compare/1.0.0")
    assert (alone.status_code, "two to 4" in alone.text) == (400, True)


def test_compared_scores_have_the_own_suite_first_as_the_release_lists_them() -> None:
    own, guard = (
        ScoreOut.model_construct(
            suite=name,
            suite_digest=name,
            metric="nll",
            value=1.0,
            stderr=0.1,
            n=8,
            higher_is_better=False,
        )
        for name in ("sql", "guard")
    )
    for columns in ([[own, guard], [guard]], [[guard], [own, guard]]):
        rows = score_rows([ReleaseOut.model_construct(scores=column) for column in columns])
        assert [name for name, _ in rows] == ["sql.nll", "guard.nll"]


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


def test_a_promotion_that_its_rules_refuse_does_not_say_that_clients_get_it(house: House, admin: Browser) -> None:
    rules = {"channel": "strict", "rules": ["exact.nll <= 0.0000001"]}
    assert house.ask("admin", "PUT", f"/v1/adapters/{NAME}/gates", json=rules).status_code == 200
    page = admin.open(f"/{NAME}@strict/promote?version=1.0.0").text
    assert "Some rules of strict fail." in page
    assert "only if you force the promotion" in page
    assert "from their next pull" not in page


def test_a_channel_has_a_page_before_its_first_promotion(house: House, admin: Browser) -> None:
    page = f"/{NAME}@early"
    assert admin.open(page).status_code == 404
    assert admin.open(f"{page}/policy").status_code == 200
    document = "version: 1\napproval: {role: releaser, count: 1}\n"
    done = admin.post(f"{page}/policy", {"policy": document, "revision": "0"})
    assert done.headers["location"] == page
    shown = admin.open(page)
    assert (shown.status_code, "early serves nothing yet." in shown.text) == (200, True)
    as_json = admin.http.get(page, headers={"accept": "application/json"})
    assert as_json.headers["location"] == f"/v1/adapters/{NAME}/channels/early/policy"

    ready = admin.open(f"{page}/promote?version=1.0.0").text
    assert "Clients get 1.0.0 once the promotion is made." in ready
    assert admin.post(f"{page}/promote", {"version": "1.0.0", "expected": "0"}).headers["location"] == page
    waits = admin.open(page).text
    assert ("1.0.0 waits to be promoted" in waits, f"{page}/approve" in waits) == (True, False)
    assert "1.0.0 waits to be promoted to early." in admin.open(f"{page}/promote?version=1.1.0").text


def await_approval(admin: Browser, channel: str) -> str:
    """Lets 1.0.0 wait for an approval; returns the page of the channel."""
    page, document = f"/{NAME}@{channel}", "version: 1\napproval: {role: releaser, count: 1}\n"
    assert admin.post(f"{page}/policy", {"policy": document, "revision": "0"}).status_code == 303
    assert admin.post(f"{page}/promote", {"version": "1.0.0", "expected": "0"}).status_code == 303
    return page


def number_in(page: str) -> str:
    [number] = re.findall(r'name="promotion" value="(\d+)"', page)
    return number


def test_another_person_approves_a_promotion_that_waits(house: House, admin: Browser) -> None:
    page = await_approval(admin, "reviewed")
    own = admin.post(f"{page}/approve", {"promotion": number_in(admin.open(f"{page}/approve").text)})
    assert (own.status_code, "someone else must approve it" in own.text) == (403, True)
    with Browser(house) as other:
        other.sign_in(house.secrets["publisher"])
        assert f"{page}/approve" not in other.open(page).text
        lower = other.post(f"{page}/approve", {"promotion": number_in(other.open(f"{page}/approve").text)})
        assert (lower.status_code, "does not have the role releaser" in lower.text) == (403, True)
    with Browser(house) as other:
        other.sign_in(house.secrets["releaser"])
        assert f'href="{page}/approve"' in other.open(page).text
        fields = {"promotion": number_in(other.open(f"{page}/approve").text), "reason": "I have tried it"}
        assert other.post(f"{page}/approve", fields).headers["location"] == page
        assert "reviewed serves 1.0.0." in other.open(page).text
        other.open("/account")
        late = other.post(f"{page}/approve", fields)
        assert (late.status_code, "is already completed" in late.text) == (409, True)


def test_a_releaser_cancels_a_promotion_that_waits_and_never_a_newer_one(house: House, admin: Browser) -> None:
    page = await_approval(admin, "dropped")
    older = number_in(admin.open(f"{page}/cancel").text)
    admin.post(f"{page}/promote", {"version": "1.1.0", "expected": "0"})
    late = admin.post(f"{page}/cancel", {"promotion": older})
    assert (late.status_code, "is already replaced" in late.text) == (409, True)
    assert admin.post(f"{page}/cancel", {"promotion": number_in(late.text)}).headers["location"] == page
    assert "waits to be promoted" not in admin.open(page).text
    assert "No promotion waits for dropped." in admin.open(f"{page}/cancel").text
    listed = house.ask("admin", "GET", f"/v1/adapters/{NAME}/channels/dropped/promotions").json()["items"]
    assert [promotion["state"] for promotion in listed] == ["cancelled", "replaced"]
