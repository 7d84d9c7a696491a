"""`unsync.stats()`: what was done and what is pending, summed up over all that ever ran here.

Imported when somebody asks: `_counts.py` keeps the counts.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Stats", "Work"]


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
