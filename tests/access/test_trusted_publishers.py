"""Jobs of continuous integration: valid ID tokens, and everything that makes a token invalid."""

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, update

from registry.api.http.threads import EXCHANGE_THREADS
from registry.database.tables import AuditRow, Token, TrustedPublisher, UsedIdToken
from registry.domain.access.audit import MAX_REFUSALS
from registry.errors import Unauthenticated, Unavailable
from registry.transfer.installation import check_installation
from registry.transfer.issuer_keys import MAX_AGE_S, MIN_INTERVAL_S, RETRY_S, IssuerKeys
from tests import services
from tests.access.house import OTHER, PRIVATE, House, entered, new_house
from tests.access.issuer import AUDIENCE, GITHUB_JOB, Issuer, issuer, key_of, signed

RULE = {
    "issuer": "github", "project": "acme/training", "ref": "refs/heads/main", "environment": "release",
    "workflow": "release.yml",
}  # fmt: skip
WORKFLOWS = "acme/training/.github/workflows"
REPOSITORY = f"{PRIVATE}/sql"
PUBLISHERS = f"/v1/publishers/{REPOSITORY}"
GRANT = {
    "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
    "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
}


@pytest.fixture(scope="module")
def ci() -> Generator[Issuer]:
    with issuer() as local:
        yield local


@pytest.fixture(scope="module", params=services.ONE_PAIRING)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ci: Issuer) -> Generator[House]:
    built = new_house(request.param, tmp_path_factory.mktemp("house"))
    built.transport.close()
    accepted = f"github:{ci.url},https://gitlab.com"
    house = entered(built, built.environ, oidc_audience=AUDIENCE, oidc_issuers=accepted)
    yield house
    house.close()
    built.resources.close()


@pytest.fixture
def rule(house: House) -> Generator[dict[str, Any]]:
    """The only rule of acme/sql."""
    made = house.ask("admin", "POST", PUBLISHERS, json=RULE)
    assert made.status_code == 201, made.text
    yield made.json()
    house.ask("admin", "DELETE", f"{PUBLISHERS}/{made.json()['id']}")


def exchange(house: House, token: str, resource: str = REPOSITORY) -> httpx2.Response:
    return house.ask("nobody", "POST", "/oauth/token", json=GRANT | {"subject_token": token, "resource": resource})


def audited(house: House, act: str) -> list[AuditRow]:
    with house.resources.read() as session:
        return list(session.scalars(select(AuditRow).where(AuditRow.act == act).order_by(AuditRow.id)))


def test_a_job_publishes_in_its_repository_and_nowhere_else(house: House, ci: Issuer, rule: dict[str, Any]) -> None:
    answer = exchange(house, ci.token())
    document = answer.json()
    assert (answer.status_code, document["token_type"], document["expires_in"]) == (200, "bearer", 3600), answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    house.secrets["job"] = document["access_token"]

    who = house.ask("job", "GET", "/v1/whoami").json()
    assert who["user"].endswith("/acme/training")
    assert who["grants"] == {PRIVATE: "reader", REPOSITORY: "publisher"}
    assert house.ask("job", "GET", "/api/whoami-v2").json()["auth"]["accessToken"]["role"] == "write"
    file = {"path": "weights.safetensors", "size_bytes": 1, "sha256": "2" * 64}
    release = {"version": "1.2.0", "base": "tiny", "files": [file]}
    upload = {"namespace": PRIVATE, "files": [file]}
    score = {"suite_digest": "0" * 64, "metric": "nll", "value": 1, "n": 1, "higher_is_better": False}
    for method, path, body, status, code in (
        ("POST", f"/v1/adapters/{REPOSITORY}/releases", release, 404, "blob_missing"),  # accepted
        ("POST", "/v1/uploads", upload, 200, None),
        ("GET", f"/api/models/{REPOSITORY}/auth-check/write", None, 200, None),
        ("GET", f"/v1/models/{PRIVATE}/merged", None, 200, None),
        ("POST", f"/v1/models/{PRIVATE}/merged/releases", release, 403, "role_missing"),
        ("GET", f"/api/models/{PRIVATE}/merged/auth-check/write", None, 403, "role_missing"),
        ("POST", f"/v1/adapters/{OTHER}/sql/releases", release, 404, "namespace_unknown"),
        ("POST", "/v1/uploads", upload | {"namespace": OTHER}, 404, "namespace_unknown"),
        ("POST", "/v1/uploads", upload | {"namespace": "open"}, 403, "role_missing"),
        ("PUT", f"/v1/adapters/{REPOSITORY}/channels/prod", {"version": "1.0.0"}, 403, "role_missing"),
        ("POST", f"/v1/adapters/{REPOSITORY}/releases/1.0.0/yank", {"reason": "x"}, 403, "role_missing"),
        ("POST", f"/v1/adapters/{REPOSITORY}/releases", release | {"allow_breaking": "x"}, 403, "role_missing"),
        ("POST", PUBLISHERS, RULE, 403, "role_missing"),
        ("POST", "/v1/tokens", {}, 403, "token_not_allowed"),
        ("POST", "/v1/bases/tiny/scores", {"scores": [score]}, 403, "role_missing"),
        ("POST", "/v1/suites", {}, 403, "role_missing"),
        ("GET", "/v1/jobs", None, 403, "role_missing"),
        ("POST", "/v1/evaluations", {"releases": [f"{REPOSITORY}:1.0.0"], "suites": ["exact"]}, 403, "role_missing"),
    ):
        answered = house.ask("job", method, path, **({"json": body} if body is not None else {}))
        seen = answered.json().get("code") if answered.status_code >= 400 else None
        assert (answered.status_code, seen) == (status, code), (method, path, answered.text)

    row = audited(house, "token:exchange")[-1]
    assert (row.actor, row.subject, row.namespace) == (who["user"], REPOSITORY, PRIVATE)
    assert (row.detail["publisher"], row.detail["token"]) == (rule["id"], who["token"])
    assert row.detail["claims"]["run_id"] == "17"
    listed = house.ask("job", "GET", "/v1/tokens").json()["items"]
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    assert datetime.fromisoformat(listed[0]["last_used_at"]) in (hour, hour - timedelta(hours=1))
    assert (listed[0]["publisher_id"], listed[0]["name"]) == (rule["id"], "acme/training refs/heads/main")

    house.ask("admin", "DELETE", f"{PUBLISHERS}/{rule['id']}")
    ended = house.ask("job", "POST", f"/v1/adapters/{REPOSITORY}/releases", json=release)
    assert (ended.status_code, ended.json()["code"]) == (401, "token_invalid")
    assert "removed" in ended.json()["detail"]


def _unsigned(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"x") -> str:
    return ".".join(_b64(json.dumps(part).encode()) for part in (header, claims)) + f".{_b64(signature)}"


def _b64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _keyed_with_the_public_key(claims: dict[str, Any]) -> str:
    """The known confusion: the published key as the secret of an HMAC."""
    text = _unsigned({"alg": "HS256", "kid": "rsa"}, claims).rpartition(".")[0]
    public = key_of("RS256").as_pem(private=False)
    return f"{text}.{_b64(hmac.new(public, text.encode(), hashlib.sha256).digest())}"


def _refused(ci: Issuer) -> list[tuple[str, str, str]]:
    """A defect, a token with it, and the expected code."""
    good, now = ci.claims(), int(time.time())
    nested = _unsigned({"alg": "RS256", "kid": "rsa"}, good).replace(".", f".{_b64(b'[' * 9000)}", 1)
    wrong = [
        ("another audience", {"aud": "https://elsewhere.example"}, "id_token_audience"),
        ("a second audience", {"aud": [AUDIENCE, "https://elsewhere.example"]}, "id_token_audience"),
        ("no audience", {"aud": None}, "id_token_audience"),
        ("an audience that is an object", {"aud": {AUDIENCE: 1}}, "id_token_audience"),
        ("an issuer that is not configured", {"iss": "https://evil.example"}, "id_token_issuer"),
        ("an issuer that no rule names", {"iss": "https://gitlab.com"}, "id_token_issuer"),
        ("the issuer with a slash", {"iss": f"{ci.url}/"}, "id_token_issuer"),
        ("expired", {"exp": now - 31}, "id_token_expired"),
        ("not valid yet", {"nbf": now + 40}, "id_token_invalid"),
        ("issued in the future", {"iat": now + 40}, "id_token_invalid"),
        ("no expiry", {"exp": None}, "id_token_invalid"),
        ("an expiry that is true", {"exp": True}, "id_token_invalid"),
        ("an expiry beyond all dates", {"exp": 10**300}, "id_token_invalid"),
        ("valid for a year", {"exp": now + 365 * 86400}, "id_token_invalid"),
        ("an id that is a list", {"jti": ["a"]}, "id_token_invalid"),
        ("no number of the project", {"repository_id": None}, "id_token_invalid"),
        ("started by strangers", {"event_name": "pull_request_target"}, "id_token_invalid"),
        ("another project", {"repository": "acme/other"}, "publisher_refused"),
        ("the project in capitals", {"repository": "ACME/training"}, "publisher_refused"),
        ("the project with a look-alike letter", {"repository": "\u0430cme/training"}, "publisher_refused"),
        ("the project with a hidden character", {"repository": "acme/training\u200b\u0000"}, "id_token_invalid"),
        ("another ref", {"ref": "refs/heads/main2"}, "publisher_refused"),
        ("a pull request", {"ref": "refs/pull/1/merge"}, "publisher_refused"),
        ("no ref", {"ref": None}, "publisher_refused"),
        ("no environment", {"environment": None}, "publisher_refused"),
        ("another environment", {"environment": "Release"}, "publisher_refused"),
        ("another workflow", {"workflow_ref": f"{WORKFLOWS}/other.yml@refs/heads/main"}, "publisher_refused"),
        ("no workflow", {"workflow_ref": None}, "publisher_refused"),
        ("a workflow that begins so", {"workflow_ref": f"{WORKFLOWS}/release.yml"}, "publisher_refused"),
        ("the workflow of another project", {"workflow_ref": f"x/{WORKFLOWS}/release.yml@x"}, "publisher_refused"),
    ]
    return [
        *((what, ci.token(**changed), code) for what, changed, code in wrong),
        ("no signature", _unsigned({"alg": "none", "kid": "rsa"}, good, b"").rstrip("."), "id_token_invalid"),
        ("the algorithm none", _unsigned({"alg": "none", "kid": "rsa"}, good), "id_token_invalid"),
        ("the algorithm NONE in a list", _unsigned({"alg": ["none"], "kid": "rsa"}, good), "id_token_invalid"),
        ("a secret for a key", _keyed_with_the_public_key(good), "id_token_invalid"),
        ("another key of the same id", signed(good, key=key_of("other")), "id_token_invalid"),
        ("a key of the other type", signed(good, "ES256", kid="rsa"), "id_token_invalid"),
        ("a strong but other algorithm", signed(good, "RS512"), "id_token_invalid"),
        ("a path for a key id", signed(good, kid="../../etc/passwd' OR 1=1"), "id_token_invalid"),
        ("no key id", _unsigned({"alg": "RS256"}, good), "id_token_invalid"),
        ("a key of its own", signed(good, jwk=key_of("other").as_dict(private=False)), "id_token_invalid"),
        ("an address of keys", signed(good, jku=f"{ci.url}/evil"), "id_token_invalid"),
        ("an address of certificates", signed(good, x5u=f"{ci.url}/evil"), "id_token_invalid"),
        ("other claims under the signature", _with_other_claims(signed(good)), "id_token_invalid"),
        ("thousands of lists", nested, "id_token_invalid"),
        ("a list of events", ci.token(event_name=["push"]), "id_token_invalid"),
        ("huge", ci.token(sub="x" * 20_000), "id_token_invalid"),
        ("not a token", "hf_abc", "id_token_invalid"),
    ]


def _with_other_claims(token: str) -> str:
    header, payload, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return f"{header}.{_b64(json.dumps(claims | {'run_id': '18'}).encode())}.{signature}"


def test_every_other_token_is_refused_with_its_reason_and_an_audit_row(
    house: House, ci: Issuer, rule: dict[str, Any]
) -> None:
    for what, token, code in _refused(ci):
        before = len(audited(house, "token:refuse"))
        answer = exchange(house, token)
        problem = answer.json()
        assert (what, problem.get("code")) == (what, code), answer.text
        assert (answer.status_code, problem["error"]) == (403 if code == "publisher_refused" else 401, "invalid_grant")
        assert problem["detail"][:40] in answer.headers["X-Error-Message"], what
        rows = audited(house, "token:refuse")[before:]
        assert [(row.detail["code"], row.subject, row.namespace) for row in rows] == [(code, REPOSITORY, PRIVATE)], what
        assert (rows[0].actor == "anonymous") == (code != "publisher_refused" and not rows[0].detail.get("claims")), (
            what
        )
    assert "/evil" not in ci.requested
    assert exchange(house, ci.token()).status_code == 200, "the good token differs from these"
    assert exchange(house, signed(ci.claims(aud=[AUDIENCE]), "ES256")).status_code == 200
    assert exchange(house, signed(ci.claims(exp=int(time.time()) - 5), "PS256")).status_code == 200, "within the leeway"


def test_a_token_is_exchanged_once_however_many_ask_at_once(house: House, ci: Issuer, rule: dict[str, Any]) -> None:
    for token in (ci.token(), ci.token(jti=None)):
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(exchange, [house] * 4, [token] * 4))
        assert sorted(answer.status_code for answer in answers) == [200, 401, 401, 401]
        assert {answer.json()["code"] for answer in answers if answer.status_code != 200} == {"id_token_used"}
        # Base64 has spare bits in its last character, so that the same signature has other spellings.
        spelled = token[:-1] + chr(ord(token[-1]) + 1)
        assert exchange(house, spelled).json()["code"] in ("id_token_used", "id_token_invalid")
    elsewhere = exchange(house, token, f"{PRIVATE}/ghost").json()["code"]
    assert elsewhere == "publisher_refused"
    with house.resources.write() as session:
        session.execute(update(UsedIdToken).values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    exchange(house, ci.token())
    with house.resources.read() as session:
        assert len(list(session.scalars(select(UsedIdToken)))) == 1, "what has expired is forgotten"


def test_a_project_that_was_made_anew_under_the_name_is_another_one(
    house: House, ci: Issuer, rule: dict[str, Any]
) -> None:
    assert rule["project_id"] is None
    assert exchange(house, ci.token()).status_code == 200
    assert house.ask("admin", "GET", PUBLISHERS).json()["items"][0]["project_id"] == GITHUB_JOB["repository_id"]
    again = exchange(house, ci.token(repository_id="4712"))
    assert again.json()["code"] == "publisher_refused"
    assert "4712" in again.json()["detail"]
    assert house.ask("admin", "POST", PUBLISHERS, json=RULE).status_code == 200, "the same rule"


def test_a_refusal_says_nothing_of_repositories_and_cannot_fill_the_audit_log(
    house: House, ci: Issuer, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = ci.token(repository="evil/project")
    there, absent = (exchange(house, stranger, f"{PRIVATE}/{name}") for name in ("sql", "ghost"))
    assert there.status_code == absent.status_code == 403
    assert there.json()["detail"] == absent.json()["detail"].replace("ghost", "sql")
    before = len(audited(house, "token:refuse"))
    for _ in range(MAX_REFUSALS + 20):
        assert exchange(house, "x.y.z").status_code == 401
    assert len(audited(house, "token:refuse")) - before <= MAX_REFUSALS
    assert exchange(house, stranger).status_code == 403
    assert audited(house, "token:refuse")[-1].detail["claims"]["project"] == "evil/project"


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"issuer": "https://evil.example"}, "issuer_unknown"),
        ({"issuer": "gitlab"}, "issuer_unknown"),
        ({"ref": None, "environment": None}, "bad_publisher"),
        ({"workflow": None}, "bad_publisher"),
        ({"workflow": "*.yml"}, "bad_publisher"),
        ({"project": "acme/*"}, "bad_publisher"),
        ({"ref": "refs/heads/*", "environment": None}, "bad_publisher"),
        ({"ref": "main"}, "bad_publisher"),
        ({"ref": "refs/*/main"}, "bad_publisher"),
        ({"project": "acme"}, "bad_publisher"),
        ({"project": "acme/training\n"}, "bad_publisher"),
        ({"project_id": "acme"}, "bad_publisher"),
    ],
)
def test_a_rule_that_no_job_or_every_job_meets_is_refused(house: House, changed: dict[str, Any], code: str) -> None:
    answer = house.ask("admin", "POST", PUBLISHERS, json=RULE | changed)
    assert (answer.status_code, answer.json()["code"]) == (422, code)


def test_a_rule_of_before_that_names_no_workflow_stays_valid_and_the_doctor_names_it(
    house: House, ci: Issuer, rule: dict[str, Any]
) -> None:
    with house.resources.write() as session:
        session.get_one(TrustedPublisher, rule["id"]).workflow = None
    assert exchange(house, ci.token(workflow_ref=f"{WORKFLOWS}/other.yml@refs/heads/main")).status_code == 200
    listed = house.ask("admin", "GET", PUBLISHERS).json()["items"]
    assert [(row["workflow"], row["exchanges"]) for row in listed] == [(None, True)]
    (check,) = [
        check
        for check in check_installation(house.resources.settings, contents=False, progress=lambda _: None)
        if check.name == "publishers"
    ]
    assert (check.state, REPOSITORY in check.detail) == ("warning", True)


def test_a_ref_may_end_in_a_star_and_a_repository_may_be_yet_to_come(house: House, ci: Issuer) -> None:
    path = f"/v1/publishers/{PRIVATE}/coming"
    made = house.ask("admin", "POST", path, json=RULE | {"ref": "refs/tags/v*", "environment": None})
    assert made.status_code == 201
    tagged = ci.token(ref="refs/tags/v1.0.0", environment=None)
    assert exchange(house, ci.token(), f"{PRIVATE}/coming").status_code == 403
    assert exchange(house, tagged, f"{PRIVATE}/coming").status_code == 200
    events = house.ask("admin", "GET", "/v1/audit", params={"subject": f"{PRIVATE}/coming"}).json()["items"]
    assert {row["act"] for row in events} == {"publisher:add", "token:exchange", "token:refuse"}


def test_a_token_of_a_job_lasts_an_hour_and_its_row_a_week(house: House, ci: Issuer, rule: dict[str, Any]) -> None:
    house.secrets["job"] = exchange(house, ci.token()).json()["access_token"]
    token = house.ask("job", "GET", "/v1/whoami").json()["token"]
    with house.resources.write() as session:
        row = session.get_one(Token, token)
        assert row.expires_at is not None
        assert timedelta(minutes=59) < row.expires_at - datetime.now(UTC) <= timedelta(hours=1)
        row.expires_at = datetime.now(UTC) - timedelta(days=8)
    assert house.ask("job", "GET", "/v1/whoami").status_code == 401
    exchange(house, ci.token())
    with house.resources.read() as session:
        assert session.get(Token, token) is None


def test_keys_are_cached_and_fetched_anew_only_now_and_then() -> None:
    now = 0.0
    with issuer() as ci:
        keys = IssuerKeys(clock=lambda: now)
        for _ in range(3):
            assert keys.find(ci.url, "rsa")["kty"] == "RSA"
        assert ci.requested == ["/.well-known/openid-configuration", "/keys"]
        for _ in range(3):
            with pytest.raises(Unauthenticated, match="no such key"):
                keys.find(ci.url, "invented")
        assert len(ci.requested) == 2
        now += MIN_INTERVAL_S
        ci.publish(key_of("ES256"))  # the issuer changes its keys
        assert keys.find(ci.url, "ec")["crv"] == "P-256"
        with pytest.raises(Unauthenticated):
            keys.find(ci.url, "rsa-2")
        assert len(ci.requested) == 4
        with pytest.raises(Unauthenticated):
            keys.find(ci.url, "rsa")
        ci.serve("/keys", {}, status=500)
        now += MAX_AGE_S
        with pytest.raises(Unavailable, match="500"):
            keys.find(ci.url, "ec")
        ci.publish(key_of("ES256"))
        now += RETRY_S
        assert keys.find(ci.url, "ec")


def test_an_issuer_leads_the_server_nowhere_else() -> None:
    with issuer() as ci, issuer() as inside:
        discovery, good = "/.well-known/openid-configuration", {"issuer": ci.url, "jwks_uri": f"{ci.url}/keys"}
        for why, path, document, status, headers in (
            ("answers 302", discovery, {}, 302, {"Location": f"{inside.url}{discovery}"}),
            ("own host", discovery, good | {"jwks_uri": f"{inside.url}/keys"}, 200, {}),
            ("own host", discovery, good | {"jwks_uri": "file:///etc/passwd"}, 200, {}),
            ("own host", discovery, good | {"jwks_uri": f"http://x@{ci.url[7:]}/keys"}, 200, {}),
            ("another issuer", discovery, good | {"issuer": inside.url}, 200, {}),
            ("answers 302", "/keys", {}, 302, {"Location": f"{inside.url}/keys"}),
            ("bytes", "/keys", {"keys": ["x" * 300_000]}, 200, {}),
            ("keys", "/keys", {"keys": [{}] * 101}, 200, {}),
            ("compressed", "/keys", {"keys": []}, 200, {"Content-Encoding": "gzip"}),
            ("not a JSON object", "/keys", [], 200, {}),
        ):
            ci.publish(key_of("RS256"))
            ci.serve(path, document, status, **headers)
            with pytest.raises(Unavailable, match=why):
                IssuerKeys().find(ci.url, "rsa")
        assert inside.requested == []
        ci.serve("/keys", {"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "rsa"}, 3]})
        ci.serve(discovery, good)
        with pytest.raises(Unauthenticated):
            IssuerKeys().find(ci.url, "rsa")


@pytest.mark.long
def test_an_issuer_that_hangs_stops_only_exchanges(
    house: House, ci: Issuer, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anyone can send tokens that name it: each waits for its keys."""
    waiting, go_on = threading.Semaphore(0), threading.Event()

    def hang(*_: object) -> None:
        waiting.release()
        go_on.wait(60)
        raise Unavailable("issuer_unavailable", "It does not answer.", next_step="Try again.")

    monkeypatch.setattr(IssuerKeys, "find", hang)
    with ThreadPoolExecutor(61) as pool:
        asked = [pool.submit(exchange, house, ci.token()) for _ in range(60)]
        try:
            for _ in range(EXCHANGE_THREADS):
                assert waiting.acquire(timeout=30)
            assert pool.submit(house.ask, "reader", "GET", "/v1/whoami").result(4).status_code == 200
        finally:
            refused = next(answer for answer in as_completed(asked)).result()
            go_on.set()
    assert (refused.status_code, refused.json()["code"]) == (503, "exchanges_busy"), refused.text


def test_a_registry_without_an_audience_exchanges_nothing(house: House, ci: Issuer) -> None:
    plain = entered(house, house.environ)
    try:
        answer = exchange(plain, ci.token())
        assert (answer.status_code, answer.json()["code"]) == (422, "exchange_disabled")
        rule = RULE | {"issuer": "https://gitlab.com", "workflow": None}
        made = plain.ask("admin", "POST", f"/v1/publishers/{PRIVATE}/early", json=rule)
        assert (made.status_code, made.json()["exchanges"]) == (201, False)
        form = plain.ask("nobody", "POST", "/oauth/token", data={"grant_type": "client_credentials"})
        assert (form.status_code, form.json()["error"]) == (400, "unsupported_grant_type")
        assert plain.ask("nobody", "POST", "/oauth/token", content=b"[" * 70_000).status_code == 413
        assert plain.ask("nobody", "POST", "/oauth/token", content=b"[" * 9_000).status_code == 400
    finally:
        plain.close()
