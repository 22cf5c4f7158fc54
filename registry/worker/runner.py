"""The executor: claims a job, sends its heartbeat, runs its unfinished steps and records how it ended."""

import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from composer.errors import ComposerError, Interrupted
from registry.database.engine import database_now
from registry.database.tables import Job
from registry.domain.compositions.compositions import declare_missing
from registry.domain.jobs import needs, queue
from registry.domain.jobs.queue import Amount
from registry.errors import RegistryError, Unavailable
from registry.errors.codes import RETRYABLE
from registry.errors.translation import of_failed_work
from registry.formats.paths import document_without_directories, without_directories
from registry.formats.references import Digest
from registry.transfer.prometheus import measure_canaries
from registry.transfer.promotions import settle_due
from registry.transfer.resources import Resources
from registry.transfer.sealing import Sealer
from registry.worker.deliverer import Deliverer
from registry.worker.engine.opened import WorkerEngine
from registry.worker.host import Host, sweep_work

BEAT_S = 3.0
POLL_S = 1.0
SETTLE_S = 2.0
"""How often waiting promotions are checked."""
MEASURE_S = 10.0
"""How often Prometheus is asked for the figures of canaries."""
SEAL_S = 1.0
"""How often audit rows are sealed."""
SWEEP_S = 600.0
UNMET_S = 30.0
"""How often a worker looks for jobs whose needs no worker has met for a long time."""
_NOT_AWAITED = ("engine_unavailable", "blob_corrupt")
"""Errors that do not retry a command's own job, since its user is waiting: an absent cluster, and bytes that were wrong
twice in a row."""
_PROGRESS_STEP = 0.05
_PROGRESS_S = 1.0
"""Progress is written after each further _PROGRESS_STEP and, if an amount is known, every _PROGRESS_S seconds."""

log = logging.getLogger(__name__)


class JobLost(Interrupted):
    """The job was cancelled or taken over: this worker drops it."""


class WorkerStopping(Interrupted):
    """This worker is stopping: the job is requeued for another."""


@dataclass(slots=True)
class JobRun:
    """A claimed job, as its steps see it. The worker announces its `host` while the job runs; None if it runs a single
    job."""

    resources: Resources
    worker: str
    job_id: int
    stop: threading.Event
    host: Host | None = None
    lost: threading.Event = field(default_factory=threading.Event)
    kind: str = ""
    observe: "Observe | None" = None
    is_own: bool = False
    """Whether a command runs its own job while its user waits."""
    engine: WorkerEngine = field(kw_only=True)
    made: set[Digest] = field(default_factory=set[Digest])
    """Blobs that units stored for releases that are not published yet."""
    _began_s: float = field(default_factory=time.monotonic)
    _step_began_s: float = 0.0
    _step: str = ""
    _noted: float = 0.0
    _amount: Amount = field(default_factory=lambda: Amount(0, 1, "units"))
    _noted_s: float = 0.0

    def start_step(self, name: str) -> None:
        """Records that the step runs. Raises JobLost or WorkerStopping like `progress`."""
        self._step, self._noted, self._noted_s, self._step_began_s = name, 0.0, 0.0, time.monotonic()
        self._amount = Amount(0, 1, "units")
        self.check()
        self._note("running", 0.0)

    def finish_step(self) -> None:
        """Records that the step is done. Raises JobLost if the job is no longer this worker's."""
        self._note("done", 1.0)
        self._ended(self._step, "done", self._step_began_s)

    def fail_step(self, log: Sequence[str] = ()) -> None:
        """Records that the current step failed, if one was started, with the failed unit's log."""
        if self._step:
            known = own_directories(self.resources)
            shown = [without_directories(line, known) for line in log]
            self._write("failed", replace(self._amount, log=shown) if log else self._noted)
            self._ended(self._step, "failed", self._step_began_s)

    def ended(self, state: str) -> None:
        """Counts the ended job in the metrics."""
        self._ended(None, state, self._began_s)

    def _ended(self, step: str | None, state: str, began_s: float) -> None:
        if self.observe is not None:
            self.observe(self.kind, step, state, time.monotonic() - began_s)

    def progress(self, done: float | Amount) -> None:
        """Records progress. Called often but writes rarely. Raises JobLost or WorkerStopping if this worker must
        stop."""
        self.check()
        share = done.share if isinstance(done, Amount) else done
        late = isinstance(done, Amount) and time.monotonic() - self._noted_s >= _PROGRESS_S
        if isinstance(done, Amount):
            self._amount = done
        if late or share - self._noted >= _PROGRESS_STEP:
            self._noted, self._noted_s = share, time.monotonic()
            with suppress(Unavailable):  # only the end of the step needs the database back
                self._note("running", done)

    def check(self, _done: int = 0) -> None:
        """Raises like `progress`. Long work calls it often, with the amount just done."""
        if self.lost.is_set():
            raise JobLost
        if self.stop.is_set():
            raise WorkerStopping

    def _note(self, state: str, done: float | Amount) -> None:
        if not self._write(state, done):
            raise JobLost

    def _write(self, state: str, done: float | Amount) -> bool:
        with self.resources.write() as session:
            return queue.note_step(session, self.job_id, self.worker, self._step, state=state, progress=done)


Step = Callable[[JobRun], None]
Observe = Callable[[str, str | None, str, float], None]
"""Called with kind, step, state and seconds when a step ends; without a step, when a job ends."""


@dataclass(frozen=True, slots=True)
class JobKind:
    """Steps by name. `clean` runs before the job is recorded as ended, and may run again."""

    steps: Mapping[str, Step]
    clean: Step = lambda _held: None


def run_worker(
    resources: Resources,
    kinds: Mapping[str, JobKind],
    stop: threading.Event,
    *,
    only: int | None = None,
    observe: Observe | None = None,
) -> None:
    """Works until `stop` is set; the current job is then requeued at its next `check`.

    With `only`, runs just that job, which its own command started, and fails at once if the host cannot meet its needs
    or the cluster is absent. Otherwise claims any job whose needs this host meets. A separate thread judges waiting
    promotions, even while a job runs. Unless a command has started the worker, others deliver to webhooks, seal the
    audit log, and ask the Prometheus of the settings for the figures of canaries.
    """
    settle = (resources, stop, SETTLE_S, settle_due, "Judging waiting promotions")
    duties = [threading.Thread(target=_repeat, args=settle, daemon=True, name="promotions")]
    if only is None:
        deliver = Deliverer(resources).run
        duties.append(threading.Thread(target=deliver, args=(stop,), daemon=True, name="webhooks"))
        seal = (resources, stop, SEAL_S, Sealer().turn, "Sealing the audit log")
        duties.append(threading.Thread(target=_repeat, args=seal, daemon=True, name="audit"))
    if only is None and resources.settings.prometheus is not None:
        measure = (resources, stop, MEASURE_S, measure_canaries, "Measuring canaries")
        duties.append(threading.Thread(target=_repeat, args=measure, daemon=True, name="canaries"))
    for duty in duties:
        duty.start()
    try:
        _work(resources, kinds, stop, only=only, observe=observe)
    finally:
        stop.set()  # otherwise, after an exit inside a job, the threads alone would keep the process alive
        for duty in duties:
            duty.join()


def _repeat(
    resources: Resources, stop: threading.Event, every_s: float, act: Callable[[Resources], None], what: str
) -> None:
    """Acts every few seconds until `stop` is set. After an error the next turn tries again."""
    while not stop.wait(every_s):
        try:
            act(resources)
        except Unavailable as error:
            log.warning("%s waits: %s", what, error)
        except Exception:
            log.warning("%s failed", what, exc_info=True)


def _work(
    resources: Resources,
    kinds: Mapping[str, JobKind],
    stop: threading.Event,
    *,
    only: int | None,
    observe: Observe | None,
) -> None:
    worker = f"{socket.gethostname()[:40]}-{uuid.uuid4().hex[:12]}"
    host = None if only is not None else Host(resources, kinds)
    sweep_at = unmet_at = 0.0
    with closing(WorkerEngine(resources.settings, resources.store)) as engine:
        while not stop.is_set():
            try:
                if time.monotonic() >= sweep_at:
                    sweep_at = time.monotonic() + SWEEP_S
                    sweep_work(resources)
                    engine.sweep(resources.clock())
                if host is not None and time.monotonic() >= unmet_at:
                    unmet_at = time.monotonic() + UNMET_S
                    end_unmet(resources)
                worked = bool(kinds) and run_one(resources, kinds, worker, stop, host, observe, engine, only)
            except Unavailable as error:
                log.warning("The worker takes no jobs for now: %s", error)
                worked = False
            except Exception:  # a defect in one job must not end the worker; the job's lease expires and it is retried
                log.exception("The worker lost a job")
                worked = False
            if not worked:
                stop.wait(POLL_S)


def end_unmet(resources: Resources) -> None:
    """Ends jobs whose needs no worker has met for a long time, and forgets workers that ended long ago."""
    with resources.write() as session:
        now = database_now(session)
        ended = queue.end_unmet(session, now)
        needs.forget_workers(session, now)
    for job_id, error in ended:
        log.warning("Job %s ended, since no worker can take it: %s", job_id, error)


def run_one(  # noqa: PLR0913
    resources: Resources,
    kinds: Mapping[str, JobKind],
    worker: str,
    stop: threading.Event | None = None,
    host: Host | None = None,
    observe: Observe | None = None,
    engine: WorkerEngine | None = None,
    only: int | None = None,
) -> bool:
    """Runs one waiting job of these kinds whose needs the host meets, if there is one. Without a host, needs are
    ignored. `only` restricts it to that job. Returns whether a job ran."""
    offer = None
    if host is not None:
        _declare_missing(resources)
        offer = host.offer()
    with resources.write() as session:
        now = database_now(session)
        if offer is not None:
            needs.announce(session, worker, offer, now)
        job = queue.claim(session, worker, now, kinds, offer, only=only)
    if job is None:
        return False
    spread = engine or WorkerEngine(resources.settings, resources.store)
    held = JobRun(
        resources, worker, job.id, stop or threading.Event(), host, kind=job.kind, observe=observe, engine=spread
    )
    held.is_own = only is not None
    done = threading.Event()
    heart = threading.Thread(target=_beat, args=(held, done), daemon=True, name=f"beat-{job.id}")
    heart.start()
    try:
        _run(held, job, kinds[job.kind])
    finally:
        done.set()
        heart.join()
        spread.release()
        if engine is None:
            spread.close()
    return True


def _declare_missing(resources: Resources) -> None:
    with resources.read() as session:
        if not needs.are_undeclared(session):
            return
    with resources.write() as session:
        declare_missing(session)


def _run(held: JobRun, job: Job, kind: JobKind) -> None:
    try:
        _go_on(held, job, kind)
    except WorkerStopping:
        with held.resources.write() as session:
            cancelled = queue.find(session, held.job_id).cancel_requested
            if not cancelled:
                queue.requeue(session, held.job_id, held.worker)
        if cancelled:  # an interrupted command cancels its composition and stops its worker
            _finish(held, kind, "cancelled", None)
    except JobLost:
        _finish(held, kind, "cancelled", None)
    except (RegistryError, ComposerError, OSError) as error:
        if isinstance(error, OSError):
            log.warning("This worker's disk failed", exc_info=error)
        _handle_failure(held, job, kind, of_failed_work(error))
    except Exception as error:
        log.exception("Job %s failed", job.id)
        held.fail_step()
        failure = Unavailable("job_failed", f"{type(error).__name__}: {error}")
        _finish(held, kind, "failed", failure)
    else:
        _finish(held, kind, "done", None)


def _handle_failure(held: JobRun, job: Job, kind: JobKind, error: RegistryError) -> None:
    """Postpones the job, whose next worker resumes after the finished steps; or ends it."""
    given_up = held.is_own and error.code in _NOT_AWAITED
    if error.code in RETRYABLE and job.attempts < queue.MAX_ATTEMPTS and not given_up:
        pause, row = queue.PAUSES[job.attempts - 1], shown_row(held, error)
        log.warning("Job %s waits for %s and is tried again: %s", held.job_id, pause, error)
        with held.resources.write() as session:
            queue.retry_later(session, held.job_id, held.worker, database_now(session) + pause, row)
        return
    held.fail_step(error.log_lines)
    _finish(held, kind, "refused" if error.exit_code == 1 else "failed", error)


def _go_on(held: JobRun, job: Job, kind: JobKind) -> None:
    if job.cancel_requested:
        raise JobLost
    if job.attempts > queue.MAX_ATTEMPTS:
        raise Unavailable("worker_lost", f"The worker was lost {queue.MAX_ATTEMPTS} times.")
    held.engine.prepare()
    for step in job.steps:
        if step["state"] != "done":
            held.start_step(step["name"])
            kind.steps[step["name"]](held)
            held.finish_step()


def _finish(held: JobRun, kind: JobKind, state: str, error: RegistryError | None) -> None:
    """Cleans up, then ends the job. After a crash in between, another worker takes over, so no ended job leaves
    files."""
    if not _cleaned(held, kind):
        return
    row = shown_row(held, error) if error is not None else None
    with held.resources.write() as session:
        queue.finish(session, held.job_id, held.worker, state, held.resources.clock(), row)
    held.ended(state)


def own_directories(resources: Resources, subject: str = "") -> set[str]:
    """This host's own directories, and the parent of an error's subject if that is a path."""
    own = {str(resources.settings.home_directory), str(resources.work_directory)}
    return own | {str(Path(subject).parent)} if subject.startswith("/") else own


def shown_row(held: JobRun, error: RegistryError) -> dict[str, Any]:
    """Builds the error row shown to everyone who may see the job. It omits this host's directories, which go to the
    log."""
    row: dict[str, Any] = error.to_row()
    shown: dict[str, Any] = document_without_directories(row, own_directories(held.resources, row["subject"] or ""))
    if shown != row:
        log.warning("Job %s: %s", held.job_id, error.detail)
    return shown


def _cleaned(held: JobRun, kind: JobKind) -> bool:
    """Cleans up. Returns False and removes nothing if the job is no longer this worker's."""
    with held.resources.read() as session:
        if queue.find(session, held.job_id).worker != held.worker:
            return False
    kind.clean(held)
    return True


def _beat(held: JobRun, done: threading.Event) -> None:
    """Extends the lease, and notices a cancellation within a beat."""
    wait = 0.5
    while not done.wait(wait):
        wait = min(BEAT_S, wait * 2)
        try:
            offer = held.host.offer() if held.host is not None else None
            with held.resources.write() as session:
                now = database_now(session)
                if offer is not None:
                    needs.announce(session, held.worker, offer, now)
                kept = queue.extend_lease(session, held.job_id, held.worker, now)
        except Exception:  # whatever failed, the lease lasts for another attempt
            log.warning("No heartbeat for job %s", held.job_id, exc_info=True)
            continue
        if not kept:
            held.lost.set()
            return
