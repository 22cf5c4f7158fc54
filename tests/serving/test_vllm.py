"""A real vLLM on the CPU: the contract of servers, moves beside clients, the served check, and what ends the server."""

import shutil
import threading
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path

import httpx2
import pytest

from registry.agent.directory import MirrorDirectory
from registry.agent.servers.vllm import VllmServer
from registry.agent.versions import ServedVersion
from tests import services
from tests.eventually import eventually
from tests.serving import real
from tests.serving.conftest import Site, loaded, mirrored
from tests.serving.contract import (
    COMMIT,
    one_release,
    test_a_name_that_is_not_loaded_fails_its_check,
    test_a_second_load_of_the_same_directory_and_an_unload_of_nothing_are_no_errors,
    test_a_server_that_refuses_is_quoted,
    test_a_version_is_listed_with_its_directory_until_it_is_unloaded,
)
from tests.serving.test_mirror import Users, front

pytestmark = pytest.mark.long
__all__ = [
    "test_a_name_that_is_not_loaded_fails_its_check",
    "test_a_second_load_of_the_same_directory_and_an_unload_of_nothing_are_no_errors",
    "test_a_server_that_refuses_is_quoted",
    "test_a_version_is_listed_with_its_directory_until_it_is_unloaded",
]
OLD, NEW = real.NAMES
THIRD = "acme/support@1.0.0"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    real.interpreter()
    return real.base_in(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def url(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    with real.vllm(base, tmp_path_factory.mktemp("vllm") / "vllm.log") as address:
        with closing(VllmServer(address)) as server:
            assert server.busy() == frozenset(), "no request for an adapter has come yet"
        yield address


@pytest.fixture
def server(url: str) -> Generator[VllmServer]:
    with closing(VllmServer(url)) as opened:
        for name in opened.loaded():
            opened.unload(name)
        yield opened


@pytest.fixture
def directory(tmp_path: Path) -> MirrorDirectory:
    return one_release(tmp_path / "served", real.ADAPTERS / "sql-migration")


@pytest.fixture(scope="module")
def registry(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Site]:
    running = real.stocked(tmp_path_factory.mktemp("registry"), base)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def site(registry: Site, tmp_path: Path) -> Site:
    registry.directory = tmp_path
    return registry


def test_requests_that_run_and_those_that_were_broken_off_are_counted(
    server: VllmServer, url: str, directory: MirrorDirectory, base: Path
) -> None:
    server.load(ServedVersion("acme/sql", "1.0.0", COMMIT), directory.path(COMMIT))
    asked = {"model": OLD, **real.question(base, 40), "ignore_eos": True}
    thread = threading.Thread(
        target=httpx2.post, args=(f"{url}/v1/completions",), kwargs={"json": asked, "timeout": 60}
    )
    thread.start()
    eventually(lambda: server.busy() == {OLD}, within_s=20)
    thread.join()
    eventually(lambda: server.busy() == frozenset(), within_s=5)
    with suppress(httpx2.ReadTimeout):
        httpx2.post(f"{url}/v1/completions", json=asked, timeout=2)
    eventually(lambda: server.busy() == frozenset(), within_s=5)


def test_promotions_change_what_users_get_and_no_request_fails_or_meets_another_adapter(
    site: Site, server: VllmServer, url: str, base: Path
) -> None:
    asked, port = real.question(base), services.free_port()
    texts = real.texts(url, asked)
    words = ("--server", f"vllm={url}", "--front", f"http://127.0.0.1:{port}", "--group", "serving")
    with mirrored(site, *words) as agent, front(agent, port) as address:
        agent.wait_for(OLD, within_s=120)
        with Users(address, "acme/sql@prod", texts, 2, asked) as users:
            for version in ("1.1.0", "1.0.0", "1.1.0", "1.0.0"):
                site.promote(version)
                agent.wait_for(f"acme/sql@{version}", within_s=120)
                users.wait_for(f"acme/sql@{version}")
        assert users.wrong == []
        assert set(users.served) == {OLD, NEW}
        eventually(lambda: set(loaded(url)) == {OLD}, within_s=60)
        eventually(lambda: site.cli.json("rollout", "status", "acme/sql@prod")["proved"] == 1, within_s=60)

        site.promote("1.2.0")  # vLLM loads it with 200, and would answer as the base does
        agent.wait_for_problem("does not apply acme/sql@1.2.0: share", within_s=120)
        assert agent.routed() == OLD
        assert real.answer(address, "acme/sql@prod", asked) == texts[OLD]
        site.cli.ok("rollback", "acme/sql@prod")
        eventually(lambda: agent.problems() == [], within_s=60)


def test_the_release_is_proved_and_nothing_else_is(site: Site, server: VllmServer, url: str, tmp_path: Path) -> None:
    evidence = real.evidence_of(site, "1.1.0")
    for what, adapter in real.wrong_things(tmp_path).items():
        if adapter is not None:
            real.load(url, NEW, adapter)
        result = server.check(NEW if adapter is not None else "base", evidence)
        assert result.verdict == ("proved" if what == "the release" else "failed"), (what, result)
        assert result.served is not None
        if what in ("unapplied names", "the base"):
            assert abs(result.served.share) < 0.1, (what, result)
        server.unload(NEW)
    assert server.check(NEW, evidence).verdict == "failed"


def test_an_example_that_is_longer_than_the_servers_context_proves_nothing(
    site: Site, server: VllmServer, url: str
) -> None:
    real.load(url, NEW, real.ADAPTERS / "sql-migration-1.1")
    [one, *_] = real.evidence_of(site, "1.1.0")
    long = [real.EvidenceExample((1,) * 600 + one.ids, 600 + one.start, one.release, one.base)]
    result = server.check(NEW, long)
    assert (result.verdict, "takes at most 512 tokens" in result.why) == ("unproved", True)


def ask(url: str, name: str, length: int, base: Path) -> int:
    body = {"model": name, **real.question(base, length), "ignore_eos": True}
    with suppress(httpx2.TransportError):
        return httpx2.post(f"{url}/v1/completions", json=body, timeout=120).status_code
    return 500


def test_another_path_under_a_loaded_name_ends_the_engine(base: Path, tmp_path: Path) -> None:
    """What the double does too: a request of the old path runs, one of the new path comes, then a third adapter."""
    with real.vllm(base, tmp_path / "vllm.log") as url:
        real.load(url, "acme/sql@prod", real.ADAPTERS / "sql-migration")
        asked = [threading.Thread(target=ask, args=(url, "acme/sql@prod", 100, base)) for _ in range(2)]
        asked[0].start()
        eventually(lambda: 'running_lora_adapters="acme/sql@prod"' in httpx2.get(f"{url}/metrics").text, within_s=20)
        real.unload(url, "acme/sql@prod")
        real.load(url, "acme/sql@prod", real.ADAPTERS / "sql-migration-1.1")
        asked[1].start()
        threading.Event().wait(2)  # it is under way
        with suppress(httpx2.HTTPError):
            real.load(url, THIRD, real.ADAPTERS / "support-macros")
        assert ask(url, THIRD, 2, base) == 500
        for thread in asked:
            thread.join()
        assert ask(url, "base", 2, base) == 500, "requests to the base fail too"
    assert "convert_mapping" in (tmp_path / "vllm.log").read_text()


def test_a_moved_link_answers_from_an_old_cache_and_a_removed_directory_ends_the_engine(
    base: Path, tmp_path: Path
) -> None:
    old, new, link = tmp_path / "1.0.0", tmp_path / "1.1.0", tmp_path / "prod"
    shutil.copytree(real.ADAPTERS / "sql-migration", old)
    shutil.copytree(real.ADAPTERS / "sql-migration-1.1", new)
    link.symlink_to(old)
    asked = {**real.question(base), "logprobs": 1}
    asked["prompt"] = asked["prompt"].replace(
        real.QUESTION, "The table belongs to the schema app. " * 20 + real.QUESTION
    )

    def values(name: str) -> list[float]:
        answered = httpx2.post(f"{url}/v1/completions", json={"model": name, **asked}, timeout=120).json()
        return answered["choices"][0]["logprobs"]["token_logprobs"]

    with real.vllm(base, tmp_path / "vllm.log", "--max-cpu-loras", "2") as url:
        real.load(url, "prod", link)
        values("prod")
        (tmp_path / "next").symlink_to(new)
        (tmp_path / "next").replace(link)
        real.unload(url, "prod")
        real.load(url, "prod", link)
        real.load(url, NEW, new)
        assert values("prod") != values(NEW), "the prompt's part of the answer is the old version's"
        real.unload(url, "prod")

        real.load(url, OLD, old)
        real.load(url, THIRD, real.ADAPTERS / "support-macros")
        shutil.rmtree(old)
        assert {ask(url, name, 2, base) for name in (NEW, THIRD)} == {200}
        assert ask(url, OLD, 2, base) == 500, "it was evicted, and is read again"
        assert ask(url, "base", 2, base) == 500
