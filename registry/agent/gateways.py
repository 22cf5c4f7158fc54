"""The routes of a mirror as the configuration of a gateway or controller, which then needs no front of ours.

Each form follows the documentation of its project; none of the projects is run by the tests.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from registry.agent.directory import Routes, write_text
from registry.errors import Usage

Document = Mapping[str, Any]


def litellm(routes: Routes, _pool: str) -> Document:
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


def llm_d(routes: Routes, pool: str) -> Document:
    """InferenceModelRewrite of llm-d: the channel in a request becomes a version, by weights."""
    rules = [
        {
            "matches": [{"model": {"type": "Exact", "value": channel}}],
            "targets": [{"modelRewrite": name, "weight": weight} for name, weight in weights.items()],
        }
        for channel, weights in _channels(routes)
    ]
    reference = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": pool}
    return {
        "apiVersion": "inference.networking.x-k8s.io/v1alpha2",
        "kind": "InferenceModelRewrite",
        "metadata": {"name": f"{pool}-channels"},
        "spec": {"poolRef": reference, "rules": rules},
    }


def envoy(routes: Routes, pool: str) -> Document:
    """AIGatewayRoute of Envoy AI Gateway: the backend gets the version's name instead of the channel's."""
    rules = [
        {
            "matches": [{"headers": [{"type": "Exact", "name": "x-ai-eg-model", "value": channel}]}],
            "backendRefs": [
                {"name": pool, "modelNameOverride": name, "weight": weight} for name, weight in weights.items()
            ],
        }
        for channel, weights in _channels(routes)
    ]
    return {
        "apiVersion": "aigateway.envoyproxy.io/v1alpha1",
        "kind": "AIGatewayRoute",
        "metadata": {"name": f"{pool}-channels"},
        "spec": {"rules": rules},
    }


def kserve(routes: Routes, pool: str) -> Document:
    """A patch of KServe's LLMInferenceService: its adapters, from the registry's hub API (HF_ENDPOINT)."""
    adapters = [{"name": name, "uri": f"hf://{name.replace('@', ':')}"} for name, _ in _loaded(routes)]
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LLMInferenceService",
        "metadata": {"name": pool},
        "spec": {"model": {"lora": {"adapters": adapters}}},
    }


def aibrix(routes: Routes, pool: str) -> Document:
    """A ModelAdapter of AIBrix for each version, from the registry's hub API (HF_ENDPOINT). It gives its name to a
    service, so that the name has no dots and at most 63 characters; the commit keeps two of them apart."""
    items = [
        {
            "apiVersion": "model.aibrix.ai/v1alpha1",
            "kind": "ModelAdapter",
            "metadata": {"name": f"lora-{re.sub('[^a-z0-9]+', '-', name.lower())[:49]}-{commit[:8]}"},
            "spec": {
                "baseModel": pool,
                "podSelector": {"matchLabels": {"model.aibrix.ai/name": pool}},
                "artifactURL": f"huggingface://{name.replace('@', '.')}",
            },
        }
        for name, commit in _loaded(routes)
    ]
    return {"apiVersion": "v1", "kind": "List", "items": items}


FORMS: Mapping[str, Callable[[Routes, str], Document]] = {
    "aibrix": aibrix, "envoy": envoy, "kserve": kserve, "litellm": litellm, "llm-d": llm_d,
}  # fmt: skip
_WEIGHTED = frozenset({"envoy", "litellm", "llm-d"})
"""The forms with weights. The others only load what the routes name."""


class GatewayFile:
    """A file of one form, replaced in one step when the routes change."""

    def __init__(self, text: str, pool: str) -> None:
        """Reads FORM=FILE. Raises Usage for an unknown form."""
        form, _, path = text.partition("=")
        if form not in FORMS or not path:
            raise Usage(
                "bad_server",
                f"--write {text} is unknown.",
                subject=text,
                next_step=f"Write FORM=FILE; the forms are {', '.join(FORMS)}.",
            )
        self._render, self._path, self._pool = FORMS[form], Path(path), pool
        self.splits = form in _WEIGHTED
        self._written = ""

    def write(self, routes: Routes) -> None:
        text = yaml.safe_dump(json.loads(json.dumps(self._render(routes, self._pool))), sort_keys=False)
        if text != self._written:
            write_text(self._path, text)
            self._written = text


def write_all(files: Sequence[GatewayFile], routes: Routes) -> None:
    for file in files:
        file.write(routes)
