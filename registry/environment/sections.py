"""Sections of the settings: the engine, and a Prometheus with the figures of canaries."""

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr
from pydantic_core import PydanticCustomError


def _cluster(text: str) -> str:
    if text != "auto" and not re.fullmatch(r"[^\s/@]+:[0-9]{1,5}", text):
        raise PydanticCustomError("address", "it is neither `auto` nor HOST:PORT, such as 10.0.0.5:6379")
    return text


class EngineSettings(BaseModel):
    """Settings of the engine, which runs the parts of a job: in a child of the worker, or on a Ray cluster."""

    model_config = ConfigDict(frozen=True, defer_build=True)
    kind: Literal["local", "ray"] = "local"
    """`local`: in a process for each job. `ray`: on a Ray cluster, with the extra `ray` on workers and nodes."""
    address: Annotated[str, AfterValidator(_cluster)] = "auto"
    """The address of the cluster's head, such as `10.0.0.5:6379`. `auto` is that of this host, a node of it."""
    token_path: Path | None = None
    """A file with the cluster's token; without one, `RAY_AUTH_TOKEN` or Ray's own file."""
    insecure: bool = False
    """Use a cluster without tokens: anyone who reaches its ports can run code on all nodes."""
    runners: int = Field(default=64, gt=0, le=10_000)
    """Maximum processes on the cluster for one job."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where units that load a model run; `auto`: on GPUs if the cluster has any."""
    job_seconds: float = Field(default=12 * 3600.0, gt=0)
    """Maximum time of a job with `local`; beyond it the job ends with `job_time_limit`."""
    job_memory_bytes: int | None = Field(default=None, gt=0)
    """Maximum memory of its process; beyond it `job_memory_limit`. By default 90 % of the host's or container's."""


def _prometheus(text: str) -> str:
    parts = urlsplit(text.strip().rstrip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise PydanticCustomError("url", "it must be an address such as http://prometheus:9090, without a password")
    return parts.geturl()


class PrometheusSettings(BaseModel):
    """Queries of a Prometheus, or of a service with its query API, for the figures of running canaries. A query is for
    one version and counts since the canary began: `$since` is that time, such as `754s`. `$model` stands for
    `acme/sql@1.2.0`, `$version` for `1.2.0`, and `$channel` for `acme/sql@prod`."""

    model_config = ConfigDict(frozen=True, defer_build=True)
    url: Annotated[str, AfterValidator(_prometheus)]
    """Its address, such as `http://prometheus:9090`, to which `/api/v1/query` is added. Redirects are not followed."""
    token: SecretStr | None = None
    """A token that is sent as `Authorization: Bearer`."""
    requests: str = Field(
        default='sum(increase(vllm:request_success_total{model_name="$model"}[$since]))', min_length=1
    )
    """The number of requests."""
    errors: str = 'sum(increase(vllm:request_success_total{model_name="$model",finished_reason="error"}[$since]))'
    """The requests that failed by the server's fault; empty for no such figure."""
    seconds: str = 'sum by (le) (increase(vllm:e2e_request_latency_seconds_bucket{model_name="$model"}[$since]))'
    """The requests by the time to the end of an answer, as buckets with `le`; empty for no such figure."""
