"""Draining: waiting for what is pending, and for what that calls in turn.

`unsync.drain()` and the end of the interpreter do so; imported by the first of them. The cores tell
of each call that is made while somebody drains, and at no other time: so calls pay nothing for it.

What counts is what is pending at the beginning, and from then on each call that is made by what
counts: by a job, known by the worker that is at it; or in a context that has the mark of the drain,
which calls, tasks and continuations hand on as they copy it. And each continuation of what counts.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from contextvars import Context, ContextVar
from typing import TYPE_CHECKING, Any

from unsync import _common, executors
from unsync._backend import name_of_call, waiting_upon, watch_calls, when_told
from unsync._common import LOOK_AGAIN_SECONDS, Latch, monotonic

if TYPE_CHECKING:
    from unsync._backend import Mailbox, Unfuture

__all__ = ["Drain", "after_fork", "pending_now", "summary", "wait_for_end"]

# The drains for which the calls count that are made in this context.
_marks: ContextVar[tuple[Drain, ...]] = ContextVar("unsync drains")


class _Watcher:
    """What the cores tell, handed on to all drains that are under way."""

    def __init__(self) -> None:
        # Guards the list and whether the cores tell, for no longer than to change both. Reentrant,
        # since a signal handler may drain, too.
        self._lock = threading.RLock()
        self._drains: list[Drain] = []

    def add(self, drain: Drain) -> None:
        with self._lock:
            self._drains.append(drain)
            watch_calls(self)
            executors.when_back = self.is_through

    def remove(self, drain: Drain) -> None:
        with self._lock:
            self._drains.remove(drain)
            if not self._drains:
                watch_calls(None)
                executors.when_back = None

    def made(
        self,
        unfuture: Unfuture[Any],
        source: Unfuture[Any] | None,
        job: Unfuture[Any] | None,
        context: Context,
    ) -> None:
        for drain in list(self._drains):
            drain.made(unfuture, source, job, context)

    def is_through(self, job: Unfuture[Any]) -> None:
        for drain in list(self._drains):
            drain.is_through(job)


_watcher = _Watcher()


def after_fork() -> None:
    """In the child: who drained is with the parent."""
    global _watcher
    watch_calls(None)
    executors.when_back = None
    _watcher = _Watcher()


class Drain:
    """One wait for all that is pending; `with` it from the beginning to the end.

    :param find_mailbox: gives the ambient loop's, if it runs; None if that does not matter.
    :param only_functions: only those count that are pending at the beginning, in threads and
        processes, and what they call; not coroutines.
    """

    def __init__(
        self, find_mailbox: Callable[[], Mailbox | None] | None, only_functions: bool = False
    ) -> None:
        self._find_mailbox = None if only_functions else find_mailbox
        self._mailbox: Mailbox | None = None
        self._only_functions = only_functions
        # Written by any thread, each change in one step: all that counts, ended or not; and what of
        # it is still to be waited for, in the order it came.
        self._counted: dict[Unfuture[Any], None] = {}
        self._left: deque[Unfuture[Any]] = deque()
        # Set while it looks around for what is pending: what moves meanwhile it might miss.
        self._is_looking = True
        # Set when a worker, or another executor, is through with a call.
        self._moved = Latch()
        # Whether the loop has been looked into, and what was raised there.
        self._saw_loop = Latch()
        self._failure: BaseException | None = None
        self.has_ended = False

    def __enter__(self) -> Drain:
        _watcher.add(self)
        try:
            if self._find_mailbox is not None:
                # Only now: what comes into a loop that is started later has been told of.
                self._mailbox = self._find_mailbox()
            for queue in executors.open_queues():
                for jobs in queue.pending():
                    self._count_all(jobs)
            executors.collect_forgotten_calls()
            self._count_all(executors.calls_elsewhere(in_pools=self._only_functions))
            self._look_into_loop()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.has_ended = True
        _watcher.remove(self)
        self._counted.clear()
        self._left.clear()

    # What counts.

    def made(
        self,
        unfuture: Unfuture[Any],
        source: Unfuture[Any] | None,
        job: Unfuture[Any] | None,
        context: Context,
    ) -> None:
        """Told of each call, by the thread that makes it."""
        counts = (
            self in context.get(_marks, ())
            or job in self._counted
            or source in self._counted
            or (self._is_looking and self._might_be_missed(source, job))
        )
        if counts:
            self._mark(context)
            self._count(unfuture)

    def _might_be_missed(self, source: Unfuture[Any] | None, job: Unfuture[Any] | None) -> bool:
        """Whether it may come of something that ends before it is found.

        Where only functions count, what others call does not.
        """
        ends = job is not None or (source is not None and source.done())
        return ends or not self._only_functions

    def _count(self, unfuture: Unfuture[Any]) -> None:
        if unfuture not in self._counted:
            self._counted[unfuture] = None
            self._left.append(unfuture)

    def _count_all(self, unfutures: Iterable[Unfuture[Any]]) -> None:
        """With their continuations, and the continuations of those."""
        found = deque(unfutures)
        while found:
            unfuture = found.popleft()
            if unfuture not in self._counted:
                self._count(unfuture)
                found.extend(waiting_upon(unfuture))

    def _mark(self, context: Context) -> None:
        """Calls that are made in it count from now on."""
        marks = context.get(_marks, ())
        if self not in marks:
            others = [drain for drain in marks if not drain.has_ended]
            with suppress(RuntimeError):  # it is entered: what runs in it is known in another way
                context.run(_marks.set, (*others, self))

    def _look_into_loop(self) -> None:
        loop = None if self._mailbox is None else self._mailbox.loop
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._look_around_in, loop)
                return
        except RuntimeError:  # it was closed just now
            pass
        self._is_looking = False
        self._saw_loop.set()

    def _look_around_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """In the loop's thread. All tasks get the mark: whose children they are nobody knows."""
        assert self._mailbox is not None
        try:
            self._count_all(self._mailbox.pending(self._mark))
            self._mark_all(asyncio.all_tasks(loop))
        except BaseException as exc:
            self._failure = exc
        self._is_looking = False
        self._saw_loop.set()

    def _mark_all(self, tasks: set[asyncio.Task[Any]]) -> None:
        for task in tasks:
            context = _context_of(task)
            if context is not None:
                self._mark(context)

    # The wait.

    def wait(self, until: float | None) -> bool:
        """Whether all of it has ended, at `until` on the monotonic clock at the latest.

        It may be called again to wait for longer.
        """
        if not self.look(until):
            return False
        while True:
            while self._left:
                unfuture = self._left[0]
                if unfuture not in _common.apart and not wait_for_end(unfuture, until):
                    return False
                self._left.popleft()
            # Who is told of the end of a job may be told before the worker calls the continuations
            # of it. And one that was cancelled may still run.
            self._moved = moved = Latch()
            if self._at_hand():
                if not _wait_for(moved, until):
                    return False
            elif not self._left:
                return True

    def look(self, until: float | None) -> bool:
        """Whether the loop has been looked into by then."""
        if not _wait_for(self._saw_loop, until):
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def is_through(self, job: Unfuture[Any]) -> None:
        """Told by who worked on it."""
        if job in self._counted:
            self._moved.set()

    def _at_hand(self) -> list[Unfuture[Any]]:
        """What some worker or other executor is not through with yet."""
        found = [job for queue in executors.open_queues() for job in queue.pending()[1]]
        found += executors.calls_elsewhere(in_pools=False)
        return [unfuture for unfuture in found if unfuture in self._counted]

    def pending(self) -> list[Unfuture[Any]]:
        """What has not ended: each once."""
        left = [each for each in list(self._left) if not each.done() and each not in _common.apart]
        return list(dict.fromkeys([*left, *self._at_hand()]))


def wait_for_end(unfuture: Unfuture[Any], until: float | None) -> bool:
    if unfuture.done():
        return True
    ended = Latch()
    when_told(unfuture, lambda _: ended.set())
    return _wait_for(ended, until)


def pending_now(find_mailbox: Callable[[], Mailbox | None] | None) -> list[Unfuture[Any]]:
    """What would be waited for; but for the coroutines of a loop that is blocked for a second."""
    with Drain(find_mailbox) as drain:
        drain.look(monotonic() + LOOK_AGAIN_SECONDS)
        return drain.pending()


def _wait_for(latch: Latch, until: float | None) -> bool:
    """In short waits, since some systems let Ctrl-C in only between them."""
    while True:
        left = LOOK_AGAIN_SECONDS
        if until is not None:
            left = min(left, max(0.0, until - monotonic()))
        if latch.wait(left):
            return True
        if until is not None and monotonic() >= until:
            return False


def _context_of(task: asyncio.Task[Any]) -> Context | None:
    get_context: Callable[[], Context] | None = getattr(task, "get_context", None)
    if get_context is not None:
        return get_context()
    # Before Python 3.12 only the garbage collector knows it.
    return next((each for each in gc.get_referents(task) if type(each) is Context), None)


def summary(unfutures: Sequence[Unfuture[Any]]) -> str:
    """How many calls of which functions: "1 call of f()", "3 calls, 2 of f(), 1 of g()"."""
    # Without a name are those that wait for another one's outcome.
    names: Counter[str] = Counter()
    for unfuture in unfutures:
        if name := name_of_call(unfuture):
            names[name] += executors.sizes.get(unfuture, 1)
    total = names.total()
    if not total:
        return f"{len(unfutures)} continuations"
    calls = "1 call" if total == 1 else f"{total} calls"
    if len(names) == 1:
        return f"{calls} of {next(iter(names))}()"
    shown = names.most_common(_NAMES)
    parts = [f"{number} of {name}()" for name, number in shown]
    if len(names) > len(shown):
        parts.append(f"{total - sum(number for _, number in shown)} of others")
    return ", ".join([calls, *parts])


# How many functions are named in one line.
_NAMES = 5
