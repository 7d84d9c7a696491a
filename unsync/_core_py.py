"""The core in plain Python: the fallback, and what type checkers and readers read.

`_core.pyx` is its compiled twin: the same names, the same behaviour. Who may touch what:

- Nothing here is guarded by a lock for which a call might have to wait. A signal handler or a
  `__del__` may come at any point, make a call and wait for it: whatever the thread that it has
  interrupted was at, the others can go on. What several threads may want to change is changed in
  one step that the interpreter makes as a whole: `dict.setdefault` and `pop`, `deque.append` and
  `popleft`. Whoever depends on what others do shows first what it does, and then looks.
- An Unfuture's end belongs to whoever entered it in its `_turns` first; see there.
- A waiter belongs to whoever took it out of the Unfuture's `_waiting`, and is fired once.
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
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    MutableSequence,
    Sequence,
)
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from threading import get_ident
from time import monotonic, sleep
from types import CoroutineType, GenericAlias, MethodType, TracebackType
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
    OWN_RUN,
    PENDING,
    PLAIN_TYPES,
    RUNNING,
    START_ATTEMPTS,
    STATE_NAMES,
    WAKE_AGAIN_SECONDS,
    CancelRequest,
    Enlisting,
    Latch,
    MailboxCounts,
    Mirror,
    QueueCounts,
    ToldEvent,
    Waiters,
    WorkCounts,
    already_done_error,
    awaited_exception,
    buried_error,
    by_this_thread,
    cancelled_error,
    check_callable,
    check_context,
    check_exception,
    check_outcome,
    check_threads,
    check_timeout,
    circle_error,
    close_unstarted,
    describe,
    exhausted_error,
    full_error,
    hint_at_map,
    interrupted_start_error,
    is_asyncio_future,
    is_awaitable,
    is_coroutine,
    let_others_make,
    log_failed_callback,
    log_failed_waking,
    logger,
    may_be_reentered,
    mirror_of,
    name_of,
    no_loop_error,
    not_iterable_error,
    orphan_error,
    outcome_of_asyncio,
    rebuild,
    refused_running_error,
    report_failed_callback,
    report_slow,
    report_unseen_failure,
    running_loop,
    set_up_error,
    take,
    take_out,
    thrown,
    wait_for_awaitable,
    waits_for_ever,
    warn_if_it_blocks,
    would_block_error,
    would_deadlock_error,
)
from unsync._views import asyncio_view, concurrent_view

if TYPE_CHECKING:
    from unsync._common import Nesting, Watcher

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
    "name_of_call",
    "set_home",
    "show_to_collector",
    "take_unseen",
    "tell_watcher",
    "waiting_upon",
    "watch_calls",
    "when_done",
    "when_told",
]

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


def __dir__() -> list[str]:
    """Without the clock, so that freezegun leaves it alone: see `_common.monotonic`."""
    return [name for name in globals() if name != "monotonic"]


# A drain gives the loop back to its timers and I/O after so many seconds and items, or after the
# longer time: each turn costs a poll, in which other threads take the GIL, if there is one.
DRAIN_SECONDS = 0.002
DRAIN_ITEMS = 128
DRAIN_LONGEST = 0.01
# How many items pass between two looks at the clock.
DRAIN_STRIDE = 16
# How many awaited calls may start one within the other, and how many firings may call callbacks so:
# each takes some of the C stack.
NESTING = 32
# How many may start there and then in one turn of the loop, which others are waiting for.
STARTS_IN_A_TURN = 256

# Counts the forks above this process: an Unfuture of an older one has nobody to finish it.
_generation = 0
# While somebody drains: what is told of calls, see `watch_calls`.
_watcher: Watcher | None = None
_process = os.getpid()
# Guards the moment when a child first looks at one of its parent's Unfutures.
_fork_lock = threading.RLock()


class _ThisThread(threading.local):
    """What belongs to the calling thread."""

    # The worker that it is, if it is one.
    worker: _Worker | None = None
    # How many firings call callbacks, each within the one before it; and where the callbacks of a
    # further one are left, if they have to wait for one of these.
    firings = 0
    # The context of the call that this thread is making fail.
    failing_in: Context | None = None
    later: MutableSequence[tuple[_Callback, Unfuture[Any]]] | None = None

    def __init__(self) -> None:
        # The queues for which it starts workers, each within the one before it.
        self.starts: list[JobQueue] = []


_this = _ThisThread()

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


def wake_home_again() -> None:
    """For a thread that is about to wait."""
    if by_this_thread.makings:
        let_others_make()
    mailbox = _home
    if mailbox is None:
        return
    arming = mailbox._armed
    if arming is not None and arming.ringer is not None:
        mailbox._ring_for_the_interrupted(arming)
    # Asked here as well: of a wait for a `then` the call alone was 2 % of the instructions.
    if mailbox._rung_at is not None:
        mailbox._wake_again()


def after_fork() -> None:
    """Run in the child: what was pending before the fork will never be finished here."""
    global _generation, _fork_lock, _process
    if _process == os.getpid():
        return  # it is no child
    _process = os.getpid()
    _generation += 1
    _fork_lock = threading.RLock()
    _this.worker = None  # its queue has no workers here


def watch_calls(watcher: Watcher | None) -> None:
    """Has it told of every call and continuation that is made, and of jobs that workers are through
    with; by the threads that do so. With None nobody is told, as is usual.
    """
    global _watcher
    _watcher = watcher


def _context_for(unfuture: Unfuture[Any], source: Unfuture[Any] | None = None) -> Context:
    """The context of a call that is being made: nobody else has seen it yet.

    :param source: what it is a continuation of.
    """
    context, watcher = copy_context(), _watcher
    if watcher is not None:
        watcher.made(unfuture, source, _job_here(), context)
    return context


def _job_here() -> Unfuture[Any] | None:
    """What this thread works on, if it is a worker."""
    worker = _this_worker()
    return None if worker is None else worker.job


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


def _listed(line: deque[T]) -> list[T]:
    """What is in it. Of a dict `list` gives that in one step, but of a deque only with the GIL."""
    while True:
        try:
            return list(line)
        except RuntimeError:  # it changed meanwhile
            continue


@final
class Mailbox:
    """What other threads leave for one event loop, picked up in batches: one wakeup per burst.

    Any thread may leave something. The first item wakes the loop, later ones only join it,
    until the loop finds the box empty. A closed loop's items are abandoned, each in its own way.

    A platform or an interrupt may lose a wakeup, and an armed box would stay as it is for ever. So
    whoever leaves the 2nd, 4th, 8th item and so on, or begins to wait, looks whether the loop was
    woken a while ago and has not come, and wakes it again.

    What a drain runs may run the loop in turn: Qt's modal dialogs do, and programs that use
    nest_asyncio. Such a loop is asked to come again before a drain begins, so that the inner one
    sees what is left and what arrives.

    The loop is held weakly: it owns the mailbox.
    """

    __slots__ = (
        "__weakref__",
        "_abandoned",
        "_again",
        "_armed",
        "_arrived",
        "_begun",
        "_bell",
        "_busy_since",
        "_cancelled",
        "_debug",
        "_drains",
        "_failed",
        "_finished",
        "_items",
        "_lag",
        "_loop",
        "_reentered",
        "_rung_at",
        "_starts",
        "_taken",
        "_woken_at",
        "live",
        "starting",
        "thread_id",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._reentered = may_be_reentered(type(loop))
        # The order of these two operations is the protocol: a poster appends, then reads
        # `_armed`; the loop clears `_armed`, then looks at the items once more.
        self._items: deque[Any] = deque()
        self._armed: _Arming | None = None
        # The ambient loop's thread; None for a foreign loop.
        self.thread_id: int | None = None
        # asyncio holds tasks weakly; these have begun and must get to their end.
        self.live: dict[asyncio.Task[Any], Unfuture[Any]] = {}
        # Those whose coroutines make their first step now, each within the one before it.
        self.starting: list[Unfuture[Any]] = []
        # How many awaited calls were started there and then, in this turn of the loop.
        self._starts = 0
        # When the loop was first woken and when for the last time, since it came here; None once it
        # has. Any thread may write them: the worst that can come of it is a wakeup more.
        self._woken_at: float | None = None
        self._rung_at: float | None = None
        # What follows is counted and set by the loop's thread: how often it came, how many items it
        # took, how many of those were calls, and how many began and ended; how long it took to come
        # the last time, and since when it has been at work here.
        self._drains = self._taken = self._arrived = 0
        self._begun = self._finished = self._failed = self._cancelled = 0
        self._lag = 0.0
        self._busy_since: float | None = None
        # By whoever closes it.
        self._abandoned = 0
        # Whether the loop is in debug mode, while the box is drained; and what makes the loop come
        # again meanwhile, if it may be entered again.
        self._debug = False
        self._again: asyncio.Handle | None = None
        # What wakes the loop, if there is one. Set in the loop's thread.
        self._bell: _Bell | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        return self._loop()

    def _post(self, item: Any) -> None:
        """Leaves `item` for the loop; `item._arrive(mailbox)` is called in its thread."""
        self._items.append(item)
        arming = self._armed
        if arming is None:
            arming = _Arming(get_ident())
            try:
                self._armed = arming
                self._wake()
            except BaseException:
                # A Ctrl-C, before that had begun. Others count on this thread.
                if self._armed is arming:
                    self._wake()
                raise
            arming.ringer = None
            return
        if arming.ringer is not None:
            self._ring_for_the_interrupted(arming)
        left = len(self._items)
        if not left & (left - 1):
            self._wake_again()

    def _ring_for_the_interrupted(self, arming: _Arming) -> None:
        """For a handler that has interrupted this thread before that had woken the loop."""
        if arming.ringer == get_ident():
            self._wake()

    def _wake_again(self) -> None:
        """Called in any thread now and then: wakes a loop that should have come long since."""
        rung_at = self._rung_at
        if rung_at is not None and monotonic() - rung_at >= WAKE_AGAIN_SECONDS:
            self._wake()

    def _wake(self) -> None:
        loop = self._loop()
        try:
            self._wake_loop(loop)
        except BaseException as exc:
            if type(exc) is RuntimeError and loop is not None and loop.is_closed():
                self.close()
                return
            # A Ctrl-C, say, and nobody else is coming. Drained once more than needed does no harm.
            try:
                self._wake_loop(loop)
            except BaseException:
                self._armed = None  # whoever posts next must try again
                raise
            raise

    def _wake_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._rung_at = monotonic()
        if self._woken_at is None:
            self._woken_at = self._rung_at
        if loop is None:
            self.close()
        elif running_loop() is loop:
            loop.call_soon(self._drain)
        elif not self._ring():
            loop.call_soon_threadsafe(self._drain)

    # The bell: an eventfd costs one short system call to ring and one to still. The loop's own way
    # to be woken, call_soon_threadsafe(), takes three on a socket pair, and more Python.

    def open_bell(self) -> None:
        """Has the loop woken by a bell of the mailbox's own, where there is such a thing.

        Called before the loop runs, or in its thread.

        :raises RuntimeError: if it runs in another thread.
        """
        loop = self._own_loop()
        if not hasattr(os, "eventfd"):
            return
        try:
            bell = _Bell(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except OSError:
            return
        try:
            loop.add_reader(bell.fd, self._on_bell)
        except Exception:  # the loop has no readers, and will be woken in its own way
            return
        former, self._bell = self._bell, bell
        if former is not None:
            loop.remove_reader(former.fd)

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        """The loop, for those who may call this: its thread, and anybody while it does not run."""
        loop = self._loop()
        if loop is None or (running_loop() is not loop and loop.is_running()):
            raise RuntimeError(f"this is for the thread of {loop!r} only")
        return loop

    def close_bell(self) -> None:
        """Called in the loop's thread before the loop is closed.

        :raises RuntimeError: if it runs in another thread.
        """
        loop = self._own_loop()
        bell, self._bell = self._bell, None
        if bell is not None:
            loop.remove_reader(bell.fd)

    def _ring(self) -> bool:
        """Rings the bell; False if there is none."""
        bell = self._bell
        if bell is None:
            return False
        os.eventfd_write(bell.fd, 1)
        return True

    def _on_bell(self) -> None:
        bell = self._bell
        if bell is not None:
            with suppress(BlockingIOError):
                os.eventfd_read(bell.fd)
        self._drain(True)

    def _drain(self, in_reader: bool = False) -> None:
        """Takes what is here, as much as fits in a turn of the loop, in whose thread this is.

        :param in_reader: whether the loop calls this for the bell.
        """
        loop = self._loop()
        if running_loop() is not loop or loop is None:
            raise RuntimeError(f"this is for the thread of {loop!r} only")
        outer, self._again = self._again, None
        try:
            self._starts = 0
            begun = monotonic()
            self._busy_since = begun
            if self._woken_at is not None:
                self._lag = begun - self._woken_at
                self._woken_at = self._rung_at = None
            # In here, since these may be the user's: what they raise is the loop's to hear.
            self._debug = loop.get_debug()
            if self._is_reentered(loop):
                if in_reader:
                    # An inner run could not call the reader: the context that it has would be in
                    # use. What is called soon has one of its own.
                    loop.call_soon(self._drain)
                    return
                self._again = loop.call_soon(self._drain)
            del loop
            self._drains += 1
            if not self._take_all(begun):
                self._wake()
        except BaseException:
            # Only KeyboardInterrupt and SystemExit leave a task; the loop will hear of it, the
            # other items must not suffer.
            self._wake()
            raise
        finally:
            self._busy_since = None
            if self._again is not None:
                self._again.cancel()
            self._again = outer

    def _take_all(self, begun: float) -> bool:
        """Whether it is empty then, and disarmed; or the loop's turn has been long enough."""
        items = self._items
        count = 0
        while True:
            for _ in range(DRAIN_STRIDE):
                if not items:
                    arming, self._armed = self._armed, None
                    if not items:
                        return True
                    self._armed = arming
                self._taken += 1
                if self._debug:
                    self._time(items.popleft())
                else:
                    items.popleft()._arrive(self)
            count += DRAIN_STRIDE
            elapsed = monotonic() - begun
            if elapsed >= (DRAIN_SECONDS if count >= DRAIN_ITEMS else DRAIN_LONGEST):
                return False

    def _is_reentered(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether what the loop runs may run it in turn."""
        if self._reentered is None:
            return getattr(loop.run_until_complete, "__func__", None) is not OWN_RUN
        return self._reentered

    def _note_waiter(self, loop: asyncio.AbstractEventLoop) -> None:
        """In the loop's thread, by who comes to wait there.

        That may be in a drain which has run what patched the loop.
        """
        if (
            self._busy_since is not None
            and self._again is None
            and self._reentered is None
            and type(loop).run_until_complete is not OWN_RUN
        ):
            self._again = loop.call_soon(self._drain)
            self.close_bell()  # an inner run could not call the reader, which may be at work

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
        left = _listed(self._items)
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

    def waiting(self) -> list[Unfuture[Any]]:
        """The calls and continuations that wait here and have not begun."""
        return [
            item.target if isinstance(item, _Continuation) else item
            for item in _listed(self._items)
            if isinstance(item, (Unfuture, _Continuation))
        ]

    def pending(self, mark: Callable[[Context], object]) -> list[Unfuture[Any]]:
        """In the loop's thread: the calls and continuations that wait here or have begun.

        :param mark: is called with the contexts in which those that wait will run.
        """
        waiting = self.waiting()
        for unfuture in waiting:
            source = unfuture._source
            if isinstance(source, (_Call, _Continuation)):
                mark(source.context)
        return [*self.starting, *self.live.values(), *waiting]

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

    def after_fork(self) -> None:
        """In a forked child, first of all: a thread of the parent may have been at it."""
        # There is no lock of ours here.

    def close(self) -> None:
        """Abandons what is here, and leaves the box so that later items are abandoned too."""
        while True:
            self._armed = None
            try:
                item = self._items.popleft()
            except IndexError:
                return
            self._abandoned += isinstance(item, (Unfuture, _Continuation))
            item._abandon()

    def _start(
        self,
        unfuture: Unfuture[Any],
        coro: Coroutine[Any, Any, Any],
        context: Context,
        got_unfuture: bool = False,
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
                if got_unfuture:
                    _hint_at_map_if_failed(task)
                unfuture._ended_at_once(task, context)
                self._count_ended(unfuture)
            else:
                self.live[task] = unfuture
                unfuture._started(task)
                if got_unfuture:
                    task.add_done_callback(_hint_at_map_if_failed)
                task.add_done_callback(partial(self._task_done, unfuture), context=context)
            del task
        finally:
            self.starting.pop()
            del unfuture  # a failure's traceback may lead to this frame

    def _task_done(self, unfuture: Unfuture[Any], task: asyncio.Task[Any]) -> None:
        self.live.pop(task, None)
        status, outcome = outcome_of_asyncio(task)
        if status == FAILED:
            unfuture._fail_in(copy_context(), outcome)  # this is called in the coroutine's
        else:
            unfuture._complete(status, outcome)
        self._count_ended(unfuture)


def _hint_at_map_if_failed(task: asyncio.Task[Any]) -> None:
    """Of a coroutine that a `then` called, before anybody hears of its failure."""
    status, outcome = outcome_of_asyncio(task)
    if status == FAILED:
        hint_at_map(outcome)


@final
class _Arming:
    """That the loop of a box is woken, or about to be."""

    __slots__ = ("ringer",)

    def __init__(self, ringer: int) -> None:
        # The thread that is to wake it, until it has.
        self.ringer: int | None = ringer


@final
class _Bell:
    """An eventfd. It is closed when nobody has it any more: so nobody rings what was closed.

    Who rings it while it is taken away wakes nobody. But whoever takes it away has the loop look at
    the box after that, or closes the box.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


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
    caught: list[Callable[[], object]] = []
    attributes: dict[str, object] = getattr(loop, "__dict__", {"call_soon": None})
    catches = "call_soon" not in attributes
    if catches:
        attributes["call_soon"] = partial(_catch_first_step, loop, task, caught)
    try:
        task.__init__(coro, loop=loop, name=name_of(coro), context=context)  # type: ignore[misc]
    finally:
        if catches:
            del attributes["call_soon"]
        del task  # a failure's traceback may lead to this frame
    if not caught:
        return
    outer = asyncio.current_task(loop)
    if outer is not None:
        _leave_task(loop, outer)
    try:
        context.run(caught.pop())
    finally:
        if outer is not None:
            _enter_task(loop, outer)


def _catch_first_step(
    loop: asyncio.AbstractEventLoop,
    task: asyncio.Task[Any],
    caught: list[Callable[[], object]],
    callback: Callable[..., object],
    *args: Any,
    context: Context | None = None,
) -> asyncio.Handle | None:
    """The loop's `call_soon` while `task` is made."""
    if not caught and getattr(callback, "__self__", None) is task:
        caught.append(callback)
        return None
    return type(loop).call_soon(loop, callback, *args, context=context)


if TYPE_CHECKING:

    class _Future(  # type: ignore[override, misc]
        asyncio.Future[T],
        concurrent.futures.Future[T],  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    ):
        """What type checkers take an Unfuture for, so that they let it be waited for.

        `asyncio.wait` and `concurrent.futures.wait` say that they take futures of their own class,
        though whatever has the methods will do.
        """

else:
    _Future = Generic


class _Waiter:
    """One who waits for an Unfuture."""

    __slots__ = ()

    def _fire(self, unfuture: Unfuture[Any], backlog: list[Unfuture[Any]]) -> None:
        """By the thread that finished `unfuture` (or found it done).

        Called once; but if a Ctrl-C strikes in it, once more, if it is no callback. Then it is not
        known what was done, and to do that again must do no harm.

        :param backlog: takes a follower that just got the same outcome, for the caller to fire its
            waiters: chains are walked with a queue, never by recursion.
        """
        raise NotImplementedError


@final
class _Blocked(_Waiter):
    """A thread that waits in `result()` or `exception()`, or for room in a queue."""

    __slots__ = ("lock", "request")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()
        # Belongs to the thread that waits: by what the wait was interrupted.
        self.request: CancelRequest | None = None

    def _fire(self, unfuture: Unfuture[Any], backlog: list[Unfuture[Any]]) -> None:
        self.interrupt()

    def interrupt(self) -> None:
        with suppress(RuntimeError):  # somebody else has ended the wait already
            self.lock.release()

    def wait(self, timeout: float | None) -> bool:
        """Blocks until it is fired; False after `timeout` seconds."""
        until = None if timeout is None else monotonic() + max(timeout, 0)
        left = LOOK_AGAIN_SECONDS
        while True:
            wake_home_again()
            if until is not None:
                left = min(max(until - monotonic(), 0), LOOK_AGAIN_SECONDS)
            if self.lock.acquire(True, left):
                return True
            if until is not None and monotonic() >= until:
                return False


def _call_soon(
    loop: asyncio.AbstractEventLoop,
    function: Callable[[Any], object],
    argument: object,
    context: Context | None,
) -> None:
    """The loop's, in its own thread, where nobody else would see to it that this is called."""
    try:
        loop.call_soon(function, argument, context=context)
    except MemoryError:
        # Then nothing was queued. What was given up on the way here is free now.
        loop.call_soon(function, argument, context=context)
    except TypeError:
        # In debug mode asyncio refuses coroutine functions, and takes a marked one for such.
        if not isinstance(getattr(function, "__func__", function), Launcher):
            raise
        loop.call_soon(MethodType(_call_with, function), argument, context=context)


def _call_with(function: Callable[[Any], object], argument: object) -> None:
    function(argument)


@final
class _Callback(_Waiter):
    """A done-callback; bound to the loop that ran where it was added, if one did."""

    __slots__ = ("context", "era", "function", "loop", "mailbox", "own", "unfuture", "worker")

    def __init__(
        self,
        function: Callable[[Unfuture[Any]], object],
        context: Context | None,
        loop: asyncio.AbstractEventLoop | None,
        own: bool = False,
    ) -> None:
        self.function = function
        self.context = context
        self.loop = loop
        # Whether it is bookkeeping of our own, which comes before whoever waits.
        self.own = own
        self.mailbox = None if loop is None else _mailbox_of(loop)
        if loop is not None and self.mailbox is not None:
            self.mailbox._note_waiter(loop)
        # Once it is done; as long as that is None, it arrives only to end the wait.
        self.unfuture: Unfuture[Any] | None = None
        # Whose thread the loop runs in, and waits there, if it is a worker; and in which era. Added
        # there by gather(), wait(), shield() and the like, it says that their callers wait.
        self.worker: _Worker | None = None
        self.era = 0

    def begin_wait(self, worker: _Worker, unfuture: Unfuture[Any]) -> None:
        assert self.loop is not None
        self.worker = worker
        self.era = worker.era
        worker.begin_wait_in(self.loop, unfuture)

    def _end_wait(self) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.end_wait(self.era)

    def removed(self) -> None:
        """It waits no more, says whoever has taken it from the chain."""
        if self.worker is None:
            return
        if _this_worker() is self.worker:
            self._end_wait()
        else:
            assert self.mailbox is not None
            self.mailbox._post(self)

    def _fire(self, unfuture: Unfuture[Any], backlog: list[Unfuture[Any]]) -> None:
        """Where it is bound to a loop, or our own; others come last: see `_fire_all`."""
        if self.loop is None:
            self._call(unfuture)
        elif running_loop() is self.loop:
            self._end_wait()
            self._schedule(unfuture)
        else:
            self.unfuture = unfuture
            assert self.mailbox is not None
            self.mailbox._post(self)

    def _call(self, unfuture: Unfuture[Any]) -> None:
        if self.context is None:
            self.function(unfuture)
        else:
            self.context.run(self.function, unfuture)

    def _schedule(self, unfuture: Unfuture[Any]) -> None:
        assert self.loop is not None
        assert self.mailbox is not None
        ambient = self.mailbox.thread_id is not None
        function = self._call_in_ambient_loop if ambient else self.function
        _call_soon(self.loop, function, unfuture, self.context)

    def _call_in_ambient_loop(self, unfuture: Unfuture[Any]) -> None:
        try:
            self.function(unfuture)
        except (KeyboardInterrupt, SystemExit) as exc:
            # It would leave the loop, where nobody runs it who could hear of it.
            log_failed_callback(self.function, unfuture, exc)

    def _arrive(self, mailbox: Mailbox) -> None:
        """Calls it there and then; a loop in debug mode wants to time each callback."""
        self._end_wait()
        unfuture = self.unfuture
        if unfuture is None:
            return
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
        if self.unfuture is not None:
            logger.debug("%r: its loop is closed, the callback is not called", self.function)


def when_done(unfuture: Unfuture[T], function: Callable[[Unfuture[T]], object]) -> _Callback:
    """Has the thread that finishes it call `function(unfuture)`, whichever loop may run here.

    If it is done it is called here and now. What a signal handler raises in there is raised here,
    and not logged as of a callback: who has not done its part, waking a consumer say, must know.
    Gives what `no_more` takes.
    """
    callback = _Callback(function, None, None, own=True)
    if not unfuture._add_waiter(callback):
        function(unfuture)
    return callback


def no_more(unfuture: Unfuture[Any], callback: _Callback) -> None:
    """Takes out what `when_done` has given, if that still waits; by a finalizer, say."""
    unfuture._remove_waiter(callback)


def name_of_call(unfuture: Unfuture[Any]) -> str | None:
    """The name of the function behind it; None if there is none."""
    source = unfuture._source
    return None if source is None else _name_behind(source)


def waiting_upon(unfuture: Unfuture[Any]) -> list[Unfuture[Any]]:
    """Its continuations, and those that are to have its outcome."""
    waiters = list(unfuture._waiting)
    return [each.target for each in waiters if isinstance(each, (_Continuation, _Follower))]


def show_to_collector(calls: list[Unfuture[Any]]) -> None:
    """Of a batch: calls that are on their way, and may be garbage nevertheless.

    That is so where their executor has forgotten them. The garbage collector sees them anyway;
    the compiled core keeps calls on their way from it.
    """


def take_unseen(unfuture: Unfuture[Any]) -> BaseException | None:
    """Its failure, if nobody has looked at that; from now on somebody has."""
    if unfuture._status != FAILED or unfuture._seen:
        return None
    unfuture._seen = True
    return cast(BaseException, unfuture._outcome)


def tell_watcher(unfuture: Unfuture[Any]) -> None:
    """A call is being made that goes to an executor which is not ours: see `watch_calls`."""
    if _watcher is not None:
        _context_for(unfuture)


def when_told(unfuture: Unfuture[T], function: Callable[[Unfuture[T]], object]) -> None:
    """The same, but when whoever waits has been told, in turn with the callbacks of others."""
    _add_callback(unfuture, _Callback(function, None, None))


def _add_callback(unfuture: Unfuture[Any], callback: _Callback) -> bool:
    """Fires it at once if the Unfuture is done; whether it was not."""
    if unfuture._add_waiter(callback):
        return True
    raised = _fire_all(unfuture, _may_raise(), callback)
    if raised is not None:
        raise raised
    return False


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
        "_era",
        "_loop",
        "_mailbox",
        "_request",
        "_unfuture",
        "_wakeup",
        "_woken",
        "_worker",
    )

    def __init__(self, unfuture: Unfuture[Any]) -> None:
        # Whose thread the loop runs in, and waits there, if it is a worker; and in which era.
        self._worker: _Worker | None = None
        self._era = 0
        # The task's last request to cancel whose answer comes later. They are answered in the order
        # they were made, so if this one was heard, so were those before it.
        self._request: CancelRequest | None = None
        self._unfuture = unfuture
        self._begun = self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wakeup: Callable[[_Park], object] | None = None
        self._woken = False  # belongs to the loop's thread
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
        self._mailbox._note_waiter(loop)
        self._asyncio_future_blocking = True
        return True

    # What a task asks of the future that it is parked on.

    def get_loop(self) -> asyncio.AbstractEventLoop | None:
        return self._loop

    def add_done_callback(
        self, function: Callable[[_Park], object], *, context: Context | None = None
    ) -> None:
        """:raises RuntimeError: if no task waits here, or it has been called already."""
        if context is None:
            context = copy_context()
        else:
            check_context(context)
        if self._loop is None or self._wakeup is not None:
            raise RuntimeError("only the task that is parked here may ask to be called, and once")
        self._wakeup = function
        self._context = context
        if not self._unfuture._add_waiter(self):
            _call_soon(self._loop, function, self, self._context)
            return
        worker = _this_worker()
        if worker is not None:
            self._worker = worker
            self._era = worker.era
            worker.begin_wait_in(self._loop, self._unfuture)

    def remove_done_callback(self, function: Callable[[_Park], object]) -> int:
        removed = self._unfuture._remove_waiter(self)
        if removed:
            self._end_wait()
        return removed

    def _end_wait(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end_wait(self._era)

    def _behind(self) -> Unfuture[Any]:
        return self._unfuture

    def cancel(self, msg: object = None) -> bool:
        request = CancelRequest(msg)
        if request.repeats(self._request):
            return True
        answer = self._unfuture._request_cancel(request)
        if request.awaited:
            self._request = request
        return answer

    def done(self) -> bool:
        return self._unfuture._status >= CANCELLED

    def result(self) -> None:
        """The task only asks whether to go on: `__next__` gives the outcome to its coroutine.

        :raises CancelledError: if the task was cancelled, and the outcome came without anybody
            having heard of that.
        """
        # As in asyncio: it was woken for this, even if its coroutine gets CancelledError instead.
        self._unfuture._seen = True
        request = self._request
        if request is not None and request.was_lost():
            raise cancelled_error(request.message, True)

    # How the end of the wait reaches the task.

    def _fire(self, unfuture: Unfuture[Any], backlog: list[Unfuture[Any]]) -> None:
        assert self._loop is not None
        if running_loop() is self._loop:
            self._end_wait()
            _call_soon(self._loop, _Park._wake, self, self._context)
        else:
            self._mailbox._post(self)

    def _arrive(self, mailbox: Mailbox) -> None:
        try:
            self._end_wait()
            self._context.run(_Park._wake, self)
        finally:
            del self  # a failure's traceback may lead to this frame

    def _wake(self) -> None:
        """Once: it may have been fired twice, and a task must not be woken from another wait."""
        assert self._wakeup is not None
        if not self._woken:
            self._woken = True
            try:
                self._wakeup(self)
            finally:
                del self

    def _abandon(self) -> None:
        logger.debug("%r: the loop of a task that awaited it is closed", self._unfuture)


@final
class _Follower(_Waiter):
    """Gives an Unfuture the outcome of the one it waits for."""

    __slots__ = ("got_unfuture", "target")

    def __init__(self, target: Unfuture[Any], got_unfuture: bool) -> None:
        self.target = target
        # Whether it waits for what the function of a `then` returned.
        self.got_unfuture = got_unfuture

    def _fire(self, unfuture: Unfuture[Any], backlog: list[Unfuture[Any]]) -> None:
        unfuture._seen = True
        _pass_on(unfuture, self.target, backlog, self.got_unfuture)


@final
class _Continuation(_Waiter):
    """What `then` and `map` leave at their source; also what stands behind their Unfuture."""

    __slots__ = ("by_value", "context", "function", "source", "target")

    def __init__(
        self, source: Unfuture[Any], function: Callable[[Any], Any], by_value: bool
    ) -> None:
        self.source = source
        self.function = function
        self.by_value = by_value
        self.target: Unfuture[Any] = _blank(Unfuture)
        self.context = _context_for(self.target, source)
        self.target._source = self

    def _fire(self, unfuture: Unfuture[Any], backlog: list[Unfuture[Any]]) -> None:
        if unfuture._status != FINISHED:
            unfuture._seen = True
            _pass_on(unfuture, self.target, backlog)
            return
        try:
            mailbox = home()  # first: who begins to drain while that starts a loop must be told
            if (watcher := _watcher) is not None:
                watcher.made(self.target, self.source, _job_here(), self.context)
            mailbox._post(self)
        except BaseException as exc:
            # The ambient loop cannot be started: the one who waits must hear of it.
            self.target._complete(FAILED, exc)

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
            went_on = target._resolve(result, context, mailbox, not self.by_value)
        except asyncio.CancelledError as exc:
            target._complete(CANCELLED, exc.args[0] if exc.args else None)
        except BaseException as exc:
            target._fail_in(context, exc if self.by_value else hint_at_map(exc))
        finally:
            if not went_on:
                mailbox._count_ended(target)
            del self, target  # an error's traceback holds this frame

    def _abandon(self) -> None:
        self.target._complete(CANCELLED, None)


@final
class _Failed(_Waiter):
    """Stands for what was raised when somebody was told, for `_fire_all` to come upon."""

    __slots__ = ("failure",)

    def __init__(self, failure: BaseException) -> None:
        self.failure = failure

    def _fire(self, unfuture: Unfuture[Any], backlog: list[Unfuture[Any]]) -> NoReturn:
        raise self.failure


def _pass_on(
    source: Unfuture[Any],
    target: Unfuture[Any],
    backlog: list[Unfuture[Any]],
    got_unfuture: bool = False,
) -> None:
    """Gives `target` the same outcome; puts it into the backlog if it has waiters to fire."""
    status, outcome = source._status, source._outcome
    if status == CANCELLED_AND_NOTIFIED:
        status = CANCELLED
    try:
        if got_unfuture and status == FAILED:
            hint_at_map(outcome)
        target._claim(_turn(status, outcome), None)
    except BaseException:
        target._tell_the_rest(False)
        raise
    # Whoever claimed it: if that is being fired somewhere else, each waiter goes to one of the two.
    if target._waiting:
        backlog.append(target)


# In which order.
#
# Our own bookkeeping comes first: views, streams and batches are as far as their Unfuture when
# somebody sees it done. Then, at once and in the order they came, whoever waits: threads, what is
# bound to a loop, continuations, followers and those who wait for these. Last the callbacks of
# others without a loop, in their order: they may take any time, or wait for one of the former.
#
# Whatever is raised on the way, all are told. A KeyboardInterrupt or SystemExit out of a callback
# then goes on to who called `set_result` and the like; so does what a log handler raises.


def _fire_all(
    unfuture: Unfuture[Any], raises: bool, late: _Waiter | None = None
) -> BaseException | None:
    """Fires a finished Unfuture's waiters, then its followers' waiters, then callbacks.

    Each is taken out of the Unfuture just before it is fired. So where this is interrupted those
    whom it has not told are still there, and it can be called again.

    The loops are in functions of their own here and wherever something must be done after a Ctrl-C:
    CPython 3.12 and 3.13 look for no `except`, `finally` or `with` if it strikes as a loop jumps
    back from an `if` at its end (python/cpython#130279).

    Returns what is to be raised when all is done, or None.

    :param raises: whether the caller will; else everything is logged.
    :param late: the only one to fire, which came when it was done and is not among its waiters.
    """
    raised: BaseException | None = None
    foreign: list[tuple[_Callback, Unfuture[Any]]] = []
    entailed: list[tuple[_Callback, Unfuture[Any]]] = []
    backlog = [unfuture]
    try:
        raised = _fire_backlog(backlog, late, foreign, entailed, raises)
    except BaseException:
        # A Ctrl-C, or there is no memory, but what was given up on the way here is free now.
        # Whoever was told is not there any more.
        for each in backlog:
            _fire_all(each, False)
        raise
    finally:
        foreign += entailed
        if foreign:
            raised = _call_back(foreign, raises, raised)
    return raised


def _fire_backlog(
    backlog: list[Unfuture[Any]],
    late: _Waiter | None,
    foreign: list[tuple[_Callback, Unfuture[Any]]],
    entailed: list[tuple[_Callback, Unfuture[Any]]],
    raises: bool,
) -> BaseException | None:
    """All waiters but callbacks without a loop; of the Unfuture there, then of its followers."""
    raised: BaseException | None = None
    for unfuture in backlog:  # which grows meanwhile
        own: list[_Waiter] = []
        ready: list[_Waiter] = []
        last: list[_Callback] = []
        for waiter in list(unfuture._waiting) if late is None else (late,):
            if not isinstance(waiter, _Callback) or waiter.loop is not None:
                ready.append(waiter)
            elif waiter.own:
                own.append(waiter)
            else:
                last.append(waiter)
        if last:
            # Nobody can remove them from now on.
            foreign += [(callback, unfuture) for callback in last]
            for callback in last:
                if callback is not late and not unfuture._remove_waiter(callback):
                    foreign.remove((callback, unfuture))
        if own:
            raised = _keep_books(unfuture, own, late, entailed, raises, raised)
        for waiter in ready:
            try:
                if waiter is late or unfuture._remove_waiter(waiter):
                    waiter._fire(unfuture, backlog)
            except BaseException as exc:
                raised = _note_failure(waiter, unfuture, exc, raises, raised)
                _fire_again(waiter, unfuture, backlog)
        late = None
    return raised


def _fire_again(waiter: _Waiter, unfuture: Unfuture[Any], backlog: list[Unfuture[Any]]) -> None:
    """After something was raised in firing it: nobody else would. A callback is called once."""
    if isinstance(waiter, (_Callback, _Failed)):
        return
    try:
        waiter._fire(unfuture, backlog)
    except BaseException as exc:
        _note_failure(waiter, unfuture, exc, False, None)


def _keep_books(
    unfuture: Unfuture[Any],
    own: list[_Waiter],
    late: _Waiter | None,
    entailed: list[tuple[_Callback, Unfuture[Any]]],
    raises: bool,
    raised: BaseException | None,
) -> BaseException | None:
    """What others want called for that which ends with it, a batch's calls say, is `entailed`."""
    nested = _this.later is not None
    if not nested:
        _this.later = entailed
    try:
        for waiter in own:
            if waiter is not late and not unfuture._remove_waiter(waiter):
                continue
            try:
                waiter._fire(unfuture, [])
            except BaseException as exc:
                raised = _note_failure(waiter, unfuture, exc, raises, raised)
    finally:
        if not nested:
            _this.later = None
    return raised


def _call_back(
    foreign: list[tuple[_Callback, Unfuture[Any]]], raises: bool, raised: BaseException | None
) -> BaseException | None:
    """Calls those callbacks, or leaves them for the firing in this thread that said to."""
    if _this.later is not None:
        _this.later.extend(foreign)
        return raised
    _this.firings += 1
    innermost = _this.firings >= NESTING
    queue = deque(foreign)
    if innermost:
        # Those of the firings within this one come after its own.
        _this.later = queue
    try:
        return _call_each(queue, raises, raised)
    finally:
        if innermost:
            _this.later = None
        _this.firings -= 1


def _call_each(
    queue: deque[tuple[_Callback, Unfuture[Any]]], raises: bool, raised: BaseException | None
) -> BaseException | None:
    while queue:
        callback, unfuture = queue.popleft()
        try:
            callback._call(unfuture)
        except BaseException as exc:
            raised = _note_failure(callback, unfuture, exc, raises, raised)
    return raised


def _note_failure(
    waiter: _Waiter,
    unfuture: Unfuture[Any],
    failure: BaseException,
    raises: bool,
    raised: BaseException | None,
) -> BaseException | None:
    """What is to be raised in the end, when `raised` was to be, and now this."""
    if (
        raises
        and isinstance(failure, (KeyboardInterrupt, SystemExit))
        and not isinstance(raised, (KeyboardInterrupt, SystemExit))
    ):
        return failure
    try:
        if isinstance(waiter, _Callback):
            log_failed_callback(waiter.function, unfuture, failure)
        else:
            log_failed_waking(waiter, unfuture, failure)
    except BaseException as exc:
        if raises and raised is None:
            return exc
    return raised


def _may_raise() -> bool:
    """Whether what callbacks raise goes on to who called a method in this thread.

    It would end the ambient loop, or look like the failure of a function that a worker runs.
    """
    return _this.worker is None and not in_home_thread()


@final
class _Call:
    """A coroutine that has no task yet, and the context to start it in."""

    __slots__ = ("context", "coro", "requests")

    def __init__(self, coro: Coroutine[Any, Any, Any], context: Context) -> None:
        self.coro = coro
        self.context = context
        # Those that come while the first step is made.
        self.requests: list[CancelRequest] = []

    def __repr__(self) -> str:
        return repr(self.coro)


def _taken_from(requests: list[CancelRequest]) -> Iterator[CancelRequest]:
    """Those that nobody has taken back, one after the other."""
    while requests:
        try:
            request = requests.pop(0)
        except IndexError:
            return
        yield request


@final
class _Job:
    """A function that has no outcome yet, its arguments, and the context to run it in."""

    __slots__ = ("args", "context", "function", "kwargs", "worker")

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
        # The one that runs it, once it is running.
        self.worker: _Worker | None = None


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
    unfuture._turns = {}
    unfuture._status = PENDING
    unfuture._begun = unfuture._notified = unfuture._seen = False
    unfuture._generation = _generation
    unfuture._outcome = None
    unfuture._traceback = None
    unfuture._source = None
    unfuture._waiting = {}
    return unfuture


# What can be entered in an Unfuture's `_turns`, once each.
#
# As the first: that it begins, with the thread that says so; or how it ends, if it never begins. As
# the last: how it ends after it has begun. That is `RUNNING` or the state at the end, the outcome,
# and of a failure its traceback and the context that it is reported in, if nobody looks at it. Who
# is to be told under a condition: see `_show`.
_FIRST, _LAST, _SIDE, _LATE_SIDE = "first", "last", "side", "late side"
_Turn = tuple[int, Any, "TracebackType | None", "Context | None"]


def _turn(status: int, outcome: Any) -> _Turn:
    if status == FAILED:
        return status, outcome, outcome.__traceback__, _this.failing_in
    return status, outcome, None, None


class Unfuture(_Future[T]):
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
        "_begun",
        "_generation",
        "_notified",
        "_outcome",
        "_seen",
        "_source",
        "_status",
        "_traceback",
        "_turns",
        "_waiting",
    )

    # asyncio.isfuture() looks for it. No task is ever parked on the Unfuture itself: see _Park.
    _asyncio_future_blocking: ClassVar[bool] = False  # type: ignore[misc]  # pyright: ignore[reportIncompatibleVariableOverride]

    if not TYPE_CHECKING:
        __class_getitem__ = classmethod(GenericAlias)

    # Who begins and who ends it: each change of state is one `setdefault` here.
    _turns: dict[str, Any]
    # What can be seen of that: the state at the end, or PENDING until then, and whether it has
    # begun. Written by whoever comes upon what was entered above, always with the same.
    _status: int
    _begun: bool
    # Whether an executor has taken note that it was cancelled.
    _notified: bool
    _generation: int
    # Whether somebody has looked at its failure, if it is one.
    _seen: bool
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
    # In the order they came; whoever pops one fires it.
    _waiting: dict[_Waiter, bool]

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
            self._set_up(source)
            self._follow(source)
        elif is_coroutine(source):
            mailbox = home()
            call = _Call(cast("Coroutine[Any, Any, T]", source), _context_for(self))
            self._set_up(call)
            mailbox._post(self)
        else:
            mirror = mirror_of(self, source)
            self._set_up(mirror)
            mirror.attach()

    def _set_up(self, source: _Call | Unfuture[Any] | Mirror) -> None:
        """Puts something behind it, unless there is something, or it has begun or ended."""
        self._check_fork()
        if self._phase() != PENDING or self._source is not None:
            raise set_up_error(self)
        self._source = source

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
        :raises CancelledError: if it was cancelled; in a function that runs in a thread of ours, if
            its own call is cancelled from a loop: then this one is cancelled, too.
        :raises BaseException: what the function raised.
        """
        if self._status < CANCELLED:
            self._wait(timeout)
        status = self._status
        if status == FINISHED:
            return cast(T, self._outcome)
        try:
            if status == FAILED:
                self._seen = True
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
            self._seen = True
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
            phase = unfuture._phase()
            if phase != PENDING:
                return phase == RUNNING
            if not isinstance(source, Unfuture):
                return isinstance(source, Mirror) and source.running()
            unfuture = source

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return CANCELLED <= self._status <= CANCELLED_AND_NOTIFIED

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The running loop: an Unfuture can be awaited in every loop.

        :raises RuntimeError: where none runs, for `asyncio.gather` and its like cannot wait there.
        """
        loop = running_loop()
        if loop is None:
            raise no_loop_error(self)
        return loop

    def _loop_for_view(self) -> asyncio.AbstractEventLoop:
        loop = running_loop()
        if loop is None:
            loop = home().loop
            assert loop is not None
        return loop

    @property
    def future(self) -> asyncio.Future[T]:
        """A true `asyncio.Future` that shows this one; of the running loop, else the ambient one.

        A new one each time, which goes when nobody holds it or waits for it. Outcome and
        cancellation go both ways, as does what is set.
        """
        return asyncio_view(self, self._loop_for_view(), when_done, no_more, in_worker)

    @property
    def concurrent_future(self) -> concurrent.futures.Future[T]:
        """A true `concurrent.futures.Future` that shows this one.

        A new one each time, which goes when nobody holds it or waits for it. Outcome and
        cancellation go both ways, as does what is set.
        """
        return concurrent_view(self, when_done, when_told, no_more, in_worker, pool_wait)

    def __await__(self) -> Generator[Any, None, T]:
        """Suspends the calling coroutine, in whatever loop it runs, until there is an outcome.

        A cancelled awaiter cancels what it awaits, as in asyncio.

        :raises asyncio.CancelledError: if it was cancelled.
        :raises BaseException: what the function raised.
        """
        return cast("Generator[Any, None, T]", _Park(self))

    if TYPE_CHECKING:
        # So that type checkers refuse it, too: what they take an Unfuture for has one.
        __iter__: None  # type: ignore[assignment]
    else:

        def __iter__(self):
            raise not_iterable_error(self)

    # Setting it.

    def set_result(self, result: T) -> None:
        """Finishes it with `result`.

        :raises InvalidStateError: if it is done already.
        """
        self._set(FINISHED, result)

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
        self._set(FAILED, check_exception(exception))

    def _set(self, status: int, outcome: Any) -> None:
        source = self._source
        claimed, raised = self._settle(status, outcome, None, raises=True)
        if not claimed:
            raise already_done_error(self)
        if isinstance(source, Mirror):
            source.push(status, outcome)
        if raised is not None:
            raise raised

    def set_running_or_notify_cancel(self) -> bool:
        """For executors, as in concurrent.futures: marks it running.

        Returns False if it was cancelled: then its work must not begin.

        :raises RuntimeError: if it is running or finished, or something stands behind it: a call,
            a continuation or another future, which says itself when it begins.
        """
        if self._source is None and self._begin():
            return True
        if self.cancelled():
            self._notified = True
            return False
        raise refused_running_error(self, self._phase())

    def cancel(self, msg: object = None) -> bool:
        """Cancels what is behind it; `msg` goes with the CancelledError.

        A coroutine sees `CancelledError` and decides, as in asyncio; work that has not begun
        never will; the source of a `then` is cancelled with it, as what is awaited would be.
        A function that already runs in a thread or a process cannot be stopped: a plain thread
        gets False, as in concurrent.futures; where a loop runs the Unfuture is cancelled and the
        function's outcome dropped, as in asyncio. In a thread of ours the function gets
        CancelledError where it waits, or where it does so next: in `result()` and `exception()`,
        which cancel what they wait for, in `concurrent.futures.wait()` and `as_completed()`, and
        for a stream. That happens once. A loop that the function runs is left alone.

        Returns whether it is, or is being, cancelled. In the thread of the loop that a coroutine
        runs in, that is what its task answers: False if it has just ended.
        """
        return self._request_cancel(CancelRequest(msg))

    def _request_cancel(self, request: CancelRequest) -> bool:
        """`cancel()` for one who must know, when the outcome comes, whether it was in time."""
        known: Unfuture[Any] | None = None
        steps, bound = 0, 1024
        if request.asked is None:
            request.asked = self
        answer, behind = self._cancel_this(request)
        while behind is not None and behind is not known:
            steps += 1
            if steps == bound:  # two threads may have made a circle that `_follow` did not see
                known = behind
                bound *= 2
            cancelled, behind = behind._cancel_this(request)
            if answer is None:
                answer = cancelled
        if not request.awaited:
            request.asked = None
            if self._status >= CANCELLED:
                self._overlook()
        raised, request.raised = request.raised, None
        if raised is not None:
            raise raised
        return bool(answer)

    def _overlook(self) -> None:
        """Who cancelled it came too late, and does not want to hear that it failed."""
        if self._status >= CANCELLED:
            self._seen = True

    def _cancel_this(self, request: CancelRequest) -> tuple[bool | None, Unfuture[Any] | None]:
        """Whether this one is cancelled (None: as the next one is), and the next to cancel."""
        self._check_fork()
        status = self._phase()
        source = self._source
        if isinstance(source, _Call) and status == RUNNING:
            # The loop's thread first puts a task there, or the end, and then takes the requests.
            # This one first leaves its own, and then looks whether that was in time.
            source.requests.append(request)
            is_late = self._source is not source or self._status >= CANCELLED
            if is_late and take_out(source.requests, request):
                return self._cancel_this(request)
            request.awaited = True
            return True, None
        if status >= CANCELLED:
            self._overlook()
            return status <= CANCELLED_AND_NOTIFIED, None
        if isinstance(source, Unfuture):
            return None, source
        if isinstance(source, asyncio.Future):
            return self._cancel_task(source, request), None
        if status == PENDING:
            if isinstance(source, Mirror):
                return source.cancel(request), None
            if self._cancel_now(request, PENDING):
                if isinstance(source, Batch):
                    source._lose()
                return True, source.source if isinstance(source, _Continuation) else None
            return self._cancel_this(request)  # it began or ended in between
        if request.is_from_loop() and self._cancel_now(request, None):
            worker: _Worker | None = None
            if isinstance(source, _Job):
                worker = source.worker
            elif isinstance(source, Batch):
                worker = source._maker
            if worker is not None:
                worker.cancel_call(self, request)
        return self.cancelled(), None

    def _cancel_now(self, request: CancelRequest, expected: int | None) -> bool:
        """Whether it was this; what callbacks raise `_request_cancel` raises in the end."""
        claimed, raised = self._settle(CANCELLED, request.message, expected, raises=True)
        if raised is not None:
            request.raised = raised
        return claimed

    def _cancel_task(self, task: asyncio.Task[Any], request: CancelRequest) -> bool:
        loop = task.get_loop()
        if running_loop() is loop:
            request(task)
            return request.heard
        request.awaited = True
        try:
            loop.call_soon_threadsafe(request, task)
        except RuntimeError:
            # The loop is closed, the task will never end.
            self._cancel_now(request, None)
        return True

    # Going on from it.

    def add_done_callback(
        self, fn: Callable[[Unfuture[T]], object], *, context: Context | None = None
    ) -> None:
        """Has `fn(unfuture)` called once it is done.

        Added where a loop is running: called in that loop's thread, soon, as in asyncio. Added
        elsewhere: called by the thread that finishes it, at once if it is done, as in
        concurrent.futures. What a callback raises is logged and stops no other. But a
        KeyboardInterrupt or SystemExit goes on, when all have been called, to a thread that itself
        called `set_result`, `set_exception`, `cancel` or this; in the threads of unsync, and of
        pools that finish what stands behind it, it is logged.

        More than 32 within each other are not called before `set_result` returns, but after the
        ones that they are called in.

        :param context: the context to call it in; in a loop the default is a copy of the
            current one.
        :raises TypeError: if `fn` is not callable.
        """
        check_callable("a done-callback", fn)
        loop = running_loop()
        if context is not None:
            check_context(context)
        elif loop is not None:
            context = copy_context()
        callback = _Callback(fn, context, loop)
        if _add_callback(self, callback) and loop is not None:
            worker = _this_worker()
            if worker is not None:
                callback.begin_wait(worker, self)

    def remove_done_callback(self, fn: Callable[[Unfuture[T]], object]) -> int:
        """Removes every callback that equals `fn`; returns how many there were."""
        # They are compared first, since that may run anything, and then taken out in one go.
        equal = [
            waiter
            for waiter in list(self._waiting)
            if isinstance(waiter, _Callback) and waiter.function == fn
        ]
        removed = [callback for callback in equal if self._remove_waiter(callback)]
        for callback in removed:
            callback.removed()
        return len(removed)

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
            _fire_all(self, False, continuation)
        return target

    # Where it changes.
    #
    # Whoever is the first to enter its turn has it: `setdefault` tells everybody who that is. What
    # was entered is then shown in the attributes that all others read; and by whoever else comes
    # upon it, for the first one may be interrupted before. So nobody who is told that it has begun
    # or ended sees anything else afterwards.

    def _phase(self) -> int:
        """The state, as far as it can be seen."""
        status = self._status
        if status == PENDING:
            return RUNNING if self._begun else PENDING
        if status == CANCELLED and (self._notified or self._is_watched()):
            # No executor will come to say so, and concurrent.futures.wait() would wait for it.
            return CANCELLED_AND_NOTIFIED
        return status

    def _is_watched(self) -> bool:
        return self._turns.get(_SIDE) is not None or _LATE_SIDE in self._turns

    def _begin(self) -> bool:
        """Marks it running, unless somebody finished or cancelled it before."""
        batch = self._source
        if isinstance(batch, Batch):
            worker = _this_worker()
            if worker is not None:
                batch._maker = worker
                worker.begin_call(self)
        if self._status >= CANCELLED:
            return False
        mine: _Turn = (RUNNING, get_ident(), None, None)
        first = self._turns.setdefault(_FIRST, mine)
        if first[0] == RUNNING:
            self._begun = True
            return first is mine
        self._show(first)
        return False

    def _claim(self, mine: _Turn, expected: int | None) -> bool:
        """Makes it done, once; whether it was this call, which is then to fire the waiters.

        Whatever it raises, see `_tell_the_rest`.

        :param expected: PENDING, if it must not have begun.
        """
        self._check_fork()
        if self._status >= CANCELLED:
            return False
        end = first = self._turns.setdefault(_FIRST, mine)
        if first[0] == RUNNING:
            self._begun = True
            if expected == PENDING:
                return False
            end = self._turns.setdefault(_LAST, mine)
        self._show(end)
        if end is not mine:
            return False
        source = self._source
        self._forget_source()
        if first is mine and isinstance(source, _Call):
            try:
                close_unstarted(source.coro)
            except BaseException as exc:  # a log handler's, or a Ctrl-C
                self._waiting[_Failed(exc)] = True
        return True

    def _end(self) -> _Turn | None:
        """What was entered as its end, if it was."""
        end: _Turn | None = self._turns.get(_LAST) or self._turns.get(_FIRST)
        return None if end is None or end[0] == RUNNING else end

    def _tell_the_rest(self, raises: bool) -> BaseException | None:
        """After a Ctrl-C, or a lack of memory, while it was made done or its waiters were fired.

        Nobody else would tell those who wait; those who were told are not there any more. Nothing
        is done if it is not done: then the change that was interrupted has not been made.
        """
        end = self._end()
        if end is None:
            return None
        self._show(end)
        self._forget_source()
        return _fire_all(self, raises)

    def _show(self, end: _Turn) -> None:
        """Lets everybody see how it ended; a second time does no harm.

        Whether somebody waits in concurrent.futures.wait() is a turn as well: once it is entered
        here that nobody does, who asks gets another list, for one that is done.
        """
        side: Waiters | None = self._turns.setdefault(_SIDE, None)
        if self._status < CANCELLED:
            self._set_end(end)
        if side is not None and (failure := side.tell(self, end[0])) is not None:
            raise failure

    def _set_end(self, end: _Turn) -> None:
        status, self._outcome, self._traceback, _ = end
        # Last: whoever reads it finds the rest in place.
        self._status = status

    def _forget_source(self) -> None:
        """What is done keeps the name of what was behind it only.

        By who finishes it, after it has shown that; and by who puts something there, if it finds
        then that it is done.
        """
        source = self._source
        if source is not None:
            self._source = _name_behind(source)

    def _name_function(self, function: Callable[..., Any]) -> None:
        """For `repr`: the function behind the future that this was made from."""
        name = name_of(function)
        source = self._source
        if isinstance(source, Mirror):
            source.function = name
        elif source is None and self._status >= CANCELLED:
            self._source = name

    def _complete(self, status: int, outcome: Any, expected: int | None = None) -> bool:
        """Makes it done and tells everybody; False if it was done already."""
        check_outcome(status, outcome)
        return self._settle(status, outcome, expected, raises=False)[0]

    def _settle(
        self, status: int, outcome: Any, expected: int | None, raises: bool
    ) -> tuple[bool, BaseException | None]:
        """What `_complete` does; and what callbacks raised that the caller is to raise.

        :param raises: whether it will, in a thread that may.
        """
        mine = _turn(status, outcome)
        raises = raises and _may_raise()
        try:
            if not self._claim(mine, expected):
                return False, None
            return True, _fire_all(self, raises) if self._waiting else None
        except BaseException as exc:
            raised = self._tell_the_rest(raises)
            if not isinstance(exc, MemoryError) or self._end() is not mine:
                raise
            return True, raised

    def _fail_in(self, context: Context, failure: BaseException) -> None:
        """Has a call fail; if nobody looks at that, it is reported in the call's own context.

        Notebooks go by a context variable: the report stands under the cell that made the call.
        """
        former, _this.failing_in = _this.failing_in, context
        try:
            self._complete(FAILED, failure)
        finally:
            _this.failing_in = former

    def _is_call(self) -> bool:
        """Whether behind it is a coroutine that has not begun."""
        return type(self._source) is _Call and self._phase() == PENDING

    def _started(self, task: asyncio.Task[Any]) -> None:
        """In the ambient loop: its coroutine has become `task`."""
        call = self._source
        if self._status == PENDING:
            self._source = task
        if self._status != PENDING:
            self._forget_source()
        if isinstance(call, _Call):
            for request in _taken_from(call.requests):
                request(task)

    def _ended_at_once(self, task: asyncio.Task[Any], context: Context) -> None:
        """In the ambient loop: its coroutine's first step was its last."""
        call = self._source
        status, outcome = outcome_of_asyncio(task)
        if status == FAILED:
            self._fail_in(context, outcome)
        elif status == FINISHED and isinstance(call, _Call) and call.requests:
            # As in asyncio: a task that cancels itself and then returns is cancelled.
            self._complete(CANCELLED, call.requests[-1].message)
        else:
            self._complete(status, outcome)
        if isinstance(call, _Call):
            for request in _taken_from(call.requests):
                request.came_too_late()

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

    def _resolve(self, result: Any, context: Context, mailbox: Mailbox, got_unfuture: bool) -> bool:
        """In the ambient loop: finishes it with what a continuation returned, flattened.

        Returns whether that was a coroutine, which has its turn now.

        :param got_unfuture: whether it is one of `then`, and not of `map`.
        """
        try:
            if type(result) in PLAIN_TYPES:
                self._complete(FINISHED, result)
            elif isinstance(result, Unfuture):
                self._follow(result, got_unfuture)
            elif is_asyncio_future(result):
                self._follow(Unfuture(result), got_unfuture)
            elif is_awaitable(result):
                coro = result if is_coroutine(result) else wait_for_awaitable(result)
                if self._status == PENDING:
                    self._source = _Call(coro, context)
                if self._status != PENDING:  # cancelled while the function ran, say
                    self._forget_source()
                    close_unstarted(coro)
                    return False
                mailbox._start(self, coro, context, got_unfuture)
                return True
            else:
                self._complete(FINISHED, result)
            return False
        finally:
            del self  # a failure's traceback may lead to this frame

    def _follow(self, source: Unfuture[Any], got_unfuture: bool = False) -> None:
        if source is self:
            self._complete(FAILED, circle_error())
            return
        if self._status == PENDING:
            self._source = source
        if self._status != PENDING:
            self._forget_source()
            if self.cancelled():
                # While the function of a continuation ran, which has returned what to wait for.
                source.cancel(self._outcome)
            return
        if self._waiting and source._hangs_upon(self):
            self._complete(FAILED, circle_error())
        # In a circle, too: it will fail for the same reason, which is no news.
        follower = _Follower(self, got_unfuture)
        if not source._add_waiter(follower):
            _fire_all(source, False, follower)

    def _hangs_upon(self, other: Unfuture[Any]) -> bool:
        """Whether its outcome is that of `other`, or of a continuation of that, and so on."""
        unfuture: Unfuture[Any] = self
        known: Unfuture[Any] | None = None
        steps, bound = 0, 1024
        while unfuture is not other:
            steps += 1
            if steps == bound:
                known = unfuture
                bound *= 2
            behind = unfuture._behind()
            if not isinstance(behind, Unfuture) or behind is known:
                return False
            unfuture = behind
        return True

    def _work(self) -> bool:
        """In a worker thread: runs the function behind it, unless it was cancelled.

        Returns whether it began.
        """
        job = self._source
        if isinstance(job, _Job):
            job.worker = _this_worker()
        if not self._begin():
            return False
        assert isinstance(job, _Job)
        try:
            # A partial, since PyPy's Context.run() has names for its own arguments.
            result = job.context.run(partial(job.function, *job.args, **job.kwargs))
            rest: Unfuture[Any] | None = None
            if type(result) is CoroutineType:
                # Of a function below a decorator that is none for coroutines, say.
                rest = job.context.run(Unfuture, result)
        except asyncio.CancelledError as exc:
            # What it waited for was cancelled.
            self._complete(CANCELLED, exc.args[0] if exc.args else None)
        except BaseException as exc:
            self._fail_in(job.context, exc)
        else:
            if rest is None:
                self._complete(FINISHED, result)
            else:
                self._follow(rest)
        finally:
            # The error's traceback holds this frame.
            del self, job
        return True

    def _add_waiter(self, waiter: _Waiter) -> bool:
        """Has it fired in its turn; False if it is done, and the caller must fire it itself.

        Who finishes it shows that, and then takes who waits. This one waits, and then looks: if it
        is done by then, one of the two takes the waiter out.
        """
        self._check_fork()
        if self._status >= CANCELLED:
            return False
        self._waiting[waiter] = True
        return self._status < CANCELLED or not self._remove_waiter(waiter)

    def _remove_waiter(self, waiter: _Waiter) -> bool:
        """Takes one out; False if it is not there any more."""
        return self._waiting.pop(waiter, False)

    def _wait(self, timeout: float | None, cancels: bool = True) -> None:
        """Blocks until it is done.

        :param cancels: whether it is cancelled if that is what ends the wait.
        :raises TimeoutError: after `timeout` seconds.
        :raises InvalidStateError: in `unsync.thread`, if it is not done.
        :raises CancelledError: if the call that runs in this thread was cancelled from a loop.
        """
        mailbox = _home
        if mailbox is not None and mailbox.thread_id == get_ident():
            if not self.done():
                raise would_deadlock_error(self)
            return
        if timeout is not None:
            check_timeout(timeout)
        check_threads()
        loop = running_loop()
        if loop is not None and not self.done():
            warn_if_it_blocks(loop)
        blocked = _Blocked()
        if not self._add_waiter(blocked):
            return
        released = False
        _start_again()
        worker = _this_worker()
        try:
            if worker is None:
                released = blocked.wait(timeout)
            else:
                released = worker.wait(self, blocked, timeout)
        finally:
            if not released:
                self._remove_waiter(blocked)
        request = blocked.request
        if request is not None:
            if cancels:
                self._request_cancel(CancelRequest(request.message, crosses=True))
            raise cancelled_error(request.message, False)
        if self._status < CANCELLED:
            raise TimeoutError(f"no outcome after {timeout} seconds: {self!r}")

    def _check_fork(self) -> None:
        """After a fork: fails it in the child if its work stayed with the parent."""
        if self._generation == _generation:
            return
        with _fork_lock:
            if self._generation == _generation:
                return
            is_done = self._status >= CANCELLED
            whole = is_done or (not self._begun and self._source is None)
            if not is_done:
                # A thread of the parent may have entered what nobody shows here. But what has begun
                # has: a coroutine that is in its first step must not be closed.
                side = self._turns.get(_SIDE) if whole else None
                self._turns = {} if side is None else {_SIDE: side}
                if self._begun:
                    self._turns[_FIRST] = (RUNNING, 0, None)
            if not whole:
                self._waiting = {}  # who waited is with the parent too
            # Last: another thread of the child that sees it may add itself to the chain.
            self._generation = _generation
        if whole:
            return
        self._complete(FAILED, orphan_error())
        self._seen = True

    def _check_not_own(self, loop: asyncio.AbstractEventLoop) -> None:
        """For a coroutine that awaits the Unfuture of its own call, and would wait for ever."""
        if self._phase() != RUNNING:
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
                self._seen = True
                raise awaited_exception(self._outcome.with_traceback(self._traceback))
            raise cancelled_error(self._outcome, True)
        finally:
            del self

    def _behind(self) -> Any:
        """What its outcome hangs upon, if that is an Unfuture, also behind a view, or a task."""
        source = self._source
        if isinstance(source, _Continuation):
            return source.source
        if isinstance(source, Mirror):
            return source.behind()
        return source if isinstance(source, (Unfuture, asyncio.Task)) else None

    # What the two parents' modules look for.

    # Type checkers take them for the attributes that they are in the parents.
    if not TYPE_CHECKING:

        @property
        def _state(self) -> str:
            side = self._turns.get(_SIDE)
            seen = None if side is None else side.seen()
            return STATE_NAMES[self._phase() if seen is None else seen]

        @property
        def _condition(self) -> Enlisting:
            return Enlisting(self, self._waiting_side())

        @property
        def _waiters(self) -> Enlisting:
            return Enlisting(self, self._waiting_side())

    def _waiting_side(self) -> Waiters:
        self._check_fork()
        turns = self._turns
        side: Waiters | None = turns.get(_SIDE) or turns.setdefault(_SIDE, Waiters(pool_wait))
        if side is None:
            # Who finishes it may be just about to show that, and will tell nobody.
            self._set_end(cast(_Turn, self._end()))
            side = cast(Waiters, turns.setdefault(_LATE_SIDE, Waiters(pool_wait)))
        return side

    def _get_snapshot(self) -> tuple[bool, bool, T | None, BaseException | None]:
        """What asyncio copies, from Python 3.15 on: done, cancelled, result, exception."""
        status = self._status
        if status == FINISHED:
            return True, False, cast(T, self._outcome), None
        if status == FAILED:
            self._seen = True
            return True, False, None, cast(BaseException, self._outcome)
        return status >= CANCELLED, status >= CANCELLED, None, None

    def _peek(self) -> tuple[int, Any]:
        """Status and outcome, for who only shows them; the outcome is None before the end."""
        status = self._status
        return status, self._outcome if status >= CANCELLED else None

    @property
    def _cancel_message(self) -> object:
        return self._outcome if self.cancelled() else None

    def _make_cancelled_error(self) -> asyncio.CancelledError:
        return cancelled_error(self._cancel_message, True)

    # What Python looks for.

    def __repr__(self) -> str:
        source = self._source
        status = self._phase()
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
        # Without, if its making was interrupted.
        if getattr(self, "_status", PENDING) == FAILED and not self._seen:
            self._seen = True
            if report_unseen_failure is None:
                return  # the interpreter has taken its modules apart
            loop = None if _home is None else _home.loop
            end = self._end()
            report_unseen_failure(self, self._outcome, loop, None if end is None else end[3])


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


# What a tally counts, beside the states in which jobs end.
SUBMITTED, REFUSED, TAKEN, NOT_BEGUN = range(FAILED + 1, FAILED + 5)
# When so many have come, they are added up.
TALLY_ROOM = 1024


@final
class _Tally:
    """Counts of several kinds, to which any thread may add at any point, under no lock.

    To count is one step: the kind is added to what came. That is added up now and then, and by
    those who read, with a lock for which nobody waits: who does not get it leaves that to the one
    who has it, whom a handler may have interrupted. What came is taken in the order it came, and so
    nothing that is read has ended before it began.
    """

    __slots__ = ("_adding", "_came", "_sums")

    def __init__(self) -> None:
        self._came: deque[int] = deque()
        self._adding = threading.Lock()
        # Belongs to who has the lock.
        self._sums = [0] * (NOT_BEGUN + 1)

    def add(self, kind: int) -> None:
        self._came.append(kind)
        if len(self._came) >= TALLY_ROOM:
            self._add_up(0)

    def read(self) -> list[int]:
        """The counts of all kinds."""
        # Another thread is through in no time. If it is this one, the sums may be one short.
        sums = self._add_up(0.01)
        if sums is None:
            sums = [*self._sums]
            for kind in _listed(self._came):
                sums[kind] += 1
        return sums

    def _add_up(self, patience: float) -> list[int] | None:
        """The sums; None if somebody else is at it."""
        is_mine = False
        try:
            is_mine = self._adding.acquire(timeout=patience)
            return self._sum_up() if is_mine else None
        finally:
            if is_mine:
                self._adding.release()

    def _sum_up(self) -> list[int]:
        while self._came:
            self._sums[self._came.popleft()] += 1
        return [*self._sums]


@final
class Counter:
    """How many jobs of executors that are not ours were started, and how they ended."""

    __slots__ = ("_tally",)

    def __init__(self) -> None:
        self._tally = _Tally()

    def start(self) -> None:
        self._tally.add(SUBMITTED)

    def end(self, failed: bool, cancelled: bool) -> None:
        """:param failed: whether with an error; one that is cancelled has not failed."""
        self._tally.add(CANCELLED if cancelled else FAILED if failed else FINISHED)

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
        counts = self._tally.read()
        started = counts[SUBMITTED]
        ended = counts[FINISHED], counts[FAILED], counts[CANCELLED]
        return (started, *ended, started - sum(ended))


class Batch:
    """Calls of one function that go together, as one job for an executor, which packs itself.

    A subclass sends the job, has `end` called when it is done, and says what then becomes of calls
    that did not simply give their results. An executor that is not ours gives its own future.

    :param name: of the function.
    :param items: what the calls are made with, in a list that nobody changes.
    """

    __slots__ = ("_cancelled", "_maker", "calls", "counter", "items", "job", "name", "size")

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
        # The one that makes the calls, if it is a thread of ours: set before the first begins.
        self._maker: _Worker | None = None
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

        If it gives True and a result for each call, the calls have them at once. What others want
        called for a call is called when all are done.
        """
        if _this.later is not None:
            self._end_calls(job)
            return
        foreign: list[tuple[_Callback, Unfuture[Any]]] = []
        _this.later = foreign
        try:
            self._end_calls(job)
        finally:
            _this.later = None
            if foreign:
                _call_back(foreign, False, None)

    def _end_calls(self, job: Unfuture[Any] | concurrent.futures.Future[Any]) -> None:
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
            tell_watcher(unfuture)
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
        if not unfuture._waiting and not unfuture._is_watched():
            unfuture._complete(FINISHED, result)
        else:
            left.append((unfuture, result))
    for unfuture, result in left:
        unfuture._complete(FINISHED, result)


# How the workers share the jobs, without a lock.
#
# Each change is one step of a deque or a dict, and each thread speaks for itself: a worker alone
# says whether it is idle, waits or has ended, and takes its jobs itself. No job is forgotten,
# because everybody first shows what changed, and then looks at what others have shown. Who submits
# adds the job, then looks whether a worker is missing. A worker goes idle, waits or ends, then
# looks whether there are jobs. However the two fall together, one of them sees the other.
#
# So it does not matter who is interrupted between two steps, nor for how long: what a handler or a
# finalizer submits meanwhile finds its worker in the same way. Nobody holds anything that it would
# need, but one: a start that is under way. Whoever submits or waits within the start that its own
# thread makes starts that worker once more: see `_start_again`.


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
    :param nesting: which jobs the worker runs itself while it waits, if there is but one and no
        spare one.
    """

    __slots__ = (
        "_bell",
        "_door",
        "_ended",
        "_idle",
        "_inside",
        "_jobs",
        "_limit",
        "_nested",
        "_nesting",
        "_patient",
        "_refuse",
        "_room",
        "_spares",
        "_spawn",
        "_tally",
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
        nesting: Nesting | None = None,
    ) -> None:
        self._limit = limit
        self._spares = spares
        self._spawn = spawn
        self._room = room
        self._patient = patient
        self._nesting = nesting
        self._refuse: Callable[[], Exception] | None = None
        # Closed, and no worker is left.
        self._ended = Latch()
        self._set_up()

    def _set_up(self) -> None:
        self._jobs: deque[Unfuture[Any]] = deque()
        # All that there are, in the order in which they were sent for; those among them whose
        # thread has not begun have their `to_begin`.
        self._workers: dict[_Worker, None] = {}
        # By the lock in which it sleeps, a new one each time. Whoever releases that has woken it.
        self._idle: dict[threading.Lock, _Worker] = {}
        # Those that wait for an Unfuture.
        self._waiting: dict[_Worker, None] = {}
        # Where there is bounded room: the jobs in the queue and at work, but for those that wait.
        self._inside: dict[Unfuture[Any], None] = {}
        # The threads that wait for room.
        self._door: deque[_Blocked] = deque()
        # What interrupts the worker's wait, where it runs jobs meanwhile, for it to look for one;
        # and those that it is for these jobs.
        self._bell: Any = None
        self._nested: dict[_Worker, None] = {}
        self._tally = _Tally()

    def submit(
        self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Unfuture[T]:
        """Has a worker call `function(*args, **kwargs)` in a copy of the current context.

        :raises queue.Full: if there is no room, and it must not wait.
        :raises Exception: what `close` was told to refuse with, once the queue is closed.
        :raises RuntimeError: if there is no worker and none can be started.
        """
        unfuture = _blank(Unfuture)
        unfuture._source = _Job(function, args, kwargs, _context_for(unfuture))
        try:
            self._accept(unfuture)
        except Exception:
            # Nobody will see it, but a watcher has.
            unfuture._complete(CANCELLED, None)
            raise
        return unfuture

    def _accept(self, unfuture: Unfuture[Any]) -> None:
        """:raises Exception: as `submit`, if it stands in the queue no more."""
        if self._room >= 0:
            if self._patient:
                unfuture._add_waiter(_Leaver(self))
            self._enter(unfuture)
        if self._refuse is not None:
            self._leave(unfuture)
            raise self._refuse()
        self._tally.add(SUBMITTED)
        self._jobs.append(unfuture)
        if self._refuse is not None and self._take_out(unfuture):
            # Closed in between, by who may not have seen it.
            self._tally.add(REFUSED)
            self._note_end()
            raise self._refuse()
        self._call_up(unfuture)

    def _take_out(self, unfuture: Unfuture[Any]) -> bool:
        """Whether it still stood in the queue."""
        if not take_out(self._jobs, unfuture):
            return False
        self._leave(unfuture)
        return True

    # Bounded room. A job is inside from before it stands in the queue until it has ended, but for
    # the time in which its worker waits.

    def _enter(self, unfuture: Unfuture[Any]) -> None:
        """Returns when there is room for it, or the queue is closed.

        :raises queue.Full: if there is none, and it must not wait.
        """
        try:
            while self._refuse is None:
                self._inside[unfuture] = None
                # If several come at once, those that came first are in, and the others go again.
                is_in = not self._is_beyond(self._inside, unfuture, self._places)
                if is_in or self._is_own_worker():
                    break
                del self._inside[unfuture]
                self._wait_for_room()
        except BaseException:  # a Ctrl-C, say
            self._inside.pop(unfuture, None)
            unfuture._complete(CANCELLED, None)  # nobody will see it, but a watcher has
            raise
        self._open_door()  # if there is more

    @property
    def _places(self) -> int:
        return self._limit + self._room

    @staticmethod
    def _is_beyond(line: dict[Any, Any], one: object, most: int) -> bool:
        """Whether so many stand in the line before it; not if it has been taken out meanwhile."""
        try:
            return len(line) > most and list(line).index(one) >= most
        except ValueError:
            return False

    def _leave(self, unfuture: Unfuture[Any] | None) -> None:
        if self._room >= 0 and unfuture is not None:
            self._inside.pop(unfuture, None)
            self._open_door()

    def _is_own_worker(self) -> bool:
        worker = _this_worker()
        return worker is not None and worker.queue is self

    def _wait_for_room(self) -> None:
        """Returns when it is worth another try."""
        self._open_door()  # for one who looked while this one was inside, and saw no room
        if self._drop_cancelled():
            return
        if not self._patient or running_loop() is not None:
            raise full_error(self._limit, self._room, self._patient)
        self._call_up()  # if this thread has been interrupted before it did so
        blocked = _Blocked()
        self._door.append(blocked)
        try:
            # Whoever makes room then looks at the door; so this looks for room at the door.
            if len(self._inside) >= self._places and self._refuse is None:
                with pool_wait(blocked):  # it may be another pool's thread
                    blocked.wait(None)
        except BaseException:
            take_out(self._door, blocked)
            self._open_door()  # it may have been let in already
            raise
        take_out(self._door, blocked)

    def _open_door(self) -> None:
        """Lets in the first of those that wait for room, if there is some."""
        if self._door and (len(self._inside) < self._places or self._refuse is not None):
            with suppress(IndexError):
                self._door.popleft().interrupt()

    def _drop_cancelled(self) -> bool:
        """Whether some of the queue were cancelled, and so make room."""
        dropped = False
        for job in _listed(self._jobs):
            if job._status >= CANCELLED and self._take_out(job):
                self._tally.add(job._status)
                dropped = True
        return dropped

    # Workers that come.

    def _missing(self) -> int:
        """How many more workers should be at work; negative if too many.

        Others change what is counted here meanwhile. One who begins or goes on in between may be
        missed, and one more be called than is needed. But each that is taken for one at work is
        so, and will look at the queue before it does anything else.
        """
        return self._limit - (len(self._workers) - len(self._waiting) - len(self._idle))

    def _call_up(self, unfuture: Unfuture[Any] | None = None) -> Exception | None:
        """Wakes or starts a worker, if there are jobs and one is missing.

        Returns why none could be started. Whoever waits without a worker at work looks again: see
        `_Worker.wait`.

        :param unfuture: the job that it is called for, whose caller hears of it.
        :raises Exception: as `_start_worker`.
        """
        if not self._jobs:
            return None
        if self._missing() > 0:
            if self._rouse():
                return None
            # From now on a handler that interrupts this thread knows that it must start one itself.
            _this.starts.append(self)
            try:
                if self._send_for_one():
                    return self._start_worker(unfuture)
            finally:
                _this.starts.pop()
        _start_again()
        return None

    def _rouse(self) -> bool:
        """Wakes the worker that went idle last, of those that sleep; whether there was one."""
        return any(map(self._wake, reversed(list(self._idle))))

    def _wake(self, bed: threading.Lock) -> bool:
        """Whether this, and nobody else, has woken the one that sleeps there."""
        try:
            bed.release()
        except RuntimeError:
            return False  # it is awake
        # It does so itself as well: whoever comes here may be interrupted before.
        self._idle.pop(bed, None)
        return True

    def _send_for_one(self) -> bool:
        """Counts one worker more, who is to begin; not if there are as many as there may be."""
        most = self._limit + (self._spares if self._waiting else 0)
        if len(self._workers) >= most:
            return False
        worker = _Worker(self)
        self._workers[worker] = None
        if not self._is_beyond(self._workers, worker, most):
            return True
        # Others were first. Unless a thread has just begun as this one.
        # Then the one that it was sent for is left, and none will come for that.
        surplus = worker if take(worker.to_begin) else self._begin_worker()
        if surplus is not None:
            del self._workers[surplus]
            if self._jobs and self._missing() > 0:
                self._rouse()  # for one who counted this one as a worker
        return False

    def _starting(self) -> list[_Worker]:
        return [worker for worker in list(self._workers) if worker.to_begin]

    def _begin_worker(self) -> _Worker | None:
        """In a new thread: which of those that were sent for it is; or None, if it comes too late.

        So a start that Ctrl-C interrupts may be tried again: the second thread finds nothing to
        begin. Whoever finds that none could be started takes one off in the same way.
        """
        workers: list[_Worker] = []
        while (now := list(self._workers)) != workers:
            # Another one was sent for meanwhile: its thread may have begun as the one that this
            # thread was sent for.
            workers = now
            for worker in workers:
                if take(worker.to_begin):
                    return worker
        return None

    def _start_worker(self, unfuture: Unfuture[Any] | None) -> Exception | None:
        """Starts a worker that is counted; returns why it could not.

        If that leaves none, what stands in the queue fails.

        :param unfuture: the job that it was sent for, whose caller hears of it.
        :raises Exception: why it could not, if that job is refused.
        :raises KeyboardInterrupt: if it struck meanwhile, or anything that is no Exception; the
            worker has been started, unless that happened again and again.
        """
        failure: Exception | None = None
        interrupt: BaseException | None = None
        for _ in range(START_ATTEMPTS):
            failure = None
            try:
                self._spawn()
            except Exception as exc:
                failure = exc
            except BaseException as exc:
                interrupt = exc
                # Whether a thread was started nobody knows.
                failure = interrupted_start_error(exc)
                if self._starting():
                    continue
            break
        if failure is not None:
            refused = False
            for other in self._give_up_start():
                if other is unfuture:
                    refused = True
                    self._tally.add(REFUSED)
                else:
                    # Who came later counted on the thread that did not start.
                    other._complete(FAILED, failure)
                    self._tally.add(FAILED)
            if refused and interrupt is None:
                raise failure
        if interrupt is not None:
            raise interrupt
        return failure

    def _start_again(self) -> None:
        """For a handler that has interrupted this thread while it starts a worker.

        Nobody knows whether a thread has been started; if not, it would wait for itself.
        """
        if self._starting():
            with suppress(Exception):  # which the one that it interrupted will find as well
                self._spawn()

    def _give_up_start(self) -> list[Unfuture[Any]]:
        """Unless it has begun; returns the jobs that nobody will do."""
        worker = self._begin_worker()
        if worker is None:
            return []
        del self._workers[worker]
        if not self._workers:
            return self._take_all()
        if self._jobs and self._missing() > 0:
            self._rouse()  # for one who counted this one as a worker
        self._note_end()
        return []

    # Workers at work.

    def work(self, prepare: Callable[[], object] | None = None) -> None:
        """A worker's life: runs jobs until the queue is closed and empty.

        Returns at once if no worker is missing: its start was given up, or another one was first.

        :raises BaseException: what `prepare` raised; then no job was taken.
        """
        worker = self._begin_worker()
        if worker is None:
            return
        begun = True
        try:
            if prepare is not None:
                prepare()
        except BaseException:
            self._end_worker(worker)
            raise
        try:
            _this.worker = worker
            while True:
                if worker.waits:
                    worker.end_all_waits()  # of a loop that was left
                if self._take_job(worker):
                    begun = True
                    assert worker.job is not None
                    begun = worker.job._work()
                    self._end_job(worker, begun)
                elif not self._rest(worker):
                    return
        except BaseException as exc:
            # Nothing of ours raises here: somebody raised it in this thread from outside.
            logger.critical("a worker was killed, another one takes its place", exc_info=True)
            if worker.job is not None:
                worker.job._complete(FAILED, exc)
                self._end_job(worker, begun)
        finally:
            _this.worker = None
            self._end_worker(worker)
            self._call_up()

    def _take_job(self, worker: _Worker) -> bool:
        # When those that waited go on, there are too many. If two see each other here, both rest,
        # and the second of them sees that one is missing then.
        if (
            len(self._workers) > self._limit
            and self._refuse is None
            and len(self._at_work()) > self._limit
        ):
            return False
        worker.moves += 1  # first: see `pending`
        try:
            worker.job = self._jobs.popleft()
        except IndexError:
            return False
        self._tally.add(TAKEN)
        return True

    def _end_job(self, worker: _Worker, begun: bool) -> None:
        # An idle worker must not keep the last result alive.
        done = worker.end_job()
        assert done is not None
        if not begun:
            self._tally.add(NOT_BEGUN)
        # The function has ended, even if a coroutine that it returned has not.
        self._tally.add(done._status if done._status >= CANCELLED else FINISHED)
        self._leave(done)
        if (watcher := _watcher) is not None:
            watcher.is_through(done)

    def _rest(self, worker: _Worker) -> bool:
        """Sleeps until somebody wakes it; False if it is to end."""
        if self._refuse is not None:
            return False
        bed = worker.bed = threading.Lock()
        bed.acquire()
        try:
            worker.moves += 1
            self._idle[bed] = worker
            if self._is_beyond(self._idle, bed, self._limit):
                return False
            # Now whoever submits or closes can see it; what they did before, it sees.
            if self._refuse is not None:
                return True
            if self._jobs and self._missing() > 0:
                self._rouse()
            bed.acquire()
            return True
        finally:
            self._idle.pop(bed, None)
            worker.bed = None

    def _at_work(self) -> list[_Worker]:
        return [worker for worker in list(self._workers) if not worker.to_begin and worker.is_up()]

    def _none_at_work(self) -> bool:
        """None that has begun."""
        return not self._at_work()

    def _may_work(self) -> bool:
        """Whether some worker is at work, or may begin."""
        return any(worker.is_up() for worker in list(self._workers))

    def _is_stuck(self, looking: _Worker) -> bool:
        """Whether no worker is at work, and all wait for jobs that stand in the queue."""
        before = self._moves()
        queued = {id(job): job for job in _listed(self._jobs)}
        waits: list[tuple[Unfuture[Any], Unfuture[Any]]] = []
        for worker in list(self._waiting):
            job, awaited = worker.job, worker.awaited
            if job is None or awaited is None:
                return False
            waits.append((job, awaited))
        if not queued or self._may_work() or not waits_for_ever(Unfuture, queued, waits):
            return False
        # Who waits, goes idle or ends shows that first, and calls up another one then. It may have
        # been held up in between; so that is done for it here.
        looking.failure = self._call_up()
        return before == self._moves() and not self._may_work()

    # The worker of a queue that is given its `nesting` makes up for itself while it waits: it runs
    # some of the jobs on top of the one that waits. Each has a worker of its own for that time, and
    # so waits and is cancelled as any other. Who brings such a job rings afterwards; the worker
    # first shows by what it can be woken, and then looks.

    def listen(self, bell: Any) -> Any:
        """For its worker: what `ring` interrupts from now on; gives what it did before."""
        former, self._bell = self._bell, bell
        return former

    def ring(self) -> None:
        """In any thread: has the worker look for a job, if it waits."""
        bell = self._bell
        if bell is not None:
            bell.interrupt()

    def run_one(self) -> bool:
        """In its worker: runs one of the jobs that may run while it waits; whether it did."""
        worker = _this_worker()
        if worker is None or worker.queue is not self or not worker.waits:
            return False
        assert self._nesting is not None
        return self._nesting.run_one(self)

    def run_within(self, unfuture: Unfuture[Any] | None) -> bool:
        """In its worker, which waits: runs that job, or the first one; whether it was there."""
        outer = _this_worker()
        worker = _Worker(self)
        begun = True
        bell = self.listen(None)
        worker.moves += 1  # first: see `pending`
        self._nested[worker] = None
        try:
            if unfuture is None:
                with suppress(IndexError):
                    worker.job = self._jobs.popleft()
            elif self._take_out(unfuture):
                worker.job = unfuture
            if worker.job is None:
                return False
            self._tally.add(TAKEN)
            _this.worker = worker
            begun = worker.job._work()
        except BaseException as exc:
            # As in `work`: somebody raised it in this thread from outside.
            if worker.job is not None:
                worker.job._complete(FAILED, exc)
            raise
        finally:
            if _this.worker is worker:  # not in the child of a fork
                _this.worker = outer
            if worker.waits:
                worker.end_all_waits()  # of a loop that was left
            self._nested.pop(worker, None)
            if worker.job is not None:
                self._end_job(worker, begun)
            self.listen(bell)
        return True

    def _is_buried(self, looking: _Worker, unfuture: Unfuture[Any]) -> bool:
        """Whether it hangs upon jobs whose turn comes after the one that waits."""
        if looking.job is None:
            return False
        behind = [worker.job for worker in list(self._waiting) if worker.job is not None]
        behind += _listed(self._jobs)
        waits = [(looking.job, unfuture)]
        return waits_for_ever(Unfuture, {id(job): job for job in behind}, waits)

    def _moves(self) -> list[tuple[_Worker, int]]:
        """What is another one as soon as a worker has come, gone or moved."""
        return [(worker, worker.moves) for worker in list(self._workers)]

    def _end_worker(self, worker: _Worker) -> None:
        """Counts one worker less."""
        self._workers.pop(worker, None)
        self._note_end()

    def _note_end(self) -> None:
        # In this order: what is taken out of the queue is in the hands of one of the workers.
        if self._refuse is not None and not self._jobs and not self._workers:
            self._ended.set()

    def counts(self) -> QueueCounts:
        """For `unsync.stats()`: see `QueueCounts`."""
        counts = self._tally.read()
        submitted = counts[SUBMITTED] - counts[REFUSED]
        started = counts[TAKEN] - counts[NOT_BEGUN]
        ended = (
            counts[FINISHED],
            counts[FAILED],
            counts[CANCELLED] + counts[CANCELLED_AND_NOTIFIED],
        )
        work = (started, *ended, submitted - sum(ended))
        workers = len(self._workers)
        # Of those that run jobs while they wait there may be several to a thread.
        waiting = min(len(self._waiting), workers)
        return work, len(self._jobs), workers, len(self._idle), waiting

    def pending(self) -> tuple[list[Unfuture[Any]], list[Unfuture[Any]]]:
        """The jobs that wait for a worker, and those that workers are at, also if they are done."""
        # A job that was taken just now belongs to a worker that does not show it yet. So this looks
        # again until each worker that is up shows what it is at.
        while True:
            queued = _listed(self._jobs)
            at_work: list[Unfuture[Any]] = []
            for worker in list(self._workers) + list(self._nested):
                job = worker.job
                if job is not None:
                    at_work.append(job)
                elif worker.moves and worker.is_up():
                    break
            else:
                return queued, at_work
            sleep(0)

    def wait(self, timeout: float | None) -> bool:
        """After `close`: waits up to `timeout` seconds for the last worker's end; whether it came.

        This counts the workers whose threads are only just being started, too.
        """
        return self._ended.wait(timeout)

    def close(self, refuse: Callable[[], Exception]) -> None:
        """Refuses further jobs with `refuse()`; the workers end when the queue is empty."""
        if self._refuse is None:
            self._refuse = refuse
        for bed in list(self._idle):
            self._wake(bed)
        while self._door:
            self._open_door()
        self._note_end()

    def cancel_all(self) -> None:
        """Cancels the jobs that have not begun."""
        for unfuture in self._take_all():
            unfuture._complete(CANCELLED, None, expected=PENDING)
            self._tally.add(unfuture._status)

    def fail_all(self, error: Exception) -> None:
        """Fails the jobs that have not begun."""
        check_outcome(FAILED, error)
        for unfuture in self._take_all():
            unfuture._complete(FAILED, error)
            self._tally.add(unfuture._status)

    def _take_all(self) -> list[Unfuture[Any]]:
        jobs: list[Unfuture[Any]] = []
        with suppress(IndexError):
            while True:
                jobs.append(self._jobs.popleft())
        for job in jobs:
            self._leave(job)
        self._note_end()
        return jobs

    def after_fork(self) -> None:
        """In the child: the workers, and the jobs that waited for them, stayed with the parent."""
        for worker in self._waiting:
            worker.waits = 0
        # All anew: a thread of the parent may have been in the middle of a change.
        self._set_up()


@final
class _Leaver(_Waiter):
    """Of a job of a bounded queue: that it is cancelled before it begins makes room."""

    __slots__ = ("queue",)

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue

    def _fire(self, unfuture: Unfuture[Any], backlog: list[Unfuture[Any]]) -> None:
        if unfuture.cancelled():
            self.queue._drop_cancelled()


@final
class _Worker:
    """A thread of a pool, and the waits it is in."""

    __slots__ = (
        "awaited",
        "bed",
        "blocked",
        "call",
        "era",
        "failure",
        "found_by",
        "job",
        "moves",
        "queue",
        "requests",
        "to_begin",
        "waits",
    )

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue
        # Taken by the thread that begins, or by who gives its start up.
        self.to_begin: deque[None] = deque([None])
        # All that follows is written by its own thread, but for what is said to be others'.
        # There is more than one wait in a loop of its own, with many tasks. Why no spare worker
        # could be started for the last one, if so.
        self.waits = 0
        self.failure: Exception | None = None
        # How often it has given up all its waits, at the end of a job: those are nobody's any more.
        self.era = 0
        # What it works on, what it waits for, and what it sleeps in while it is idle; and how often
        # it has taken a job, begun to wait or gone idle.
        self.job: Unfuture[Any] | None = None
        self.awaited: Unfuture[Any] | None = None
        self.bed: threading.Lock | None = None
        self.moves = 0
        # Which call of a job that makes several it is at; and what to interrupt, while it waits
        # outside of a loop of its own.
        self.call: Unfuture[Any] | None = None
        self.blocked: Any = None
        # Others leave here that the job or call was cancelled from a loop, until a wait has been
        # ended by that; and find here what to interrupt, by the job or call that it serves, and
        # take it: so nobody who comes late interrupts a wait of the next job.
        self.requests: dict[Unfuture[Any], CancelRequest] = {}
        self.found_by: dict[Unfuture[Any], Any] = {}

    def is_up(self) -> bool:
        """Whether it neither waits nor sleeps."""
        bed = self.bed
        asleep = bed is not None and bed in self.queue._idle and bed.locked()
        return not asleep and self not in self.queue._waiting

    def begin_wait(self, unfuture: Unfuture[Any] | None) -> None:
        """Called before it waits for `unfuture`, or None for something unknown."""
        self.waits += 1
        queue = self.queue
        if self not in queue._waiting:
            self.moves += 1
            self.awaited = unfuture
            queue._waiting[self] = None
            if self.bed is not None:
                # In a finalizer, which has come as it went idle.
                queue._wake(self.bed)
            queue._leave(self.job)
        # Each time: a finalizer may have come just before, and now it waits in here.
        self.failure = queue._call_up()

    def begin_wait_in(self, loop: asyncio.AbstractEventLoop, unfuture: Unfuture[Any]) -> None:
        """The same, for one that waits in a loop of its own."""
        self.begin_wait(unfuture)
        queue = self.queue
        if queue._nesting is not None:
            queue._nesting.wait_in(loop, queue)

    def end_wait(self, era: int) -> None:
        """:param era: of when it began. Its loop may have been left since, and run elsewhere."""
        if self.waits and era == self.era and _this_worker() is self:
            self.waits -= 1
            if not self.waits:
                self._go_on()

    def end_all_waits(self) -> None:
        self.era += 1
        self.waits = 0
        self._go_on()

    def _go_on(self) -> None:
        queue = self.queue
        if queue._room >= 0 and self.job is not None:
            queue._inside[self.job] = None
        queue._waiting.pop(self, None)
        self.awaited = None

    # A cancel of the call that it is at, which comes from a loop. The function cannot be stopped,
    # but a wait of it can be ended: that in progress, or else the next one. Who cancels leaves the
    # request, then looks for a wait; who waits can be found first, and then looks for a request.

    def begin_call(self, unfuture: Unfuture[Any]) -> None:
        """Of those of its job."""
        self.requests.clear()
        self.call = unfuture

    def end_job(self) -> Unfuture[Any] | None:
        job, self.job = self.job, None
        self.call = None
        self.requests.clear()
        self._hide()  # if somebody raised something in the thread
        return job

    def cancel_call(self, unfuture: Unfuture[Any], request: CancelRequest) -> None:
        """In any thread: `unfuture` was cancelled; if this is still at it, a wait is to hear."""
        if unfuture is not self.job and unfuture is not self.call:
            return
        self.requests[unfuture] = request
        blocked = self.found_by.pop(unfuture, None)
        if blocked is not None:
            blocked.interrupt()

    def begin_blocking(self, blocked: Any) -> CancelRequest | None:
        """The thread is going to wait until that is released.

        Returns why it must not, as `end_blocking` does. A loop of the thread's own is left alone,
        and so is what the core itself asks within a wait.
        """
        if self.blocked is not None or running_loop() is not None:
            return None
        self.blocked = blocked
        for unfuture in (self.job, self.call):
            if unfuture is not None:
                self.found_by[unfuture] = blocked
        request = self._take_request()
        if request is not None:
            self._hide()
        return request

    def end_blocking(self, blocked: Any, takes: bool) -> CancelRequest | None:
        """What the wait was ended by, if it was, and asks for that: it is told once."""
        if self.blocked is not blocked:
            return None
        self._hide()
        return self._take_request() if takes else None

    def _hide(self) -> None:
        self.found_by.clear()
        self.blocked = None

    def _take_request(self) -> CancelRequest | None:
        """What was asked of its job, or of the call of that."""
        for unfuture in (self.call, self.job):
            if unfuture is not None and unfuture in self.requests:
                return self.requests.pop(unfuture)
        return None

    def wait(self, unfuture: Unfuture[Any], blocked: _Blocked, timeout: float | None) -> bool:
        """Waits in `blocked`, with a spare worker in its place; False if there is no outcome.

        That is after `timeout` seconds, or for `blocked.request`.

        :raises RuntimeError: if there is none, and the pool would wait for ever.
        """
        blocked.request = self.begin_blocking(blocked)
        if blocked.request is not None:
            return False
        is_done = True
        try:
            try:
                self.begin_wait(unfuture)
                self._wait_in(unfuture, blocked, timeout)
            finally:
                self.end_wait(self.era)
            is_done = unfuture._status >= CANCELLED
        finally:
            request = self.end_blocking(blocked, not is_done)
        blocked.request = request
        return is_done

    def _wait_in(self, unfuture: Unfuture[Any], blocked: _Blocked, timeout: float | None) -> None:
        queue = self.queue
        until = None if timeout is None else monotonic() + max(timeout, 0)
        while (self.waits == 1 or queue._nesting is not None) and queue._none_at_work():
            if queue._nesting is not None:
                self._work_meanwhile(unfuture, blocked, until)
                return
            # Nobody else would see to the queue. What is waited for may come to hang upon it
            # later on, as when a coroutine calls a function. With a timeout it is no deadlock.
            if timeout is None and queue._is_stuck(self) and unfuture._status < CANCELLED:
                raise exhausted_error(len(queue._workers), unfuture, self.failure)
            left = LOOK_AGAIN_SECONDS
            if until is not None:
                left = min(left, until - monotonic())
            if blocked.wait(left):
                return
            if until is not None and monotonic() >= until:
                return
            self.failure = queue._call_up()
        blocked.wait(None if until is None else until - monotonic())

    def _work_meanwhile(
        self, unfuture: Unfuture[Any], blocked: _Blocked, until: float | None
    ) -> None:
        """Runs what may run now, one job after the other, until the wait is over."""
        queue = self.queue
        former = queue.listen(blocked)
        try:
            self._work_until_done(unfuture, blocked, until)
        finally:
            queue.listen(former)
            queue.ring()  # a loop of its own, which this kept from looking

    def _work_until_done(
        self, unfuture: Unfuture[Any], blocked: _Blocked, until: float | None
    ) -> None:
        queue = self.queue
        while not unfuture.done() and not self._is_cancelled_in(blocked):
            left = LOOK_AGAIN_SECONDS
            if until is not None:
                left = min(left, until - monotonic())
                if left <= 0:
                    return
            if queue.run_one() or blocked.wait(left) or until is not None:
                continue
            # What it would run before has come before somebody could wait for it.
            if queue._is_buried(self, unfuture) and not queue.run_one() and not unfuture.done():
                raise buried_error(unfuture)

    def _is_cancelled_in(self, blocked: _Blocked) -> bool:
        """Whether the wait is to be ended by that."""
        return self.blocked is blocked and (self.job in self.requests or self.call in self.requests)


def _this_worker() -> _Worker | None:
    return _this.worker


def _start_again() -> None:
    """For a thread that submits or waits.

    If it does so in a handler that has interrupted it while it starts a worker, nobody else would
    start that one meanwhile.
    """
    for queue in [*_this.starts]:
        queue._start_again()


def in_worker() -> bool:
    """Whether this is a thread of a pool."""
    return _this_worker() is not None


@final
class pool_wait:  # noqa: N801  # lower case as in the twin
    """Around a wait that is none for an Unfuture; nothing in a thread that is not a pool's.

    :param blocked: its `interrupt()` ends the wait.
    :raises InvalidStateError: in the ambient loop's thread, which must not wait.
    :raises CancelledError: at the begin or the end, if the call that runs in this thread was
        cancelled from a loop.
    """

    def __init__(self, blocked: Any) -> None:
        self._blocked = blocked

    def __enter__(self) -> None:
        if in_home_thread():
            raise would_block_error()
        check_threads()
        wake_home_again()
        _start_again()
        worker = _this_worker()
        if worker is not None:
            request = worker.begin_blocking(self._blocked)
            if request is not None:
                raise cancelled_error(request.message, False)
            worker.begin_wait(None)

    @staticmethod
    def event() -> ToldEvent | threading.Event:
        """What this thread is going to wait for, which tells its pool."""
        worker = _this_worker()
        nesting = None if worker is None else worker.queue._nesting
        return ToldEvent(pool_wait) if nesting is None else nesting.event()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        worker = _this_worker()
        if worker is not None:
            worker.end_wait(worker.era)
            request = worker.end_blocking(self._blocked, kind is None)
            if request is not None:
                raise cancelled_error(request.message, False)


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
        unfuture._source = _Call(coro, _context_for(unfuture))
        mailbox._post(unfuture)
        return unfuture

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        binding = self._binding
        if binding == BIND_NOTHING:
            return self
        if binding == BIND_CLASS:
            return MethodType(self, type(instance) if owner is None else owner)
        return self if instance is None else MethodType(self, instance)
