"""Figures of canaries from a Prometheus that the operator names: a server with its query API, and the real one."""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from pydantic import ValidationError

from registry.environment.sections import PrometheusSettings
from registry.errors import outages
from registry.transfer.prometheus import measure_canaries
from registry.worker import runner
from tests import services
from tests.access.house import PRIVATE, House
from tests.access.test_canaries import CANARY, begun, figures, report, reported, splitting
from tests.access.test_fleet import Clock, Json, clock, furnished, house, live, put
from tests.eventually import eventually

__all__ = ["clock", "furnished", "house", "splitting"]
CANDIDATE, SERVED = f"{PRIVATE}/sql@1.0.0", f"{PRIVATE}/sql@1.1.0"

TOKEN = "of-prometheus"  # noqa: S105
KINDS = ("finished_reason", "latency", "success_total")
"""Parts of the queries, the first one that applies."""


@dataclass
class Answers:
    """What a server answers to a path. Without `text`, it is a vector by the name of the metric in the query and by
    model; `asked` has the queries."""

    url: str = ""
    text: str | None = None
    status: int = 200
    location: str = ""
    counts: dict[tuple[str, str], Mapping[str, float]] = field(
        default_factory=dict[tuple[str, str], Mapping[str, float]]
    )
    asked: list[str] = field(default_factory=list[str])
    times: set[str] = field(default_factory=set[str])
    tokens: list[str | None] = field(default_factory=list[str | None])

    def counted(self, model: str, requests: int, failed: int, seconds: Mapping[str, float]) -> None:
        for kind, values in zip(KINDS, ({"": failed}, seconds, {"": requests}), strict=True):
            self.counts[kind, model] = values

    def body(self, query: str) -> str:
        self.asked.append(query)
        kind = next(kind for kind in KINDS if kind in query)
        model = next(model for model in (CANDIDATE, SERVED) if f'"{model}"' in query)
        rows = [
            {"metric": {"le": le} if le else {}, "value": [1.0, str(value)]}
            for le, value in self.counts.get((kind, model), {}).items()
        ]
        return json.dumps({"status": "success", "data": {"resultType": "vector", "result": rows}})


@pytest.fixture(autouse=True)
def _each_warning_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    """A warning within a second of one in the test before would be left out."""
    monkeypatch.setattr(outages, "EVERY_S", 0.0)


@contextmanager
def answering() -> Generator[Answers]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            answers.tokens.append(self.headers.get("Authorization"))
            query, at = (parse_qs(parts.query)[name][0] for name in ("query", "time"))
            answers.times.add(at)
            body = (answers.body(query) if answers.text is None else answers.text).encode()
            self.send_response(answers.status)
            if answers.location:
                self.send_header("Location", answers.location)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        answers = Answers(f"http://127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield answers
        server.shutdown()


def asking(house: House, url: str, **more: Any) -> House:
    settings = house.resources.settings.model_copy(update={"prometheus": PrometheusSettings(url=url, **more)})
    house.resources = replace(house.resources, settings=settings)
    return house


def shown(house: House) -> Json:
    return house.ask("reader", "GET", CANARY).json()


def test_figures_of_a_prometheus_lead_a_canary_to_its_promotion(splitting: House, clock: Clock) -> None:
    with answering() as prometheus:
        house = asking(splitting, prometheus.url, token=TOKEN)
        assert begun(house, weight=50).status_code == 200
        clock.passes(30)
        measure_canaries(house.resources)
        assert (shown(house)["figures_at"], shown(house)["state"]) == (None, "running"), "nothing was counted yet"
        for minute, count in enumerate((150, 400)):
            clock.passes(61)
            assert put(house, "a", live(splits=True)).status_code == 200
            for model in (CANDIDATE, SERVED):
                prometheus.counted(model, count, minute, {"0.5": count * 0.9, "1.0": count, "+Inf": count})
            measure_canaries(house.resources)
        assert (shown(house)["requests"], shown(house)["state"]) == ([400, 400], "promoted")
        assert set(re.findall(r"\[\w+\]", " ".join(prometheus.asked))) == {"[30s]", "[91s]", "[152s]"}
        assert len(prometheus.times) == 3, "the counts of a round are of one time"
        assert set(prometheus.tokens) == {f"Bearer {TOKEN}"}


def test_a_worker_rolls_back_by_figures_of_a_prometheus_and_the_audit_has_them(
    splitting: House, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering() as prometheus:
        house = asking(splitting, prometheus.url)
        assert begun(house).status_code == 200
        clock.passes(10)
        prometheus.counted(CANDIDATE, 300, 45, {"+Inf": 300})
        prometheus.counted(SERVED, 2700, 27, {"+Inf": 2700})
        monkeypatch.setattr(runner, "MEASURE_S", 0.05)
        stop = threading.Event()
        worker = threading.Thread(target=runner.run_worker, args=(house.resources, {}, stop))
        worker.start()
        eventually(lambda: shown(house)["state"] != "running", within_s=30)
        stop.set()
        worker.join()
        assert shown(house)["why"] == "broken: errors <= served + 0.01"
        [row] = house.ask("admin", "GET", "/v1/audit?act=channel:watch").json()["items"]
        assert (row["actor"], row["detail"]["figures"][0]["candidate"]) == ("registry", pytest.approx(0.15))


def test_times_in_one_bucket_break_no_rule_and_slower_ones_do(splitting: House, clock: Clock) -> None:
    with answering() as prometheus:
        house = asking(splitting, prometheus.url)
        assert begun(house).status_code == 200
        prometheus.counted(SERVED, 3000, 0, {"0.5": 0, "1.0": 3000, "+Inf": 3000})
        for count, state in ((300, "running"), (900, "rolled_back")):
            clock.passes(10)
            prometheus.counted(CANDIDATE, count, 0, {"1.0": 0, "2.5": 300, "+Inf": count})
            measure_canaries(house.resources)
            assert shown(house)["state"] == state, shown(house)


def test_an_answer_that_is_not_one_of_a_query_changes_nothing(
    splitting: House, caplog: pytest.LogCaptureFixture
) -> None:
    vector = '{"data": {"resultType": "vector", "result": %s}}'
    answers = (
        ("", 200, ""), ("[]", 200, ""), ("{}", 200, ""), (" " * (300 << 10), 200, ""), ("", 302, "/elsewhere"),
        (vector % '[{"metric": {}, "value": [1, "-4"]}]', 200, ""),
        (vector % '[{"metric": {}, "value": [1, "+Inf"]}]', 200, ""),
        (vector % '[{"metric": {}, "value": [1, "NaN"]}]', 200, ""),
        (vector % '[{"metric": "le", "value": [1, "4"]}]', 200, ""),
        (vector % "[7]", 200, ""), (vector % "7", 200, ""),
        ('{"data": {"resultType": "matrix", "result": []}}', 200, ""),
        ('{"error": "parse error"}', 400, ""),
    )  # fmt: skip
    with answering() as prometheus:
        house = asking(splitting, prometheus.url, token=TOKEN)
        assert begun(house).status_code == 200
        for number, (prometheus.text, prometheus.status, prometheus.location) in enumerate(answers, 1):
            measure_canaries(house.resources)
            assert (shown(house)["figures_at"], shown(house)["requests"]) == (None, [0, 0])
            assert len(prometheus.tokens) == number, "neither a redirect nor a second query"
    measure_canaries(house.resources)  # it is away now
    assert shown(house)["figures_at"] is None
    assert "could not be read from Prometheus" in caplog.text
    assert TOKEN not in caplog.text


def test_counts_that_fall_and_answers_that_come_late_are_not_counted_twice(splitting: House, clock: Clock) -> None:
    with answering() as prometheus:
        house = asking(splitting, prometheus.url)
        assert begun(house).status_code == 200
        for count, expected in ((100, 100), (98, 100), (105, 105)):
            clock.passes(10)
            for model in (CANDIDATE, SERVED):
                prometheus.counted(model, count, 0, {"0.5": count, "+Inf": count})
            measure_canaries(house.resources)
            assert shown(house)["requests"] == [expected, expected]
        clock.passes(-20)
        prometheus.counted(CANDIDATE, 500, 0, {})
        measure_canaries(house.resources)
        assert shown(house)["requests"] == [105, 105], "a worker with newer figures was faster"


def test_requests_that_agents_and_a_prometheus_count_count_once(
    splitting: House, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with answering() as prometheus:
        house = asking(splitting, prometheus.url)
        for model in (CANDIDATE, SERVED):
            prometheus.counted(model, 50, 0, {"0.5": 50, "+Inf": 50})
        assert begun(house).status_code == 200
        reported(house, figures(100), figures(100))  # counted before the canary
        measure_canaries(house.resources)
        assert shown(house)["requests"] == [50, 50]
        refused = report(house, figures(120), figures(130)).json()
        assert (refused["code"], shown(house)["requests"]) == ("counted_twice", [50, 50])
        reported(house, figures(0, **{"sql-live.accuracy": (9, 7.0)}), figures(0), "grader")

        assert begun(house).status_code == 200
        reported(house, figures(100), figures(100))
        reported(house, figures(120), figures(130))
        measure_canaries(house.resources)
        assert shown(house)["requests"] == [20, 30]
        assert "front already counts" in caplog.text
        assert begun(house).status_code == 200
        measure_canaries(house.resources)
        assert shown(house)["requests"] == [50, 50], "each canary counts anew"


def test_only_addresses_of_a_prometheus_are_accepted() -> None:
    for url in ("ftp://p", "file:///etc/passwd", "p:9090", "http://u:p@p", "http://p?x=1", "http://p#x", ""):
        with pytest.raises(ValidationError):
            PrometheusSettings(url=url)
    assert PrometheusSettings(url="https://mimir.example/prometheus/").url == "https://mimir.example/prometheus"


@pytest.mark.long
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus not found: apt-get install prometheus")
def test_the_real_prometheus_answers_the_default_queries(splitting: House, clock: Clock, tmp_path: Path) -> None:
    counts = {CANDIDATE: 0, SERVED: 0}
    exporter, port = services.free_port(), services.free_port()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            lines = list[str]()
            for model, count in counts.items():
                label = f'model_name="{model}"'
                bucket = "vllm:e2e_request_latency_seconds_bucket"
                failed = count // 3 if model == CANDIDATE else 0
                lines += [f'vllm:request_success_total{{{label},finished_reason="stop"}} {count - failed}']
                lines += [f'vllm:request_success_total{{{label},finished_reason="error"}} {failed}']
                lines += [f'{bucket}{{{label},le="{le}"}} {count}' for le in ("0.5", "1.0", "+Inf")]
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write("\n".join([*lines, ""]).encode())

        def log_message(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            pass

    target = {"job_name": "vllm", "scrape_interval": "1s", "static_configs": [{"targets": [f"127.0.0.1:{exporter}"]}]}
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [target]}))
    words = (f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data")
    command = ["prometheus", *words, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    with ThreadingHTTPServer(("127.0.0.1", exporter), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with subprocess.Popen(command) as running:
            try:
                url = f"http://127.0.0.1:{port}"
                house = asking(splitting, url)
                eventually(lambda: is_ready(url), within_s=30)
                clock.now = datetime.now(UTC)
                assert begun(house).status_code == 200

                def is_rolled_back() -> bool:
                    counts.update({CANDIDATE: counts[CANDIDATE] + 30, SERVED: counts[SERVED] + 300})
                    clock.now = datetime.now(UTC)
                    measure_canaries(house.resources)
                    return shown(house)["state"] == "rolled_back"

                eventually(is_rolled_back, within_s=60)
                assert shown(house)["why"] == "broken: errors <= served + 0.01"
                assert shown(house)["rules"][0]["candidate"] == pytest.approx(0.33, abs=0.08)
            finally:
                running.terminate()
                server.shutdown()


def is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/-/ready").status_code == 200
    except httpx2.TransportError:
        return False
