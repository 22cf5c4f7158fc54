"""The routes of a mirror as files of other gateways and controllers: golden, since none of these is run here."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from registry.agent.directory import Routes
from registry.agent.gateways import FORMS, GatewayFile, GatewayTarget
from registry.errors import Usage
from tests.eventually import eventually
from tests.serving.conftest import Site, mirrored

TARGET = GatewayTarget("vllm", "envoy/gate")
GOLDEN = Path(__file__).parent / "golden"
ROUTES = Routes(
    channels={"acme/sql@prod": {"acme/sql@1.1.0": 90, "acme/sql@1.2.0": 10}, "acme/hr@prod": {"acme/hr@2.0.0": 100}},
    since={},
    commits={"acme/sql@1.1.0": "a" * 40, "acme/sql@1.2.0": "b" * 40, "acme/hr@2.0.0": "c" * 40},
    servers={
        "acme/sql@1.1.0": ("http://a:8000", "http://b:8000"),
        "acme/sql@1.2.0": ("http://a:8000",),
        "acme/hr@2.0.0": ("http://a:8000",),
    },
)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_file_has_the_form_that_its_project_documents(form: str, tmp_path: Path) -> None:
    path = tmp_path / "routes.yaml"
    GatewayFile(f"{form}={path}", TARGET).write(ROUTES)
    assert path.read_text() == (GOLDEN / f"{form}.yaml").read_text()


@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_set_is_in_no_file_and_its_members_are_loaded_as_others_are(form: str, tmp_path: Path) -> None:
    """Only the front has the router of a set."""
    path, name = tmp_path / "routes.yaml", "acme/all@1.0.0"
    channels = {**ROUTES.channels, "acme/all@prod": {name: 100}}
    commits, sets = {**ROUTES.commits, name: "d" * 40}, {name: {"sql": "acme/sql@1.1.0", "hr": "acme/hr@2.0.0"}}
    GatewayFile(f"{form}={path}", TARGET).write(replace(ROUTES, channels=channels, commits=commits, sets=sets))
    assert path.read_text() == (GOLDEN / f"{form}.yaml").read_text()


def test_a_command_is_no_address_of_a_server(tmp_path: Path) -> None:
    path = tmp_path / "routes.yaml"
    GatewayFile(f"litellm={path}", TARGET).write(replace(ROUTES, servers=dict.fromkeys(ROUTES.servers, ("./load",))))
    rows = yaml.safe_load(path.read_text())["model_list"]
    assert [row["litellm_params"].keys() for row in rows] == [{"model", "weight"}] * 3


def test_an_unknown_form_is_refused_with_the_known_ones() -> None:
    with pytest.raises(Usage) as refused:
        GatewayFile("nginx=routes.conf", TARGET)
    assert "litellm" in refused.value.next_step


def test_a_route_of_envoy_without_a_gateway_is_refused() -> None:
    with pytest.raises(Usage) as refused:
        GatewayFile("envoy=routes.yaml", GatewayTarget("vllm"))
    assert "--gateway NAME" in refused.value.next_step


def test_envoy_has_a_route_for_each_of_many_channels_under_a_name_that_kubernetes_takes(tmp_path: Path) -> None:
    """A route takes at most 15 rules, and a name at most 63 characters."""
    path, names = (
        tmp_path / "routes.yaml",
        [f"acme/{'a' * 60}{n}@prod" for n in range(40)] + ["acme/a.b@c", "acme/a-b@c"],
    )
    GatewayFile(f"envoy={path}", TARGET).write(
        replace(ROUTES, channels=dict.fromkeys(names, ROUTES.channels["acme/hr@prod"]))
    )
    items = yaml.safe_load(path.read_text())["items"]
    values = [item["spec"]["rules"][0]["matches"][0]["headers"][0]["value"] for item in items]
    written = {item["metadata"]["name"] for item in items}
    assert sorted(values) == sorted(names)
    assert len(written) == len(names)
    assert all(re.fullmatch("[a-z0-9][a-z0-9-]{,61}[a-z0-9]", name) for name in written)


def test_a_file_follows_the_routes(site: Site) -> None:
    path = site.directory / "litellm.yaml"

    def weights() -> list[int]:
        return [row["litellm_params"]["weight"] for row in yaml.safe_load(path.read_text())["model_list"]]

    with mirrored(site, "--write", f"litellm={path}", "--group", "gpus") as agent:
        agent.wait_for("acme/sql@1.0.0")
        eventually(lambda: site.cli("promote", "acme/sql:1.1.0", "--to", "prod", "--canary", "10%").code == 0)
        eventually(lambda: weights() == [90, 10])
        site.promote("1.1.0")
        agent.wait_for("acme/sql@1.1.0")
        (row,) = yaml.safe_load(path.read_text())["model_list"]
        assert row["model_name"] == "acme/sql@prod"
        assert row["litellm_params"]["model"] == "hosted_vllm/acme/sql@1.1.0"
