"""The contents of a registry's disk and lists, for tests of the remains of a failure."""

import hashlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import boto3

from registry.cli.console.connect import connected
from registry.client.api import Api
from registry.environment.settings import Settings
from registry.storage.blobs import WORK
from registry.storage.s3.probe import PROBE
from registry.transfer.resources import Resources, open_resources
from tests.scenarios.world import Cli, environment


def home_of(cli: Cli) -> Path:
    """The registry's own directory, be it embedded or served by the `cli` fixture's server."""
    home = Path(cli.environment["ADAPTORY_HOME"])
    return home.with_name("server") if "ADAPTORY_URL" in cli.environment else home


@contextmanager
def api_of(cli: Cli) -> Generator[Api]:
    """Calls without the command line's own checks."""
    with environment(cli.environment, ["adaptory"]), connected() as connection:
        yield connection.api


def opened(cli: Cli) -> Resources:
    """The resources of the embedded registry of `cli`, for calls below HTTP; the caller closes them."""
    with environment(cli.environment, ["adaptory"]):
        return open_resources(Settings())


def hashes(directory: Path) -> dict[str, str]:
    """The sha256 of every file below it, by its relative path."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@dataclass(frozen=True)
class Traces:
    """`work` are unfinished files of the registry: uploads, inspections, compositions, puts."""

    blobs: frozenset[str]
    work: frozenset[str]
    releases: tuple[str, ...]


def traces(cli: Cli) -> Traces:
    home = home_of(cli)
    with api_of(cli) as api:
        releases = [
            f"{release['repository']}:{release['version']}"
            for kind in ("adapter", "model")
            for release in api.pages("/v1/releases", kind=kind, include_yanked=True)
        ]
    unfinished = {str(path.relative_to(home)) for path in (home / "work").rglob("*")}
    if keeps_blobs_in_s3(cli):
        blobs, arriving = _in_s3(cli)
    else:
        blobs = {path.name for path in (home / "store" / "blobs").rglob("*") if path.is_file()}
        arriving = {str(path.relative_to(home)) for path in (home / "store" / "incoming").rglob("*")}
    return Traces(frozenset(blobs), frozenset(unfinished | arriving), tuple(sorted(releases)))


def keeps_blobs_in_s3(cli: Cli) -> bool:
    return "AWS_ACCESS_KEY_ID" in cli.registry_environment


def s3_of(cli: Cli) -> tuple[Any, str, str]:
    """boto3, bucket and prefix of the registry's store; past our own store class on purpose."""
    environ = cli.registry_environment
    names = ("ADAPTORY_STORAGE__ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    client = _client(*(environ[name] for name in names))
    return client, environ["ADAPTORY_STORAGE__BUCKET"], environ["ADAPTORY_STORAGE__PREFIX"]


@cache
def _client(endpoint: str, region: str, key: str, secret: str) -> Any:
    """Cached, since creating one takes longer than using it."""
    return boto3.client(
        "s3", endpoint_url=endpoint, region_name=region, aws_access_key_id=key, aws_secret_access_key=secret
    )


def parts_in(cli: Cli) -> int:
    """The number of received parts of unfinished uploads."""
    return len(list(_arrived(cli)))


def _arrived(cli: Cli) -> Iterator[dict[str, Any]]:
    client, bucket, prefix = s3_of(cli)
    for row in client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", ()):
        with suppress(client.exceptions.NoSuchUpload):  # ended between the two questions
            yield from client.list_parts(Bucket=bucket, Key=row["Key"], UploadId=row["UploadId"]).get("Parts", ())


def bytes_in_s3(cli: Cli) -> int:
    """The bytes of blobs and of received data of others."""
    return sum(row["Size"] for row in (*_objects(cli), *_arrived(cli)))


def _objects(cli: Cli) -> Iterator[dict[str, Any]]:
    client, bucket, prefix = s3_of(cli)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", ())


def _in_s3(cli: Cli) -> tuple[set[str], set[str]]:
    """Names of blobs, and keys that belong neither to blobs nor to finished uploads, without the objects of a server's
    probe and without the results of units, which are kept for a week."""
    client, bucket, prefix = s3_of(cli)
    keys = {row["Key"].removeprefix(prefix) for row in _objects(cli)}
    parts = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", ())
    blobs = {key for key in keys if key.startswith("blobs/")}
    others = {key for key in keys - blobs if not key.startswith((f"incoming/{PROBE}", WORK))}
    return {key.rpartition("/")[2] for key in blobs}, others | {row["Key"] for row in parts}
