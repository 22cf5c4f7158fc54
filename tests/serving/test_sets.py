"""A channel that serves a set: each request is answered by the member that its prompt is for, or by the base."""

from pathlib import Path

import httpx2
import pytest
import yaml

from registry.agent.directory import MirrorDirectory
from registry.agent.front import prompt_of
from tests import services
from tests.eventually import eventually
from tests.serving.conftest import Site, loaded, mirrored
from tests.serving.double import BASE, double
from tests.serving.test_mirror import NEW, OLD, front

TERRAFORM, SET = "acme/terraform@1.0.0", "acme/assistants@1.0.0"
ASKED = {OLD: "sql 77", TERRAFORM: "terraform 78", f"{SET}#base": "水曜日"}


def compose(site: Site, directory: Path, version: str, *inputs: str) -> None:
    recipe = directory / f"{version}.yaml"
    rows = [{"adapter": name, "prompts": [f"{name[5:].partition(':')[0]} {n}" for n in range(5)]} for name in inputs]
    recipe.write_text(yaml.safe_dump({"inputs": rows, "set": f"acme/assistants:{version}", "gates": []}))
    site.cli.ok("compose", recipe, "--follow")


def served_by(url: str, prompt: str, model: str = "acme/assistants@prod") -> str:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    answer = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-served-model"])


def test_a_front_answers_each_prompt_by_the_member_that_it_is_for_and_a_move_changes_the_members(
    site: Site, tmp_path: Path
) -> None:
    compose(site, tmp_path, "1.0.0", "acme/sql:1.0.0", "acme/terraform:1.0.0")
    site.cli.ok("promote", "acme/assistants:1.0.0", "--to", "prod", "--new-channel")
    port = services.free_port()
    options = ("--front", f"http://127.0.0.1:{port}", "--keep", "0", "--grace", "1s")
    with (
        double(max_loras=4) as (server, _),
        mirrored(site, "--server", f"vllm={server}", *options, channels=("acme/assistants@prod",)) as agent,
        front(agent, port) as url,
    ):
        eventually(
            lambda: SET in MirrorDirectory(agent.directory).routes().sets and len(loaded(server)) == 2, within_s=60
        )
        assert loaded(server).keys() == {OLD, TERRAFORM}, "the members, and not the set, are loaded"
        assert MirrorDirectory(agent.directory).routes().bases == {server: BASE}
        assert {name: served_by(url, prompt) for name, prompt in ASKED.items()} == {name: name for name in ASKED}
        figures = httpx2.get(f"{url}/-/figures").json()["channels"]["acme/assistants@prod"]
        assert {name: row["requests"] for name, row in figures.items()} == {SET: 3}, "a canary compares sets"
        assert served_by(url, "terraform 78", SET) == TERRAFORM

        compose(site, tmp_path, "1.1.0", "acme/sql:1.1.0", "acme/terraform:1.0.0")
        site.cli.ok("promote", "acme/assistants:1.1.0", "--to", "prod")
        eventually(lambda: served_by(url, "sql 77") == NEW, within_s=60)
        assert served_by(url, "terraform 78") == TERRAFORM
        eventually(lambda: loaded(server).keys() == {NEW, TERRAFORM}, within_s=60)
        site.cli.ok("rollback", "acme/assistants@prod", "--reason", "as before")
        eventually(lambda: served_by(url, "sql 77") == OLD, within_s=60)


def test_a_set_whose_member_is_gone_is_not_switched_to_and_says_why(site: Site, tmp_path: Path) -> None:
    compose(site, tmp_path, "1.0.0", "acme/sql:1.0.0")
    compose(site, tmp_path, "2.0.0", "acme/sql:1.1.0", "acme/terraform:1.0.0")
    site.cli.ok("promote", "acme/assistants:1.0.0", "--to", "prod", "--new-channel")
    with (
        double(max_loras=4) as (server, _),
        mirrored(site, "--server", f"vllm={server}", channels=("acme/assistants@prod",)) as agent,
    ):
        agent.wait_for(SET, "acme/assistants@prod")
        agent.kill()
        site.cli.ok("promote", "acme/assistants:2.0.0", "--to", "prod")
        site.cli.ok("takedown", "acme/terraform:1.0.0", "--reason", "not ours")
        agent.start()
        agent.wait_for_problem("was taken down")
        assert agent.routed("acme/assistants@prod") == SET
        assert MirrorDirectory(agent.directory).routes().sets == {SET: {"sql": OLD}}


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"prompt": "a"}, "a"),
        ({"prompt": ["a", "b"]}, "a\nb"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]}, "a"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}, "a"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"content": "c"}]},
            "a\nc",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}, "a"),
        ({"prompt": [1, 2, 3]}, ""),
        ({"messages": 7}, ""),
        ({}, ""),
    ],
)
def test_the_text_that_is_routed_is_the_users(document: dict[str, object], text: str) -> None:
    assert prompt_of(document) == text
