"""Addresses for uploads by LFS carry a permission: who cannot forge one, and when it ends."""

import hashlib
import hmac
from collections.abc import Generator
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest

from registry.database.tables import BlobHolder
from tests import services
from tests.access.house import House, new_house
from tests.registry.api.test_hub_commits import announce, send


@pytest.fixture(scope="module", params=services.PAIRINGS)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    house = new_house(request.param, tmp_path_factory.mktemp("house"))
    yield house
    house.close()


def test_an_address_is_not_made_of_what_its_user_knows_and_ends_with_the_token(house: House) -> None:
    made = house.ask("operator", "POST", "/v1/tokens", json={"user": "publisher"}).json()
    house.secrets["leaving"] = made["token"]
    content = b"weights that nobody wants"
    actions = announce(house, "acme/sql", content, "leaving")
    own = next(url for url in (action["href"] for action in actions.values()) if url.startswith("http://registry/"))
    parts, row = (
        urlsplit(own),
        {"path": "w.dat", "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
    )
    plan = house.ask("leaving", "POST", "/v1/uploads", json={"namespace": "acme", "files": [row]}).json()
    upload_id, query = plan["files"][0]["upload"], dict(parse_qsl(parts.query))
    for key in (upload_id, made["id"], ""):
        forged = {**query, "expires": str(int(query["expires"]) + 86_400)}
        fields = [forged["act"], "acme", row["sha256"], forged["expires"], forged.get("multipart", ""), made["id"]]
        for length in (5, 6):
            text = "\n".join(fields[:length]).encode()
            forged["signature"] = hmac.new(key.encode(), text, "sha256").hexdigest()
            answer = send(house, "PUT", parts._replace(query=urlencode(forged)).geturl(), content)
            assert (answer.status_code, answer.json()["code"]) == (404, "upload_address_invalid")
    assert house.ask("operator", "DELETE", f"/v1/tokens/{made['id']}").status_code == 200
    for method in ("PUT", "POST"):
        assert send(house, method, own, content).status_code == 404, "revoked"
    with house.resources.read() as session:
        assert session.get(BlobHolder, (row["sha256"], "acme")) is None
