"""`unsync.stats()`: what was done and what is pending, summed up over all that ever ran here."""

from __future__ import annotations

import concurrent.futures
import threading
from typing import Any, NamedTuple

from unsync._backend import JobQueue, Mailbox
from unsync._common import WorkCounts

__all__ = ["Book", "Counter", "Stats", "Work"]


class Work(NamedTuple):
    """The calls that went one way; the first four only grow."""

    started: int
    """How many began: those that were cancelled before are not in it."""
    finished: int
    """How many ended with a result."""
    failed: int
    """How many ended with an exception."""
    cancelled: int
    """How many were cancelled, before they began or later."""
    pending: int
    """How many were made and have not ended."""


class Stats(NamedTuple):
    """What `unsync.stats()` gives. Counts are since the process began, in a fork since the fork.

    What came to pass in other threads just now may be in one number and not yet in the next.
    """

    coroutines: Work
    """What ran in the ambient loop: coroutines, async generators and continuations. One whose
    continuation returned an Unfuture counts as finished then."""
    threads: Work
    """What ran in the threads of each `ThreadExecutor`, the default one among
    them."""
    processes: Work
    """What went to process pools. Counted as started when it is handed over. A chunk of calls of
    `unsync.calls` or `unsync.map` counts as one."""
    executors: Work
    """What went to executors of other kinds, counted in the same way."""
    loop_queue: int
    """How many things wait for the ambient loop: calls, continuations, outcomes that its coroutines
    await."""
    thread_queue: int
    """How many calls wait for a thread."""
    workers: int
    """How many threads there are in every `ThreadExecutor` together."""
    workers_idle: int
    """How many of those have nothing to do."""
    workers_waiting: int
    """How many of those wait for an Unfuture, each made up for by a spare thread."""
    wakeups: int
    """How often the ambient loop was woken."""
    wakeups_saved: int
    """How often it was not, because it had been woken already."""
    loop_lag: float
    """Seconds that the ambient loop took to come when it was last woken, or that it keeps
    something waiting now, if that is longer. A loop that is idle has the lag of its last turn."""


class Counter:
    """Of what went to executors that are not ours."""

    def __init__(self) -> None:
        # Guards the others. Reentrant: a `__del__` may close a stream, and so cancel jobs.
        self._lock = threading.RLock()
        self._started = self._finished = self._failed = self._cancelled = 0

    def count(self, future: concurrent.futures.Future[Any]) -> None:
        with self._lock:
            self._started += 1
        future.add_done_callback(self._ended)

    def _ended(self, future: concurrent.futures.Future[Any]) -> None:
        failed = cancelled = False
        try:
            failed = future.exception() is not None
        except concurrent.futures.CancelledError:
            cancelled = True
        with self._lock:
            self._cancelled += cancelled
            self._failed += failed
            self._finished += not (cancelled or failed)

    def work(self) -> WorkCounts:
        with self._lock:
            ended = self._finished, self._failed, self._cancelled
            return (self._started, *ended, self._started - sum(ended))


class Book:
    """The counts of all mailboxes of ambient loops, or of all job queues, that there ever were."""

    def __init__(self, width: int) -> None:
        """:param width: how many sums each of them keeps."""
        self._lock = threading.RLock()  # guards the others; a `__del__` may open or close
        self._open: list[Mailbox | JobQueue] = []
        # What those that were closed counted.
        self._past: tuple[int, ...] = (0,) * width

    def open(self, source: Mailbox | JobQueue) -> None:
        with self._lock:
            self._open.append(source)

    def close(self, source: Mailbox | JobQueue) -> None:
        """It has ended, and will count no more."""
        (started, finished, failed, cancelled, pending, *others), *_ = source.counts()
        # Those who waited for what was given up have heard that it is cancelled.
        counts = started, finished, failed, cancelled + pending, 0, *others
        with self._lock:
            if source in self._open:
                self._open.remove(source)
                self._past = _sum([self._past, counts])

    def close_ended_queues(self) -> None:
        for source in list(self._open):
            if isinstance(source, JobQueue) and source.wait(0):
                self.close(source)

    def read(self) -> tuple[tuple[int, ...], list[tuple[Any, ...]]]:
        """The sums over all, and the other numbers of each that is open."""
        with self._lock:
            counts = [source.counts() for source in self._open]
            past = self._past
        return _sum([past, *(sums for sums, *_ in counts)]), [tuple(each[1:]) for each in counts]


def _sum(rows: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*rows, strict=True)))
