"""One frozen value, built once from the environment and passed in."""

import getpass
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, SecretStr, Tag
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_RATE = "6000/minute"
_DRIVERS = ("sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg")


def _login_name() -> str:
    """A container may run under a number that no passwd file knows."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def registry_url(text: str) -> str:
    """The address of a registry without a slash at its end; `/v1`, which requests add themselves, is taken off too.

    Raises ValueError for another path, a query, or a name and password.
    """
    host = r"(?:[^/\s?#@:\\\[\]]+|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?"
    match = re.fullmatch(rf"(https?://{host})(?:/(?:v1/?)?)?", text.strip())
    if match is None:
        raise ValueError("it is not the address of a registry, such as https://adapters.example, without a path")
    return match.group(1)


def _http_url(text: str) -> str:
    """Empty says that there is none."""
    try:
        return registry_url(text) if text else text
    except ValueError as error:
        raise PydanticCustomError("url", "{why}", {"why": str(error)}) from error


def _store_url(text: str) -> str | None:
    """Empty says that it is S3's own."""
    if text and not re.match(r"https?://[^/\s]", text):
        raise PydanticCustomError("url", "it is not the address of a store, such as https://s3.example")
    return text or None


def stripped_token(text: str) -> str:
    """As a file or a shell gives it, with white space around. Not in any message: every reader could use it."""
    if not re.fullmatch(r"[\x21-\x7e]*", text := text.strip()):
        raise ValueError("it is not a token: it has a space or a non-ASCII character")
    return text


def _token(token: SecretStr) -> SecretStr:
    try:
        return SecretStr(stripped_token(token.get_secret_value()))
    except ValueError as error:
        raise PydanticCustomError("token", "{why}", {"why": str(error)}) from error


def _profile(text: str) -> str | None:
    """Empty says that there is none."""
    return text or None


def _database_url(text: str) -> str:
    """Of the two databases and their drivers that there is code for; empty says that there is none."""
    from sqlalchemy.engine import make_url  # loaded only where a database is named
    from sqlalchemy.exc import ArgumentError

    try:
        known = not text or make_url(text).drivername in _DRIVERS
    except (ArgumentError, ValueError):  # ValueError: a port that is not a number
        known = False
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
    """Empty says that there is none."""
    if text in ("", DEFAULT_RATE):
        return text
    import limits  # takes a third of this module's time to import, and mostly the default stands

    try:
        rates = limits.parse_many(text)
    except ValueError:
        rates = []
    if len(rates) != 1 or rates[0].amount < 1:
        raise PydanticCustomError("rate", "it is not a rate, such as 6000/minute (empty means no limit)")
    return text


def _addresses(text: str) -> str:
    """Empty says that there are none."""
    for part in text.split(",") if text else ():
        try:
            ipaddress.ip_network(part.strip())
        except ValueError:
            raise PydanticCustomError(
                "addresses", "it is not a list of addresses or networks, such as 10.0.0.7,10.1.0.0/16"
            ) from None
    return text


def _prefix(text: str) -> str:
    """Empty says that there is none. Clients and proxies that tidy addresses up would ask for another place."""
    parts = text.removesuffix("/").split("/") if text else []
    if any(part in ("", ".", "..") for part in parts):
        raise PydanticCustomError(
            "prefix", "it is not a prefix of keys, such as team/adapters/: a part is empty or dots"
        )
    return text


class LocalStorage(BaseModel):
    """Blobs in a directory. `directory` is `$ADAPTORY_HOME/store` unless set."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["local"] = "local"
    directory: Path | None = None


class S3Storage(BaseModel):
    """Blobs in S3 or a compatible store; credentials come from boto3's usual chain, never from here."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["s3"] = "s3"
    bucket: str
    prefix: Annotated[str, AfterValidator(_prefix)] = ""
    endpoint_url: Annotated[str, AfterValidator(_store_url)] | None = None
    connect_timeout_s: float = Field(default=5.0, gt=0)
    read_timeout_s: float = Field(default=30.0, gt=0)
    attempts: int = Field(default=2, gt=0)
    """How often a request is sent to a store that fails, the first time included."""
    multipart_bytes: int = Field(default=256 * 2**20, gt=0, le=5 * 2**30)
    """Files from this size on are sent in parts, so that a broken upload goes on where it stopped."""
    part_bytes: int = Field(default=64 * 2**20, ge=5 * 2**20)
    """The size of a part; larger where there would be more than 10,000."""
    checksums: Literal["when_supported", "when_required"] = "when_supported"
    """Old stores do not understand the checksums that boto3 sends with its own requests."""
    hash_arrivals: bool = False
    """Read back and hash every file that arrives, also where the store was found to refuse wrong bytes."""
    direct: bool | Literal["auto"] = "auto"
    """Let clients write under a blob's final key where the store refuses wrong bytes: spares it a copy of each file.

    `auto`: where the store was seen to hold to the end that is signed. True is for publishers who trust each other: on
    a store that takes another one, who sent a blob first could end it later.
    """


def _kind_of(storage: object) -> str:
    """What is not said follows from the rest: only S3 has a bucket."""
    if not isinstance(storage, dict):
        return str(getattr(storage, "kind", "local"))
    given = cast("dict[str, object]", storage)
    return str(given.get("kind") or ("s3" if "bucket" in given else "local"))


STORAGES: tuple[type[BaseModel], ...] = (LocalStorage, S3Storage)
"""The members of `Storage`. registry/transfer/resources.py opens the store of each."""
_KINDS = ", ".join(str(one.model_fields["kind"].default) for one in STORAGES)
Storage = Annotated[
    Annotated[LocalStorage, Tag("local")] | Annotated[S3Storage, Tag("s3")],
    Discriminator(_kind_of, custom_error_type="kind", custom_error_message=f"its KIND is not one of {_KINDS}"),
]


class Settings(BaseSettings):
    """Environment variables start with `ADAPTORY_`; nested fields are joined by `__` (`ADAPTORY_STORAGE__KIND`)."""

    model_config = SettingsConfigDict(env_prefix="ADAPTORY_", env_nested_delimiter="__", frozen=True, extra="ignore")

    home: Path = Path("~/.adaptory")
    """Where the embedded registry keeps its database, its blobs and its work files."""
    database_url: Annotated[str, AfterValidator(_database_url)] | None = None
    """A SQLAlchemy URL; `sqlite:///$ADAPTORY_HOME/registry.db` unless set."""
    database_connect_timeout_s: int = Field(default=5, ge=2)
    """How long a connection to PostgreSQL is waited for."""
    database_timeout_s: float = Field(default=30.0, gt=0, le=24 * 3600)
    """How long the database may take for one statement, the locks that it waits for included."""
    database_pool_size: int = Field(default=20, ge=2, le=1000)
    """The most connections to PostgreSQL that one process has open: 4 processes leave room within its 100."""
    storage: Storage = LocalStorage()
    url: Annotated[str, AfterValidator(_http_url)] | None = None
    """The registry that the command line talks to; without it, and without a profile in use, the registry in `home` is
    opened in this process."""
    profile: Annotated[str, AfterValidator(_profile)] | None = None
    """A profile that `adaptory login` has made, or `local` for the embedded registry; as the option --profile."""
    max_file_bytes: int = Field(default=64 * 2**30, gt=0)
    """The largest file a release may hold."""
    upload_expires_s: int = Field(default=24 * 3600, gt=0, le=7 * 24 * 3600)
    """How long the bytes of an announced upload are waited for; S3 signs requests for a week at most."""
    max_open_uploads: int = Field(default=10_000, gt=0)
    """Announced uploads of one user whose bytes have not come yet."""
    max_document_bytes: int = Field(default=16 * 2**20, gt=0)
    """The largest JSON or YAML body: a tensor table, a suite, a recipe."""
    access: Literal["single", "tokens"] = "single"
    """Who may use a server: `single` answers on loopback to its one user, `tokens` asks everybody for a token."""
    access_cache_s: float = Field(default=5.0, ge=0, le=300)
    """How long a server remembers whom a token stands for, and so how late another server may notice a revocation."""
    access_log: Literal["text", "json", "off"] = "text"
    """One line on stderr for each request that a server answers: route, status, seconds, actor and request id."""
    download_expires_s: int = Field(default=300, ge=1, le=7 * 24 * 3600)
    """How long an address that S3 gives out for a download is good for, whatever becomes of the token meanwhile."""
    rate_limit: Annotated[str, AfterValidator(_rate)] = DEFAULT_RATE
    """Requests a token, or an address without one, may make of one server process; empty for no limit."""
    trusted_proxies: Annotated[str, AfterValidator(_addresses)] = ""
    """Addresses and networks, with commas between them, whose word on where a request comes from (`X-Forwarded-For`) a
    server believes; nobody's unless set."""
    max_concurrent_uploads: int = Field(default=16, gt=0)
    """Bodies of blobs that one token may be sending to one server process at a time."""
    max_header_bytes: int = Field(default=32 * 1024, gt=0)
    """All headers of a request together."""
    signing_key: Path | None = None
    """A key in PEM that signs what a composition publishes, where its namespace trusts it. Workers need the private
    key; servers may have the public one, and then accept compositions where signatures are required."""
    token: Annotated[SecretStr, AfterValidator(_token)] | None = None
    """Sent by the command line to the registry at `url`."""
    user: Annotated[str, AfterValidator(_user)] = Field(default_factory=_login_name, min_length=1, max_length=128)
    """The name written into moves and audit rows in the embedded registry; the login name unless set."""

    @classmethod
    def variables(cls) -> set[str]:
        """The names of all environment variables that are read."""
        stores = {f"storage__{name}" for one in STORAGES for name in one.model_fields}
        names = (set(cls.model_fields) - {"storage"}) | stores
        return {f"ADAPTORY_{name}".upper() for name in names} | {"ADAPTORY_STORAGE"}

    @property
    def home_directory(self) -> Path:
        return self.home.expanduser().resolve()

    @property
    def effective_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home_directory / 'registry.db'}"

    @property
    def store_directory(self) -> Path:
        if isinstance(self.storage, LocalStorage) and self.storage.directory:
            return self.storage.directory.expanduser().resolve()
        return self.home_directory / "store"

    @property
    def work_directory(self) -> Path:
        return self.home_directory / "work"
