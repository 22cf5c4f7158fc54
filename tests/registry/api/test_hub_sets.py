"""Files of a set over the hub API."""

from tests.access.house import House
from tests.registry.api.test_hub_commits import commit, file, house, named

__all__ = ["house", "named"]


def test_the_files_of_a_set_are_not_released_by_a_tag(house: House, named: str) -> None:
    commit(house, named, file("adapter_set.json", b"{}"), file("README.md", b"---\nbase_model: tiny\n---\n"))
    refused = house.ask("publisher", "POST", f"/api/models/{named}/tag/main", json={"tag": "1.0.0"})
    assert (refused.status_code, "A set is not pushed" in refused.text) == (422, True), refused.text
