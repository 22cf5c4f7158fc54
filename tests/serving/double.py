"""A double of vLLM's server, with the ways in which the real one (0.32.0, `--max-loras 2`) dies.

- Two ids of one name in a batch, and a third adapter: the engine dies, and every later request gets 500.
- A loaded name whose directory is gone, once it was evicted: the same.

An answer's text is the hash of the weights that the engine read for its name, so that a test sees which adapter
answered.
"""

import asyncio
import hashlib
import itertools
import json
import sys
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from registry.agent.directory import Routes
from tests import services
from tests.eventually import eventually
from tests.forked import start

WEIGHTS = "adapter_model.safetensors"
BASE = "base-model"
CONTEXT = 512


def weights_hash(directory: Path) -> str:
    return hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest()[:16]


def _fraction(*of: object) -> float:
    """A number from 0 to 1 that is fixed by what it is of."""
    return int(hashlib.sha256(repr(of).encode()).hexdigest()[:8], 16) / 0xFFFFFFFF


def log_probabilities(weights: str, ids: list[int]) -> list[float]:
    """The model: an adapter improves on the base by 2 nats a token, and by up to 1 more or less for a single one, so
    that two adapters differ little in total and much in some token."""
    base = [-4.0 - _fraction("base", place, token) for place, token in enumerate(ids)]
    if weights == BASE:
        return base
    return [value + 1.0 + 2.0 * _fraction(weights, place) for place, value in enumerate(base)]


class EngineDied(Exception):
    """The engine is dead, for all requests."""


@dataclass(frozen=True)
class Loaded:
    """What `load_lora_adapter` makes of a name; the engine tells adapters apart by the name, and slots by the id."""

    number: int
    path: str


class Engine:
    """Names, running requests and slots. `seconds` is how long a request runs."""

    def __init__(self, seconds: float, max_loras: int, wrong: str = "") -> None:
        self.seconds, self.max_loras, self.wrong = seconds, max_loras, wrong
        self.names = dict[str, Loaded]()
        self.dead = self.began = False
        self.served = Counter[str]()
        self._running = Counter[tuple[str, int]]()
        self._slots: OrderedDict[int, str] = OrderedDict()
        self._numbers = itertools.count(1)

    @property
    def running(self) -> list[str]:
        return sorted({name for (name, _), count in self._running.items() if count})

    def load(self, name: str, path: str) -> None:
        self.names[name] = Loaded(next(self._numbers), path)

    async def answer(self, name: str) -> str:
        """Runs a request. Returns the hash of the weights that answered it."""
        loaded = self.names[name]
        self.began = True
        self._running[name, loaded.number] += 1
        try:
            self._refuse_twins()
            text = self._read(loaded)
            await asyncio.sleep(self.seconds)
            self._refuse_twins()
            self.served[name] += 1
            return text
        finally:
            self._running[name, loaded.number] -= 1

    def log_probabilities(self, weights: str, ids: list[int]) -> list[float]:
        """Those of the adapter, or of what a server that goes wrong in that way applies instead."""
        applied = {"": weights, "quantised": weights, "unapplied": BASE}.get(self.wrong, f"{self.wrong} {weights}")
        drift = 0.8 if self.wrong.startswith("quantised") else 0.0
        return [
            value + drift * (_fraction("drift", place) - 0.5)
            for place, value in enumerate(log_probabilities(applied, ids))
        ]

    def _refuse_twins(self) -> None:
        """A batch maps names to slots: two ids of one name, and a third adapter, break the map."""
        ids = [key for key, count in self._running.items() if count]
        if len(ids) > self.max_loras and len({name for name, _ in ids}) < len(ids):
            self.dead = True
        if self.dead:
            raise EngineDied

    def _read(self, loaded: Loaded) -> str:
        """The hash of the adapter in a slot. One that is not in a slot is read from its directory."""
        if loaded.number not in self._slots:
            try:
                self._slots[loaded.number] = weights_hash(Path(loaded.path))
            except OSError as error:
                self.dead = True
                raise EngineDied from error
            while len(self._slots) > self.max_loras:
                self._slots.popitem(last=False)
        self._slots.move_to_end(loaded.number)
        return self._slots[loaded.number]


def error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


def dead() -> Response:
    return error(500, "EngineCore encountered an issue. See stack trace for the root cause.")


class VllmDouble:
    """The routes that an agent and clients use."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def app(self) -> Starlette:
        posts = {
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
            "/v1/completions": self.complete,
            "/v1/chat/completions": self.complete,
        }
        routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
        return Starlette(routes=[*routes, Route("/v1/models", self.models), Route("/metrics", self.metrics)])

    async def models(self, _request: Request) -> Response:
        if self.engine.dead:
            return dead()
        base = {"id": BASE, "object": "model", "root": f"/models/{BASE}", "parent": None, "max_model_len": CONTEXT}
        rows = [
            {"id": name, "object": "model", "root": loaded.path, "parent": BASE, "max_model_len": None}
            for name, loaded in self.engine.names.items()
        ]
        return JSONResponse({"object": "list", "data": [base, *rows]})

    async def load(self, request: Request) -> Response:
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        if self.engine.dead:
            return dead()
        if name in self.engine.names:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").is_file():
            return error(404, f"Loading lora {name} failed: No adapter found for <path>")
        rank = json.loads((Path(path) / "adapter_config.json").read_text())["r"]
        if rank > 16:
            return error(400, f"LoRA rank {rank} is greater than max_lora_rank 16.")
        self.engine.load(name, path)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if self.engine.names.pop(name, None) is None:
            return error(404, f"The lora adapter '{name}' cannot be found.")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def complete(self, request: Request) -> Response:
        body: dict[str, Any] = await request.json()
        name = body["model"]
        if self.engine.dead:
            return dead()
        if name == BASE:
            return self._answered(name, "base", stream=bool(body.get("stream")))
        if name not in self.engine.names:
            return error(404, f"The model `{name}` does not exist.")
        if isinstance(body.get("prompt"), list) and len(body["prompt"]) >= CONTEXT:
            return error(400, f"This model's maximum context length is {CONTEXT} tokens.")
        if body.get("prompt") == f"fails on {name}":
            return error(500, "This prompt fails on this adapter.")
        try:
            text = await self.engine.answer(name)
        except EngineDied:
            return dead()
        return self._answered(name, text, stream=bool(body.get("stream")), asked=body)

    async def metrics(self, _request: Request) -> Response:
        """No sample before the first request of an adapter. Then two, as the real server keeps the old label sets: the
        newest is the one that counts."""
        kind = "# TYPE vllm:lora_requests_info gauge\n"
        if not self.engine.began:
            return PlainTextResponse(kind)
        running = ",".join(self.engine.running)
        newest = asyncio.get_running_loop().time()
        line = 'vllm:lora_requests_info{{max_lora="2",running_lora_adapters="{}",waiting_lora_adapters=""}} {}\n'
        return PlainTextResponse(kind + line.format("old@1.0.0", newest - 9) + line.format(running, newest))

    def _answered(self, name: str, text: str, *, stream: bool, asked: dict[str, Any] | None = None) -> Response:
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "length"}
        if asked and "logprobs" in asked:
            ids, rows = list(asked["prompt"]), list[float]()
            for _ in range(asked["max_tokens"]):
                [token] = asked.get("allowed_token_ids") or [ids[-1] + (3 if len(ids) % 4 else 1)]
                ids.append(token)
                rows.append(self.engine.log_probabilities(text, ids)[-1])
            tokens = [f"token_id:{token}" for token in ids[-len(rows) :]]
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": rows}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        document = {"model": name, "choices": [choice], "usage": usage}
        if not stream:
            return JSONResponse(document)

        async def events() -> AsyncIterator[bytes]:
            for part in text:
                yield b"data: " + json.dumps({"choices": [{**choice, "text": part, "finish_reason": None}]}).encode()
                yield b"\n\n"
            yield b"data: " + json.dumps({**document, "choices": [{**choice, "text": ""}]}).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


class SglangDouble(VllmDouble):
    """SGLang's routes: its unload waits for the requests that use the name."""

    def app(self) -> Starlette:
        app = super().app()
        app.routes.append(Route("/load_lora_adapter", self.load, methods=["POST"]))
        app.routes.append(Route("/unload_lora_adapter", self.unload, methods=["POST"]))
        return app

    async def unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        while name in self.engine.running:  # noqa: ASYNC110 - a double polls
            await asyncio.sleep(0.01)
        if self.engine.names.pop(name, None) is None:
            return error(400, f"LoRA adapter {name} is not loaded.")
        return JSONResponse({"success": True})


KINDS = {"vllm": VllmDouble, "sglang": SglangDouble}


def run(kind: str, port: int, seconds: float, max_loras: int, count: int = 1, wrong: str = "") -> None:
    """Runs a server, at `/`; or several in one process, at `/0`, `/1` and so on."""
    apps = [KINDS[kind](Engine(seconds, max_loras, wrong)).app() for _ in range(count)]
    mounted = Starlette(routes=[Mount(f"/{number}", each) for number, each in enumerate(apps)])
    uvicorn.run(apps[0] if count == 1 else mounted, host="127.0.0.1", port=port, log_level="error")


def one_route(channel: str, name: str, url: str) -> Routes:
    """Routes of one channel to one version on one server."""
    since = datetime.now(UTC).isoformat()
    return Routes({channel: {name: 100}}, {channel: since}, {name: "a" * 40}, {name: (url,)})


def answers(url: str) -> bool:
    """Whether a GET of the address succeeds."""
    try:
        return httpx2.get(url).status_code == 200
    except httpx2.TransportError:
        return False


@contextmanager
def double(
    kind: str = "vllm", *, port: int | None = None, seconds: float = 0.02, max_loras: int = 2, wrong: str = ""
) -> Generator[tuple[str, BaseProcess]]:
    """A double in its own process; yields its address once it answers."""
    port = port or services.free_port()
    url, process = f"http://127.0.0.1:{port}", start(run, {}, kind, port, seconds, max_loras, 1, wrong)
    try:
        eventually(lambda: answers(f"{url}/v1/models"), within_s=30)
        yield url, process
    finally:
        process.kill()
        process.join(20)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
