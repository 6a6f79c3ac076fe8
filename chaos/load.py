"""Carries the planned load out: submits, cancels, sends poison, and writes down what was answered.

Several threads, because a submission waits for Kafka and the plan does not.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from chaos.generator import ENDS, Planned, job_of
from chaos.history import Ack, Completed, Invoked, Operation, Recorder
from chaos.scenario import Generator
from dataplane.commands import send_command_sync
from dataplane.producer import RecordProducer
from dataplane.submit import Submitter
from idl.codec import JSON
from idl.errors import JobFaultError, OutriderError
from idl.ids import QueueName
from idl.jobs import LimitName, SourceRef
from idl.records import CancelJob
from idl.settings import ClusterSettings
from idl.topics import TopicNames

THREADS: Final = 16
"""Submissions on their way at once; at a stalled broker the rest of the plan waits behind them."""
QUEUE: Final = QueueName("default")
DELIVERY_TIMEOUT_MS: Final = 60_000
Ask = Callable[[], list[SourceRef]]


class Load:
    """The generator's processes (Jepsen's clients)."""

    def __init__(
        self,
        settings: ClusterSettings,
        run: str,
        load: Generator,
        unenforced: tuple[LimitName, ...],
        recorder: Recorder,
    ) -> None:
        self._settings = settings
        self._run = run
        self._load = load
        self._unenforced = unenforced
        self._recorder = recorder
        self._topics = TopicNames(settings.kafka.prefix)
        self._producer = RecordProducer(
            settings.kafka, name="chaos", delivery_timeout_ms=DELIVERY_TIMEOUT_MS
        )
        self._submitter = Submitter(settings.kafka, producer=self._producer, submitter="chaos")
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="load")
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._accepted: set[str] = set()
        self._acknowledged: set[SourceRef] = set()
        self.asked = 0

    def accepted(self) -> set[str]:
        """Jobs whose submission was acknowledged."""
        with self._lock:
            return set(self._accepted)

    def acknowledged(self) -> set[SourceRef]:
        """Records in queues that the broker has taken: jobs, second submissions of one, poison."""
        with self._lock:
            return set(self._acknowledged)

    def run(self, plan: Sequence[Planned]) -> None:
        """Follows the plan from now on; returns at its end, or soon after `stop`."""
        began = time.monotonic()
        todo = sorted(
            [
                *((one.at_s, 0, one) for one in plan),
                *((one.at_s + one.cancel_after_s, 1, one) for one in plan if one.cancel_after_s),
            ],
            key=lambda step: step[:2],
        )
        for at_s, step, one in todo:
            if self._stopping.wait(max(0.0, began + at_s - time.monotonic())):
                return
            self.asked += step == 0
            self._threads.submit(self._cancel if step else self._submit, one)

    def stop(self) -> None:
        """Nothing more is asked; what is on its way is waited for by `close`."""
        self._stopping.set()

    def close(self) -> None:
        """Waits for answers and closes the connection."""
        self.stop()
        self._threads.shutdown(wait=True)
        self._submitter.close()
        self._producer.close()

    # -- one operation each ----------------------------------------------------------------------

    def _submit(self, one: Planned) -> None:
        name = f"{self._run}-{one.name}"
        if one.kind == "poisoned":
            self._asked("poison", name, one)
            topic = self._topics.queue(QUEUE)
            self._answer("poison", name, lambda: [
                self._producer.send(topic, one.payload, content_type=JSON).result()
            ])  # fmt: skip
            return
        self._asked("submit", name, one)
        spec = job_of(one, self._run, self._load, self._unenforced).submission().spec
        times = 2 if one.kind == "duplicate" else 1
        self._answer("submit", name, lambda: [
            self._submitter.submit_sync(QUEUE, spec).source for _ in range(times)
        ])  # fmt: skip

    def _cancel(self, one: Planned) -> None:
        name = f"{self._run}-{one.name}"
        self._asked("cancel", name, one)
        self._answer("cancel", name, lambda: [
            send_command_sync(self._producer, self._settings.kafka, CancelJob(job=name),
                              by="chaos", at_ms=time.time_ns() // 1_000_000)
        ])  # fmt: skip

    def _asked(self, operation: Operation, name: str, one: Planned) -> None:
        wanted = hashlib.sha256(one.result).hexdigest() if one.result is not None else ""
        ends = ENDS.get(one.kind, ())
        self._recorder.add(
            Invoked(at_ms=self._recorder.now_ms(), operation=operation, job=name, kind=one.kind,
                    ends=ends, result=wanted)
        )  # fmt: skip

    def _answer(self, operation: Operation, name: str, ask: Ask) -> None:
        ack: Ack = "ok"
        sources: tuple[SourceRef, ...] = ()
        error = ""
        try:
            sources = tuple(ask())
        except JobFaultError as refused:
            ack, error = "refused", str(refused)
        except OutriderError as failed:
            ack, error = "unknown", str(failed)
        if ack == "ok" and operation != "cancel":
            with self._lock:
                self._acknowledged.update(sources)
                if operation == "submit":
                    self._accepted.add(name)
        self._recorder.add(
            Completed(at_ms=self._recorder.now_ms(), operation=operation, job=name, ack=ack,
                      sources=sources, error=error)
        )  # fmt: skip
