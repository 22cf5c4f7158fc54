"""A user's name is removed; the record of the user's acts stays."""

from collections.abc import Generator

import pytest
from sqlalchemy import String, select

from registry.database.engine import Row
from registry.domain.access.users import ENDED, PSEUDONYM, RENAMED
from tests import services
from tests.access.house import PRIVATE, House, new_house


@pytest.fixture(params=services.ONE_PAIRING)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    built = new_house(request.param, tmp_path_factory.mktemp("house"))
    yield built
    built.close()


def test_every_column_with_a_user_is_listed() -> None:
    named = {
        (table.name, column.name)
        for table in Row.metadata.sorted_tables
        for column in table.columns
        if isinstance(column.type, String) and column.type.length == 128
    }
    assert named == {(table.__tablename__, name) for table, name in (*RENAMED, *ENDED)}


def test_a_removed_user_is_nowhere_in_the_database_and_every_act_stays(house: House) -> None:
    granted = {"user": "pia", "role": "releaser"}
    assert house.ask("operator", "PUT", f"/v1/namespaces/{PRIVATE}/members", json=granted).status_code == 200
    made = house.ask("operator", "POST", "/v1/tokens", json={"user": "pia", "name": "pia's laptop"})
    house.secrets["pia"] = made.json()["token"]
    path = f"/v1/adapters/{PRIVATE}/sql/releases/1.0.0"
    assert house.ask("pia", "POST", f"{path}/yank", json={"reason": "wrong"}).status_code == 200
    before = len(house.ask("operator", "GET", "/v1/audit", params={"limit": 500}).json()["items"])
    removed = house.ask("operator", "DELETE", "/v1/users/pia").json()
    assert removed["user"].startswith(PSEUDONYM)
    with house.resources.read() as session:
        rows = [str(row) for table in Row.metadata.sorted_tables for row in session.execute(select(table))]
    assert rows
    assert [row for row in rows if "pia" in row] == []
    assert house.ask("pia", "GET", "/v1/whoami").json()["code"] == "token_invalid"
    acts = house.ask("operator", "GET", "/v1/audit", params={"limit": 500}).json()["items"]
    assert len(acts) == before + 1
    yanked = next(row for row in acts if row["act"] == "release:yank")
    assert (yanked["actor"], yanked["reason"], yanked["source"]) == (removed["user"], "wrong", None)


def test_nobody_removes_the_own_name_or_one_that_nothing_has(house: House) -> None:
    assert house.ask("operator", "DELETE", "/v1/users/operator").json()["code"] == "own_name"
    assert house.ask("operator", "DELETE", "/v1/users/stranger%20").json()["code"] == "user_unknown"
    assert house.ask("admin", "DELETE", "/v1/users/reader").status_code == 403
