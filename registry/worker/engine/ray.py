"""The engine on a Ray cluster. Each running unit has an actor in a process of its own on some node.

Ray holds no state that matters: its tasks die with this process, and a dying node loses its running units. Units are
pure and keep their results in shared storage, so only the lost ones run again.
"""

import logging
import os
import socket
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Generic, cast

from registry.environment.settings import EngineSettings
from registry.errors import NotAllowed, Unavailable
from registry.worker.engine.protocol import MAX_DEATHS, Needs
from registry.worker.engine.ray_runner import UnitRunner
from registry.worker.engine.units import Count, HostNode, ResultT, Task, Unit, finished

_POLL_S = 0.5
_CAUSE_CHARS = 400
_PROBE_S = 30.0
_CONNECT_S = 5.0
_REFUSED = b"AuthenticationError"
"""Part of Ray's reply to a request without a token."""
_MAX_FAILED_STARTS = 20
"""The number of runners in a row that may die before they are ready. One dying node can end several."""
LACKING_S = 120.0
"""How long to wait for a node that meets a unit's needs, since one may be starting."""


def ray_module() -> Any:
    """Imports Ray. Raises Unavailable without the extra `ray`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    try:
        import ray
    except ModuleNotFoundError as error:
        raise Unavailable(
            "extra_missing",
            "ADAPTORY_ENGINE__KIND=ray needs packages.",
            next_step="Install adaptory with its extra `ray`.",
        ) from error
    return cast(Any, ray)


@dataclass(eq=False, slots=True)
class _Runner:
    """An actor, the needs that it was started for, its current unit (None while it starts), and what its units were
    `near`."""

    actor: Any
    needs: Needs
    unit: Unit | None = None
    near: set[str] = field(default_factory=set[str])


@dataclass(slots=True)
class _Map(Generic[ResultT]):
    """The state of one call of `map`: units left, runners by the Ray reference to wait for, and deaths by unit."""

    task: Task[ResultT]
    needs: Needs
    left: deque[Unit]
    marker: str
    waiting: dict[Any, _Runner] = field(default_factory=dict[Any, _Runner])
    deaths: dict[str, int] = field(default_factory=dict[str, int])
    failed_starts: int = 0
    lacking_since_s: float | None = None

    @property
    def unfinished(self) -> bool:
        return bool(self.left) or any(runner.unit is not None for runner in self.waiting.values())


class RayEngine:
    """Runs units on the nodes of a cluster. This host must be a node of the cluster at the settings' address. If this
    process already has a session, such as a notebook's, the engine uses it and does not end it.

    Raises Unavailable if the cluster cannot be reached, and NotAllowed if it requires no token.
    """

    slice_examples = 32
    """Takes seconds on a small model, minutes on a large one."""

    def __init__(self, settings: EngineSettings, node: HostNode) -> None:
        self._settings, self._node = settings, node
        self._begun_here = not _has_session()
        if self._begun_here:  # Ray reads these when it is imported
            if settings.token_path is not None:
                os.environ["RAY_AUTH_TOKEN_PATH"] = str(settings.token_path.expanduser())
            os.environ["RAY_AUTH_MODE"] = "disabled" if settings.insecure else "token"
        self._ray = ray_module()
        self._idle: list[_Runner] = []
        self.redone = 0
        self._connect()

    def _connect(self) -> None:
        self._refuse_absent_head()
        if self._begun_here:
            self._begin_session()
        else:
            self._refuse_other_session()
        if not self._settings.insecure:
            self._refuse_open_cluster()

    def _begin_session(self) -> None:
        # Ray warns that a thread cannot set a SIGTERM handler; the worker has its own.
        harmless = "SIGTERM handler is not set"
        logging.getLogger("ray._private.worker").addFilter(lambda record: harmless not in record.getMessage())
        try:
            self._ray.init(
                address=self._settings.address,
                namespace="adaptory",
                log_to_driver=False,
                configure_logging=False,
                include_dashboard=False,
            )
        except Exception as error:  # Ray raises errors of many types
            raise self._unusable(error) from error

    def _refuse_other_session(self) -> None:
        """Raises Unavailable if this process has a session of another cluster."""
        address = self._ray.get_runtime_context().gcs_address
        if self._settings.address != "auto" and self._endpoint(self._settings.address) != self._endpoint(address):
            raise Unavailable(
                "engine_unavailable",
                f"This process has a Ray session of the cluster at {address}, not of {self._settings.address}.",
                subject=self._settings.address,
                next_step="End it with ray.shutdown(), or use its cluster with ADAPTORY_ENGINE__ADDRESS=auto.",
            )

    def _endpoint(self, address: str) -> tuple[str, str]:
        """Resolves the IP address and port. Ray replaces a loopback address by its node's."""
        host, _, port = address.rpartition(":")
        try:
            known = socket.gethostbyname(host)
        except OSError as error:
            raise self._unusable(error) from error
        return self._ray.util.get_node_ip_address() if known.startswith("127.") else known, port

    def _refuse_absent_head(self) -> None:
        """Raises Unavailable at once where Ray would retry for minutes."""
        host, _, port = self._settings.address.rpartition(":")
        if not port.isdecimal():
            return
        try:
            socket.create_connection((host, int(port)), _CONNECT_S).close()
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: BaseException) -> Unavailable:
        return Unavailable(
            "engine_unavailable",
            f"The Ray cluster at {self._settings.address} cannot be used: {_first_line(error)}.",
            subject=self._settings.address,
            next_step="Start a node of it on this host, with the same Ray and Python, and check the token.",
        )

    def _refuse_open_cluster(self) -> None:
        """Raises NotAllowed if the cluster answers a request without a token: anyone who reaches its ports can run code
        on all nodes. Raises Unavailable if that request fails for a reason other than the missing token."""
        address = self._ray.get_runtime_context().gcs_address
        try:
            answer = subprocess.run(  # noqa: S603 - our own interpreter
                [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address],
                env={**os.environ, "RAY_AUTH_MODE": "disabled"},
                capture_output=True,
                timeout=_PROBE_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            self.close()
            raise self._unusable(error) from error
        if answer.returncode == 0:
            self.close()
            raise NotAllowed(
                "engine_open",
                f"The Ray cluster at {address} needs no token: anyone who reaches its ports can run code on its nodes.",
                subject=address,
                next_step="Start it with RAY_AUTH_MODE=token, or set ADAPTORY_ENGINE__INSECURE=true if no one else can "
                "reach it.",
            )
        if _REFUSED not in answer.stdout + answer.stderr:
            self.close()
            raise self._unusable(RuntimeError("it does not say whether it needs a token"))

    def map(
        self, task: Task[ResultT], units: Sequence[Unit], needs: Needs, check: Count
    ) -> Iterator[tuple[Unit, ResultT]]:
        state = _Map(task, needs, deque(), uuid.uuid4().hex)
        for unit in units:
            check(0)
            done = finished(self._node, task, unit)
            if done is None:
                state.left.append(unit)
            else:
                yield unit, done
        if not state.left:
            return
        self._node.results.write(state.marker, b"{}")
        try:
            self._begin(state)
            while state.unfinished:
                check(0)
                ended, _ = self._ray.wait(list(state.waiting), num_returns=1, timeout=_POLL_S)
                for waited in ended:
                    yield from self._ended(state, waited)
                if not ended:
                    self._refuse_lacking(state)
        finally:
            for runner in state.waiting.values():
                self._ray.kill(runner.actor)
            with suppress(Unavailable):  # must not hide why the map ends; the sweep removes the marker
                self._node.results.delete(state.marker)

    def prepare(self) -> None:
        """Runners start when there are units."""

    def release(self) -> None:
        self._end_idle()
        self.redone = 0

    def _end_idle(self) -> None:
        for runner in self._idle:
            self._ray.kill(runner.actor)
        self._idle = []

    def close(self) -> None:
        if not self._begun_here:
            self._end_idle()
            return
        self._idle = []
        self._ray.shutdown()

    def _begin(self, state: _Map[Any]) -> None:
        """Reuses runners of the previous map that meet the needs of this one, since they may have loaded a base. Ends
        the others, and starts more."""
        before, self._idle = self._idle, list[_Runner]()
        for runner in before:
            if not runner.needs.cover(state.needs):
                self._ray.kill(runner.actor)
            elif state.left:
                self._give(state, runner)
            else:
                self._idle.append(runner)
        for _ in range(min(len(state.left), self._settings.runners - len(state.waiting))):
            self._start(state)

    def _give(self, state: _Map[Any], runner: _Runner) -> None:
        """Gives the runner the first unit that is quicker there, or else the first of all."""
        unit = next((unit for unit in state.left if unit.near in runner.near), state.left[0])
        state.left.remove(unit)
        if unit.near:
            runner.near.add(unit.near)
        runner.unit = unit
        state.waiting[runner.actor.run.remote(state.task, runner.unit)] = runner

    def _start(self, state: _Map[Any]) -> None:
        options = self._resources(state.needs)
        actor = self._ray.remote(UnitRunner).options(max_restarts=0, max_task_retries=0, **options).remote()
        state.waiting[actor.ready.remote(state.marker, version("adaptory"))] = _Runner(actor, state.needs)

    def _ended(self, state: _Map[ResultT], waited: Any) -> Iterator[tuple[Unit, ResultT]]:
        """Handles the return of a runner, and hands it the next unit."""
        runner = state.waiting.pop(waited)
        unit = runner.unit
        try:
            answer = self._ray.get(waited)
        except self._ray.exceptions.RayTaskError as error:  # ready() failed: run() returns its errors
            raise _node_differs(_first_line(error.cause)) from error
        except self._ray.exceptions.RayError as error:
            yield from self._died(state, unit, error)
            return
        if unit is None:
            if answer:
                raise _node_differs(answer)
            state.failed_starts = 0
        elif error := answer.failure():
            error.detail = f"{unit.name}: {error.detail}"
            raise error
        if state.left:
            self._give(state, runner)
        else:
            runner.unit = None
            self._idle.append(runner)
        if unit is not None:
            yield unit, answer.result

    def _died(self, state: _Map[ResultT], unit: Unit | None, error: Exception) -> Iterator[tuple[Unit, ResultT]]:
        """Requeues the dead runner's unit unless its result was already written. If units are left, gives one to a
        runner that is idle, or else starts another: one that idles keeps its CPU, which may be the last. Raises
        Unavailable for a unit whose process died MAX_DEATHS times, and if no runner starts."""
        done = None if unit is None else finished(self._node, state.task, unit)
        if unit is None:
            self._count_failed_start(state)
        elif done is None:
            self._put_back(state, unit, error)
        else:
            yield unit, done
        if state.left and self._idle:
            self._give(state, self._idle.pop())
        elif state.left:
            self._start(state)

    @staticmethod
    def _count_failed_start(state: _Map[Any]) -> None:
        state.failed_starts += 1
        if state.failed_starts >= _MAX_FAILED_STARTS:
            raise _node_differs(f"{state.failed_starts} processes in a row died before they were ready.")

    def _put_back(self, state: _Map[Any], unit: Unit, error: Exception) -> None:
        deaths = state.deaths[unit.name] = state.deaths.get(unit.name, 0) + 1
        if deaths >= MAX_DEATHS:
            raise Unavailable(
                "unit_lost",
                f"The process of {unit.name} died {deaths} times. The last reason: {_last_line(error)}",
                subject=unit.name,
            )
        state.left.appendleft(unit)
        self.redone += 1

    def _refuse_lacking(self, state: _Map[Any]) -> None:
        """Raises Unavailable once no node has met a runner's needs for LACKING_S. Ray would wait forever."""
        if any(runner.unit is not None for runner in state.waiting.values()):
            state.lacking_since_s = None
            return
        # The resources under the names that Ray's nodes give them.
        named = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
        options = self._resources(state.needs)
        own = {named[name]: amount for name, amount in options.items() if name in named}
        wanted: dict[str, float] = own | options.get("resources", {})
        if any(_has(node, wanted) for node in self._ray.nodes()):
            state.lacking_since_s = None
            return
        now = time.monotonic()
        if state.lacking_since_s is None:
            state.lacking_since_s = now
        if now - state.lacking_since_s < LACKING_S:
            return
        needed = ", ".join(f"{name}: {amount:,.10g}" for name, amount in wanted.items())
        raise Unavailable(
            "engine_too_small",
            f"No node of the Ray cluster has all that a unit needs ({needed}).",
            subject=state.left[0].name,
            next_step="Start a node that has it; for a base in a directory with --resources, or add an hf:// or s3:// "
            "address of the base.",
        )

    def _resources(self, needs: Needs) -> dict[str, Any]:
        """The resources that Ray reserves for a runner."""
        options: dict[str, Any] = {"num_cpus": needs.cpus}
        memory_bytes = needs.memory_bytes
        if needs.device_bytes and self._with_gpus:
            options["num_gpus"] = self._share_of_device(needs.device_bytes)
        else:
            memory_bytes += needs.device_bytes  # the device is the CPU
        if memory_bytes:
            options["memory"] = memory_bytes
        if needs.base is not None:
            options["resources"] = {base_resource(needs.base): 0.001}
        return options

    @property
    def _with_gpus(self) -> bool:
        if self._settings.device != "auto":
            return self._settings.device == "gpu"
        return self._ray.cluster_resources().get("GPU", 0) > 0

    def _share_of_device(self, size_bytes: int) -> float:
        """The share of the smallest device, rounded up, so that units share a device only if both fit. A unit gets a
        device to itself if the memory is unknown or the model is larger. What does not fit is read from disk; jobs that
        must not do that are claimed only where they fit."""
        smallest = self._node.settings.device_memory_bytes
        if not smallest or size_bytes >= smallest:
            return 1.0
        return -(-size_bytes * 10_000 // smallest) / 10_000  # Ray counts in ten thousandths


def _has_session() -> bool:
    """Whether this process is connected to a cluster: Ray has one session for each process."""
    loaded = sys.modules.get("ray")
    return loaded is not None and cast(Any, loaded).is_initialized()


def _has(node: dict[str, Any], wanted: dict[str, float]) -> bool:
    """Whether the node, when it is free, has room for a runner."""
    there: dict[str, float] = node["Resources"]
    return node["Alive"] and all(there.get(name, 0) >= amount for name, amount in wanted.items())


def base_resource(digest: str) -> str:
    """The resource of the nodes that have this base in a directory: `ray start --resources='{"base:…": 1}'`."""
    return f"base:{digest[:12]}"


def _node_differs(why: str) -> Unavailable:
    return Unavailable(
        "engine_node_differs",
        f"A node of the Ray cluster cannot run units: {why}",
        next_step="Give every node the same version of adaptory and the same ADAPTORY_STORAGE__* as the workers.",
    )


def _last_line(error: BaseException) -> str:
    """Returns the last line, shortened: Ray ends its long messages with the reason why a process died."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:_CAUSE_CHARS]


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
