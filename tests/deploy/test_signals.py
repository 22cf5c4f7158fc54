"""The alert rules and the dashboard, by Prometheus' own tool and against the metrics that a server has."""

import json
import re
import shutil
import subprocess
from pathlib import Path

from tests import services
from tests.access.house import new_house

DEPLOY = Path(__file__).parents[2] / "deploy"
_METRIC = re.compile(r"\badaptory_[a-z_]+")


def promtool(*words: str) -> str:
    if shutil.which("promtool") is None:
        services.unavailable("promtool", "apt-get install prometheus")
    ran = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=60)  # noqa: S607
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_alert_rules_are_valid_and_fire_when_they_should() -> None:
    rules = DEPLOY / "prometheus" / "alerts.yaml"
    promtool("check", "rules", "--lint-fatal", str(rules))
    promtool("test", "rules", str(DEPLOY / "prometheus" / "alerts_test.yaml"))


def test_rules_and_dashboard_use_metrics_that_a_server_has_and_strangers_do_not_see_them(tmp_path: Path) -> None:
    house = new_house(services.PAIRINGS[0], tmp_path)
    try:
        assert house.ask("nobody", "GET", "/metrics").status_code == 401
        house.ask("reader", "GET", "/v1/resolve?ref=acme/sql")
        house.ask("reader", "INVENTED", "/v1/resolve")
        text = house.ask("reader", "GET", "/metrics").text
    finally:
        house.close()
    assert 'adaptory_http_requests_total{method="GET",route="/v1/resolve",status="200"} 1.0' in text
    assert 'method="other"' in text, "invented methods make no new series"
    assert "acme" not in text
    known = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    used = set(_METRIC.findall((DEPLOY / "prometheus" / "alerts.yaml").read_text()))
    dashboard = json.loads((DEPLOY / "grafana" / "adaptory.json").read_text())
    used |= {
        name for panel in dashboard["panels"] for target in panel["targets"] for name in _METRIC.findall(target["expr"])
    }
    assert {name.removesuffix("_bucket") for name in used} <= known
