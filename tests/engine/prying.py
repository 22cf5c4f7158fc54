"""Tasks that look at what their process has, or do what a process should not."""

import ctypes
import hashlib
import itertools
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from registry.formats.references import Digest
from registry.worker.engine.frames import FrameSocket
from registry.worker.engine.units import Count, Node, Result, Task, Unit, always_intact
from registry.worker.node_files import are_stored, from_rows, store_directory, to_rows
from tests.engine.counted import note


def look(_node: Node, unit: Unit, _count: Count) -> Result:
    """The environment and the open files of its process, and those of the process that it was forked from."""
    own, template = (Path(f"/proc/{pid}") for pid in (os.getpid(), os.getppid()))
    return {
        "environment": dict(os.environ),
        "started with": (template / "environ").read_bytes().decode(errors="replace"),
        "files": {path.name: str(path.readlink()) for path in own.glob("fd/*") if path.is_symlink()},
        "process": os.getpid(),
        "template": os.getppid(),
        "unit": unit.name,
    }


def read(node: Node, unit: Unit, _count: Count) -> Result:
    """Reads a blob, whether its content names it or only a hint."""
    with node.store.open(Digest(unit.hints["sha256"])) as source:
        return {"sha256": hashlib.sha256(source.read()).hexdigest()}


def claim(_node: Node, unit: Unit, _count: Count) -> Result:
    """Returns a file that it has not made."""
    return {"files": [["stolen", unit.hints["size_bytes"], unit.hints["sha256"]]]}


def make(node: Node, unit: Unit, count: Count) -> Result:
    """Makes a file of 20 MB, and counts."""
    with node.scratch() as directory:
        (directory / "made").write_bytes(unit.content["seed"].encode() * (1 << 20))
        count(5)
        return {"files": to_rows(store_directory(node, directory))}


def stick(_node: Node, unit: Unit, _count: Count) -> Result:
    """Never returns from one operation, which holds the interpreter's lock; a process that it started sleeps."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    note(unit, f"{os.getpid()} {os.getppid()} {other.pid}")
    return {"found": "x" in itertools.repeat("y")}


_ORPHAN = """
import os, sys, time
if os.fork():
    sys.exit()
os.setsid()
if os.fork():
    sys.exit()
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
time.sleep(600)
"""


def detach(_node: Node, unit: Unit, _count: Count) -> Result:
    """Starts a process that leaves its group, its session and its parent."""
    path = Path(unit.hints["journal"])
    subprocess.run([sys.executable, "-c", _ORPHAN, str(path)], check=True)
    while not path.exists() or not path.read_text().endswith("\n"):
        time.sleep(0.01)
    return {"orphan": int(path.read_text())}


def confuse(node: Node, unit: Unit, _count: Count) -> Result:
    """Sends its worker what no child sends, on its own socket."""
    end: socket.socket = vars(vars(vars(node.store)["_calls"])["_wire"])["_end"]
    how = unit.content["how"]
    if document := MALFORMED.get(how):
        end.sendall(struct.pack("!II", len(document), 0) + document)
    else:
        for _ in range(200):
            first, second = socket.socketpair()
            held.append(first)
            with Path(os.devnull).open() as other:
                given = other.fileno() if how == "not a socket" else second.fileno()
                socket.send_fds(end, [struct.pack("!II", 2, 0)], [given])
                end.sendall(b"{}")
            second.close()
    return {"sent": how}


held: list[socket.socket] = []
MALFORMED = {
    "deep": b"[" * 100_000,
    "list": b"[]",
    "no result": b"{}",
    "two answers": b'{"result": {}, "error": {}}',
    "a text for a number": b'{"count": "5"}',
    "a text for seconds": b'{"result": {}, "seconds": "5"}',
}


def ask(node: Node, unit: Unit, _count: Count) -> Result:
    """Sends its worker each message, and returns the replies."""
    connection: FrameSocket = vars(node.store)["_calls"].connect()
    replies: list[Result] = []
    for message in unit.content["messages"]:
        connection.send(message)
        replies.append(connection.receive().message)
    return {"replies": replies}


def crash(_node: Node, unit: Unit, _count: Count) -> Result:
    note(unit, "begun")
    return {"read": ctypes.string_at(0)}


def eat(_node: Node, unit: Unit, _count: Count) -> Result:
    held = list[bytes]()
    while True:
        held.append(os.urandom(1 << 20) * 16)
        time.sleep(0.01)
        if len(held) * 16 > unit.content["megabytes"]:
            return {"held": len(held)}


def _stored(node: Node, result: Result) -> bool:
    return are_stored(node, from_rows(result["files"]))


LOOK = Task(name="look", version=1, run=look, intact=always_intact)
READ = Task(name="read", version=1, run=read, intact=always_intact)
CLAIM = Task(name="claim", version=1, run=claim, intact=_stored)
MAKE = Task(name="make", version=1, run=make, intact=_stored)
DETACH = Task(name="detach", version=1, run=detach, intact=always_intact)
CONFUSE = Task(name="confuse", version=1, run=confuse, intact=always_intact)
ASK = Task(name="ask", version=1, run=ask, intact=always_intact)
STICK = Task(name="stick", version=1, run=stick, intact=always_intact)
CRASH = Task(name="crash", version=1, run=crash, intact=always_intact)
EAT = Task(name="eat", version=1, run=eat, intact=always_intact)
