"""Serving goes on while the disk is full, the registry is away or clocks jump; health and reports say so."""

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests import services
from tests.clocks import JumpingClocks
from tests.eventually import eventually
from tests.scenarios.world import own_environment
from tests.serving.conftest import Agent, Site, loaded, mirrored
from tests.serving.double import double
from tests.small_disk import small_disk

OLD, NEW = "acme/sql@1.0.0", "acme/sql@1.1.0"
NODE = ("--group", "serving", "--node", "gpu-1")


def reported(site: Site) -> dict[str, Any]:
    """The node as the channel's rollout shows it."""
    (node,) = site.cli.json("rollout", "status", "acme/sql@prod")["nodes"]
    return node


def fill(disk: Path) -> Path:
    """Takes all space that is left, by a file."""
    filler = disk / "of others"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            while True:
                try:
                    file.write(b"\0" * size)
                except OSError:
                    break
    return filler


@contextmanager
def on_a_small_disk(site: Site) -> Generator[tuple[Path, Agent, str, BaseProcess]]:
    """The disk, the agent that follows from it, and its server's address and process."""
    with (
        small_disk(site.directory / "served") as disk,
        double() as (url, server),
        mirrored(site, "--server", f"vllm={url}", *NODE) as agent,
    ):
        agent.wait_for(OLD)
        eventually(lambda: reported(site)["state"] == "following", within_s=30)
        yield disk, agent, url, server


@contextmanager
def restarted(url: str, server: BaseProcess) -> Generator[None]:
    """Another server on the same port, which has no adapter loaded."""
    server.kill()
    server.join(10)
    with double(port=int(url.rpartition(":")[2])):
        yield


def test_a_full_disk_changes_nothing_that_is_served_and_is_reported(site: Site) -> None:
    with on_a_small_disk(site) as (disk, agent, url, server):
        filler = fill(disk)
        site.promote("1.1.0")
        agent.wait_for_problem("disk")
        eventually(lambda: reported(site)["state"] == "failed", within_s=30)
        node = reported(site)
        assert (node["version"], "disk" in node["error"]) == ("1.0.0", True)
        with restarted(url, server):
            eventually(lambda: OLD in loaded(url), within_s=30)
            assert agent.routed() == OLD
            filler.unlink()
            agent.wait_for(NEW)
            eventually(lambda: reported(site)["state"] == "following", within_s=30)
            eventually(lambda: agent.problems() == [], within_s=30)


@pytest.mark.long
def test_a_disk_that_becomes_read_only_changes_nothing_that_is_served_and_is_reported(site: Site) -> None:
    with on_a_small_disk(site) as (disk, agent, url, server):
        subprocess.run(["/bin/mount", "-o", "remount,ro", disk], check=True)
        agent.wait_for_problem("Read-only")
        eventually(lambda: "Read-only" in (reported(site)["error"] or ""), within_s=30)
        assert reported(site)["state"] == "following", "nothing had to be written"
        site.promote("1.1.0")
        eventually(lambda: reported(site)["state"] == "failed", within_s=30)
        with restarted(url, server):
            eventually(lambda: OLD in loaded(url), within_s=30)
            assert agent.routed() == OLD
            subprocess.run(["/bin/mount", "-o", "remount,rw", disk], check=True)
            agent.wait_for(NEW)
            eventually(lambda: agent.problems() == [], within_s=30)


@contextmanager
def elsewhere(site: Site, clocks: JumpingClocks, *words: object) -> Generator[Agent]:
    """An agent with clocks of its own."""
    agent = Agent(site, site.directory / "served", ("acme/sql@prod", site.directory / "served", *words))
    command = [sys.executable, "-m", "registry.cli.start", "mirror", *map(str, agent.words)]
    environment = own_environment(site.cli) | clocks.environment
    with agent.directory.with_name(f"{agent.directory.name}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--listen", f"127.0.0.1:{agent.listen}"], env=environment, stdout=log, stderr=log
        )
    try:
        yield agent
    finally:
        process.kill()
        process.wait()


def lost(url: str) -> list[str]:
    """The names that a server has loaded from directories that are gone."""
    return [name for name, path in loaded(url).items() if not Path(path).is_dir()]


@pytest.mark.long
def test_a_clock_that_jumps_changes_nothing_that_is_served_and_is_reported(site: Site) -> None:
    clocks, days = JumpingClocks(site.directory), 2 * 86_400
    with double() as (url, _), elsewhere(site, clocks, "--server", f"vllm={url}", *NODE) as agent:
        agent.wait_for(OLD)
        eventually(lambda: reported(site)["state"] == "following", within_s=30)
        for ahead_s, says, version in ((days, "ahead of", "1.1.0"), (-days, "behind", "1.0.0")):
            clocks.jump(ahead_s)
            agent.wait_for_problem(f"2,880 min {says} the registry's")
            eventually(lambda words=says: words in (reported(site)["error"] or ""), within_s=30)
            assert reported(site)["state"] == "following", "it is no reason to fail"
            site.promote(version)
            agent.wait_for(f"acme/sql@{version}")
            eventually(lambda name=f"acme/sql@{version}": set(loaded(url)) == {name}, within_s=30)
            assert lost(url) == []
        clocks.jump()
        eventually(lambda: agent.problems() == [], within_s=30)
        eventually(lambda: reported(site)["error"] is None, within_s=30)


@pytest.mark.long
def test_an_hour_without_the_registry_changes_nothing_that_is_served(site: Site) -> None:
    clocks, port = JumpingClocks(site.directory), services.free_port()
    with double(port=port) as (url, server), elsewhere(site, clocks, "--server", f"vllm={url}", *NODE) as agent:
        agent.wait_for(OLD)
        eventually(lambda: reported(site)["state"] == "following", within_s=30)
        site.stop()
        agent.wait_for_problem("does not answer")
        clocks.jump(3600, 3600)
        eventually(lambda: agent.health["status"] == "degraded", within_s=30)
        server.kill()
        server.join(10)
        with double(port=port):
            eventually(lambda: OLD in loaded(url), within_s=30)
            assert (agent.routed(), lost(url)) == (OLD, [])
            clocks.jump(0, 3600)  # no hour has passed for the registry
            site.start()
            site.promote("1.1.0")
            agent.wait_for(NEW, within_s=60)
            eventually(lambda: reported(site)["version"] == "1.1.0", within_s=30)
            eventually(lambda: agent.problems() == [], within_s=30)
