"""llama.cpp's own HTTP server, as `examples/llama_server.py` starts it from the wheel of `xllamacpp`."""

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tests import services
from tests.eventually import eventually
from tests.serving.double import answers

SCRIPT = Path(__file__).parents[2] / "examples" / "llama_server.py"


def command(base: Path, ports: object) -> str:
    """The command of a server of that GGUF file."""
    return f"{sys.executable} {SCRIPT} -m {base} --port {ports}"


def port_range() -> str:
    """A range of four ports; the first is free."""
    first = services.free_port()
    return f"{first}-{first + 3}"


@contextmanager
def llama_server(base: Path, *adapters: Path) -> Generator[str]:
    """A server that has these adapters; yields its address."""
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
