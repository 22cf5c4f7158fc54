"""vLLM, started with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, with one API process."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from registry.agent.servers.protocol import CheckResult, HttpServer
from registry.agent.versions import ServedVersion
from registry.errors import RegistryError, Unavailable

_REQUESTS = re.compile(r"^vllm:lora_requests_info\{(.*)\} ([0-9.eE+-]+)\s*$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class VllmServer(HttpServer):
    """Lists names with their paths, which makes the server itself the ledger of what it has loaded."""

    kind = "vllm"

    def loaded(self) -> Mapping[str, str]:
        document = self.document("/v1/models")
        try:
            rows = [row for row in document["data"] if row.get("parent")]
            return {_text(row["id"]): _text(row["root"] or "") for row in rows if row["id"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise Unavailable(
                "server_unreachable", f"{self.address}/v1/models is not a list of models.", subject=self.address
            ) from error

    def load(self, version: ServedVersion, directory: Path) -> None:
        body = {"lora_name": version.name, "lora_path": str(directory)}
        answer = self.request("POST", "/v1/load_lora_adapter", body)
        # A resolver, or an earlier request whose answer was lost, may have loaded the same directory.
        if answer.status_code != 200 and self.loaded().get(version.name) != str(directory):
            raise self.refused(f"load {version.name}", answer)

    def unload(self, name: str) -> None:
        answer = self.request("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if answer.status_code not in (200, 404):
            raise self.refused(f"unload {name}", answer)

    def busy(self) -> frozenset[str] | None:
        """From the newest sample of `vllm:lora_requests_info`: its value is the time at which it was set. None for a
        server that has no such metric."""
        answer = self.request("GET", "/metrics")
        if answer.status_code != 200:
            raise self.refused("GET /metrics", answer)
        samples: list[tuple[float, str]] = []
        for labels, value in _REQUESTS.findall(answer.text):
            with suppress(ValueError):
                samples.append((float(value), labels))
        if not samples:
            return None
        labels = dict(_LABEL.findall(max(samples)[1]))
        names = f"{labels.get('running_lora_adapters', '')},{labels.get('waiting_lora_adapters', '')}"
        return frozenset(filter(None, names.split(",")))

    def check(self, name: str) -> CheckResult:
        body = {"model": name, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        try:
            answer = self.request("POST", "/v1/completions", body)
        except RegistryError as error:
            return CheckResult("failed", error.detail)
        if answer.status_code != 200:
            return CheckResult("failed", self.refused(f"a request to {name}", answer).detail)
        return CheckResult("unproved")


def _text(value: object) -> str:
    """Raises TypeError for anything but a text."""
    if not isinstance(value, str):
        raise TypeError
    return value
