"""Tokens: their rights and their limits."""

import hashlib
from collections.abc import Generator
from datetime import datetime, timedelta
from functools import reduce
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, text

from registry.database.engine import Row
from registry.database.tables import BlobHolder, ReleaseInput
from registry.domain.access import namespaces, tokens
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role, at_least, holds, max_role
from registry.domain.access.tokens import NewToken
from registry.domain.catalog import releases
from registry.errors import Unauthenticated
from registry.formats.references import Digest, RepositoryName, Version
from tests import services
from tests.access.house import HOST, NOW, OTHER, PRIVATE, PUBLIC, House, entered, new_house, opened


@pytest.fixture(params=services.ONE_PAIRING)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    built = new_house(request.param, tmp_path_factory.mktemp("house"))
    yield built
    built.close()


def test_the_secret_is_shown_once_and_lies_nowhere(house: House) -> None:
    made = house.ask("publisher", "POST", "/v1/tokens", json={"name": "ci"})
    assert made.status_code == 201
    assert made.headers["Cache-Control"] == "no-store"
    secret = made.json()["token"]
    listed = house.ask("publisher", "GET", "/v1/tokens").json()["items"]
    assert {row["name"] for row in listed} == {"publisher", "ci"}
    assert secret not in str(listed)
    with house.resources.read() as session:
        rows = [row for table in Row.metadata.sorted_tables for row in session.execute(select(table))]
    assert rows
    assert not any(secret[17:60] in str(row) for row in rows)
    house.resources.database.engine.dispose()
    assert all(
        secret[17:60].encode() not in path.read_bytes()
        for path in house.resources.settings.home_directory.glob("registry.db*")
    )


def test_a_revoked_token_ends_at_once_and_every_other_one_goes_on(house: House) -> None:
    assert house.ask("publisher", "GET", "/v1/whoami").status_code == 200
    assert house.ask("publisher", "DELETE", f"/v1/tokens/{house.ids['publisher']}").status_code == 200
    assert house.ask("publisher", "GET", "/v1/whoami").json()["code"] == "token_invalid"
    assert house.ask("reader", "GET", "/v1/whoami").status_code == 200


def test_nobody_revokes_the_token_of_another_but_an_admin_of_the_registry(house: House) -> None:
    path = f"/v1/tokens/{house.ids['reader']}"
    assert house.ask("admin", "DELETE", path).status_code == 404
    assert house.ask("operator", "DELETE", path).status_code == 200


@pytest.mark.parametrize(
    "spoil", [lambda s: s[:-1], lambda s: s[:-1] + "x", lambda s: s.upper(), lambda s: s + "0", lambda _: "x"]
)
def test_a_mistyped_token_is_refused_without_a_look_at_the_database(house: House, spoil: object) -> None:
    house.secrets["typo"] = spoil(house.secrets["reader"])  # type: ignore[operator]
    answer = house.ask("typo", "GET", "/v1/whoami")
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert "mistyped" in answer.json()["detail"]


def test_a_token_with_the_right_id_and_another_secret_is_refused(house: House) -> None:
    import zlib

    body = house.secrets["reader"][:17] + "0" * 64
    house.secrets["forged"] = f"{body}{zlib.crc32(body.encode()):08x}"
    assert "unknown" in house.ask("forged", "GET", "/v1/whoami").json()["detail"]


def test_who_loses_a_role_loses_it_with_every_token(house: House) -> None:
    assert house.ask("releaser", "GET", f"/v1/adapters/{PRIVATE}/sql").status_code == 200
    gone = house.ask("admin", "PUT", f"/v1/namespaces/{PRIVATE}/members", json={"user": "releaser", "role": None})
    assert gone.status_code == 200
    assert house.ask("releaser", "GET", f"/v1/adapters/{PRIVATE}/sql").status_code == 404


def test_a_narrowed_token_makes_no_other(house: House) -> None:
    made = house.ask("publisher", "POST", "/v1/tokens", json={"scope": {PRIVATE: "publisher"}})
    house.secrets["weak"] = made.json()["token"]
    assert house.ask("weak", "GET", "/v1/whoami").status_code == 200
    assert house.ask("weak", "POST", "/v1/tokens", json={}).status_code == 403


def _days(made: dict[str, str]) -> float:
    return (datetime.fromisoformat(made["expires_at"]) - datetime.fromisoformat(made["created_at"])) / timedelta(days=1)


def test_a_token_has_a_default_lifetime_and_a_maximum_and_old_ones_keep_theirs(house: House) -> None:
    assert house.ask("publisher", "GET", "/v1/tokens").json()["items"][0]["expires_at"] is None, "made before"
    assert _days(house.ask("publisher", "POST", "/v1/tokens", json={}).json()) == 90
    assert _days(house.ask("publisher", "POST", "/v1/tokens", json={"expires_in_days": 366}).json()) == 366
    for caller in ("publisher", "operator"):
        refused = house.ask(caller, "POST", "/v1/tokens", json={"expires_in_days": 367})
        assert (refused.status_code, refused.json()["code"]) == (422, "token_too_long")
        assert "ADAPTORY_MAX_TOKEN_DAYS" in refused.json()["next"]
    short = entered(house, house.environ, token_days=7, max_token_days=3)
    assert _days(short.ask("publisher", "POST", "/v1/tokens", json={}).json()) == 3, "the maximum wins"
    short.close()
    house.close()


def test_a_token_makes_none_that_outlives_it_unless_its_user_is_an_admin_of_the_registry(house: House) -> None:
    for user, longest in (("publisher", 1.0), ("operator", 90.0)):
        made = house.ask(user, "POST", "/v1/tokens", json={"expires_in_days": 1})
        house.secrets["day"] = made.json()["token"]
        assert _days(house.ask("day", "POST", "/v1/tokens", json={}).json()) == pytest.approx(longest, abs=0.01)
        longer = house.ask("day", "POST", "/v1/tokens", json={"expires_in_days": 2})
        assert (longer.status_code, longer.json().get("code")) == (
            (403, "token_not_allowed") if user == "publisher" else (201, None)
        )


def test_an_admin_of_everything_but_one_namespace_neither_reads_its_audit_log_nor_sets_its_quota(house: House) -> None:
    scope = {EVERYWHERE: "admin", PRIVATE: "reader"}
    house.secrets["spared"] = house.ask("operator", "POST", "/v1/tokens", json={"scope": scope}).json()["token"]
    rows = house.ask("operator", "GET", "/v1/audit", params={"limit": 500}).json()["items"]
    seen = house.ask("spared", "GET", "/v1/audit", params={"limit": 500}).json()["items"]
    assert {row["id"] for row in rows if row["namespace"] != PRIVATE} <= {row["id"] for row in seen}
    assert PRIVATE in {row["namespace"] for row in rows}
    assert PRIVATE not in {row["namespace"] for row in seen}
    assert house.ask("spared", "GET", "/v1/audit", params={"namespace": PRIVATE}).json()["items"] == []
    quota = {"max_bytes": 1, "max_releases": 1}
    refused = house.ask("spared", "PUT", f"/v1/namespaces/{PRIVATE}/quota", json=quota)
    assert (refused.status_code, refused.json()["code"]) == (403, "scope_too_narrow")
    assert house.ask("spared", "PUT", f"/v1/namespaces/{OTHER}/quota", json=quota).status_code == 200
    assert house.ask("spared", "GET", f"/v1/namespaces/{PRIVATE}/usage").status_code == 200, "it may read"
    for method, path, body in (
        ("PUT", "/v1/namespaces/*/members", {"user": "stranger", "role": "admin"}),
        ("PUT", "/v1/users/publisher/person", {"subject": "mallory", "issuer": "https://login.example"}),
        ("DELETE", "/v1/users/publisher", None),
    ):
        refused = house.ask("spared", method, path, json=body)
        assert (refused.status_code, refused.json()["code"]) == (403, "scope_too_narrow"), "its effect is also there"
    member = {"user": "new", "role": "reader"}
    assert house.ask("operator", "PUT", "/v1/namespaces/*/members", json=member).status_code == 200
    listed = {row["id"] for row in house.ask("spared", "GET", "/v1/jobs").json()["items"]}
    assert house.things[PRIVATE].job_id not in listed
    assert house.things[OTHER].job_id in listed


def test_a_new_namespace_has_the_quota_of_the_setting_until_an_admin_removes_it(house: House) -> None:
    file = {"path": "weights.safetensors", "size_bytes": 11, "sha256": "2" * 64}
    for setting, first in ((10, 422), (0, 200)):
        name = f"new{setting}"
        limited = entered(house, house.environ, namespace_bytes=setting)
        assert limited.ask("operator", "PUT", f"/v1/namespaces/{name}", json={}).status_code == 200
        assert limited.ask("operator", "GET", f"/v1/namespaces/{name}/usage").json()["max_bytes"] == (setting or None)
        sent = {"namespace": name, "files": [file]}
        assert limited.ask("operator", "POST", "/v1/uploads", json=sent).status_code == first
        unlimited = {"max_bytes": None, "max_releases": None}
        assert limited.ask("operator", "PUT", f"/v1/namespaces/{name}/quota", json=unlimited).status_code == 200
        assert limited.ask("operator", "POST", "/v1/uploads", json=sent).status_code == 200
        limited.close()
    member = {"user": "reader", "role": "reader"}
    assert house.ask("operator", "PUT", "/v1/namespaces/granted/members", json=member).status_code == 200
    assert house.ask("operator", "GET", "/v1/namespaces/granted/usage").json()["max_bytes"] == 2**40
    house.close()


def test_what_a_public_namespace_holds_is_not_for_anonymous_callers(house: House) -> None:
    path = f"/v1/namespaces/{PUBLIC}/usage"
    assert house.ask("nobody", "GET", f"/v1/namespaces/{PUBLIC}").status_code == 200
    assert house.ask("nobody", "GET", path).json()["code"] == "token_missing"
    assert house.ask("reader", "GET", path).status_code == 200


def test_a_search_does_not_tell_who_has_no_role_which_suites_there_are(house: House) -> None:
    for name in ("exact", "nothing"):
        for asked in ({"sort": f"{name}.odd"}, {"score": f"{name}.odd>=0"}):
            answer = house.ask("nobody", "GET", "/v1/releases", params=asked)
            assert (answer.status_code, answer.json()) == (200, {"items": [], "next": None}), asked
        assert house.ask("reader", "GET", "/v1/releases", params={"sort": f"{name}.odd"}).status_code == 404


def test_a_token_that_lasts_no_time_at_all_has_expired(house: House) -> None:
    made = house.ask("operator", "POST", "/v1/tokens", json={"expires_in_days": 5e-324}).json()
    house.secrets["gone"] = made["token"]
    assert made["expires_at"] == made["created_at"]
    assert house.ask("gone", "GET", "/v1/whoami").status_code == 401


@pytest.mark.parametrize("user", ["publisher", "operator"])
def test_a_narrowed_token_sees_and_revokes_itself_alone(house: House, user: str) -> None:
    made = house.ask(user, "POST", "/v1/tokens", json={"name": "ci", "scope": {PRIVATE: "reader"}}).json()
    house.secrets["weak"] = made["token"]
    assert [row["id"] for row in house.ask("weak", "GET", "/v1/tokens").json()["items"]] == [made["id"]]
    for other in (user, "reader"):
        refused = house.ask("weak", "DELETE", f"/v1/tokens/{house.ids[other]}")
        assert (refused.status_code, refused.json()["code"]) == (404, "token_unknown")
        assert "can revoke only itself" in refused.json()["next"]
        assert house.ask(other, "GET", "/v1/whoami").status_code == 200
    assert {user, "ci"} <= {row["name"] for row in house.ask(user, "GET", "/v1/tokens").json()["items"]}
    assert house.ask("weak", "DELETE", f"/v1/tokens/{made['id']}").status_code == 200
    assert house.ask("weak", "GET", "/v1/whoami").status_code == 401


def test_a_token_tells_its_user_alone_which_namespaces_its_scope_leaves_out(house: House) -> None:
    made = house.ask("publisher", "POST", "/v1/tokens", json={"scope": {PUBLIC: "reader"}}).json()
    house.secrets["weak"] = made["token"]
    problem = house.ask("weak", "GET", f"/v1/adapters/{PRIVATE}/sql").json()
    assert problem["status"] == 404
    assert (
        problem["detail"]
        == f"This token's scope excludes the namespace {PRIVATE}, where publisher has the role publisher."
    )
    assert problem["next"].endswith(f"Use a token whose scope includes {PRIVATE}=reader.")
    who = house.ask("weak", "GET", "/v1/whoami").json()
    assert (who["grants"], who["limited"]) == ({PUBLIC: "reader"}, {PUBLIC: "publisher", PRIVATE: "publisher"})
    for caller, namespace in (("weak", OTHER), ("weak", "ghost"), ("stranger", PRIVATE)):
        problem = house.ask(caller, "GET", f"/v1/adapters/{namespace}/sql").json()
        assert (problem["status"], problem["detail"]) == (
            404,
            f"Namespace {namespace} does not exist, or you have no access to it.",
        )


def test_an_unknown_repository_is_answered_with_near_ones_of_what_the_caller_may_read(house: House) -> None:
    for path, near in ((f"/v1/adapters/{PRIVATE}x/sql", PRIVATE), (f"/v1/resolve?ref={PRIVATE}/sqll@prod", PRIVATE)):
        for caller in ("reader", "operator"):
            assert f"{near}/sql" in house.ask(caller, "GET", path).json()["next"]
        for caller in ("nobody", "stranger", "narrowed"):
            problem = house.ask(caller, "GET", path).json()
            assert f"{near}/" not in problem["next"], "though it is near"
    assert f"Did you mean {OTHER}/sql" in house.ask("stranger", "GET", "/v1/adapters/othr/sql").json()["next"]


def test_a_whole_token_revokes_the_narrowed_ones_of_its_user(house: House) -> None:
    made = house.ask("publisher", "POST", "/v1/tokens", json={"scope": {PRIVATE: "reader"}}).json()
    assert house.ask("publisher", "DELETE", f"/v1/tokens/{made['id']}").status_code == 200


def test_only_an_admin_of_the_registry_makes_a_token_for_another(house: House) -> None:
    assert house.ask("admin", "POST", "/v1/tokens", json={"user": "operator"}).status_code == 403
    made = house.ask("operator", "POST", "/v1/tokens", json={"user": "reader"}).json()
    house.secrets["given"] = made["token"]
    assert house.ask("given", "GET", "/v1/whoami").json()["grants"] == {"acme": "reader", "open": "reader"}


def test_a_server_that_remembers_tokens_forgets_what_changes_through_it(
    house: House,
) -> None:
    remembering = entered(house, house.environ, access_cache_s=300)
    for caller in ("reader", "nobody"):
        assert remembering.ask(caller, "GET", "/v1/adapters/open/sql").status_code == 200
    remembering.ask("operator", "PUT", "/v1/namespaces/open", json={"public": False})
    assert remembering.ask("nobody", "GET", "/v1/adapters/open/sql").status_code == 404
    remembering.ask("operator", "DELETE", f"/v1/tokens/{house.ids['reader']}")
    assert remembering.ask("reader", "GET", "/v1/adapters/open/sql").status_code == 401
    remembering.close()
    house.close()


def test_a_token_that_another_server_revoked_changes_nothing_even_while_it_is_remembered(house: House) -> None:
    remembering = entered(house, house.environ, access_cache_s=300)
    assert remembering.ask("publisher", "GET", "/v1/whoami").status_code == 200
    assert house.ask("operator", "DELETE", "/v1/users/publisher").status_code == 200
    assert remembering.ask("publisher", "GET", "/v1/whoami").status_code == 200, "for ADAPTORY_ACCESS_CACHE_S"
    begun = remembering.ask("publisher", "GET", f"/api/models/{PRIVATE}/sql/xet-write-token/main")
    assert begun.status_code == 401, "a GET that begins an upload"
    suite = {"name": "late", "examples": [{"prompt": "a", "completion": "b"}]}
    assert remembering.ask("publisher", "POST", "/v1/suites", json=suite).status_code == 401
    assert remembering.ask("publisher", "GET", "/v1/whoami").status_code == 401, "noticed, it is forgotten"
    rows = house.ask("operator", "GET", "/v1/audit", params={"by": "publisher"}).json()["items"]
    assert rows == [], "nor is the name back"
    remembering.close()
    house.close()


@pytest.mark.parametrize("ending", ["token", "role", "user"])
def test_a_commit_whose_body_took_longer_than_its_token_or_role_is_not_made(house: House, ending: str) -> None:
    path = f"/api/models/{PRIVATE}/sql"
    before = house.ask("operator", "GET", f"{path}/revision/main").json()["sha"]

    def lines() -> Generator[bytes]:
        yield b'{"key": "header", "value": {"summary": "slow"}}\n'
        if ending == "token":
            ended = house.ask("operator", "DELETE", f"/v1/tokens/{house.ids['publisher']}")
        elif ending == "role":
            member = {"user": "publisher", "role": None}
            ended = house.ask("operator", "PUT", f"/v1/namespaces/{PRIVATE}/members", json=member)
        else:
            ended = house.ask("operator", "DELETE", "/v1/users/publisher")
        assert ended.status_code == 200
        yield b'{"key": "file", "value": {"path": "late.txt", "encoding": "base64", "content": "bGF0ZQ=="}}\n'

    sent = house.ask("publisher", "POST", f"{path}/commit/main", content=lines(), headers={"Content-Length": "139"})
    assert sent.status_code == (404 if ending == "role" else 401)
    assert house.ask("operator", "GET", f"{path}/revision/main").json()["sha"] == before


@pytest.mark.parametrize("house", services.PAIRINGS[:1], indirect=True)
@pytest.mark.parametrize("ending", ["token", "role"])
@pytest.mark.parametrize("way", ["rest", "lfs"])
def test_a_file_whose_body_took_longer_than_its_token_or_role_is_not_stored(
    house: House, way: str, ending: str
) -> None:
    content = b"weights that come slowly"
    sha256 = hashlib.sha256(content).hexdigest()
    if way == "rest":
        row = {"path": "w.dat", "size_bytes": len(content), "sha256": sha256}
        plan = house.ask("publisher", "POST", "/v1/uploads", json={"namespace": PRIVATE, "files": [row]}).json()
        sender, url = "publisher", plan["files"][0]["put"]["url"]
    else:
        batch = {"operation": "upload", "objects": [{"oid": sha256, "size": len(content)}]}
        plan = house.ask("publisher", "POST", f"/{PRIVATE}/sql.git/info/lfs/objects/batch", json=batch).json()
        sender, url = "nobody", plan["objects"][0]["actions"]["upload"]["href"]

    def slow() -> Generator[bytes]:
        yield content[:3]
        if ending == "token":
            ended = house.ask("operator", "DELETE", f"/v1/tokens/{house.ids['publisher']}")
        else:
            member = {"user": "publisher", "role": "reader"}
            ended = house.ask("operator", "PUT", f"/v1/namespaces/{PRIVATE}/members", json=member)
        assert ended.status_code == 200
        yield content[3:]

    sent = house.ask(sender, "PUT", url, content=slow(), headers={"Content-Length": str(len(content))})
    assert sent.status_code == (404 if ending == "token" else 403)
    with house.resources.read() as session:
        assert session.get(BlobHolder, (sha256, PRIVATE)) is None
    assert house.resources.store.stat(Digest(sha256)) is None


NAMESPACES = st.sampled_from(["acme", "open", EVERYWHERE])
ROLE = st.sampled_from(list(Role))


@given(roles=st.dictionaries(NAMESPACES, ROLE), scope=st.dictionaries(NAMESPACES, ROLE, min_size=1))
def test_a_token_never_has_more_than_its_user_nor_more_than_its_scope(
    roles: dict[str, Role], scope: dict[str, Role]
) -> None:
    caller = tokens.effective_grants(
        {name: role.value for name, role in roles.items()}, {name: role.value for name, role in scope.items()}
    )
    acting = Actor("mia", NOW, caller)
    actor = Actor("mia", NOW, {name: role.value for name, role in roles.items()})
    for namespace in ("acme", "open", "elsewhere"):
        for role in Role:
            if holds(acting, role, namespace):
                own = [roles[name] for name in (namespace, EVERYWHERE) if name in roles]
                assert at_least(reduce(max_role, own), role), (actor, acting)
                limit = scope.get(namespace, scope.get(EVERYWHERE))
                assert limit is not None
                assert limit is Role.ADMIN or at_least(limit, role)


def test_an_expired_token_is_refused_from_that_moment_on(pairing: dict[str, str], tmp_path: Path) -> None:
    resources = opened({"ADAPTORY_HOME": str(tmp_path), **pairing})
    with resources.write() as session:
        namespaces.set_member(session, HOST, EVERYWHERE, "mia", Role.READER)
        _, secret = tokens.create(session, HOST, NewToken("mia", "", {EVERYWHERE: Role.ADMIN}, timedelta(days=1)))
    with resources.read() as session:
        before = tokens.authenticate(session, secret, NOW + timedelta(days=1) - timedelta(seconds=1))
        assert before.grants == {EVERYWHERE: "reader"}
        with pytest.raises(Unauthenticated, match="expired"):
            tokens.authenticate(session, secret, NOW + timedelta(days=1))
        assert session.scalar(text("SELECT count(*) FROM audit WHERE act = 'token:create'")) == 1
    resources.close()


def test_a_publisher_cannot_let_a_breaking_change_through(house: House) -> None:
    file = {"path": "weights.safetensors", "size_bytes": 1, "sha256": "2" * 64}
    body = {"version": "1.2.0", "base": "tiny", "files": [file], "allow_breaking": "in a hurry"}
    path = f"/v1/adapters/{PRIVATE}/sql/releases"
    assert house.ask("publisher", "POST", path, json=body).json()["code"] == "role_missing"
    assert house.ask("releaser", "POST", path, json=body).json()["code"] == "blob_missing"


def test_nobody_plans_work_for_the_workers_without_being_a_publisher(house: House) -> None:
    recipe = {"base": "tiny", "inputs": [{"adapter": "open/sql:1.0.0"}], "method": "stack"}
    body = {"recipe": recipe, "plan": True}
    for caller, status in {"nobody": 401, "reader": 403, "publisher": 202}.items():
        assert house.ask(caller, "POST", "/v1/compositions", json=body).status_code == status
    answer = [house.ask("publisher", "POST", "/v1/compositions", json=body) for _ in range(150)][-1]
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_jobs")


def test_who_did_not_register_a_base_changes_neither_its_scores_nor_what_it_was_made_from(house: House) -> None:
    suite = house.ask("stranger", "GET", "/v1/suites/exact").json()["digest"]
    score = {"suite_digest": suite, "metric": "nll", "value": 1e9, "n": 1, "higher_is_better": False}
    answer = house.ask("stranger", "POST", "/v1/bases/tiny/scores", json={"scores": [score]})
    assert (answer.status_code, answer.json()["code"]) == (403, "not_yours")
    assert house.ask("operator", "POST", "/v1/bases/tiny/scores", json={"scores": [score]}).status_code == 200


def test_the_inputs_of_a_public_release_keep_the_names_of_what_is_private(house: House) -> None:
    with house.resources.write() as session:
        public, private = (
            releases.find(session, RepositoryName(namespace, "sql"), Version(1, 0, 0)) for namespace in ("open", "acme")
        )
        session.add(ReleaseInput(release_id=public.id, input_id=private.id, composition_id=None, weight=0.5))
    path = "/v1/adapters/open/sql/releases/1.0.0"
    (hidden,) = house.ask("nobody", "GET", path).json()["inputs"]
    (seen,) = house.ask("reader", "GET", path).json()["inputs"]
    assert (hidden["repository"], hidden["version"], hidden["weight"]) == (None, None, 0.5)
    assert (seen["repository"], seen["version"]) == ("acme/sql", "1.0.0")
    assert "acme" in house.ask("reader", "GET", "/v1/releases?namespace=open").text
    assert "acme" not in house.ask("nobody", "GET", "/v1/releases").text
