"""The settings: one frozen value, built once from the environment and passed in."""

import getpass
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, LiteralString, cast
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, SecretStr, Tag
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from registry.environment.network import is_loopback, parse_networks, registry_url
from registry.environment.sections import EngineSettings, PrometheusSettings

if TYPE_CHECKING:
    from composer.evaluation.scorers.scorer import PythonScorers

DATABASE_FILE = "registry.db"
DEFAULT_RATE = "6000/minute"
DEFAULT_ISSUERS = "github:https://token.actions.githubusercontent.com,gitlab:https://gitlab.com"
Claims = Literal["github", "gitlab", "other"]
"""The kinds of issuers, by the claims of their ID tokens."""
_DRIVERS = ("sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg")


def _login_name() -> str:
    """Returns the login name, or `uid-N` in a container that runs under an id without a passwd entry."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"


def _http_url(text: str) -> str:
    """Empty means none."""
    try:
        return registry_url(text) if text else text
    except ValueError as error:
        raise PydanticCustomError("url", "{why}", {"why": str(error)}) from error


def _store_url(text: str) -> str | None:
    """Empty means S3's own."""
    if text and not re.match(r"https?://[^/\s]", text):
        raise PydanticCustomError("url", "it must be the address of a store, such as https://s3.example")
    return text or None


def stripped_token(text: str) -> str:
    """Strips surrounding white space, as from a file or a shell. The error does not contain the token: anyone who reads
    it could use it."""
    if not re.fullmatch(r"[\x21-\x7e]*", text := text.strip()):
        raise ValueError("a token consists of ASCII characters without spaces")
    return text


def _token(token: SecretStr) -> SecretStr:
    try:
        return SecretStr(stripped_token(token.get_secret_value()))
    except ValueError as error:
        raise PydanticCustomError("token", "{why}", {"why": str(error)}) from error


def _database_url(text: str) -> str:
    """Accepts the two supported databases and their drivers; empty means none."""
    from sqlalchemy.engine import make_url  # loaded only where a database is named
    from sqlalchemy.exc import ArgumentError

    if not text:
        return text
    try:
        url = make_url(text)
        known = url.drivername in _DRIVERS
        in_memory = url.database in (None, "", ":memory:") or url.query.get("mode") == "memory"
    except (ArgumentError, ValueError):  # ValueError: a port that is not a number
        known = in_memory = False
    if known and in_memory and text.startswith("sqlite"):
        raise PydanticCustomError("database", "it names no file, as sqlite:////var/lib/a.db does")
    if not known:
        raise PydanticCustomError(
            "database",
            "it is neither sqlite nor postgresql, as in sqlite:////var/lib/a.db or postgresql://user@host/name",
        )
    return text


def _user(text: str) -> str:
    if text.strip().lower() == "anonymous":
        raise PydanticCustomError("user", "it stands for callers without a token; choose another name")
    return text


def _rate(text: str) -> str:
    """Empty means none."""
    if text in ("", DEFAULT_RATE):
        return text
    import limits  # a third of this module's import time, and most use the default

    try:
        rates = limits.parse_many(text)
    except ValueError:
        rates = []
    if len(rates) != 1 or rates[0].amount < 1:
        raise PydanticCustomError("rate", "it must be a rate such as 6000/minute (empty means no limit)")
    return text


def _addresses(text: str) -> str:
    """Empty means none."""
    try:
        parse_networks(text)
    except ValueError:
        message = "it must be a list of addresses or networks, such as 10.0.0.7,10.1.0.0/16"
        raise PydanticCustomError("addresses", message) from None
    return text


def _files_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise PydanticCustomError(
            "files_url", "it must be the address of a host, such as https://files.adapters.example"
        )
    return text


def _list_of(part: str, kind: LiteralString, description: LiteralString) -> AfterValidator:
    """Annotates a text of comma-separated parts that match the pattern `part`. Empty means none, or any."""

    def read(text: str) -> str:
        if text and not all(re.fullmatch(part, given.strip()) for given in text.split(",")):
            raise PydanticCustomError(kind, description)
        return text

    return AfterValidator(read)


def _issuers(text: str) -> str:
    """Empty means none."""
    for part in text.split(",") if text else ():
        url = urlsplit(re.sub(r"^(?:github|gitlab):(?=http)", "", part.strip()))
        secure = url.scheme == "https" or (url.scheme == "http" and is_loopback(url.hostname or ""))
        plain = re.fullmatch(r"https?://[A-Za-z0-9.:\[\]/_~-]{1,180}", url.geturl()) and not url.path.endswith("/")
        if not (secure and plain and url.hostname):
            raise PydanticCustomError(
                "issuers",
                "it must be a list of issuers, such as github:https://token.actions.githubusercontent.com,"
                "gitlab:https://gitlab.example,https://ci.example (https, without a slash at the end)",
            )
    return text


def _issuer(text: str) -> str:
    """One issuer; some have a slash at the end of their name."""
    _issuers(text.strip().removesuffix("/"))
    if not text or "," in text or text.startswith(("github:", "gitlab:")):
        raise PydanticCustomError("issuer", "it must be one issuer with https, such as https://login.example")
    return text.strip()


def _prefix(text: str) -> str:
    """Empty means none. Refuses empty parts and dots: clients and proxies that normalize addresses would request
    another key."""
    parts = text.removesuffix("/").split("/") if text else []
    if any(part in ("", ".", "..") for part in parts):
        raise PydanticCustomError(
            "prefix", "it must be a prefix of keys such as team/adapters/, without empty parts and dots"
        )
    return text


class LocalStorage(BaseModel):
    """Blobs in a directory: the default."""

    model_config = ConfigDict(frozen=True, defer_build=True)
    kind: Literal["local"] = "local"
    """Blobs in a directory; the default without a bucket."""
    directory: Path | None = None
    """The directory of the blobs; `$ADAPTORY_HOME/store` unless set."""


class S3Storage(BaseModel):
    """Blobs in S3 or a compatible store: the default with a bucket. Credentials come from boto3's usual chain, never
    from here."""

    model_config = ConfigDict(frozen=True, defer_build=True)
    kind: Literal["s3"] = "s3"
    """Blobs in S3 or a compatible store; the default with a bucket."""
    bucket: str
    """The bucket; it must exist."""
    prefix: Annotated[str, AfterValidator(_prefix)] = ""
    """The literal prefix of every key, such as `team/`; no part may be empty, `.` or `..`."""
    endpoint_url: Annotated[str, AfterValidator(_store_url)] | None = None
    """The address of a compatible store, such as `https://s3.example.org`; not for AWS."""
    connect_timeout_s: float = Field(default=5.0, gt=0)
    """Timeout for connecting to the store."""
    read_timeout_s: float = Field(default=30.0, gt=0)
    """Timeout for the store's answer. A store that hangs costs a request (5 + 30) * 2 seconds by default, then
    503 with `Retry-After`."""
    attempts: int = Field(default=2, gt=0)
    """Attempts per request to a failing store, including the first."""
    multipart_bytes: int = Field(default=256 * 2**20, gt=0, le=5 * 2**30)
    """Files of at least this size are sent in parts, so that an interrupted upload resumes where it stopped."""
    part_bytes: int = Field(default=64 * 2**20, ge=5 * 2**20)
    """The size of a part; larger if there would be more than 10,000."""
    checksums: Literal["when_supported", "when_required"] = "when_supported"
    """`when_required` is for old stores, which do not support the checksums that boto3 adds to its own requests."""
    hash_arrivals: bool = False
    """Read back and hash every received file, even if the store was found to refuse wrong bytes."""
    direct: bool | Literal["auto"] = "auto"
    """Let clients write directly under a blob's final key if the store refuses wrong bytes; saves the store a copy of
    each file. `auto`: only if the store was found to enforce a signed expiry. True is for publishers who trust each
    other:
    on a store that accepts another expiry, the first sender of a blob could let it expire later."""


def _kind_of(storage: object) -> str:
    """Fills in what is not set: only S3 has a bucket."""
    if not isinstance(storage, dict):
        return str(getattr(storage, "kind", "local"))
    given = cast("dict[str, object]", storage)
    return str(given.get("kind") or ("s3" if "bucket" in given else "local"))


STORAGES: tuple[type[BaseModel], ...] = (LocalStorage, S3Storage)
"""The members of `Storage`. registry/transfer/resources.py opens the store of each."""
_KINDS = ", ".join(str(storage.model_fields["kind"].default) for storage in STORAGES)
Storage = Annotated[
    Annotated[LocalStorage, Tag("local")] | Annotated[S3Storage, Tag("s3")],
    Discriminator(_kind_of, custom_error_type="kind", custom_error_message=f"its KIND is not one of {_KINDS}"),
]


class SignInSettings(BaseModel):
    """The OpenID provider whose users sign in to pages."""

    model_config = ConfigDict(frozen=True, defer_build=True)
    issuer: Annotated[str, AfterValidator(_issuer)]
    """The provider's address, exactly as its ID tokens have it in `iss`."""
    client_id: str = Field(min_length=1)
    """This registry's name at the provider."""
    client_secret: SecretStr | None = None
    """This registry's secret at the provider; none for a public client, which PKCE alone protects."""
    user_claim: str = "preferred_username"
    """The claim with the user's name; `email` only with `email_verified`. Users must not be able to choose
    another's."""
    groups_claim: str = "groups"
    """The claim with the user's groups, a list or a string."""
    scopes: str = "openid profile email"
    """The requested scopes; some providers need `groups` too."""
    roles: Annotated[
        str,
        _list_of(
            r"[^,]+=(\*|[a-z0-9][a-z0-9._-]*):(reader|agent|(publisher|releaser|admin)(\+agent)?)",
            "roles",
            "it must be a list such as ml-team=acme:publisher,platform=*:admin",
        ),
    ] = ""
    """Comma-separated `GROUP=NAMESPACE:ROLE`, such as `ml-team=acme:publisher,platform=*:admin`: the roles of a group's
    members while they are signed in."""

    @property
    def group_roles(self) -> list[tuple[str, str, str]]:
        """Groups with a namespace, or `*`, and the role there."""
        parts = [part.strip().rpartition("=") for part in self.roles.split(",")] if self.roles else []
        return [(group, *cast("tuple[str, str]", tuple(right.split(":")))) for group, _, right in parts]


class Settings(BaseSettings):
    """Environment variables start with `ADAPTORY_`; nested fields are joined by `__` (`ADAPTORY_STORAGE__KIND`)."""

    model_config = SettingsConfigDict(env_prefix="ADAPTORY_", env_nested_delimiter="__", frozen=True, extra="ignore")

    home: Path = Path("~/.adaptory")
    """Directory of the embedded registry's database, blobs and work files, of profiles and of the pull cache."""
    database_url: Annotated[str, AfterValidator(_database_url)] | None = None
    """`postgresql://user@host/name`, or `sqlite:////path`; `$ADAPTORY_HOME/registry.db` unless set."""
    database_connect_timeout_s: int = Field(default=5, ge=2)
    """Maximum time to connect to PostgreSQL; at least 2."""
    database_timeout_s: float = Field(default=30.0, gt=0, le=24 * 3600)
    """Maximum time of a statement, including the locks that it waits for. Beyond it, 503."""
    database_pool_size: int = Field(default=20, ge=2, le=1000)
    """Maximum open connections to PostgreSQL per process: 4 processes stay below its limit of 100."""
    storage: Storage = LocalStorage()
    """Where blobs are; the sections below have the settings of each kind."""
    engine: EngineSettings = EngineSettings()
    """Where the parts of a job run; the section below has its settings."""
    prometheus: PrometheusSettings | None = None
    """A Prometheus that workers ask for the figures of canaries; none by default. The section below has its settings.
    """
    url: Annotated[str, AfterValidator(_http_url)] | None = None
    """The registry that the command line talks to. Without it, and without an active profile, the registry in `home` is
    opened in this process."""
    profile: Annotated[str, AfterValidator(lambda text: text or None)] | None = None
    """A profile saved by `adaptory login`, or `local` for the embedded registry; like the option `--profile`.
    Wins over `ADAPTORY_URL`."""
    max_file_bytes: int = Field(default=64 * 2**30, gt=0)
    """Maximum size of a file in a release; beyond it 413. One push by Xet has at most four times as much."""
    namespace_bytes: int = Field(default=2**40, ge=0)
    """The quota of a new namespace, in bytes: 1 TiB by default, 0 for none. `adaptory namespace quota` changes it."""
    upload_expires_s: int = Field(default=24 * 3600, gt=0, le=7 * 24 * 3600)
    """How long an announced upload and its signed requests stay valid; S3 signs requests for a week at most."""
    commit_retention_days: float = Field(default=30.0, ge=0, le=36_500)
    """How long `gc` keeps a commit without a release after another commit has followed it."""
    max_open_uploads: int = Field(default=10_000, gt=0)
    """Maximum number of a user's announced files whose bytes have not been received yet; beyond it 429, or 413 if
    one announcement has more."""
    max_document_bytes: int = Field(default=16 * 2**20, gt=0)
    """Maximum size of a JSON or YAML body: a tensor table, a suite, a recipe. Beyond it 413, before it is read."""
    access: Literal["single", "tokens"] = "single"
    """Who may use a server: `single` serves its one user on loopback, `tokens` requires a token from everyone."""
    access_cache_s: float = Field(default=5.0, ge=0, le=300)
    """How long a server process caches a token's user and roles for requests that only read: how late it may notice a
    revoked token, a removed role or a namespace made private elsewhere."""
    access_log: Literal["text", "json", "off"] = "text"
    """A line on stderr for each request, with route, status, seconds, actor and request id: `text`, `json` or
    `off`. With `json` warnings and tracebacks are JSON lines too."""
    traces: bool = False
    """Whether servers and workers send OpenTelemetry traces, to `OTEL_EXPORTER_OTLP_ENDPOINT`. Needs the extra
    `otel`."""
    token_days: float = Field(default=90.0, gt=0, le=3660)
    """The default lifetime of a token."""
    max_token_days: float = Field(default=366.0, gt=0, le=3660)
    """Maximum lifetime of a new token. Existing tokens keep theirs."""
    download_expires_s: int = Field(default=300, ge=1, le=7 * 24 * 3600)
    """How long a presigned download URL of S3 is valid, even if the token is revoked meanwhile."""
    rate_limit: Annotated[str, AfterValidator(_rate)] = DEFAULT_RATE
    """Maximum requests to one server process per token, or per address without one; beyond it 429 with
    `Retry-After`. Empty for no limit."""
    streams: int = Field(default=200, ge=1, le=100_000)
    """Maximum event streams and waiting polls of one server process at a time; each takes about 60 kB."""
    streams_per_token: int = Field(default=20, ge=1, le=100_000)
    """The same for one token, or for one address without a token."""
    trusted_proxies: Annotated[str, AfterValidator(_addresses)] = ""
    """Comma-separated addresses and networks of proxies whose `X-Forwarded-For` a server trusts; none by default."""
    webhook_networks: Annotated[str, AfterValidator(_addresses)] = ""
    """Comma-separated addresses and private networks that webhooks may reach, also by http; none by default. The same
    for servers and workers."""
    files_url: Annotated[str, AfterValidator(_files_url)] | None = None
    """An address of this server under another host name, such as `https://files.adapters.example`: it serves only files
    of users, by signed addresses. Files in S3 come from the store's host already."""
    files_secret: Annotated[SecretStr, Field(min_length=32)] | None = None
    """The secret that signs the addresses of files: the same for all servers, at least 32 characters; needed with
    `ADAPTORY_FILES_URL`."""
    hosts: Annotated[
        str,
        _list_of(
            r"[A-Za-z0-9._-]+|\[?[0-9A-Fa-f]*:[0-9A-Fa-f:.]+\]?",
            "hosts",
            "it must be a list of host names without ports, such as adapters.example,10.0.0.7",
        ),
    ] = ""
    """Comma-separated host names, without ports, that a server with tokens answers to, others with 421; empty for any.
    `/healthz`, `/readyz` and `/metrics` answer to any."""
    oidc_audience: Annotated[str, AfterValidator(_http_url)] = ""
    """This registry's address, as clients have it in `HF_ENDPOINT`: ID tokens of continuous integration must be meant
    for it. Without it, none is exchanged for a token."""
    oidc_issuers: Annotated[str, AfterValidator(_issuers)] = DEFAULT_ISSUERS
    """Comma-separated issuers of the ID tokens of trusted publishers. `github:` or `gitlab:` before the address selects
    the form of their claims; for others the project is the subject (`sub`)."""
    sign_in: SignInSettings | None = None
    """An OpenID provider whose users sign in to pages, beside the holders of tokens; none by default."""
    max_concurrent_uploads: int = Field(default=16, gt=0)
    """Maximum bodies that one user may be sending to one server process at a time; beyond it 429. A process receives
    128; one user at most as many as remain free for others, then 503 with `Retry-After`."""
    max_header_bytes: int = Field(default=32 * 1024, gt=0)
    """Maximum total size of a request's headers; beyond it 431. A head of half a MiB, or one that takes longer
    than 30 s, also ends the connection."""
    scorers: Annotated[
        str,
        _list_of(r"[a-z][a-z0-9_]{0,63}", "scorers", "it must be a list of scorers, such as sql_results,unit_tests"),
    ] = ""
    """Comma-separated names of Python scorers (entry points `adaptory.scorers`) that evaluations on this machine
    may run; the same for servers and workers. Enable only code that you trust."""
    scorer_timeout_s: float = Field(default=30.0, gt=0, le=24 * 3600)
    """How long a Python scorer may take for one example; its process is then killed."""
    hub_token_orgs: Annotated[
        str,
        _list_of(
            r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?",
            "organisations",
            "it must be a list of organisations on a hub, such as acme,beta",
        ),
    ] = ""
    """Comma-separated organisations on the hub for whose bases this machine sends its hub token (`HF_TOKEN`) when a
    job needs one; none by default. Any publisher may register a base by its address there."""
    harness_path: Path | None = None
    """A directory of YAML files of lm-evaluation-harness tasks that evaluations on this machine run instead of those of
    the harness, with the code that they name."""
    device_memory_bytes: int | None = Field(default=None, gt=0)
    """Memory of the worker's device: it claims no job that needs more. By default that of the first CUDA device or,
    without one, of the host or its container. With Ray, that of the cluster's smallest GPU: units share one only if
    this is set and has room for both, and unless it is set, the worker claims jobs of any size."""
    base_cache_bytes: int | None = Field(default=None, gt=0)
    """Maximum size of the bases that this machine keeps from buckets: before a download, the least recently
    used ones are removed. By default the disk is the limit. Bases that a job uses stay even beyond it."""
    job_retention_days: float = Field(default=365.0, ge=0, le=36_500)
    """How long `gc` keeps a job after it has ended; longer if a release was made by its composition, or a promotion
    waited for it."""
    audit_reads: bool = False
    """Whether each download leaves a row in the audit log (`release:download`), outside its hash chain."""
    audit_reads_days: float = Field(default=90.0, ge=0, le=36_500)
    """How long these rows are kept."""
    signing_key: Path | None = None
    """A key in PEM that signs releases made by compositions, if their namespace trusts it. Workers need the private
    key; servers may have the public one, and then accept compositions where signatures are required."""
    worker_key: Path | None = None
    """A worker's Ed25519 key in PEM, which attests what it measures; by default a new `worker-key.pem` in its home."""
    drain_s: float = Field(default=0.0, ge=0, le=3600)
    """How long a stopping server (SIGTERM) still accepts requests; /readyz shows load balancers the stop at once."""
    token: Annotated[SecretStr, AfterValidator(_token)] | None = None
    """The token that the command line sends to the registry at `url`."""
    loopback_secret: Annotated[SecretStr, AfterValidator(_token)] | None = None
    """The secret that a server without tokens requires. By default a new one at each start; either is in
    `$ADAPTORY_HOME/server-PORT.secret` while it runs."""
    loopback_open: bool = False
    """Let every user of this machine use a server without tokens: for machines with one user."""
    user: Annotated[str, AfterValidator(_user)] = Field(default_factory=_login_name, min_length=1, max_length=128)
    """The name recorded in moves and audit rows of the embedded registry; the login name by default."""

    @classmethod
    def variables(cls) -> set[str]:
        """Names of all environment variables that the settings read."""
        stores = {f"storage__{name}" for storage in STORAGES for name in storage.model_fields}
        sign_in = {f"sign_in__{name}" for name in SignInSettings.model_fields}
        engine = {f"engine__{name}" for name in EngineSettings.model_fields}
        prometheus = {f"prometheus__{name}" for name in PrometheusSettings.model_fields}
        sections = stores | sign_in | engine | prometheus
        names = (set(cls.model_fields) - {"storage", "sign_in", "engine", "prometheus"}) | sections
        return {f"ADAPTORY_{name}".upper() for name in names} | {"ADAPTORY_STORAGE"}

    @property
    def home_directory(self) -> Path:
        return self.home.expanduser().resolve()

    @property
    def effective_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home_directory / DATABASE_FILE}"

    @property
    def store_directory(self) -> Path:
        if isinstance(self.storage, LocalStorage) and self.storage.directory:
            return self.storage.directory.expanduser().resolve()
        return self.home_directory / "store"

    @property
    def enabled_scorers(self) -> "PythonScorers":
        from composer.evaluation.scorers.scorer import PythonScorers  # loaded only where something is evaluated

        names = tuple(name.strip() for name in self.scorers.split(",") if name.strip())
        return PythonScorers(names, self.scorer_timeout_s)

    @property
    def hub_token_organisations(self) -> frozenset[str]:
        return frozenset(name.strip().lower() for name in self.hub_token_orgs.split(",") if name.strip())

    @property
    def host_names(self) -> tuple[str, ...]:
        return tuple(name.strip().strip("[]").lower() for name in self.hosts.split(",") if name.strip())

    @property
    def issuers(self) -> dict[str, Claims]:
        """The issuers whose ID tokens are accepted, with the kind of their claims."""
        named: dict[str, Claims] = {}
        for part in self.oidc_issuers.split(",") if self.oidc_issuers else ():
            claims, colon, url = part.strip().partition(":")
            known = colon and claims in ("github", "gitlab")
            named[url if known else part.strip()] = cast(Claims, claims) if known else "other"
        return named

    @property
    def work_directory(self) -> Path:
        return self.home_directory / "work"
