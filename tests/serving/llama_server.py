"""llama.cpp's own HTTP server, from the wheel of `xllamacpp`, with the options of `llama-server` that the tests use."""

import argparse
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


def command(base: Path, ports: object) -> str:
    """The command of a server of that GGUF file."""
    return f"{sys.executable} {__file__} -m {base} --port {ports}"


def port_range() -> str:
    """Four ports, of which the first is free."""
    from tests import services

    first = services.free_port()
    return f"{first}-{first + 3}"


@contextmanager
def llama_server(base: Path, *adapters: Path) -> Generator[str]:
    """A server that has these adapters; yields its address."""
    from tests import services
    from tests.eventually import eventually
    from tests.serving.double import answers

    port = services.free_port()
    words = command(base, port).split() + [word for path in adapters for word in ("--lora", str(path))]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: answers(f"{url}/health"), within_s=60)
        yield url
    finally:
        process.kill()
        process.wait()


def main() -> None:
    import xllamacpp

    parser = argparse.ArgumentParser()
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--alias", default="base")
    parser.add_argument("--lora", action="append", default=[])
    given = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.model_alias = given.model, given.port, {given.alias}
    params.n_ctx, params.n_parallel, params.warmup = 512, 4, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in given.lora]
    server = xllamacpp.Server(params)  # answers from threads while it is kept
    threading.Event().wait()
    del server


if __name__ == "__main__":
    main()
