"""A real S3 server on loopback for tests and developers: OpenStack Swift with its s3api, installed from wheels. Public
clouds run it, and of the servers that install without a compiler it is the only one known to refuse a body whose signed
sha256 is wrong. Four processes: the proxy, which speaks S3, and the account, container and object servers behind it.
Data and keys outlive a restart."""

import fcntl
import getpass
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.ports import BEHIND_S3, free_ports

PACKAGES = ("swift==2.38.3", "PyECLib==1.8.0", "eventlet==0.41.3", "setuptools<81")
"""Known to work together: raise them together."""
BUCKET = "adaptory-test"
REGION = "us-east-1"
ACCESS_KEY = "adaptory:test"
_STORAGE = ("account", "container", "object")
_START_TIMEOUT_S = 180
_OWN_FILTERS = Path(__file__).parent / "swift"

_STORAGE_CONF = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {etc}
devices = {devices}
recon_cache_path = {run}
mount_check = false
workers = {workers}
log_level = WARNING
# A busy machine is slow at times: wait, rather than leave a listing behind its object.
container_update_timeout = 30
conn_timeout = 10
node_timeout = 60
# By default Swift refuses to fill the last hundredth of a disk.
fallocate_reserve = 0
disk_chunk_size = 1048576
network_chunk_size = 1048576
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""

_FILTERS = "catch_errors gatekeeper metadata_cache listing_formats s3api tempauth copy slo versioned_writes symlink"
_PROXY_CONF = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {etc}
workers = 2
log_level = WARNING
[pipeline:main]
pipeline = {filters} proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
conn_timeout = 10
node_timeout = 60
recoverable_node_timeout = 60
client_chunk_size = 1048576
object_chunk_size = 1048576
[filter:metadata_cache]
paste.filter_factory = metadata_cache:filter_factory
[filter:s3api]
use = egg:swift#s3api
location = {region}
# S3's own limits; Swift's are 1,000 parts.
max_upload_part_num = 10000
min_segment_size = 5242880
[filter:slo]
use = egg:swift#slo
max_manifest_segments = 10000
max_manifest_size = 33554432
rate_limit_after_segment = 10000
# Parts go with their object; by default a daemon that does not run here removes them.
allow_async_delete = false
[filter:tempauth]
use = egg:swift#tempauth
user_adaptory_test = {secret} .admin
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
"""

_START = """
import json, os, sys
from importlib import import_module
import eventlet.green.os
from swift.common.ring import RingBuilder
etc, run, *confs = sys.argv[1:]
for conf in confs[:-1]:
    name, port = conf.split("=")[0], int(conf.split("=")[1])
    builder = RingBuilder(6, 1, 0)
    builder.add_dev(dict(id=0, region=1, zone=1, ip="127.0.0.1", port=port, device="d1", weight=1,
                         replication_ip="127.0.0.1", replication_port=port, meta=""))
    builder.rebalance(seed=1)
    builder.get_ring().save(f"{etc}/{name}.ring.gz")
names = [conf.split("=")[0] for conf in confs]
# Parents of workers wait for their end: eventlet would ask for it a hundred times a second.
eventlet.green.os.wait = os.wait
servers = {name: import_module("swift.obj.server" if name == "object" else f"swift.{name}.server") for name in names}
pids = {}
for name, server in servers.items():
    pids[name] = os.fork()
    if pids[name] == 0:
        os.setsid()
        log = os.open(f"{run}/{name}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = [f"swift-{name}-server", f"{etc}/{name}.conf"]
        sys.exit(server.main())
print(json.dumps(pids))
"""
"""Makes the rings and forks the four servers: one import of Swift instead of five. Prints their process numbers."""


@dataclass
class S3Server:
    """One server and its data in `directory`. Any process may stop, freeze or restart a server that another has
    started."""

    directory: Path
    port: int = 0
    secret_key: str = field(default_factory=lambda: secrets.token_hex(16))
    pids: dict[str, int] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def credentials(self) -> Mapping[str, str]:
        """Environment variables of boto3's usual chain."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
        }

    def environment(self, prefix: str = "") -> dict[str, str]:
        """The environment for a registry that keeps its blobs here."""
        return {
            "ADAPTORY_STORAGE__KIND": "s3",
            "ADAPTORY_STORAGE__BUCKET": BUCKET,
            "ADAPTORY_STORAGE__PREFIX": prefix,
            "ADAPTORY_STORAGE__ENDPOINT_URL": self.endpoint,
            **self.credentials,
        }

    def client(self) -> Any:
        """A boto3 client, independent of the registry."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                connect_timeout=5,
                read_timeout=30,
                retries={"total_max_attempts": 1},
            ),
        )

    def start(self) -> None:
        """Returns when the bucket answers. Raises RuntimeError with the end of a log when it does not."""
        python = install()
        self.stop()
        ports = self._ports()
        self.port = ports[0]
        _configure(self, dict(zip(("proxy", *_STORAGE), ports, strict=True)))
        parts = [f"{name}={port}" for name, port in zip((*_STORAGE, "proxy"), (*ports[1:], ports[0]), strict=True)]
        environment = {**os.environ, "PYTHONPATH": str(_OWN_FILTERS)}
        started = _run(python, "-c", _START, self._etc, self.directory / "run", *parts, environment=environment)
        self.pids = json.loads(started)
        self._save()
        self._wait_until_ready()

    def stop(self, *, kill: bool = False) -> None:
        """Stops the server; `kill` is a crash, without any cleanup."""
        self.thaw()
        for sign in (signal.SIGKILL,) if kill else (signal.SIGTERM, signal.SIGKILL):
            self._signal(sign)
            deadline = time.monotonic() + 5
            while self._running() and time.monotonic() < deadline:
                time.sleep(0.02)
        self.pids = {}
        if self.directory.exists():
            self._save()

    def freeze(self) -> None:
        """Connections open and nothing answers: a store that hangs."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _ports(self) -> list[int]:
        """The same for S3 as before: the workers of a killed server hold it for a moment longer than that lives."""
        deadline = time.monotonic() + 5
        while True:
            ports = [*free_ports(1, first=self.port), *free_ports(len(_STORAGE), among=BEHIND_S3)]
            if ports[0] == self.port or not self.port or time.monotonic() > deadline:
                return ports
            time.sleep(0.05)

    @property
    def _etc(self) -> Path:
        return self.directory / "etc"

    def _conf(self, name: str) -> Path:
        return self._etc / f"{name}.conf"

    def _signal(self, sign: int) -> None:
        for pid in self._running():
            with suppress(ProcessLookupError):
                os.killpg(pid, sign)  # each leads a group of its own, its workers in it

    def _running(self) -> list[int]:
        """The processes that are still the ones started: process ids get reused."""
        ports: list[int] = []
        for pid in self.pids.values():
            with suppress(OSError):
                if str(self._etc).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    ports.append(pid)
        return ports

    def _save(self) -> None:
        state = self.directory / "state.json"
        state.touch(mode=0o600)
        state.write_text(json.dumps(asdict(self), default=str))

    def _wait_until_ready(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        client, deadline = self.client(), time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                    client.create_bucket(Bucket=BUCKET)
                client.head_bucket(Bucket=BUCKET)
            except (BotoCoreError, ClientError) as error:
                if len(self._running()) < 4 or time.monotonic() > deadline:
                    logs = [path.read_text()[-1000:] for path in (self.directory / "run").glob("*.log")]
                    self.stop(kill=True)
                    raise RuntimeError(f"the S3 server did not start: {error}\n" + "\n".join(logs)) from error
                time.sleep(0.1)
            else:
                return


def load(directory: Path) -> S3Server:
    """The server of that directory as it was last started; a new one where there is none."""
    try:
        return S3Server(**{**json.loads((directory / "state.json").read_text()), "directory": directory})
    except FileNotFoundError:
        return S3Server(directory)


def started(directory: Path) -> S3Server:
    """The running server of that directory; the first caller starts it."""
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / "lock"):
        server = load(directory)
        if len(server._running()) < 4:
            server.start()
        return server


def install() -> Path:
    """The interpreter of an environment that has Swift, made once in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptory"
    home = cache / PACKAGES[0].replace("==", "-")
    python, complete = home / "bin" / "python", home / "complete"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f"{home.name}.lock"):
        if complete.exists() and complete.read_text() == "\n".join(PACKAGES):
            return python
        shutil.rmtree(home, ignore_errors=True)
        _run(sys.executable, "-m", "venv", home)
        _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:", *PACKAGES)
        complete.write_text("\n".join(PACKAGES))
        return python


@contextmanager
def locked(path: Path) -> Generator[None]:
    """One process at a time: test workers run in parallel."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(*command: object, environment: Mapping[str, str] | None = None) -> str:
    words = [str(word) for word in command]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if ran.returncode:
        raise RuntimeError(f"{command[:4]} failed: {(ran.stdout + ran.stderr)[-1000:]}")
    return ran.stdout


def _configure(server: S3Server, ports: Mapping[str, int]) -> None:
    etc, devices, run = (server.directory / name for name in ("etc", "devices", "run"))
    for directory in (etc, devices / "d1", run):
        directory.mkdir(parents=True, exist_ok=True)
    os.setxattr(devices, "user.adaptory", b"1")  # Swift keeps metadata there; better an error now than a 500 later
    # Part of every path on disk, hence fixed: data must outlive a restart.
    (etc / "swift.conf").write_text("[swift-hash]\nswift_hash_path_prefix = a\nswift_hash_path_suffix = a\n")
    settings = {"user": getpass.getuser(), "etc": etc, "devices": devices, "run": run}
    for name in _STORAGE:
        conf = _STORAGE_CONF.format(name=name, port=ports[name], workers=2 if name == "object" else 0, **settings)
        server._conf(name).write_text(conf)
    conf = _PROXY_CONF.format(
        port=ports["proxy"], filters=_FILTERS, region=REGION, secret=server.secret_key, user=settings["user"], etc=etc
    )
    plain = {name for name in _FILTERS.split() if f"[filter:{name}]" not in conf}
    conf += "".join(f"[filter:{name}]\nuse = egg:swift#{name.replace('-', '_')}\n" for name in sorted(plain))
    server._conf("proxy").touch(mode=0o600)
    server._conf("proxy").write_text(conf)
