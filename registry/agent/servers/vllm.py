"""vLLM, started with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, with one API process."""

import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from registry.agent.servers.protocol import CHECK_S, CheckResult, HttpServer, compared
from registry.agent.versions import ServedVersion
from registry.errors import RegistryError, Unavailable
from registry.formats.evidence import USUAL, EvidenceExample, Tolerance, decide, log_probability

_METRIC = "vllm:lora_requests_info"
_REQUESTS = re.compile(rf"^{_METRIC}\{{(.*)\}} ([0-9.eE+-]+)\s*$", re.MULTILINE)
_AT_ONCE = 16
"""Tokens that a check lets a server generate: those after one that the evidence does not have are of no use."""
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class VllmServer(HttpServer):
    """Lists names with their paths, which makes the server itself the ledger of what it has loaded."""

    kind = "vllm"

    def __init__(self, address: str, limits: Tolerance = USUAL) -> None:
        super().__init__(address)
        self._limits = limits

    def loaded(self) -> Mapping[str, str]:
        document = self.document("/v1/models")
        try:
            rows = [row for row in document["data"] if row.get("parent")]
            self.base = next((_text(row["id"]) for row in document["data"] if not row.get("parent")), "")
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
        """From the newest sample of `vllm:lora_requests_info`: its value is the time at which it was set. A server that
        has had no request for an adapter names the metric, without a sample. None if it has no such metric."""
        answer = self.request("GET", "/metrics")
        if answer.status_code != 200:
            raise self.refused("GET /metrics", answer)
        samples: list[tuple[float, str]] = []
        for labels, value in _REQUESTS.findall(answer.text):
            with suppress(ValueError):
                samples.append((float(value), labels))
        if not samples:
            is_unused = f"# TYPE {_METRIC} " in answer.text and f"{_METRIC}{{" not in answer.text
            return frozenset() if is_unused else None
        labels = dict(_LABEL.findall(max(samples)[1]))
        names = f"{labels.get('running_lora_adapters', '')},{labels.get('waiting_lora_adapters', '')}"
        return frozenset(filter(None, names.split(",")))

    def check(self, name: str, evidence: Sequence[EvidenceExample] | None = None) -> CheckResult:
        """Lets the server generate, and compares its log-probabilities of the evidence's tokens. It never asks for
        those of a prompt: on a CPU, vLLM 0.32 ends if other requests run meanwhile. A server that says none stays
        unproved, as does one whose context is too short for an example."""
        until_s = time.monotonic() + CHECK_S
        try:
            why = self._too_long(evidence) if evidence else ""
            if not evidence or why:
                self._completion(name, "Hello", until_s)
                return CheckResult("unproved", why)
            with ThreadPoolExecutor(len(evidence)) as threads:
                answered = list(threads.map(partial(self._answered, name, until_s=until_s), evidence))
        except RegistryError as error:
            return CheckResult("failed", error.detail)
        known = [values for values in answered if values is not None]
        if len(known) < len(answered):
            return CheckResult("unproved", f"{self.address} answers without log-probabilities of tokens.")
        return compared(self.address, name, decide(evidence, known, self._limits))

    def _answered(self, name: str, example: EvidenceExample, until_s: float) -> list[float] | None:
        """The server's log-probabilities of the completion's tokens, up to one that is off; None if it does not report
        them. Where the server would generate another token, it is asked for the completion's alone."""
        values = list[float]()
        while len(values) < len(example.release):
            at = example.start + len(values)
            some = {"max_tokens": min(_AT_ONCE, len(example.ids) - at)}
            steps = self._generated(name, example.ids[:at], some, until_s)
            for (token, value), wanted in zip(steps or (), example.ids[at:], strict=False):
                if token != wanted:
                    break
                values.append(value)
            at = example.start + len(values)
            if at < len(example.ids):
                only = {"max_tokens": 1, "allowed_token_ids": [example.ids[at]]}
                forced = self._generated(name, example.ids[:at], only, until_s)
                if not forced or forced[0][0] != example.ids[at]:
                    return None
                values.append(forced[0][1])
            if any(abs(value - own) > self._limits.worst for value, own in zip(values, example.release, strict=False)):
                break
        return values

    def _generated(
        self, name: str, ids: Sequence[int], asked: Mapping[str, Any], until_s: float
    ) -> list[tuple[int, float]] | None:
        """The tokens that the server generates, with their log-probabilities; None if its answer lacks them."""
        said = {"logprobs": 0, "return_tokens_as_token_ids": True, "ignore_eos": True, **asked}
        try:
            rows = self._completion(name, list(ids), until_s, said)["choices"][0].get("logprobs")
            if rows is None:
                return None
            tokens = [int(text.removeprefix("token_id:")) for text in rows["tokens"]]
            values = [log_probability(value) for value in rows["token_logprobs"]]
            return list(zip(tokens, values, strict=True))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return None

    def _too_long(self, evidence: Sequence[EvidenceExample]) -> str:
        """The reason why the server cannot run the longest example; empty if it can."""
        longest = max(len(example.ids) for example in evidence) + 1  # with the one token that is asked for
        document = self.document("/v1/models")
        try:
            lengths = [int(row["max_model_len"]) for row in document["data"] if row.get("max_model_len")]
        except (KeyError, TypeError, ValueError, AttributeError):
            return ""
        if longest <= (shortest := min(lengths, default=longest)):
            return ""
        return f"{self.address} takes at most {shortest:,} tokens, and an example of the evidence needs {longest:,}."

    def _completion(
        self, name: str, prompt: str | list[int], until_s: float, asked: Mapping[str, Any] | None = None
    ) -> Any:
        """The answer to a request, for one token unless it sets another limit. Raises Refused or Unavailable."""
        within_s = until_s - time.monotonic()
        if within_s <= 0:
            raise Unavailable(
                "server_unreachable", f"{self.address} does not end a check within {CHECK_S:g} seconds.", subject=name
            )
        body = {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0, **(asked or {})}
        answer = self.request("POST", "/v1/completions", body, within_s)
        if answer.status_code != 200:
            raise self.refused(f"a request to {name}", answer)
        return answer.json()


def _text(value: object) -> str:
    """Raises TypeError for anything but a text."""
    if not isinstance(value, str):
        raise TypeError
    return value
