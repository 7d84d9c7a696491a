"""What mailboxes and job queues counted, summed up for `unsync.stats()`."""

from __future__ import annotations

import threading
from typing import Any

from unsync._backend import JobQueue, Mailbox

__all__ = ["Book"]


class Book:
    """The counts of all mailboxes of ambient loops, or of all job queues, that there ever were."""

    def __init__(self, width: int) -> None:
        """:param width: how many sums each of them keeps."""
        # Held by who closes or reads, so that what is counted moves from the one to the other at
        # once. No call waits for it: `open` takes it not, and nobody waits for who closes. It is
        # reentrant, since a `__del__` may close, and a signal handler read.
        self._lock = threading.RLock()
        self._open: list[Mailbox | JobQueue] = []
        # What those that were closed counted.
        self._past: tuple[int, ...] = (0,) * width

    def open(self, source: Mailbox | JobQueue) -> None:
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

    def all_open(self) -> list[Any]:
        return list(self._open)

    def read(self) -> tuple[tuple[int, ...], list[tuple[Any, ...]]]:
        """The sums over all, and the other numbers of each that is open."""
        with self._lock:
            counts = [source.counts() for source in list(self._open)]
            past = self._past
        return _sum([past, *(sums for sums, *_ in counts)]), [tuple(each[1:]) for each in counts]


def _sum(rows: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*rows, strict=True)))
