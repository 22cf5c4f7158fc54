"""SGLang, started with `--enable-lora`. Only a double of it is tested: the server needs a GPU."""

from pathlib import Path

from registry.agent.servers.vllm import VllmServer
from registry.agent.versions import ServedVersion


class SglangServer(VllmServer):
    """Lists its adapters as vLLM does. Its unload waits for the requests that use the name, and it has no metric for
    them."""

    kind = "sglang"

    def load(self, version: ServedVersion, directory: Path) -> None:
        answer = self.request("POST", "/load_lora_adapter", {"lora_name": version.name, "lora_path": str(directory)})
        if answer.status_code != 200 and self.loaded().get(version.name) != str(directory):
            raise self.refused(f"load {version.name}", answer)

    def unload(self, name: str) -> None:
        answer = self.request("POST", "/unload_lora_adapter", {"lora_name": name})
        if answer.status_code != 200 and name in self.loaded():
            raise self.refused(f"unload {name}", answer)

    def busy(self) -> frozenset[str]:
        return frozenset()
