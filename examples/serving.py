"""The demo's last chapters: llama.cpp's own server follows a channel, and is checked before it gets requests."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2

if TYPE_CHECKING:
    from demo import Story

EXAMPLES = Path(__file__).resolve().parent
ADAPTORY = Path(sys.executable).with_name("adaptory")
REPOSITORY = "acme/sql-migration"
CHANNEL = f"{REPOSITORY}@live"
SUITE = "sql-served"
PROMPT = "Queries on products filter by status and are slow."
SET = "acme/assistants"
ASKED = {
    "Remove the active column from reviews.": "acme/sql-migration@",
    'resource "aws_s3_bucket" "core_metrics" {\n  acl = "private"\n}': "acme/terraform-review@",
    "Hi, please cancel order 7350. Thanks, Carla": "acme/support-macros@",
    "What is the capital of Japan?": f"{SET}@1.0.0#base",
}
"""Prompts for the set, and what serves each."""
PORTS = 3
"""For llama.cpp: two versions during a move, and one more; or the three members of the set."""
WAIT_S = 120.0


def serve(story: "Story") -> None:
    """Runs a registry, a front and an agent until the chapters are over. Whatever they have started ends with them."""
    base, served, for_all = (story.directory / name for name in ("base.gguf", "served", "served-all"))
    for directory in (served, for_all):
        stop_servers(directory)
        shutil.rmtree(directory, ignore_errors=True)
    story.chapter("The base for llama.cpp, and the server of the registry")
    if not base.is_file():
        subprocess.run([sys.executable, EXAMPLES / "make_gguf.py", base], check=True)
    first = free_ports(PORTS + 2)
    registry, front = f"http://127.0.0.1:{first}", f"http://127.0.0.1:{first + 1}"
    ports = f"{first + 2}-{first + 1 + PORTS}"
    command = f"{sys.executable} {EXAMPLES / 'llama_server.py'} -m {base} --port {ports}"
    with ExitStack() as running:
        running.enter_context(started(story, "serve", "--port", str(first)))
        wait_for(f"{registry}/healthz")
        story.url = registry
        story.run("suite", "add", EXAMPLES / "suites" / f"{SUITE}.yaml")
        for version in ("1.0.0", "1.1.0"):
            story.run("evidence", f"{REPOSITORY}:{version}", "--suite", SUITE)
        story.chapter("An agent keeps llama.cpp in step with a channel; a front takes the requests")
        story.run("promote", f"{REPOSITORY}:1.0.0", "--to", "live", "--new-channel", "--reason", "first release")
        with following(story, CHANNEL, served, command, front):
            follow(story, served, front)
        story.chapter("One adapter cannot hold all three. A set serves each as it is, by a router")
        recipe = EXAMPLES / "all-three-set.yaml"
        print(recipe.read_text().rstrip())
        story.run("compose", recipe, "--follow")
        story.run("promote", f"{SET}:1.0.0", "--to", "live", "--new-channel", "--reason", "all three")
        with following(story, f"{SET}@live", for_all, command, front):
            for prompt, wanted in ASKED.items():
                version, _ = answer(front, f"{SET}@live", prompt)
                if not version.startswith(wanted):
                    sys.exit(f"demo: {wanted} should have answered")
    story.url = None


@contextmanager
def following(story: "Story", channel: str, served: Path, command: str, front: str) -> Generator[None]:
    """An agent of the channel, with a front. The processes of llama.cpp that it starts end with it."""
    with ExitStack() as running:
        running.callback(stop_servers, served)
        options = ("--server", f"llamacpp={command}", "--front", front, "--group", "demo")
        running.enter_context(started(story, "mirror", channel, served, *options))
        wait_for_route(served, channel)
        running.enter_context(started(story, "route", served, "--listen", front.removeprefix("http://")))
        wait_for(f"{front}/healthz")
        yield


def follow(story: "Story", served: Path, front: str) -> None:
    _, old = answer(front)
    story.run("rollout", "status", CHANNEL)
    story.chapter("A promotion changes what users get, and a rollback brings the old answer back")
    story.run("promote", f"{REPOSITORY}:1.1.0", "--to", "live", "--wait", "2m")
    _, new = answer(front)
    story.run("rollback", CHANNEL, "--wait", "2m", "--reason", "to see the old answer again")
    if new == old or answer(front)[1] != old:
        sys.exit("demo: the server's answers did not follow the channel")
    story.chapter("A server with the wrong file under the right name gets no requests")
    reference = f"{REPOSITORY}:1.1.1"
    story.run("push", EXAMPLES / "adapters" / "sql-migration-1.1", reference, "--base", "smollm2")
    story.run("evidence", reference, "--suite", SUITE)
    misplace(story, served, reference)
    story.run("promote", reference, "--to", "live", "--wait", "20s", expect=1)
    if answer(front)[1] != old:
        sys.exit("demo: a version that the check refused was served")
    story.run("rollback", CHANNEL, "--wait", "2m", "--reason", "the server has the wrong file")


def misplace(story: "Story", served: Path, reference: str) -> None:
    """Puts the file of 1.0.0 where the agent keeps that of another release, as a faulty script would."""
    commit = story.ask("show", reference)["commit"]
    directory = served / "gguf" / f"{REPOSITORY}@{reference.partition(':')[2]}" / commit
    directory.mkdir(parents=True)
    (right,) = (served / "gguf").glob(f"{REPOSITORY}@1.0.0/*/adapter.gguf")
    shutil.copy(right, directory)
    print(f"(a script puts the file of 1.0.0 where the agent keeps that of {reference.partition(':')[2]})")


def answer(front: str, channel: str = CHANNEL, prompt: str = PROMPT) -> tuple[str, str]:
    """Sends the prompt to the channel's name, and prints the answer with the version that gave it. Returns both."""
    body = {"model": channel, "temperature": 0, "max_tokens": 32, "messages": [{"role": "user", "content": prompt}]}
    answered = httpx2.post(f"{front}/v1/chat/completions", json=body, timeout=WAIT_S).raise_for_status()
    version, text = answered.headers["x-served-model"], answered.json()["choices"][0]["message"]["content"]
    text = " ".join(text.split())
    shown = " ".join(prompt.split())[:71]
    print(f"\nprompt   {shown}\nserved   {version}\nanswer   {text[:71]}\n", flush=True)
    return version, text


@contextmanager
def started(story: "Story", *arguments: str | Path) -> Generator[None]:
    """A command that runs in the background."""
    print(f"{story.typed(arguments)} &", flush=True)
    with (story.directory / f"{arguments[0]}.log").open("wb") as log:
        process = subprocess.Popen([ADAPTORY, *arguments], env=story.environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(WAIT_S)


def stop_servers(served: Path) -> None:
    """Ends the processes of llama.cpp, which go on when their agent ends."""
    for note in (served / "llamacpp").glob("*.pid"):
        with suppress(ProcessLookupError, ValueError):
            os.killpg(int(note.read_text()), signal.SIGTERM)


def wait_for(url: str) -> None:
    until_s = time.monotonic() + WAIT_S
    while True:
        with suppress(httpx2.TransportError):
            httpx2.get(url, timeout=5.0)
            return
        if time.monotonic() > until_s:
            sys.exit(f"demo: {url} did not answer within {WAIT_S:g} seconds")
        time.sleep(0.1)


def wait_for_route(served: Path, channel: str) -> None:
    until_s, routes = time.monotonic() + WAIT_S, served / "routes.json"
    while not (routes.is_file() and channel in json.loads(routes.read_text())["channels"]):
        if time.monotonic() > until_s:
            sys.exit(f"demo: no server got {channel} within {WAIT_S:g} seconds")
        time.sleep(0.1)


def free_ports(count: int) -> int:
    """The first of that many ports, one after the other, that nothing listens on."""
    for first in range(8470, 9470, 10):
        with ExitStack() as tried, suppress(OSError):
            for port in range(first, first + count):
                tried.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    sys.exit("demo: no free ports between 8470 and 9470")
