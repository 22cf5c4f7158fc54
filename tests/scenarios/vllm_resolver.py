"""vLLM's own resolver of adapters on the hub, as one process of a server would run it.

Run in an environment with vLLM: `HF_ENDPOINT=URL HF_TOKEN=... python vllm_resolver.py REPOSITORIES`. Reads lines of
JSON, the base that is served and the name that a request asks for, and answers each with the adapter, or null.
"""

import asyncio
import json
import sys

from vllm.plugins.lora_resolvers.hf_hub_resolver import HfHubResolver
from vllm.version import __version__


def main() -> None:
    resolver = HfHubResolver(sys.argv[1].split(","))
    for line in sys.stdin:
        base, name = json.loads(line)
        request = asyncio.run(resolver.resolve_lora(base, name))
        answer = [request.lora_name, request.lora_path, __version__] if request else None
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
