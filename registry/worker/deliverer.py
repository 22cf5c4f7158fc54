"""Delivers events to webhooks, from a thread of the worker and others that wait for receivers."""

import logging
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

from registry.database.engine import database_now
from registry.domain.rollouts import drift
from registry.domain.webhooks import deliveries
from registry.domain.webhooks.deliveries import DeliveryOutcome, Outgoing
from registry.environment.network import parse_networks
from registry.errors import Unavailable
from registry.formats.webhooks import message_id, render, signature_headers
from registry.transfer.resources import Resources
from registry.worker import receivers

POLL_S = 0.5
AT_A_TIME = 64
"""Attempts under way in one worker."""
PER_WEBHOOK = 4
"""The same of one webhook: a slow receiver does not hold back others."""
DRIFT_S = 10.0
"""How often nodes are compared with what they should serve."""
FORGET_S = 3600.0
UNKNOWN_SOURCE = "urn:adaptory"

log = logging.getLogger(__name__)


class Deliverer:
    """The deliveries that one worker has under way."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._under_way: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        """Set when an attempt ends, since another delivery may then go out."""
        self._forget_at = self._drift_at = 0.0

    def run(self, stop: threading.Event) -> None:
        """Delivers until `stop` is set, and then waits for what is under way."""
        with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="webhook") as pool:
            while not stop.is_set():
                try:
                    self._look_after()
                    claimed = self.claim()  # last: what is claimed must be delivered
                except Unavailable as error:
                    log.warning("Webhooks wait: %s", error)
                    stop.wait(POLL_S * 4)
                    continue
                except Exception:  # the next turn tries again
                    log.warning("Webhooks could not be looked at", exc_info=True)
                    stop.wait(POLL_S * 4)
                    continue
                for sent in claimed:
                    pool.submit(self.deliver, sent).add_done_callback(self._log_defect)
                if not claimed and not self._ended.wait(POLL_S):
                    continue
                self._ended.clear()

    def claim(self) -> list[Outgoing]:
        """Claims what may go out now. Each of them must be given to `deliver`."""
        with self._lock:
            room = AT_A_TIME - self._under_way.total()
            left = {webhook: PER_WEBHOOK - count for webhook, count in self._under_way.items() if count}
        if room <= 0:
            return []
        with self._resources.read() as session:
            due = deliveries.due(session, database_now(session), PER_WEBHOOK, left)
        ids = [delivery_id for delivery_id, _ in due[:room]]
        if not ids:
            return []
        with self._resources.write() as session:
            claimed = deliveries.claim(session, ids, database_now(session))
        with self._lock:
            self._under_way.update(sent.webhook_id for sent in claimed)
        return claimed

    def deliver(self, sent: Outgoing) -> None:
        """Makes one attempt and records what came of it. If that fails, the lease ends and it is made again."""
        try:
            outcome = attempt(self._resources, sent)
            with self._resources.write() as session:
                state = deliveries.finish(session, sent, outcome, database_now(session))
            if state == deliveries.DEAD:
                log.warning(
                    "Delivery %s of webhook %s is dead after %s attempts", sent.id, sent.webhook_id, sent.attempt
                )
        except Unavailable as error:
            log.warning("Delivery %s was not recorded and is made again: %s", sent.id, error)
        finally:
            with self._lock:
                self._under_way[sent.webhook_id] -= 1
            self._ended.set()

    def _log_defect(self, done: Future[None]) -> None:
        if (error := done.exception()) is not None:
            log.error("A delivery failed in this worker", exc_info=error)

    def _look_after(self) -> None:
        """Records drift of the fleet, and removes old deliveries."""
        if time.monotonic() >= self._drift_at:
            self._drift_at = time.monotonic() + DRIFT_S
            with self._resources.read() as session:
                differs = bool(drift.compare(session, database_now(session)))
            if differs:
                with self._resources.write() as session:
                    drift.record(session, database_now(session))
        if time.monotonic() >= self._forget_at:
            self._forget_at = time.monotonic() + FORGET_S
            with self._resources.write() as session:
                deliveries.forget(session, database_now(session))


def attempt(resources: Resources, sent: Outgoing) -> DeliveryOutcome:
    """Sends a delivery once."""
    settings = resources.settings
    content_type, body = render(sent.event, sent.format, settings.oidc_audience or UNKNOWN_SOURCE)
    headers = signature_headers(sent.secrets, message_id(sent.event.id), resources.clock(), body)
    return receivers.send(
        sent.url, {"Content-Type": content_type, **headers}, body, parse_networks(settings.webhook_networks)
    )
