"""The core in plain Python: the fallback, and what type checkers and readers read.

`_core.pyx` is its compiled twin: the same names, the same behaviour. Who may touch what:

- An Unfuture's `_status`, `_outcome`, `_traceback`, `_source`, `_chain` and `_side` belong to its
  `_lock`, a reentrant one: a signal handler or a `__del__` may come back to the same Unfuture.
- No foreign code runs under that lock: waiters are fired, and references are dropped, after it.
- A waiter belongs to whoever took it from the Unfuture's chain, and is fired once.
- A mailbox's `live` and `starting` are written by its loop's thread only.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import sys
import threading
from asyncio.tasks import _enter_task, _leave_task
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from threading import get_ident
from time import monotonic
from types import GenericAlias, MethodType, TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    NoReturn,
    ParamSpec,
    TypeVar,
    cast,
    final,
    overload,
)
from weakref import ref

from unsync._common import (
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FAILED,
    FINISHED,
    LOOK_AGAIN_SECONDS,
    PENDING,
    PLAIN_TYPES,
    RUNNING,
    STATE_NAMES,
    MailboxCounts,
    Mirror,
    QueueCounts,
    TimedOutError,
    Waiters,
    WorkCounts,
    already_done_error,
    awaited_exception,
    cancelled_error,
    check_callable,
    check_exception,
    close_unstarted,
    describe,
    exhausted_error,
    full_error,
    is_asyncio_future,
    is_awaitable,
    is_coroutine,
    log_failed_callback,
    logger,
    mirror_of,
    name_of,
    orphan_error,
    outcome_of_asyncio,
    rebuild,
    report_failed_callback,
    report_slow,
    report_unseen_failure,
    running_loop,
    thrown,
    wait_for_awaitable,
    waits_for_ever,
    would_deadlock_error,
)
from unsync._views import asyncio_view, concurrent_view

__all__ = [
    "BIND_CLASS",
    "BIND_INSTANCE",
    "BIND_NOTHING",
    "Batch",
    "Counter",
    "JobQueue",
    "Launcher",
    "Mailbox",
    "Route",
    "Unfuture",
    "after_fork",
    "are_all_of",
    "call_each",
    "fill_batches",
    "in_home_thread",
    "set_home",
    "when_done",
]

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

# A drain gives the loop back to its timers and I/O after so many seconds and items, or after the
# longer time: each turn costs a poll, in which other threads take the GIL, if there is one.
DRAIN_SECONDS = 0.002
DRAIN_ITEMS = 128
DRAIN_LONGEST = 0.01
# How many items pass between two looks at the clock.
DRAIN_STRIDE = 16
# How many awaited calls may start one within the other: each takes some of the C stack.
NESTING = 32
# How many may start there and then in one turn of the loop, which others are waiting for.
STARTS_IN_A_TURN = 256

# Counts the forks above this process: an Unfuture of an older one has nobody to finish it.
_generation = 0
# Guards the moment when a child first looks at one of its parent's Unfutures.
_fork_lock = threading.RLock()

# The worker that the calling thread is, if it is one.
_this = threading.local()

_home: Mailbox | None = None
_start_home: Callable[[], Mailbox] | None = None


def set_home(mailbox: Mailbox | None, start: Callable[[], Mailbox]) -> None:
    """Names the ambient loop's mailbox, or with None the function that starts one on first use."""
    global _home, _start_home
    _home = mailbox
    _start_home = start


def home() -> Mailbox:
    """The ambient loop's mailbox; the loop is started if it does not run."""
    mailbox = _home
    if mailbox is not None:
        return mailbox
    if _start_home is None:
        raise RuntimeError("no ambient loop has been set up")
    return _start_home()


def in_home_thread() -> bool:
    """Whether this is the thread of the ambient loop."""
    mailbox = _home
    return mailbox is not None and mailbox.thread_id == get_ident()


def after_fork() -> None:
    """Run in the child: what was pending before the fork will never be finished here."""
    global _generation, _fork_lock
    _generation += 1
    _fork_lock = threading.RLock()
    _this.worker = None  # its queue has no workers here


def _mailbox_of(loop: asyncio.AbstractEventLoop) -> Mailbox:
    """The mailbox of the loop that runs in this thread.

    The loop owns it, as an attribute: what is never picked up must not outlive the loop, and
    would as the value of a registry, for it refers to the loop.
    """
    mailbox: Mailbox | None = getattr(loop, "_unsync_mailbox", None)
    if mailbox is None:
        mailbox = _home if _home is not None and _home.loop is loop else Mailbox(loop)
        # A loop that takes no attribute has a box for every waiter, and more wakeups.
        with suppress(AttributeError, TypeError):
            loop._unsync_mailbox = mailbox  # type: ignore[attr-defined]
    return mailbox


@final
class Mailbox:
    """What other threads leave for one event loop, picked up in batches: one wakeup per burst.

    Any thread may leave something. The first item wakes the loop, later ones only join it,
    until the loop finds the box empty. A closed loop's items are abandoned, each in its own way.

    The loop is held weakly: it owns the mailbox.
    """

    __slots__ = (
        "__weakref__",
        "_abandoned",
        "_armed",
        "_arrived",
        "_begun",
        "_bell",
        "_bell_lock",
        "_busy_since",
        "_cancelled",
        "_debug",
        "_drains",
        "_failed",
        "_finished",
        "_items",
        "_lag",
        "_loop",
        "_starts",
        "_taken",
        "_woken_at",
        "live",
        "starting",
        "thread_id",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        # The order of these two operations is the protocol: a poster appends, then reads
        # `_armed`; the loop clears `_armed`, then looks at the items once more.
        self._items: deque[Any] = deque()
        self._armed = False
        # The ambient loop's thread; None for a foreign loop.
        self.thread_id: int | None = None
        # asyncio holds tasks weakly; these have begun and must get to their end.
        self.live: dict[asyncio.Task[Any], Unfuture[Any]] = {}
        # Those whose coroutines make their first step now, each within the one before it.
        self.starting: list[Unfuture[Any]] = []
        # How many awaited calls were started there and then, in this turn of the loop.
        self._starts = 0
        # When the loop was woken; None once it has come.
        self._woken_at: float | None = None
        # What follows is counted and set by the loop's thread: how often it came, how many items it
        # took, how many of those were calls, and how many began and ended; how long it took to come
        # the last time, and since when it has been at work here.
        self._drains = self._taken = self._arrived = 0
        self._begun = self._finished = self._failed = self._cancelled = 0
        self._lag = 0.0
        self._busy_since: float | None = None
        # By whoever closes it.
        self._abandoned = 0
        # Whether the loop is in debug mode, while the box is drained.
        self._debug = False
        # The eventfd that wakes the loop, if there is one; guarded by the lock, a reentrant one,
        # since a signal handler may make a call.
        self._bell: int | None = None
        self._bell_lock = threading.RLock()

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        return self._loop()

    def _post(self, item: Any) -> None:
        """Leaves `item` for the loop; `item._arrive(mailbox)` is called in its thread."""
        self._items.append(item)
        if not self._armed:
            self._armed = True
            self._wake()

    def _wake(self) -> None:
        loop = self._loop()
        self._woken_at = monotonic()
        try:
            if loop is None:
                self.close()
            elif running_loop() is loop:
                loop.call_soon(self._drain)
            elif not self._ring():
                loop.call_soon_threadsafe(self._drain)
        except BaseException as exc:
            if type(exc) is RuntimeError and loop is not None and loop.is_closed():
                self.close()
                return
            # Nobody is coming: whoever posts next must try again. A Ctrl-C may be what failed.
            self._armed = False
            raise

    # The bell: an eventfd costs one short system call to ring and one to still. The loop's own way
    # to be woken, call_soon_threadsafe(), takes three on a socket pair, and more Python.

    def open_bell(self) -> None:
        """Has the loop woken by a bell of the mailbox's own, where there is such a thing.

        Called before the loop runs, or in its thread.
        """
        if not hasattr(os, "eventfd"):
            return
        loop = self._loop()
        assert loop is not None
        try:
            bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            return
        try:
            loop.add_reader(bell, self._on_bell)
        except Exception:  # the loop has no readers, and will be woken in its own way
            os.close(bell)
            return
        with self._bell_lock:
            self._bell = bell

    def close_bell(self) -> None:
        """Called in the loop's thread before the loop is closed."""
        with self._bell_lock:
            bell, self._bell = self._bell, None
        if bell is not None:
            loop = self._loop()
            assert loop is not None
            loop.remove_reader(bell)
            os.close(bell)

    def _ring(self) -> bool:
        """Rings the bell; False if there is none."""
        with self._bell_lock:
            if self._bell is None:
                return False
            os.eventfd_write(self._bell, 1)
            return True

    def _on_bell(self) -> None:
        bell = self._bell
        if bell is not None:
            with suppress(BlockingIOError):
                os.eventfd_read(bell)
        self._drain()

    def _drain(self) -> None:
        loop = self._loop()
        self._debug = loop is not None and loop.get_debug()
        del loop
        self._starts = 0
        items = self._items
        begun = monotonic()
        self._drains += 1
        if self._woken_at is not None:
            self._lag = begun - self._woken_at
            self._woken_at = None
        self._busy_since = begun
        count = 0
        try:
            while True:
                for _ in range(DRAIN_STRIDE):
                    if not items:
                        self._armed = False
                        if not items:
                            return
                        self._armed = True
                    self._taken += 1
                    if self._debug:
                        self._time(items.popleft())
                    else:
                        items.popleft()._arrive(self)
                count += DRAIN_STRIDE
                elapsed = monotonic() - begun
                if elapsed >= (DRAIN_SECONDS if count >= DRAIN_ITEMS else DRAIN_LONGEST):
                    break
        except BaseException:
            # Only KeyboardInterrupt and SystemExit leave a task; the loop will hear of it, the
            # other items must not suffer.
            self._wake()
            raise
        finally:
            self._busy_since = None
        self._wake()

    def _count_ended(self, unfuture: Unfuture[Any]) -> None:
        """In the loop's thread: this is how it ended; if it is not done, it waits for another."""
        status = unfuture._status
        if status == FAILED:
            self._failed += 1
        elif CANCELLED <= status <= CANCELLED_AND_NOTIFIED:
            self._cancelled += 1
        else:
            self._finished += 1

    def counts(self) -> MailboxCounts:
        """For `unsync.stats()`: see `MailboxCounts`."""
        while True:
            try:
                left = list(self._items)
                break
            except RuntimeError:  # it changed meanwhile
                continue
        calls = sum(isinstance(item, (Unfuture, _Continuation)) for item in left)
        finished, failed = self._finished, self._failed
        cancelled = self._cancelled + self._abandoned
        pending = self._arrived + calls - finished - failed - self._cancelled
        lag = self._lag
        since = self._woken_at or self._busy_since
        if left and since is not None:
            lag = max(lag, monotonic() - since)
        saved = self._taken + len(left) - self._drains
        sums = self._begun, finished, failed, cancelled, max(pending, 0), self._drains, saved
        return sums, len(left), lag

    def _time(self, item: Any) -> None:
        """In debug mode: the loop itself could only name the mailbox."""
        begun = monotonic()
        try:
            item._arrive(self)
        finally:
            if isinstance(item, _Park):
                what = getattr(item._wakeup, "__self__", item)  # the task that went on
            else:
                what = getattr(item, "target", item)
            loop = self._loop()
            if loop is not None:
                report_slow(loop, what, monotonic() - begun)

    def _start_now(self, unfuture: Unfuture[Any]) -> None:
        """For an `await` in the loop itself: starts what is awaited there and then.

        Only if it is all there is to do: what was called before is started before.
        """
        items = self._items
        if self._starts >= STARTS_IN_A_TURN or len(self.starting) >= NESTING or len(items) != 1:
            return
        if not _has_room():
            return
        try:
            item = items.popleft()
        except IndexError:
            return  # a shutdown gave up on the loop
        if item is not unfuture:
            items.appendleft(item)
            return
        self._starts += 1
        self._taken += 1
        unfuture._arrive(self)

    def close(self) -> None:
        """Abandons what is here, and leaves the box so that later items are abandoned too."""
        while True:
            self._armed = False
            try:
                item = self._items.popleft()
            except IndexError:
                return
            self._abandoned += isinstance(item, (Unfuture, _Continuation))
            item._abandon()

    def _start(
        self, unfuture: Unfuture[Any], coro: Coroutine[Any, Any, Any], context: Context
    ) -> None:
        """Starts `coro` as a task of this loop, in whose thread this is called."""
        loop = self._loop()
        assert loop is not None
        self.starting.append(unfuture)
        try:
            task = _make_task(loop, coro, context)
        except BaseException as exc:
            # The first step raised KeyboardInterrupt or SystemExit, or the user's task factory
            # refused: the caller hears of it, the loop goes on.
            close_unstarted(coro)
            unfuture._complete(FAILED, exc)
            self._count_ended(unfuture)
        else:
            if task.done():
                unfuture._ended_at_once(task)
                self._count_ended(unfuture)
            else:
                self.live[task] = unfuture
                unfuture._started(task)
                task.add_done_callback(partial(self._task_done, unfuture), context=context)
            del task
        finally:
            self.starting.pop()
            del unfuture  # a failure's traceback may lead to this frame

    def _task_done(self, unfuture: Unfuture[Any], task: asyncio.Task[Any]) -> None:
        self.live.pop(task, None)
        unfuture._complete(*outcome_of_asyncio(task))
        self._count_ended(unfuture)


def _make_task(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T], context: Context
) -> asyncio.Task[T]:
    if loop.get_task_factory() is not None:
        task: asyncio.Task[T] = context.run(loop.create_task, coro)
        if hasattr(task, "set_name"):
            task.set_name(name_of(coro))
        return task
    # In two steps: if the coroutine's first step raises KeyboardInterrupt, the task is there to be
    # asked for it, else asyncio would report that nobody did.
    task = asyncio.Task.__new__(asyncio.Task)
    try:
        if sys.version_info >= (3, 12):
            name = name_of(coro)
            task.__init__(coro, loop=loop, name=name, context=context, eager_start=True)  # type: ignore[misc]
        else:
            _begin_at_once(task, loop, coro, context)
        return task
    except BaseException:
        if task.done():
            outcome_of_asyncio(task)
        raise
    finally:
        # A failed coroutine's frame refers to this one, and the task to the failure.
        del task


def _has_room() -> bool:
    """Whether the stack is far enough from the recursion limit to start something within it."""
    try:
        sys._getframe(sys.getrecursionlimit() // 2)
    except ValueError:
        return True
    return False


def _begin_at_once(
    task: asyncio.Task[T],
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, T],
    context: Context,
) -> None:
    """Before Python 3.12: makes the first step, which the task asks the loop to make soon.

    A loop that takes no attributes makes the step in its turn.
    """
    name = name_of(coro)
    caught: list[tuple[Callable[[], object], Context]] = []
    attributes: dict[str, object] = getattr(loop, "__dict__", {"call_soon": None})
    catches = "call_soon" not in attributes
    if catches:
        attributes["call_soon"] = partial(_catch_first_step, loop, task, caught)
    try:
        if sys.version_info >= (3, 11):
            task.__init__(coro, loop=loop, name=name, context=context)  # type: ignore[misc]
        else:
            context.run(partial(task.__init__, coro, loop=loop, name=name))  # type: ignore[misc]
    finally:
        if catches:
            del attributes["call_soon"]
        del task  # a failure's traceback may lead to this frame
    if not caught:
        return
    outer = asyncio.current_task(loop)
    if outer is not None:
        _leave_task(loop, outer)
    step, context = caught.pop()  # on 3.10 a copy of the context, made by the task
    try:
        context.run(step)
    finally:
        if outer is not None:
            _enter_task(loop, outer)


def _catch_first_step(
    loop: asyncio.AbstractEventLoop,
    task: asyncio.Task[Any],
    caught: list[tuple[Callable[[], object], Context]],
    callback: Callable[..., object],
    *args: Any,
    context: Context | None = None,
) -> asyncio.Handle | None:
    """The loop's `call_soon` while `task` is made."""
    is_step = getattr(callback, "__self__", None) is task
    if is_step and not caught and context is not None:
        caught.append((callback, context))
        return None
    return type(loop).call_soon(loop, callback, *args, context=context)


class _Waiter:
    """One who waits for an Unfuture: a link of its chain."""

    __slots__ = ("_next",)

    _next: _Waiter | None

    def _fire(self, unfuture: Unfuture[Any]) -> tuple[Unfuture[Any], _Waiter | None] | None:
        """Called once, by the thread that finished `unfuture` (or found it done).

        Returns a follower that just got the same outcome, with its waiters, for the caller to
        fire next: chains are walked with a queue, never by recursion.
        """
        raise NotImplementedError


@final
class _Blocked(_Waiter):
    """A thread that waits in `result()` or `exception()`."""

    __slots__ = ("lock",)

    def __init__(self) -> None:
        self._next = None
        self.lock = threading.Lock()
        self.lock.acquire()

    def _fire(self, unfuture: Unfuture[Any]) -> None:
        self.lock.release()

    def wait(self, timeout: float | None) -> bool:
        """Blocks until it is fired; False after `timeout` seconds."""
        if timeout is None:
            return self.lock.acquire()
        return self.lock.acquire(True, min(max(timeout, 0), threading.TIMEOUT_MAX))


@final
class _Callback(_Waiter):
    """A done-callback; bound to the loop that ran where it was added, if one did."""

    __slots__ = ("context", "function", "loop", "mailbox", "unfuture")

    def __init__(
        self,
        function: Callable[[Unfuture[Any]], object],
        context: Context | None,
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self._next = None
        self.function = function
        self.context = context
        self.loop = loop
        self.mailbox = None if loop is None else _mailbox_of(loop)
        self.unfuture: Unfuture[Any] | None = None

    def _fire(self, unfuture: Unfuture[Any]) -> None:
        if self.loop is None:
            self._call(unfuture)
        elif running_loop() is self.loop:
            self._schedule(unfuture)
        else:
            self.unfuture = unfuture
            assert self.mailbox is not None
            self.mailbox._post(self)

    def _call(self, unfuture: Unfuture[Any]) -> None:
        try:
            if self.context is None:
                self.function(unfuture)
            else:
                self.context.run(self.function, unfuture)
        except BaseException as exc:
            log_failed_callback(self.function, unfuture, exc)

    def _schedule(self, unfuture: Unfuture[Any]) -> None:
        assert self.loop is not None
        assert self.mailbox is not None
        ambient = self.mailbox.thread_id is not None
        function = self._call_in_ambient_loop if ambient else self.function
        self.loop.call_soon(function, unfuture, context=self.context)

    def _call_in_ambient_loop(self, unfuture: Unfuture[Any]) -> None:
        try:
            self.function(unfuture)
        except (KeyboardInterrupt, SystemExit) as exc:
            # It would leave the loop, where nobody runs it who could hear of it.
            log_failed_callback(self.function, unfuture, exc)

    def _arrive(self, mailbox: Mailbox) -> None:
        """Calls it there and then; a loop in debug mode wants to time each callback."""
        unfuture = self.unfuture
        assert unfuture is not None
        assert self.context is not None
        if mailbox._debug:
            self._schedule(unfuture)
            return
        try:
            self.context.run(self.function, unfuture)
        except BaseException as exc:
            assert self.loop is not None
            ambient = mailbox.thread_id is not None
            report_failed_callback(self.function, unfuture, self.context, exc, self.loop, ambient)
        finally:
            del unfuture, self  # a failure's traceback may lead to this frame

    def _abandon(self) -> None:
        logger.debug("%r: its loop is closed, the callback is not called", self.function)


def when_done(unfuture: Unfuture[T], function: Callable[[Unfuture[T]], object]) -> None:
    """Has the thread that finishes it call `function(unfuture)`, whichever loop may run here.

    At once if it is done.
    """
    callback = _Callback(function, None, None)
    if not unfuture._add_waiter(callback):
        callback._fire(unfuture)


@final
class _Park(_Waiter):
    """One `await`: its iterator, and what the suspended task is parked on.

    It belongs to that one task: `_asyncio_future_blocking` is a handshake between two, and two
    loops that await one Unfuture would race on it.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_begun",
        "_context",
        "_ended",
        "_loop",
        "_mailbox",
        "_unfuture",
        "_wakeup",
        "_worker",
    )

    def __init__(self, unfuture: Unfuture[Any]) -> None:
        self._next = None
        # Whose thread the loop runs in, and waits there, if it is a worker.
        self._worker: _Worker | None = None
        self._unfuture = unfuture
        self._begun = self._ended = False
        self._asyncio_future_blocking = False

    def __iter__(self) -> _Park:
        return self

    def __next__(self) -> _Park:
        unfuture = self._unfuture
        if not unfuture.done() and self._must_wait():
            return self
        del self  # the traceback of a failure holds this frame
        try:
            value = unfuture._awaited()
        finally:
            del unfuture
        raise StopIteration(value)

    def send(self, value: object) -> _Park:
        """As asyncio's: for those who drive a coroutine by hand."""
        if self._ended:
            raise StopIteration
        try:
            return self.__next__()
        finally:
            del self

    def throw(self, kind: object, value: object = None, traceback: object = None) -> NoReturn:
        exc = thrown(kind, value, traceback)
        self._ended = True
        try:
            raise exc
        finally:
            del self, exc  # the traceback holds this frame

    def close(self) -> None:
        self._ended = True

    def _must_wait(self) -> bool:
        if self._begun:
            raise RuntimeError("await wasn't used with future")
        self._begun = True
        unfuture = self._unfuture
        loop = running_loop()
        if loop is None:
            raise RuntimeError(f"no running event loop to wait in for {unfuture!r}")
        mailbox = _home
        if unfuture._is_call() and mailbox is not None and mailbox.loop is loop:
            mailbox._start_now(unfuture)
            if unfuture.done():
                return False
        unfuture._check_not_own(loop)
        self._loop = loop
        self._mailbox = _mailbox_of(loop)
        self._asyncio_future_blocking = True
        return True

    # What a task asks of the future that it is parked on.

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(
        self, function: Callable[[_Park], object], *, context: Context | None = None
    ) -> None:
        self._wakeup = function
        self._context = copy_context() if context is None else context
        if not self._unfuture._add_waiter(self):
            self._loop.call_soon(function, self, context=self._context)
            return
        worker = _this_worker()
        if worker is not None:
            self._worker = worker
            worker.begin_wait(self._unfuture)

    def remove_done_callback(self, function: Callable[[_Park], object]) -> int:
        removed = self._unfuture._remove_waiter(self)
        if removed:
            self._end_wait()
        return removed

    def _end_wait(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end_wait()

    def _behind(self) -> Unfuture[Any]:
        return self._unfuture

    def cancel(self, msg: object = None) -> bool:
        return self._unfuture.cancel(msg)

    def done(self) -> bool:
        return self._unfuture._status >= CANCELLED

    def result(self) -> None:
        """The task only asks whether to go on: `__next__` gives the outcome to its coroutine."""

    # How the end of the wait reaches the task.

    def _fire(self, unfuture: Unfuture[Any]) -> None:
        if running_loop() is self._loop:
            self._end_wait()
            self._loop.call_soon(self._wakeup, self, context=self._context)
        else:
            self._mailbox._post(self)

    def _arrive(self, mailbox: Mailbox) -> None:
        try:
            self._end_wait()
            self._context.run(self._wakeup, self)
        finally:
            del self  # a failure's traceback may lead to this frame

    def _abandon(self) -> None:
        logger.debug("%r: the loop of a task that awaited it is closed", self._unfuture)


@final
class _Follower(_Waiter):
    """Gives an Unfuture the outcome of the one it waits for."""

    __slots__ = ("target",)

    def __init__(self, target: Unfuture[Any]) -> None:
        self._next = None
        self.target = target

    def _fire(self, unfuture: Unfuture[Any]) -> tuple[Unfuture[Any], _Waiter | None] | None:
        unfuture._unseen = False
        return _pass_on(unfuture, self.target)


@final
class _Continuation(_Waiter):
    """What `then` and `map` leave at their source; also what stands behind their Unfuture."""

    __slots__ = ("by_value", "context", "function", "source", "target")

    def __init__(
        self, source: Unfuture[Any], function: Callable[[Any], Any], by_value: bool
    ) -> None:
        self._next = None
        self.source = source
        self.function = function
        self.by_value = by_value
        self.context = copy_context()
        self.target: Unfuture[Any] = _blank(Unfuture)
        self.target._source = self

    def _fire(self, unfuture: Unfuture[Any]) -> tuple[Unfuture[Any], _Waiter | None] | None:
        if unfuture._status != FINISHED:
            unfuture._unseen = False
            return _pass_on(unfuture, self.target)
        try:
            home()._post(self)
        except BaseException as exc:
            # The ambient loop cannot be started: the one who waits must hear of it.
            self.target._complete(FAILED, exc)
        return None

    def _arrive(self, mailbox: Mailbox) -> None:
        target = self.target
        mailbox._arrived += 1
        went_on = False
        if not target._begin():
            mailbox._count_ended(target)
            return
        mailbox._begun += 1
        argument = self.source._outcome if self.by_value else self.source
        context = self.context
        try:
            result = context.run(self.function, argument)
            # In here as well: nobody else would finish the target if this failed.
            went_on = target._resolve(result, context, mailbox)
        except asyncio.CancelledError as exc:
            target._complete(CANCELLED, exc.args[0] if exc.args else None)
        except BaseException as exc:
            target._complete(FAILED, exc)
        finally:
            if not went_on:
                mailbox._count_ended(target)
            del self, target  # an error's traceback holds this frame

    def _abandon(self) -> None:
        self.target._complete(CANCELLED, None)


def _pass_on(
    source: Unfuture[Any], target: Unfuture[Any]
) -> tuple[Unfuture[Any], _Waiter | None] | None:
    status, outcome = source._status, source._outcome
    if status == CANCELLED_AND_NOTIFIED:
        status = CANCELLED
    claimed, chain = target._claim(status, outcome)
    return (target, chain) if claimed else None


def _fire_all(unfuture: Unfuture[Any], chain: _Waiter | None) -> None:
    """Fires a finished Unfuture's waiters in the order they came, then its followers' waiters."""
    backlog: deque[tuple[Unfuture[Any], _Waiter | None]] | None = None
    while True:
        waiter = _oldest_first(chain)
        while waiter is not None:
            following, waiter._next = waiter._next, None
            try:
                follower = waiter._fire(unfuture)
            except BaseException:
                logger.exception("waking %r for %r failed", waiter, unfuture)
            else:
                if follower is not None:
                    if backlog is None:
                        backlog = deque()
                    backlog.append(follower)
            waiter = following
        if not backlog:
            return
        unfuture, chain = backlog.popleft()


def _links(chain: _Waiter | None) -> Iterator[_Waiter]:
    while chain is not None:
        yield chain
        chain = chain._next


def _oldest_first(chain: _Waiter | None) -> _Waiter | None:
    first: _Waiter | None = None
    while chain is not None:
        following, chain._next = chain._next, first
        first, chain = chain, following
    return first


@final
class _Call:
    """A coroutine that has no task yet, and the context to start it in."""

    __slots__ = ("cancelling", "context", "coro")

    def __init__(self, coro: Coroutine[Any, Any, Any], context: Context) -> None:
        self.coro = coro
        self.context = context
        # The message, in a tuple, of a cancel() that came while the first step was made.
        self.cancelling: tuple[object] | None = None

    def __repr__(self) -> str:
        return repr(self.coro)


@final
class _Job:
    """A function that has not been started, its arguments, and the context to run it in."""

    __slots__ = ("args", "context", "function", "kwargs")

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Context,
    ) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.context = context


def _name_behind(source: object) -> str | None:
    """The name of the function behind an Unfuture; None if there is none."""
    if isinstance(source, _Call):
        return name_of(source.coro)
    if isinstance(source, (_Job, _Continuation)):
        return name_of(source.function)
    if isinstance(source, Batch):
        return source.name
    if isinstance(source, str):
        return source
    if isinstance(source, Mirror):
        return source.function
    return None if isinstance(source, Unfuture) else name_of(source)


def _blank(cls: type[Unfuture[Any]]) -> Unfuture[Any]:
    unfuture = object.__new__(cls)
    unfuture._lock = threading.RLock()
    unfuture._status = PENDING
    unfuture._generation = _generation
    unfuture._unseen = False
    unfuture._outcome = None
    unfuture._traceback = None
    unfuture._source = None
    unfuture._chain = None
    unfuture._side = None
    return unfuture


class Unfuture(Generic[T]):
    """One future for both worlds: threads wait on it with `result()`, coroutines `await` it.

    It does what an `asyncio.Future` and a `concurrent.futures.Future` do, at once, and every
    method may be called from any thread. It is bound to no loop.

    :param source: nothing, for one to set by hand; an asyncio future or task, a concurrent
        future or another Unfuture, to have the same outcome and pass on cancelling; or a
        coroutine, to run it in the ambient event loop.
    :raises TypeError: if `source` is anything else.
    :raises RuntimeError: if `source` is a pending asyncio future whose loop is closed.
    """

    __slots__ = (
        "__weakref__",
        "_chain",
        "_generation",
        "_lock",
        "_outcome",
        "_side",
        "_source",
        "_status",
        "_traceback",
        "_unseen",
    )

    # asyncio.isfuture() looks for it. No task is ever parked on the Unfuture itself: see _Park.
    _asyncio_future_blocking: ClassVar[bool] = False

    if not TYPE_CHECKING:
        __class_getitem__ = classmethod(GenericAlias)

    _lock: threading.RLock
    _status: int
    _generation: int
    # A failure that nobody has looked at yet.
    _unseen: bool
    # The result, the exception, or the message of a cancellation.
    _outcome: Any
    _traceback: TracebackType | None
    # What is behind a pending or running one: see cancel(). The name of the function that runs in
    # another thread, or that was behind a done one.
    _source: (
        _Call
        | _Job
        | _Continuation
        | asyncio.Task[Any]
        | Unfuture[Any]
        | Mirror
        | Batch
        | str
        | None
    )
    _chain: _Waiter | None
    _side: Waiters | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Unfuture[T]:
        return cast("Unfuture[T]", _blank(cls))

    def __init__(
        self,
        source: (
            asyncio.Future[T]
            | concurrent.futures.Future[T]
            | Unfuture[T]
            | Coroutine[Any, Any, T]
            | None
        ) = None,
    ) -> None:
        if source is None:
            return
        if isinstance(source, Unfuture):
            self._follow(source)
        elif is_coroutine(source):
            mailbox = home()
            self._source = _Call(cast("Coroutine[Any, Any, T]", source), copy_context())
            mailbox._post(self)
        else:
            mirror = mirror_of(self, source)
            self._source = mirror
            mirror.attach()

    @classmethod
    def from_value(cls, value: R) -> Unfuture[R]:
        """One that is finished already, with `value` as its result."""
        unfuture = cast("type[Unfuture[R]]", cls)()
        unfuture.set_result(value)
        return unfuture

    # Looking at it.

    def result(self, timeout: float | None = None) -> T:
        """The result, waiting for it as long as it takes or `timeout` seconds.

        It blocks the calling thread, as in concurrent.futures; in `unsync.thread` it never
        waits, as in asyncio.

        :raises TimeoutError: after `timeout` seconds.
        :raises InvalidStateError: in `unsync.thread`, if it is not done.
        :raises CancelledError: if it was cancelled.
        :raises BaseException: what the function raised.
        """
        if self._status < CANCELLED:
            self._wait(timeout)
        status = self._status
        if status == FINISHED:
            return cast(T, self._outcome)
        try:
            if status == FAILED:
                self._unseen = False
                raise self._outcome.with_traceback(self._traceback)
            raise cancelled_error(self._outcome, running_loop() is not None)
        finally:
            # The error's traceback holds this frame: it must not hold the Unfuture in turn.
            del self

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The exception, or None if there is a result; waits as `result` does.

        :raises TimeoutError: after `timeout` seconds.
        :raises InvalidStateError: in `unsync.thread`, if it is not done.
        :raises CancelledError: if it was cancelled.
        """
        if self._status < CANCELLED:
            self._wait(timeout)
        status = self._status
        if status == FINISHED:
            return None
        if status == FAILED:
            self._unseen = False
            return cast(BaseException, self._outcome)
        try:
            raise cancelled_error(self._outcome, running_loop() is not None)
        finally:
            del self

    def done(self) -> bool:
        """Whether it has a result or an exception or was cancelled."""
        if self._status < CANCELLED:
            self._check_fork()
        return self._status >= CANCELLED

    def running(self) -> bool:
        """Whether the work behind it has begun and not ended."""
        unfuture: Unfuture[Any] = self
        while True:
            unfuture._check_fork()
            source = unfuture._source
            if unfuture._status != PENDING:
                return unfuture._status == RUNNING
            if not isinstance(source, Unfuture):
                return isinstance(source, Mirror) and source.running()
            unfuture = source

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return CANCELLED <= self._status <= CANCELLED_AND_NOTIFIED

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The running loop, else the ambient one: an Unfuture can be awaited in every loop."""
        loop = running_loop()
        if loop is None:
            loop = home().loop
            assert loop is not None
        return loop

    @property
    def future(self) -> asyncio.Future[T]:
        """A true `asyncio.Future` that shows this one; of the running loop, else the ambient one.

        A new one each time. Outcome and cancellation go both ways, as does what is set.
        """
        return asyncio_view(self, when_done)

    @property
    def concurrent_future(self) -> concurrent.futures.Future[T]:
        """A true `concurrent.futures.Future` that shows this one.

        A new one each time. Outcome and cancellation go both ways, as does what is set.
        """
        return concurrent_view(self, when_done)

    def __await__(self) -> Generator[Any, None, T]:
        """Suspends the calling coroutine, in whatever loop it runs, until there is an outcome.

        A cancelled awaiter cancels what it awaits, as in asyncio.

        :raises asyncio.CancelledError: if it was cancelled.
        :raises BaseException: what the function raised.
        """
        return cast("Generator[Any, None, T]", _Park(self))

    def __iter__(self) -> Generator[Any, None, T]:
        return self.__await__()

    # Setting it.

    def set_result(self, result: T) -> None:
        """Finishes it with `result`.

        :raises InvalidStateError: if it is done already.
        """
        source = self._source
        if not self._complete(FINISHED, result):
            raise already_done_error(self)
        if isinstance(source, Mirror):
            source.push(FINISHED, result)

    def set_value(self, result: T) -> None:
        """The same as `set_result`."""
        self.set_result(result)

    def set_exception(self, exception: BaseException | type[BaseException] | None) -> None:
        """Finishes it with `exception`, an instance or a class to make one of.

        :raises InvalidStateError: if it is done already.
        :raises TypeError: if it is no exception.
        """
        if self.done():
            raise already_done_error(self)
        source = self._source
        instance = check_exception(exception)
        if not self._complete(FAILED, instance):
            raise already_done_error(self)
        if isinstance(source, Mirror):
            source.push(FAILED, instance)

    def set_running_or_notify_cancel(self) -> bool:
        """For executors, as in concurrent.futures: marks it running.

        Returns False if it was cancelled: then its work must not begin.

        :raises RuntimeError: if it is running or finished.
        """
        with self._lock:
            status = self._status
            if status == PENDING:
                self._status = RUNNING
                return True
            if status == CANCELLED:
                self._status = CANCELLED_AND_NOTIFIED
        if CANCELLED <= status <= CANCELLED_AND_NOTIFIED:
            return False
        raise RuntimeError(f"this Unfuture is not pending: {self!r}")

    def cancel(self, msg: object = None) -> bool:
        """Cancels what is behind it; `msg` goes with the CancelledError.

        A coroutine sees `CancelledError` and decides, as in asyncio; work that has not begun
        never will; the source of a `then` is cancelled with it, as what is awaited would be.
        A function that already runs in a thread or a process cannot be stopped: a plain thread
        gets False, as in concurrent.futures; where a loop runs the Unfuture is cancelled and the
        function's outcome dropped, as in asyncio.

        Returns whether it is, or is being, cancelled.
        """
        answer, behind = self._cancel_this(msg)
        while behind is not None:
            cancelled, behind = behind._cancel_this(msg)
            if answer is None:
                answer = cancelled
        return bool(answer)

    def _cancel_this(self, msg: object) -> tuple[bool | None, Unfuture[Any] | None]:
        """Whether this one is cancelled (None: as the next one is), and the next to cancel."""
        self._check_fork()
        with self._lock:
            status = self._status
            source = self._source
            if isinstance(source, _Call) and status == RUNNING:
                source.cancelling = (msg,)
                return True, None
        if status >= CANCELLED:
            self._unseen = False  # as in asyncio: who cancels does not want to hear of it
            return status <= CANCELLED_AND_NOTIFIED, None
        if isinstance(source, Unfuture):
            return None, source
        if isinstance(source, asyncio.Future):
            self._cancel_task(source, msg)
            return True, None
        if status == PENDING:
            if isinstance(source, Mirror):
                if source.cancel(msg):
                    return True, None
            elif self._complete(CANCELLED, msg, expected=PENDING):
                if isinstance(source, Batch):
                    source._lose()
                return True, source.source if isinstance(source, _Continuation) else None
            else:
                return self._cancel_this(msg)  # it began or ended in between
        if running_loop() is not None:
            self._complete(CANCELLED, msg)
        return self.cancelled(), None

    def _cancel_task(self, task: asyncio.Task[Any], msg: object) -> None:
        loop = task.get_loop()
        try:
            if running_loop() is loop:
                task.cancel(msg)
            else:
                loop.call_soon_threadsafe(task.cancel, msg)
        except RuntimeError:
            self._complete(CANCELLED, msg)  # the loop is closed, the task will never end

    # Going on from it.

    def add_done_callback(
        self, fn: Callable[[Unfuture[T]], object], *, context: Context | None = None
    ) -> None:
        """Has `fn(unfuture)` called once it is done.

        Added where a loop is running: called in that loop's thread, soon, as in asyncio. Added
        elsewhere: called by the thread that finishes it, at once if it is done, as in
        concurrent.futures. What a callback raises is logged and stops no other.

        :param context: the context to call it in; in a loop the default is a copy of the
            current one.
        :raises TypeError: if `fn` is not callable.
        """
        check_callable("a done-callback", fn)
        loop = running_loop()
        if loop is not None and context is None:
            context = copy_context()
        callback = _Callback(fn, context, loop)
        if not self._add_waiter(callback):
            callback._fire(self)

    def remove_done_callback(self, fn: Callable[[Unfuture[T]], object]) -> int:
        """Removes every callback that equals `fn`; returns how many there were."""
        removed: list[_Waiter] = []
        while True:
            with self._lock:
                waiters = list(_links(self._chain))
            for waiter in waiters:
                if isinstance(waiter, _Callback) and waiter.function == fn:
                    break
            else:
                return len(removed)
            if self._remove_waiter(waiter):
                removed.append(waiter)

    @overload
    def then(self, continuation: Callable[[Unfuture[T]], Unfuture[R]]) -> Unfuture[R]: ...
    @overload
    def then(self, continuation: Callable[[Unfuture[T]], Awaitable[R]]) -> Unfuture[R]: ...
    @overload
    def then(self, continuation: Callable[[Unfuture[T]], R]) -> Unfuture[R]: ...
    def then(self, continuation: Callable[[Unfuture[T]], Any]) -> Unfuture[Any]:
        """An Unfuture for what `continuation(unfuture)` returns, called once this one has a result.

        It is called in `unsync.thread`, in the current context, with this finished Unfuture. If
        it returns an awaitable, that one's result counts. It is not called if this one fails or
        is cancelled: the outcome passes on.

        :raises TypeError: if `continuation` is not callable.
        """
        check_callable("a continuation", continuation)
        return self._continue(continuation, by_value=False)

    @overload
    def map(self, fn: Callable[[T], Unfuture[R]]) -> Unfuture[R]: ...
    @overload
    def map(self, fn: Callable[[T], Awaitable[R]]) -> Unfuture[R]: ...
    @overload
    def map(self, fn: Callable[[T], R]) -> Unfuture[R]: ...
    def map(self, fn: Callable[[T], Any]) -> Unfuture[Any]:
        """The same as `then`, but `fn` is called with the result.

        :raises TypeError: if `fn` is not callable.
        """
        check_callable("a continuation", fn)
        return self._continue(fn, by_value=True)

    def _continue(self, function: Callable[[Any], Any], by_value: bool) -> Unfuture[Any]:
        continuation = _Continuation(self, function, by_value)
        target = continuation.target
        if not self._add_waiter(continuation):
            follower = continuation._fire(self)
            if follower is not None:
                _fire_all(*follower)
        return target

    # The room where it changes.

    def _claim(
        self, status: int, outcome: Any, expected: int | None = None
    ) -> tuple[bool, _Waiter | None]:
        """Makes it done, once: (whether it was this call, the waiters to fire)."""
        self._check_fork()
        changed = self._change(status, outcome, expected, None)
        if changed is not None:
            return changed
        side = self._side
        assert side is not None  # once there it stays
        # concurrent.futures.wait() reads the state and enlists under this condition, so the state
        # must not change between the two.
        with side.condition:
            changed = self._change(status, outcome, expected, side)
            assert changed is not None
            if changed[0]:
                side.tell(self, self._status)
        return changed

    def _change(
        self, status: int, outcome: Any, expected: int | None, side: Waiters | None
    ) -> tuple[bool, _Waiter | None] | None:
        """The change of state itself; None if `side` is not what belongs to the Unfuture now."""
        if status == CANCELLED and side is not None:
            status = CANCELLED_AND_NOTIFIED
        source = self._source
        name = None if source is None else _name_behind(source)
        with self._lock:
            before = self._status
            if self._side is not side:
                return None
            if before >= CANCELLED or (expected is not None and before != expected):
                return False, None
            self._outcome = outcome
            if status == FAILED:
                self._traceback = outcome.__traceback__
                self._unseen = True
            source, self._source = self._source, name
            chain, self._chain = self._chain, None
            # Last: whoever reads it without the lock finds the rest in place.
            self._status = status
        if isinstance(source, _Call) and before == PENDING:
            close_unstarted(source.coro)
        return True, chain

    def _name_function(self, function: Callable[..., Any]) -> None:
        """For `repr`: the function behind the future that this was made from."""
        name = name_of(function)
        with self._lock:
            source = self._source
            if isinstance(source, Mirror):
                source.function = name
            elif source is None and self._status >= CANCELLED:
                self._source = name

    def _complete(self, status: int, outcome: Any, expected: int | None = None) -> bool:
        """Makes it done and tells everybody; False if it was done already."""
        claimed, chain = self._claim(status, outcome, expected)
        if chain is not None:
            _fire_all(self, chain)
        return claimed

    def _is_call(self) -> bool:
        """Whether behind it is a coroutine that has not begun."""
        return self._status == PENDING and type(self._source) is _Call

    def _begin(self) -> bool:
        """Marks it running, unless somebody finished or cancelled it before."""
        with self._lock:
            if self._status != PENDING:
                return False
            self._status = RUNNING
            return True

    def _started(self, task: asyncio.Task[Any]) -> None:
        """In the ambient loop: its coroutine has become `task`."""
        with self._lock:
            call = self._source
            if self._status == RUNNING:
                self._source = task
        if isinstance(call, _Call) and call.cancelling is not None:
            task.cancel(*call.cancelling)

    def _ended_at_once(self, task: asyncio.Task[Any]) -> None:
        """In the ambient loop: its coroutine's first step was its last."""
        with self._lock:
            call = self._source
        status, outcome = outcome_of_asyncio(task)
        if status == FINISHED and isinstance(call, _Call) and call.cancelling is not None:
            # As in asyncio: a task that cancels itself and then returns is cancelled.
            status, outcome = CANCELLED, call.cancelling[0]
        self._complete(status, outcome)

    def _arrive(self, mailbox: Mailbox) -> None:
        """In the ambient loop: starts the coroutine behind it."""
        source = self._source
        mailbox._arrived += 1
        try:
            if self._begin():
                assert isinstance(source, _Call)
                mailbox._begun += 1
                mailbox._start(self, source.coro, source.context)
            else:
                mailbox._count_ended(self)
        finally:
            del self  # a failure's traceback may lead to this frame

    def _abandon(self) -> None:
        self._complete(CANCELLED, None)

    def _resolve(self, result: Any, context: Context, mailbox: Mailbox) -> bool:
        """In the ambient loop: finishes it with what a continuation returned, flattened.

        Returns whether that was a coroutine, which has its turn now.
        """
        try:
            if type(result) in PLAIN_TYPES:
                self._complete(FINISHED, result)
            elif isinstance(result, Unfuture):
                self._follow(result)
            elif is_asyncio_future(result):
                self._follow(Unfuture(result))
            elif is_awaitable(result):
                coro = result if is_coroutine(result) else wait_for_awaitable(result)
                with self._lock:
                    if self._status == RUNNING:
                        self._source = _Call(coro, context)
                mailbox._start(self, coro, context)
                return True
            else:
                self._complete(FINISHED, result)
            return False
        finally:
            del self  # a failure's traceback may lead to this frame

    def _follow(self, source: Unfuture[Any]) -> None:
        if source is self:
            self._complete(
                FAILED, TypeError("a continuation cannot return the Unfuture that waits for it")
            )
            return
        with self._lock:
            if self._status >= CANCELLED:
                return
            self._source = source
        follower = _Follower(self)
        if not source._add_waiter(follower):
            passed = follower._fire(source)
            if passed is not None:
                _fire_all(*passed)

    def _work(self) -> bool:
        """In a worker thread: runs the function behind it, unless it was cancelled.

        Returns whether it began.
        """
        job = self._source
        if not self._begin():
            return False
        assert isinstance(job, _Job)
        with self._lock:
            self._source = name_of(job.function)
        try:
            # A partial, since PyPy's Context.run() has names for its own arguments.
            result = job.context.run(partial(job.function, *job.args, **job.kwargs))
        except asyncio.CancelledError as exc:
            # What it waited for was cancelled.
            self._complete(CANCELLED, exc.args[0] if exc.args else None)
        except BaseException as exc:
            self._complete(FAILED, exc)
        else:
            self._complete(FINISHED, result)
        finally:
            # The error's traceback holds this frame.
            del self, job
        return True

    def _add_waiter(self, waiter: _Waiter) -> bool:
        """Adds to the chain; False if it is done, and the caller must fire the waiter itself."""
        self._check_fork()
        with self._lock:
            if self._status >= CANCELLED:
                return False
            waiter._next = self._chain
            self._chain = waiter
            if self._status < CANCELLED:
                return True
            # A signal handler finished it between the check and the assignment: the chain was
            # taken without this one.
            self._chain = waiter._next = None
            return False

    def _remove_waiter(self, waiter: _Waiter) -> int:
        """Takes one out of the chain; 0 if it is not there any more."""
        with self._lock:
            before: _Waiter | None = None
            for link in _links(self._chain):
                if link is waiter:
                    if before is None:
                        self._chain = waiter._next
                    else:
                        before._next = waiter._next
                    waiter._next = None
                    return 1
                before = link
            return 0

    def _wait(self, timeout: float | None) -> None:
        """Blocks until it is done."""
        mailbox = _home
        if mailbox is not None and mailbox.thread_id == get_ident():
            if not self.done():
                raise would_deadlock_error(self)
            return
        blocked = _Blocked()
        if not self._add_waiter(blocked):
            return
        released = False
        worker = _this_worker()
        try:
            if worker is None:
                source = self._source
                if timeout is None and isinstance(source, Batch):
                    source.linger()
                released = blocked.wait(timeout)
            else:
                released = worker.wait(self, blocked, timeout)
        finally:
            if not released:
                self._remove_waiter(blocked)
        if self._status < CANCELLED:
            raise TimedOutError(f"no outcome after {timeout} seconds: {self!r}")

    def _check_fork(self) -> None:
        """After a fork: fails it in the child if its work stayed with the parent."""
        if self._generation == _generation:
            return
        with _fork_lock:
            if self._generation == _generation:
                return
            self._lock = threading.RLock()  # a thread of the parent may have had it
            whole = self._status >= CANCELLED or (self._status == PENDING and self._source is None)
            if not whole:
                # Who waited is with the parent too.
                _chain, self._chain = self._chain, None
                _side, self._side = self._side, None
            # Last: another thread of the child that sees it may add itself to the chain.
            self._generation = _generation
        if whole:
            return
        self._complete(FAILED, orphan_error())
        self._unseen = False

    def _check_not_own(self, loop: asyncio.AbstractEventLoop) -> None:
        """For a coroutine that awaits the Unfuture of its own call, and would wait for ever."""
        if self._status != RUNNING:
            return
        source = self._source
        task = asyncio.current_task(loop)
        if task is not None and (
            source is task or (isinstance(source, _Call) and source.coro is task.get_coro())
        ):
            raise RuntimeError(f"a coroutine cannot await its own outcome: {self!r}")

    def _awaited(self) -> T:
        """The outcome as `await` gives it."""
        status = self._status
        if status == FINISHED:
            return cast(T, self._outcome)
        try:
            if status == FAILED:
                self._unseen = False
                raise awaited_exception(self._outcome.with_traceback(self._traceback))
            raise cancelled_error(self._outcome, True)
        finally:
            del self

    def _behind(self) -> Any:
        """What its outcome hangs upon, if that is an Unfuture or a task."""
        source = self._source
        if isinstance(source, _Continuation):
            return source.source
        return source if isinstance(source, (Unfuture, asyncio.Task)) else None

    # What the two parents' modules look for.

    @property
    def _state(self) -> str:
        return STATE_NAMES[self._status]

    @property
    def _condition(self) -> threading.Condition:
        return self._waiting_side().condition

    @property
    def _waiters(self) -> list[Any]:
        return self._waiting_side().waiters

    def _waiting_side(self) -> Waiters:
        self._check_fork()
        side = Waiters(pool_wait)
        with self._lock:
            if self._side is None:
                self._side = side
            if self._status == CANCELLED:
                # No executor will come to say so, and concurrent.futures.wait() would wait for it.
                self._status = CANCELLED_AND_NOTIFIED
            return self._side

    @property
    def _cancel_message(self) -> object:
        return self._outcome if self.cancelled() else None

    def _make_cancelled_error(self) -> asyncio.CancelledError:
        return cancelled_error(self._cancel_message, True)

    # What Python looks for.

    def __repr__(self) -> str:
        source = self._source
        status = self._status
        name = None if source is None else _name_behind(source)
        if isinstance(source, Mirror) and status == PENDING and source.running():
            status = RUNNING
        return describe(self, status, self._outcome, source if name is None else name)

    def __reduce__(self) -> tuple[Any, ...]:
        """A finished one pickles with its outcome.

        :raises TypeError: if it is not done.
        """
        status = self._status
        if status < CANCELLED:
            raise TypeError(
                f"cannot pickle {self!r}: it has no outcome yet; wait for it, or pass its result"
            )
        cls = type(self)
        arguments = (None if cls is Unfuture else cls, status, self._outcome)
        return rebuild, arguments, getattr(self, "__dict__", None)

    def __del__(self) -> None:
        if getattr(self, "_unseen", False):  # none, if its making was interrupted
            self._unseen = False
            if report_unseen_failure is None:
                return  # the interpreter has taken its modules apart
            mailbox = _home
            report_unseen_failure(self, self._outcome, None if mailbox is None else mailbox.loop)


def are_all_of(values: Iterable[object], types: frozenset[type]) -> bool:
    """Whether each of them is of one of these types, and of no subtype."""
    return types.issuperset(map(type, values))


def call_each(
    function: Callable[..., object],
    arguments: Iterator[Any],
    star: bool,
    types: frozenset[type],
    results: list[Any],
) -> None:
    """Adds what it gives for each of them; the first that `are_all_of` refuses is the last one.

    :param star: whether they are tuples of arguments, not the only argument.
    :raises BaseException: what the function raises. The iterator goes on from there.
    """
    for argument in arguments:
        result = function(*argument) if star else function(argument)
        results.append(result)
        if type(result) not in types:
            return


@final
class Counter:
    """How many jobs of executors that are not ours were started, and how they ended."""

    __slots__ = ("_cancelled", "_failed", "_finished", "_lock", "_started")

    def __init__(self) -> None:
        # Guards the others. Reentrant: a `__del__` may close a stream, and so cancel jobs.
        self._lock = threading.RLock()
        self._started = self._finished = self._failed = self._cancelled = 0

    def start(self) -> None:
        with self._lock:
            self._started += 1

    def end(self, failed: bool, cancelled: bool) -> None:
        """:param failed: whether with an error; one that is cancelled has not failed."""
        with self._lock:
            self._cancelled += cancelled
            self._failed += failed
            self._finished += not (cancelled or failed)

    def count(self, future: concurrent.futures.Future[Any]) -> None:
        """The job's start, and its end by a callback."""
        self.start()
        future.add_done_callback(self._ended)

    def _ended(self, future: concurrent.futures.Future[Any]) -> None:
        try:
            self.end(future.exception() is not None, False)
        except concurrent.futures.CancelledError:
            self.end(False, True)

    def work(self) -> WorkCounts:
        with self._lock:
            ended = self._finished, self._failed, self._cancelled
            return (self._started, *ended, self._started - sum(ended))


class Batch:
    """Calls of one function that go together, as one job for an executor, which packs itself.

    A subclass sends the job, has `end` called when it is done, and says what then becomes of calls
    that did not simply give their results. An executor that is not ours gives its own future.

    :param name: of the function.
    :param items: what the calls are made with, in a list that nobody changes.
    """

    __slots__ = ("_cancelled", "calls", "counter", "items", "job", "name", "size")

    def __init__(self, name: str, items: list[Any]) -> None:
        self.name = name
        self.size = len(items)
        self.items = items
        # Their Unfutures, from `fill_batches` on.
        self.calls: list[Unfuture[Any]] = []
        # The future of what was sent, until it has served.
        self.job: Unfuture[Any] | concurrent.futures.Future[Any] | None = None
        # Where its end is counted, if that is not done elsewhere. Set before `end` can be called.
        self.counter: Counter | None = None
        # As long as there are calls that were cancelled. Under no lock: a finalizer may cancel one
        # while its thread is at another.
        self._cancelled: list[None] = []

    def let_go(self) -> list[Unfuture[Any]]:
        """Of its job, which keeps what it calls when done, and of all else; gives the calls."""
        calls, self.calls, self.items, self.job = self.calls, [], [], None
        return calls

    def _lose(self) -> None:
        """One of the calls was cancelled before it began; the last one takes the job with it."""
        self._cancelled.append(None)
        job = self.job
        if job is not None and len(self._cancelled) == self.size:
            job.cancel()

    def end(self, job: Unfuture[Any] | concurrent.futures.Future[Any]) -> None:
        """The job is done, says the thread that finished it.

        If it gives True and a result for each call, the calls have them at once.
        """
        try:
            came_back = job.result()
        except BaseException as exc:
            self.fail(job, exc)
            return
        if self.counter is not None:
            self.counter.end(False, False)
        if self._are_results(came_back):
            _finish_calls(self.let_go(), came_back[1])
        else:
            self.arrive(came_back)

    def _are_results(self, came_back: Any) -> bool:
        if not self.calls or type(came_back) is not tuple or len(came_back) != 2:
            return False
        all_of_them, results = came_back
        return all_of_them is True and type(results) is list and len(results) == self.size

    def __call__(self) -> object:
        """Makes the calls in this process."""
        raise NotImplementedError

    def parcel(self, imports_main: bool) -> tuple[Any, ...]:
        """The function to call in another process, and its arguments: all of it pickles.

        :param imports_main: whether that imports this program's main module, if it is a file.
        :raises pickle.PicklingError: if nothing of it can travel.
        """
        raise NotImplementedError

    def linger(self) -> None:
        """For a thread of no pool that is about to wait for one of the calls, without a timeout.

        It may be kept here for a little while longer than until that one is done.
        """

    def fail(self, job: Unfuture[Any] | concurrent.futures.Future[Any], exc: BaseException) -> None:
        """Asked for its result, the job has raised this, or the thread was interrupted."""
        raise NotImplementedError

    def arrive(self, came_back: Any) -> None:
        """The job has given something else. Where it was called here, its calls may be done."""
        raise NotImplementedError


def fill_batches(batches: Sequence[Batch]) -> list[list[Unfuture[Any]]]:
    """Makes the calls of each of them, and gives a list of those for each.

    They are neither coroutines nor jobs of a queue. Whoever makes a call holds it until it is done.
    """
    made: list[list[Unfuture[Any]]] = []
    for batch in batches:
        batch.calls = [_blank(Unfuture) for _ in range(batch.size)]
        for unfuture in batch.calls:
            unfuture._source = batch
        made.append(batch.calls)
    return made


def _finish_calls(calls: list[Unfuture[Any]], results: list[Any]) -> None:
    """Gives each its result, unless it is done.

    Whoever waits for one is told when all have theirs, and so finds the next ones done.
    """
    left: list[tuple[Unfuture[Any], Any]] = []
    for unfuture, result in zip(calls, results, strict=True):
        # Whoever comes to wait in between is told at once.
        if unfuture._chain is None and unfuture._side is None:
            unfuture._complete(FINISHED, result)
        else:
            left.append((unfuture, result))
    for unfuture, result in left:
        unfuture._complete(FINISHED, result)


@final
class JobQueue:
    """The work of a pool's threads: jobs in the order they came, and the workers that are idle.

    A worker that waits for an Unfuture is made up for by a spare one, so that `limit` workers go on
    with the queue.

    :param limit: how many workers may be at work.
    :param spawn: starts a thread that calls `work()`; called by the thread that submits, or by
        a worker that is about to wait.
    :param spares: how many workers there may be beyond `limit`.
    :param room: how many jobs may wait for a worker, or -1 for any number. Those that come from the
        queue's own workers are always let in: the workers might wait for them.
    :param patient: whether `submit` waits for room, where no event loop runs.
    """

    __slots__ = (
        "_begun",
        "_cancelled",
        "_door",
        "_ended",
        "_failed",
        "_finished",
        "_jobs",
        "_limit",
        "_lock",
        "_parked",
        "_patient",
        "_refuse",
        "_room",
        "_running",
        "_spares",
        "_spawn",
        "_submitted",
        "_taken",
        "_waiting",
        "_workers",
    )

    def __init__(
        self,
        limit: int,
        spawn: Callable[[], None],
        spares: int = 0,
        room: int = -1,
        patient: bool = False,
    ) -> None:
        self._limit = limit
        self._spares = spares
        self._spawn = spawn
        self._room = room
        self._patient = patient
        # `_lock` guards what follows; reentrant for signal handlers and `__del__`.
        self._lock = threading.RLock()
        self._jobs: deque[Unfuture[Any]] = deque()
        # Each idle worker's own lock; the one that went idle last is woken first.
        self._parked: list[threading.Lock] = []
        self._workers = 0
        # Those that wait for an Unfuture.
        self._waiting: list[_Worker] = []
        # How many jobs the workers are at, and how many were taken from the queue ever.
        self._running = 0
        self._taken = 0
        # How many were submitted, how many of those that ended had begun, and how they ended.
        self._submitted = self._begun = self._finished = self._failed = self._cancelled = 0
        # The threads that wait for room.
        self._door: deque[threading.Lock] = deque()
        self._refuse: Callable[[], Exception] | None = None
        # Closed, and no worker is left.
        self._ended = threading.Event()

    def submit(
        self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Unfuture[T]:
        """Has a worker call `function(*args, **kwargs)` in a copy of the current context.

        :raises queue.Full: if there is no room, and it must not wait.
        :raises Exception: what `close` was told to refuse with, once the queue is closed.
        :raises RuntimeError: if there is no worker and none can be started.
        """
        unfuture = _blank(Unfuture)
        unfuture._source = _Job(function, args, kwargs, copy_context())
        while True:
            with self._lock:
                if self._refuse is not None:
                    raise self._refuse()
                if not self._is_full() or self._is_own_worker():
                    self._jobs.append(unfuture)
                    self._submitted += 1
                    idle, spawn = self._reinforce()
                    break
            self._wait_for_room()
        if idle is not None:
            idle.release()
        elif spawn:
            self._add_worker(unfuture)
        return unfuture

    def _is_full(self) -> bool:
        """Under the lock."""
        if self._room < 0:
            return False
        # What waits for a worker, beyond those that are about to be taken.
        at_work = self._running - len(self._waiting)
        return len(self._jobs) + at_work >= self._limit + self._room

    def _is_own_worker(self) -> bool:
        worker = _this_worker()
        return worker is not None and worker.queue is self

    def _wait_for_room(self) -> None:
        """Returns when it is worth another try."""
        if self._drop_cancelled():
            return
        if not self._patient or running_loop() is not None:
            raise full_error(self._limit, self._room, self._patient)
        lock = threading.Lock()
        lock.acquire()
        with self._lock:
            if not self._is_full() or self._refuse is not None:
                return
            self._door.append(lock)
        with pool_wait():  # it may be another pool's thread
            try:
                lock.acquire()
            except BaseException:
                with self._lock:
                    if lock in self._door:
                        self._door.remove(lock)
                self._open_door()  # it may have been let in already
                raise

    def _open_door(self) -> None:
        """Lets in the first of those that wait for room, if there is some."""
        if self._room < 0:
            return
        with self._lock:
            first = self._door.popleft() if self._door and not self._is_full() else None
        if first is not None:
            first.release()

    def _drop_cancelled(self) -> bool:
        """Whether some of the queue were cancelled, and so make room."""
        with self._lock:
            jobs = list(self._jobs)
            self._jobs.clear()
            self._jobs.extend(job for job in jobs if job._status < CANCELLED)
            dropped = len(jobs) - len(self._jobs)
            self._cancelled += dropped
            return dropped > 0

    def _missing(self) -> int:
        """Under the lock: how many more workers should be at work; negative if too many."""
        return self._limit - (self._workers - len(self._waiting) - len(self._parked))

    def _reinforce(self) -> tuple[threading.Lock | None, bool]:
        """Under the lock: a worker to wake for the queue, and whether to start one."""
        if self._jobs and self._missing() > 0:
            if self._parked:
                return self._parked.pop(), False
            if self._workers < self._limit + (self._spares if self._waiting else 0):
                self._workers += 1
                return None, True
        return None, False

    def _relieve(self) -> Exception | None:
        """Called by a worker that waits or ends: has another one go on with the queue.

        Returns why none could be started.
        """
        with self._lock:
            idle, spawn = self._reinforce()
        return self._send_for(idle, spawn)

    def _send_for(self, idle: threading.Lock | None, spawn: bool) -> Exception | None:
        """Wakes or starts the worker that `_reinforce` asked for; returns why it cannot."""
        if idle is not None:
            idle.release()
        elif spawn:
            try:
                self._spawn()
            except Exception as exc:
                # Whoever waits without a worker at work looks again: see `_Worker.wait`.
                self._end_worker(failed=False)
                return exc
        return None

    def _none_at_work(self) -> bool:
        with self._lock:
            return self._workers <= len(self._waiting) + len(self._parked)

    def _is_stuck(self) -> bool:
        """Whether no worker is at work, and all wait for jobs that stand in the queue."""
        with self._lock:
            taken = self._taken
            queued = {id(job): job for job in self._jobs}
            waits = [
                (worker.job, worker.awaited)
                for worker in self._waiting
                if worker.job is not None and worker.awaited is not None
            ]
            if not queued or len(waits) < len(self._waiting) or not self._none_at_work():
                return False
        if not waits_for_ever(Unfuture, queued, waits):
            return False
        with self._lock:
            return (
                taken == self._taken and len(self._waiting) == len(waits) and self._none_at_work()
            )

    def _add_worker(self, unfuture: Unfuture[Any]) -> None:
        try:
            self._spawn()
        except BaseException as exc:
            stranded = self._end_worker(failed=True)
            if unfuture not in stranded:
                return  # another worker does it, or did
            # Who came later counted on the thread that did not start.
            for other in stranded:
                if other is not unfuture:
                    other._complete(FAILED, exc)
            with self._lock:
                self._submitted -= 1  # this one's caller hears of it at once
                self._failed += len(stranded) - 1
            raise

    def _end_worker(self, failed: bool) -> list[Unfuture[Any]]:
        """Counts one worker less; if the last one failed, returns the jobs that nobody will do."""
        stranded: list[Unfuture[Any]] = []
        with self._lock:
            self._workers -= 1
            if self._workers == 0:
                if failed:
                    stranded.extend(self._jobs)
                    self._jobs.clear()
                if self._refuse is not None:
                    self._ended.set()
        return stranded

    def work(self, prepare: Callable[[], object] | None = None) -> None:
        """A worker's life: runs jobs until the queue is closed and empty.

        :raises BaseException: what `prepare` raised; then no job was taken.
        """
        worker = _Worker(self)
        lock = threading.Lock()
        lock.acquire()
        counted = begun = True
        try:
            if prepare is not None:
                prepare()
        except BaseException:
            self._end_worker(failed=False)
            raise
        try:
            _this.worker = worker
            while True:
                if worker.waits:
                    worker.end_all_waits()  # of a loop that was left
                with self._lock:
                    unfuture = None
                    # When those that waited go on, there are too many.
                    if self._jobs and (self._missing() >= 0 or self._refuse is not None):
                        unfuture = self._jobs.popleft()
                        self._running += 1
                        self._taken += 1
                    elif self._refuse is not None:
                        return
                    elif len(self._parked) < self._limit:
                        self._parked.append(lock)
                    else:
                        self._workers -= 1
                        counted = False
                        return
                    worker.job = unfuture
                if unfuture is None:
                    lock.acquire()
                else:
                    begun = True
                    begun = unfuture._work()
                    # An idle worker must not keep the last result alive.
                    done, unfuture = unfuture, None
                    with self._lock:
                        worker.job = None
                        self._count_ended(done, begun)
                    del done
                    self._open_door()
        except BaseException as exc:
            # Nothing of ours raises here: somebody raised it in this thread from outside.
            logger.critical("a worker was killed, another one takes its place", exc_info=True)
            if worker.job is not None:
                worker.job._complete(FAILED, exc)
                with self._lock:
                    self._count_ended(worker.job, begun)
        finally:
            _this.worker = None
            if counted:
                self._end_worker(failed=False)
                self._relieve()

    def _count_ended(self, unfuture: Unfuture[Any], begun: bool) -> None:
        """Under the lock: a worker is through with it."""
        self._running -= 1
        self._begun += begun
        self._count_outcome(unfuture)

    def _count_outcome(self, unfuture: Unfuture[Any]) -> None:
        """Under the lock."""
        if unfuture._status == FINISHED:
            self._finished += 1
        elif unfuture._status == FAILED:
            self._failed += 1
        else:
            self._cancelled += 1

    def counts(self) -> QueueCounts:
        """For `unsync.stats()`: see `QueueCounts`."""
        with self._lock:
            ended = self._finished, self._failed, self._cancelled
            work = (self._begun + self._running, *ended, self._submitted - sum(ended))
            return work, len(self._jobs), self._workers, len(self._parked), len(self._waiting)

    def wait(self, timeout: float | None) -> bool:
        """After `close`: waits up to `timeout` seconds for the last worker's end; whether it came.

        This counts the workers whose threads are only just being started, too.
        """
        return self._ended.wait(timeout)

    def close(self, refuse: Callable[[], Exception]) -> None:
        """Refuses further jobs with `refuse()`; the workers end when the queue is empty."""
        with self._lock:
            if self._refuse is None:
                self._refuse = refuse
            if self._workers == 0:
                self._ended.set()
            blocked = [*self._parked, *self._door]
            self._parked.clear()
            self._door.clear()
        for lock in blocked:
            lock.release()

    def cancel_all(self) -> None:
        """Cancels the jobs that have not begun."""
        for unfuture in self._take_all():
            unfuture.cancel()
            with self._lock:
                self._count_outcome(unfuture)

    def fail_all(self, error: Exception) -> None:
        """Fails the jobs that have not begun."""
        for unfuture in self._take_all():
            unfuture._complete(FAILED, error)
            with self._lock:
                self._count_outcome(unfuture)

    def _take_all(self) -> list[Unfuture[Any]]:
        with self._lock:
            jobs = list(self._jobs)
            self._jobs.clear()
        return jobs

    def after_fork(self) -> None:
        """In the child: the workers, and the jobs that waited for them, stayed with the parent."""
        self._lock = threading.RLock()
        self._jobs.clear()
        self._parked.clear()
        for worker in self._waiting:
            worker.waits = 0
        self._waiting.clear()
        self._door.clear()
        self._workers = self._running = 0
        self._submitted = self._begun = self._finished = self._failed = self._cancelled = 0


@final
class _Worker:
    """A thread of a pool, and the waits it is in."""

    __slots__ = ("awaited", "failure", "job", "queue", "waits")

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue
        # These belong to its own thread. There is more than one wait in a loop of its own, with
        # many tasks. Why no spare worker could be started for the last one, if so.
        self.waits = 0
        self.failure: Exception | None = None
        # These belong to the queue's lock: what it works on, and what it waits for.
        self.job: Unfuture[Any] | None = None
        self.awaited: Unfuture[Any] | None = None

    def begin_wait(self, unfuture: Unfuture[Any] | None) -> None:
        """Called before it waits for `unfuture`, or None for something unknown."""
        self.waits += 1
        if self.waits > 1:
            return
        # At once: in between there may be no worker at work, and no reason to worry.
        with self.queue._lock:
            self.queue._waiting.append(self)
            self.awaited = unfuture
            idle, spawn = self.queue._reinforce()
        self.failure = self.queue._send_for(idle, spawn)
        self.queue._open_door()

    def end_wait(self) -> None:
        if self.waits:
            self.waits -= 1
            if not self.waits:
                self._go_on()

    def end_all_waits(self) -> None:
        self.waits = 0
        self._go_on()

    def _go_on(self) -> None:
        with self.queue._lock:
            self.queue._waiting.remove(self)
            awaited, self.awaited = self.awaited, None
        del awaited
        self.queue._open_door()

    def wait(self, unfuture: Unfuture[Any], blocked: _Blocked, timeout: float | None) -> bool:
        """Waits in `blocked`, with a spare worker in its place; False after `timeout` seconds.

        :raises RuntimeError: if there is none, and the pool would wait for ever.
        """
        queue = self.queue
        until = None if timeout is None else monotonic() + max(timeout, 0)
        self.begin_wait(unfuture)
        try:
            while self.waits == 1 and queue._none_at_work():
                # Nobody else would see to the queue. What is waited for may come to hang upon it
                # later on, as when a coroutine calls a function.
                if queue._is_stuck() and unfuture._status < CANCELLED:
                    raise exhausted_error(queue._workers, unfuture, self.failure)
                left = LOOK_AGAIN_SECONDS
                if until is not None:
                    left = min(left, until - monotonic())
                if blocked.wait(left):
                    return True
                if until is not None and monotonic() >= until:
                    return False
                self.failure = queue._relieve()
            return blocked.wait(None if until is None else until - monotonic())
        finally:
            self.end_wait()


def _this_worker() -> _Worker | None:
    return getattr(_this, "worker", None)


@final
class pool_wait:  # noqa: N801  # lower case as in the twin
    """Around a wait that is none for an Unfuture; nothing in a thread that is not a pool's."""

    def __enter__(self) -> None:
        worker = _this_worker()
        if worker is not None:
            worker.begin_wait(None)

    def __exit__(self, *_: object) -> None:
        worker = _this_worker()
        if worker is not None:
            worker.end_wait()


@final
class Route:
    """Where regular functions go at the moment: `submit(function, args, kwargs)`.

    All functions that share a setting share its route, so that changing the setting is one
    assignment and a call need not look for it.

    :param owner: what must live as long as the route does.
    """

    __slots__ = ("_owner", "submit")

    def __init__(
        self,
        submit: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
        owner: object = None,
    ) -> None:
        self.submit = submit
        self._owner = owner

    def send(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What `submit` gives, or its successor if the executor was replaced meanwhile."""
        while True:
            submit = self.submit
            try:
                return submit(function, args, kwargs)
            except RuntimeError:
                # Was the executor shut down and replaced after `submit` had been read?
                if self.submit == submit:
                    raise


# What a function becomes when it is looked up on an instance or a class.
BIND_INSTANCE: int = 0
BIND_CLASS: int = 1
BIND_NOTHING: int = 2


class Launcher(Generic[P, T]):
    """A function that runs elsewhere: calling it gives an Unfuture at once.

    :param function: a coroutine function if `route` is None, to run in the ambient loop; else any
        other, to be given to `route`, whose answer is returned.
    :param binding: what the first argument is when it is looked up on an instance or a class.
    """

    __slots__ = ("_binding", "_function", "_route")

    def __init__(
        self, function: Callable[..., Any], route: Route | None, binding: int = BIND_INSTANCE
    ) -> None:
        self._function = function
        self._route = route
        self._binding = binding

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Unfuture[T]:
        route = self._route
        if route is not None:
            launched: Unfuture[T] = route.send(self._function, args, kwargs)
            return launched
        mailbox = home()
        coro = self._function(*args, **kwargs)
        unfuture = _blank(Unfuture)
        unfuture._source = _Call(coro, copy_context())
        mailbox._post(unfuture)
        return unfuture

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        binding = self._binding
        if binding == BIND_NOTHING:
            return self
        if binding == BIND_CLASS:
            return MethodType(self, type(instance) if owner is None else owner)
        return self if instance is None else MethodType(self, instance)
