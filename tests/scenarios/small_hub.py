"""A small Hugging Face Hub, sufficient for reading a repository over real HTTP. Unlike Adaptory it has pickles, small
files that git identifies by sha1, branches that move and connections that break."""

import hashlib
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 2_000
"""Files from this size on are outside git, as on the hub those from 10 MB on."""


@dataclass
class SmallHub:
    """Repositories by name: files by path at each commit, and the commit of `main`. `sizes` are listed instead of true
    ones, `changed` has other answers in JSON. `broken` are paths whose download ends in the middle. `seen` is called
    before an answer to a path, and `instead` may answer itself, if it returns True."""

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict[str, dict[str, dict[str, bytes]]])
    heads: dict[str, str] = field(default_factory=dict[str, str])
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    broken: set[str] = field(default_factory=set[str])
    seen: Callable[[str], None] = lambda _path: None
    instead: Callable[[BaseHTTPRequestHandler, str], bool] = lambda _handler, _path: False
    changed: Callable[[Any], Any] = lambda document: document
    requests: list[tuple[str, str, str | None]] = field(default_factory=list[tuple[str, str, str | None]])
    url: str = ""

    def put(self, name: str, files: dict[str, bytes]) -> str:
        """Adds a commit to `main`."""
        digests = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
        commit = hashlib.sha1(json.dumps([name, digests]).encode(), usedforsecurity=False).hexdigest()
        self.commits.setdefault(name, {})[commit] = files
        self.heads[name] = commit
        return commit

    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


@contextmanager
def small_hub() -> Generator[SmallHub]:
    hub = SmallHub()
    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    hub.url = f"http://127.0.0.1:{serving.server_address[1]}"
    thread = Thread(target=serving.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        serving.shutdown()
        thread.join()
        serving.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: SmallHub, *rest: Any) -> None:
        self.hub = hub
        super().__init__(*rest)

    def log_message(self, *_words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        self.hub.seen(path)
        if self.hub.instead(self, path):
            return
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, what, revision = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "revision", parts[5:6]
        else:
            name, what, revision = "/".join(parts[:2]), "resolve", parts[3:4]
        commit = self._commit(name, revision[0] if revision else "main")
        if commit is None:
            return
        files = self.hub.commits[name][commit]
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "sha": commit, "private": False, "siblings": siblings})
        elif what == "tree":
            self._json([self._listed(path, content) for path, content in files.items()])
        else:
            self._file("/".join(parts[4:]), files, commit)

    def _commit(self, name: str, revision: str) -> str | None:
        """The commit, or None after an answer that names what does not exist."""
        if name not in self.hub.commits:
            self._refuse("RepoNotFound")
            return None
        commit = self.hub.heads[name] if revision == "main" else revision
        if commit not in self.hub.commits[name]:
            self._refuse("RevisionNotFound")
            return None
        return commit

    def _listed(self, path: str, content: bytes) -> dict[str, Any]:
        size = self.hub.sizes.get(path, len(content))
        row: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": _git_blob(content)}
        if size >= LARGE_BYTES:
            row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
        return row

    def _file(self, path: str, files: dict[str, bytes], commit: str) -> None:
        if path not in files:
            self._refuse("EntryNotFound")
            return
        content = files[path]
        self.send_response(200)
        large = len(content) >= LARGE_BYTES
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest() if large else _git_blob(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            if path in self.hub.broken:
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(content)

    def _json(self, document: object, status: int = 200, **headers: str) -> None:
        changed = self.hub.changed(document)
        body = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, code: str) -> None:
        self._json({"error": code}, 404, X_Error_Code=code, X_Error_Message=f"{code}.")


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
