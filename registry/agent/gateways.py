"""The routes of a mirror as the configuration of a gateway or controller, which then needs no front of ours.

Each form follows the documentation and source of its project; none of the projects is run by the tests.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from registry.agent.directory import Routes, write_text
from registry.errors import Usage

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GatewayTarget:
    """The names in the files: the pool, backend or service, and the gateway of Envoy's routes, [NAMESPACE/]NAME."""

    pool: str
    gateway: str = ""


def litellm(routes: Routes, _target: GatewayTarget) -> Document:
    """LiteLLM's `model_list`: a deployment for each version and server of a channel. The servers of a version share its
    weight."""
    by_version = {name: _addresses(servers) for name, servers in routes.servers.items()}
    counts = [len(servers) for servers in by_version.values() if servers]
    scale = math.lcm(*counts)
    rows = [
        {
            "model_name": channel,
            "litellm_params": {
                "model": f"hosted_vllm/{name}",
                **({"api_base": f"{server}/v1"} if server else {}),
                "weight": weight * scale // len(by_version[name]),
            },
        }
        for channel, weights in _channels(routes)
        for name, weight in weights.items()
        for server in by_version.get(name, ())
    ]
    return {"model_list": rows}


def _addresses(servers: Sequence[str]) -> list[str]:
    """The addresses of a version's servers; an empty one for all servers that have none, such as a directory."""
    addresses = [server for server in servers if server.startswith(("http://", "https://"))]
    return addresses or [""] * bool(servers)


def _channels(routes: Routes) -> list[tuple[str, Mapping[str, int]]]:
    """The channels with their weights, without those that serve sets: only the front has the sets' routers."""
    return [row for row in sorted(routes.channels.items()) if not row[1].keys() & routes.sets.keys()]


def _loaded(routes: Routes) -> list[tuple[str, str]]:
    """The versions that servers load, with their commits."""
    return [row for row in sorted(routes.commits.items()) if row[0] not in routes.sets]


def _name(text: str, tail: str) -> str:
    """A name of at most 63 characters for Kubernetes; the tail keeps two of them apart."""
    return f"{re.sub('[^a-z0-9]+', '-', text.lower())[: 62 - len(tail)]}-{tail}"


def llm_d(routes: Routes, target: GatewayTarget) -> Document:
    """InferenceModelRewrite of llm-d's router, since 0.9: the channel in a request becomes a version, by weights."""
    rules = [
        {
            "matches": [{"model": {"type": "Exact", "value": channel}}],
            "targets": [{"modelRewrite": name, "weight": weight} for name, weight in weights.items()],
        }
        for channel, weights in _channels(routes)
    ]
    reference = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": target.pool}
    return {
        "apiVersion": "llm-d.ai/v1alpha2",
        "kind": "InferenceModelRewrite",
        "metadata": {"name": f"{target.pool}-channels"},
        "spec": {"poolRef": reference, "rules": rules},
    }


def envoy(routes: Routes, target: GatewayTarget) -> Document:
    """An AIGatewayRoute of Envoy AI Gateway for each channel: the backend gets the version's name instead of the
    channel's. A route may have 15 rules at most, and one without a parent belongs to no gateway."""
    namespace, _, gateway = target.gateway.rpartition("/")
    parent = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": gateway}
    parents = [{**parent, "namespace": namespace} if namespace else parent]
    items = [
        {
            "apiVersion": "aigateway.envoyproxy.io/v1beta1",
            "kind": "AIGatewayRoute",
            "metadata": {"name": _name(f"{target.pool}-{channel}", sha256(channel.encode()).hexdigest()[:8])},
            "spec": {
                "parentRefs": parents,
                "rules": [
                    {
                        "matches": [{"headers": [{"type": "Exact", "name": "x-ai-eg-model", "value": channel}]}],
                        "backendRefs": [
                            {"name": target.pool, "modelNameOverride": name, "weight": weight}
                            for name, weight in weights.items()
                        ],
                    }
                ],
            },
        }
        for channel, weights in _channels(routes)
    ]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def kserve(routes: Routes, target: GatewayTarget) -> Document:
    """A patch of KServe's LLMInferenceService, since 0.17: its adapters, from the registry's hub API (HF_ENDPOINT)."""
    adapters = [{"name": name, "uri": f"hf://{name.replace('@', ':')}"} for name, _ in _loaded(routes)]
    return {
        "apiVersion": "serving.kserve.io/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": {"name": target.pool},
        "spec": {"model": {"lora": {"adapters": adapters}}},
    }


def aibrix(routes: Routes, target: GatewayTarget) -> Document:
    """A ModelAdapter of AIBrix for each version, from the registry's hub API (HF_ENDPOINT). It gives its name to a
    service, so that the name has no dots and at most 63 characters; the commit keeps two of them apart."""
    items = [
        {
            "apiVersion": "model.aibrix.ai/v1alpha1",
            "kind": "ModelAdapter",
            "metadata": {"name": _name(f"lora-{name}", commit[:8])},
            "spec": {
                "baseModel": target.pool,
                "podSelector": {"matchLabels": {"model.aibrix.ai/name": target.pool}},
                "artifactURL": f"huggingface://{name.replace('@', '.')}",
            },
        }
        for name, commit in _loaded(routes)
    ]
    return {"apiVersion": "v1", "kind": "List", "items": items}


FORMS: Mapping[str, Callable[[Routes, GatewayTarget], Document]] = {
    "aibrix": aibrix, "envoy": envoy, "kserve": kserve, "litellm": litellm, "llm-d": llm_d,
}  # fmt: skip
_WEIGHTED = frozenset({"envoy", "litellm", "llm-d"})
"""The forms with weights. The others only load what the routes name."""


class GatewayFile:
    """A file of one form, replaced in one step when the routes change."""

    def __init__(self, text: str, target: GatewayTarget) -> None:
        """Reads FORM=FILE. Raises Usage for an unknown form, and for Envoy's without a gateway."""
        form, _, path = text.partition("=")
        if form not in FORMS or not path:
            raise Usage(
                "bad_server",
                f"--write {text} is unknown.",
                subject=text,
                next_step=f"Write FORM=FILE; the forms are {', '.join(FORMS)}.",
            )
        if form == "envoy" and not re.fullmatch("([a-z0-9.-]+/)?[a-z0-9.-]+", target.gateway):
            raise Usage(
                "bad_server",
                "--write envoy needs the gateway of its routes: one without belongs to no gateway.",
                subject=text,
                next_step="Add --gateway NAME or NAMESPACE/NAME, as of the Gateway that takes the requests.",
            )
        self._render, self._path, self._target = FORMS[form], Path(path), target
        self.splits = form in _WEIGHTED
        self._written = ""

    def write(self, routes: Routes) -> None:
        text = yaml.safe_dump(json.loads(json.dumps(self._render(routes, self._target))), sort_keys=False)
        if text != self._written:
            write_text(self._path, text)
            self._written = text


def write_all(files: Sequence[GatewayFile], routes: Routes) -> None:
    for file in files:
        file.write(routes)
