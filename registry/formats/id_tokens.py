"""ID tokens (OpenID Connect) of continuous integration: read, verified, and reduced to the claims that rules compare.

A token does not choose how it is verified: its algorithm is one of three, its key belongs to its issuer, and a header
that contains or points to a key is refused.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

import orjson

from registry.errors import Unauthenticated, Unavailable

KEY_TYPES = {"RS256": "RSA", "PS256": "RSA", "ES256": "EC"}
"""The key type of each accepted algorithm."""
MAX_CHARACTERS = 16 << 10
LEEWAY = timedelta(seconds=30)
"""The permitted difference between the issuer's clock and ours."""
MAX_AHEAD = timedelta(days=7)
"""The maximum validity of a token, for which it is remembered."""
_PUBLIC = {"RSA": ("kty", "n", "e"), "EC": ("kty", "crv", "x", "y")}
_MIN_RSA_BYTES = 256
_FOREIGN_KEY = ("jku", "jwk", "x5u", "x5c", "crit", "b64")
_MAX_ID = 255
_PART = re.compile(r"[A-Za-z0-9_-]+")
_IN_FORK = frozenset({"pull_request_target"})

Claims = Mapping[str, Any]
Layout = Literal["github", "gitlab", "other"]


@dataclass(frozen=True, slots=True)
class IdToken:
    """A token whose signature has not been verified yet."""

    text: str
    algorithm: str
    key_id: str
    issuer: str
    claims: Claims


@dataclass(frozen=True, slots=True, kw_only=True)
class CiJob:
    """The properties of a token's job that rules compare. `project_id` is the issuer's own number of the
    project, if its tokens have one."""

    issuer: str
    project: str
    project_id: str | None
    ref: str | None
    environment: str | None
    workflow: str | None
    """The path of its file in the project."""
    details: Mapping[str, str]
    """Further claims that identify the job: its run, commit and workflow."""


def parse(text: str) -> IdToken:
    """Parses a token. Raises Unauthenticated for one that cannot be verified."""
    parts = text.split(".") if len(text) <= MAX_CHARACTERS else []
    if len(parts) != 3 or not all(_PART.fullmatch(part) for part in parts):
        raise invalid("it is not a JSON Web Token")
    header, claims = _table(parts[0]), _table(parts[1])
    algorithm, key_id, issuer = header.get("alg"), header.get("kid"), claims.get("iss")
    if not isinstance(algorithm, str) or algorithm not in KEY_TYPES:
        raise invalid(f"its algorithm is not one of {', '.join(KEY_TYPES)}")
    if given := [name for name in _FOREIGN_KEY if name in header]:
        raise invalid(f"its header has {given[0]}")
    if not isinstance(key_id, str) or not 0 < len(key_id) <= _MAX_ID:
        raise invalid("its header does not name a key (kid)")
    if not isinstance(issuer, str):
        raise invalid("it names no issuer (iss)")
    return IdToken(text, algorithm, key_id, issuer, claims)


def verify(token: IdToken, key: Mapping[str, Any]) -> None:
    """Verifies the signature with a key of the issuer, a JSON Web Key. Raises Unauthenticated if it does not hold."""
    try:
        from joserfc import jws
        from joserfc.errors import JoseError
        from joserfc.jwk import ECKey, RSAKey
    except ModuleNotFoundError as error:
        raise Unavailable(
            "extra_missing",
            "Verifying ID tokens needs joserfc.",
            next_step="Install adaptory with its extra `oidc` on the server.",
        ) from error
    key_type = KEY_TYPES[token.algorithm]
    if (
        key.get("kty") != key_type
        or key.get("use", "sig") != "sig"
        or key.get("alg", token.algorithm) != token.algorithm
    ):
        raise invalid(f"its key is not one for {token.algorithm}")
    public = {name: key[name] for name in _PUBLIC[key_type] if name in key}
    try:
        loaded = (RSAKey if key_type == "RSA" else ECKey).import_key(public)
        if key_type == "RSA" and len(_decoded(str(public["n"]))) < _MIN_RSA_BYTES:
            raise invalid("its key is shorter than 2048 bits")
        jws.deserialize_compact(token.text, loaded, algorithms=[token.algorithm])
    except (JoseError, ValueError, TypeError, KeyError) as error:
        raise invalid("its signature is not valid") from error


def check(token: IdToken, audience: str, now: datetime) -> datetime:
    """Checks the audience and validity period of a verified token. Returns the end of its validity. Raises
    Unauthenticated.

    A token for several audiences is refused: each of them could use it here.
    """
    meant: object = token.claims.get("aud")
    if isinstance(meant, list) and len(cast("list[object]", meant)) == 1:
        meant = cast("list[object]", meant)[0]
    if meant != audience:
        raise Unauthenticated(
            "id_token_audience",
            f"The ID token is not meant for {audience} alone: its audience (aud) is {shown(cast(object, meant))}.",
            next_step=f"Request it with the audience {audience}.",
        )
    expires, issued = _moment(token.claims, "exp"), _moment(token.claims, "iat")
    starts = _moment(token.claims, "nbf") if "nbf" in token.claims else issued
    if now >= expires + LEEWAY:
        raise Unauthenticated("id_token_expired", f"The ID token expired at {expires:%Y-%m-%d %H:%M:%S} UTC.")
    if now < max(issued, starts) - LEEWAY:
        raise invalid("it is not valid yet: compare the clocks of the issuer and of this server")
    if expires > now + MAX_AHEAD:
        raise invalid(f"it is valid for more than {MAX_AHEAD.days} days")
    return expires + LEEWAY


def replay_key(token: IdToken) -> str:
    """A sha256 that is the same for every copy of the token: of its id (jti), or of the signed part, since signatures
    have several encodings."""
    own = token.claims.get("jti")
    if own is not None and (not isinstance(own, str) or not 0 < len(own) <= _MAX_ID):
        raise invalid("its id (jti) is not a short string")
    what = f"jti {own}" if own is not None else f"signed {token.text.rpartition('.')[0]}"
    return hashlib.sha256(f"{token.issuer}\n{what}".encode()).hexdigest()


def job_of(token: IdToken, layout: Layout) -> CiJob:
    """The job that a verified token describes, from the claims that its issuer makes. Raises Unauthenticated for a
    token without a project, and for a job that runs the code of strangers."""
    claims = token.claims
    if layout == "github":
        if _text(claims, "event_name") in _IN_FORK:
            raise invalid(
                "it comes from a workflow on pull_request_target, which strangers can start with their own input"
            )
        named, number, ref = "repository", _number(claims, "repository_id"), _text(claims, "ref")
        details = ("sub", "sha", "workflow_ref", "run_id", "run_attempt", "actor", "event_name")
    elif layout == "gitlab":
        named, number, ref = "project_path", _number(claims, "project_id"), _gitlab_ref(claims)
        details = ("sub", "sha", "ci_config_ref_uri", "pipeline_id", "job_id", "user_login", "pipeline_source")
    else:
        named, number, ref, details = "sub", None, _text(claims, "ref"), ("sub",)
    project = _text(claims, named)
    if project is None:
        raise invalid(f"it names no project ({named})")
    if layout != "other" and number is None:
        raise invalid("it lacks the number of its project")
    kept = {name: shown(claims[name]) for name in details if name in claims}
    return CiJob(
        issuer=token.issuer,
        project=project,
        project_id=number,
        ref=ref,
        environment=_text(claims, "environment"),
        workflow=_workflow(claims, layout, project),
        details=kept,
    )


def shown(value: object) -> str:
    """A claim in at most 200 printable characters."""
    text = value[:200] if isinstance(value, str) else str(value)[:200]
    return text if text.isprintable() else ascii(text)[1:-1][:200]


def invalid(why: str) -> Unauthenticated:
    """The error for a token that cannot be verified."""
    return Unauthenticated(
        "id_token_invalid",
        f"The ID token is refused: {why}.",
        next_step="Send the ID token as the issuer of your continuous integration made it.",
    )


def _workflow(claims: Claims, layout: Layout, project: str) -> str | None:
    """The path of the file that the issuer ran, if it is one of the project. GitHub writes
    `acme/training/.github/workflows/x.yml@refs/heads/main`, GitLab `gitlab.com/acme/training//.gitlab-ci.yml@…`."""
    name, start = {"github": ("workflow_ref", f"{project}/"), "gitlab": ("ci_config_ref_uri", f"/{project}//")}.get(
        layout, ("", "")
    )
    text = claims.get(name)
    file, at, _ = text.rpartition("@") if isinstance(text, str) else ("", "", "")
    host, separator, path = file.partition(start) if start else ("", "", "")
    own = "/" not in host if layout == "gitlab" else not host
    return path if at and separator and own else None


def _gitlab_ref(claims: Claims) -> str | None:
    """The complete name of the branch or tag, which old versions of GitLab give in two parts."""
    if "ref_path" in claims:
        return _text(claims, "ref_path")
    kind, ref = {"branch": "heads", "tag": "tags"}.get(str(claims.get("ref_type"))), _text(claims, "ref")
    return f"refs/{kind}/{ref}" if kind and ref else None


def _text(claims: Claims, name: str) -> str | None:
    """A claim that rules compare; None if absent. Raises Unauthenticated for a value that no rule can have."""
    value = claims.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > _MAX_ID or not value.isprintable():
        raise invalid(f"its {name} is not a short printable string")
    return value


def _number(claims: Claims, name: str) -> str | None:
    """A project's number, which GitHub and GitLab write as a string."""
    value = claims.get(name)
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    return text if re.fullmatch(r"[0-9]{1,20}", text) else None


def _moment(claims: Claims, name: str) -> datetime:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 36:
        raise invalid(f"its {name} is not a time")
    return datetime.fromtimestamp(value, UTC)


def _table(part: str) -> dict[str, Any]:
    try:
        table = orjson.loads(_decoded(part))
    except ValueError as error:
        raise invalid("it is not a JSON Web Token") from error
    if not isinstance(table, dict):
        raise invalid("it is not a JSON Web Token")
    return cast("dict[str, Any]", table)


def _decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
