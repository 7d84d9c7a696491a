"""An executor whose functions all run in one thread, also where they wait for each other.

A call in that thread may wait for what makes further calls there: a coroutine, say. The thread
runs these while it waits, on top of the one that waits, and no others: so a call never finds that
somebody else's work was done in the middle of its own.

Which calls are whose is known by a context variable, since contexts go wherever calls do: into
coroutines, continuations, streams and the threads of pools.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from asyncio.tasks import _enter_task, _leave_task
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

from unsync import _common
from unsync._backend import JobQueue, Unfuture
from unsync.executors import ThreadExecutor

__all__ = ["SingleThreadExecutor"]

P = ParamSpec("P")
T = TypeVar("T")


class _Call:
    """One call, as those that it makes know it.

    Those of a pool that have begun and not ended are in its one thread, each within the wait of the
    one before it. So a call that descends from several of them belongs to the last one, and may run
    when that waits.

    :param pool: what its executor's calls in this process have in common.
    :param above: the one that makes it.
    """

    __slots__ = ("above", "is_live", "pool", "queued")

    def __init__(self, pool: object, above: _Call | None) -> None:
        self.pool = pool
        self.above = _first_live(above)
        # Whether it has begun and not ended. Belongs to its thread, as does what is above it.
        self.is_live = False
        # What it may run. Some of these may have been cancelled, or begun elsewhere.
        self.queued: deque[Unfuture[Any]] = deque()

    def innermost(self, pool: object) -> _Call | None:
        """The call of that pool that it belongs to."""
        call = self.above
        while call is not None and not (call.is_live and call.pool is pool):
            call = call.above
        return call

    def end(self, outer: _Call | None) -> None:
        """:param outer: the one within whose wait it ran."""
        # In this order: whoever brings a call to this one then looks whether it has ended.
        self.is_live = False
        # Contexts may live for long, and keep this.
        self.above = _first_live(self.above)
        for left in _taken_from(self.queued):
            if outer is not None:
                outer.queued.append(left)


def _first_live(call: _Call | None) -> _Call | None:
    while call is not None and not call.is_live:
        call = call.above
    return call


class _Here(threading.local):
    # The innermost call that runs in this thread.
    call: _Call | None = None
    # Of the last loop in which it has waited.
    bell: _LoopBell | None = None


_here = _Here()


class _Nested:
    """What a job of the pool calls: a function, as one of its calls."""

    __slots__ = ("call", "function")

    def __init__(self, function: Callable[..., Any], call: _Call) -> None:
        self.function = function
        self.call = call

    @property
    def __name__(self) -> str:
        return _common.name_of(self.function)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        call, outer = self.call, _here.call
        _common.nested_in.set(call)  # in the job's own context
        call.is_live = True
        _here.call = call
        try:
            return self.function(*args, **kwargs)
        finally:
            _here.call = outer
            call.end(outer)
            del self, args, kwargs  # an error's traceback holds this frame


def _taken_from(queued: deque[Unfuture[Any]]) -> Iterator[Unfuture[Any]]:
    """One after the other; those that come meanwhile as well."""
    while True:
        try:
            unfuture = queued.popleft()
        except IndexError:
            return
        yield unfuture


class _Nesting:
    """See `_common.Nesting`."""

    def run_one(self, jobs: JobQueue) -> bool:
        call = _here.call
        if call is not None and not call.queued:
            return False
        with _outside_of_loops():
            if call is None:
                # A finalizer between two calls, say, or a callback: nobody's work is in progress.
                return jobs.run_within(None)
            # The first one that nobody has run or given up yet.
            return any(map(jobs.run_within, _taken_from(call.queued)))

    def wait_in(self, loop: asyncio.AbstractEventLoop, jobs: JobQueue) -> None:
        bell = _here.bell
        if bell is None or bell.loop() is not loop:
            bell = _here.bell = _LoopBell(loop, jobs)
        jobs.listen(bell)
        bell.interrupt()

    def event(self) -> threading.Event:
        return _AwaitedEvent()


@contextmanager
def _outside_of_loops() -> Iterator[None]:
    """For functions of a thread, which have no running loop, and may run one."""
    loop = asyncio._get_running_loop()
    if loop is None:
        yield
        return
    task = asyncio.current_task(loop)
    if task is not None:
        _leave_task(loop, task)
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(loop)
        if task is not None:
            _enter_task(loop, task)


class _LoopBell:
    """Has the loop that the thread runs itself, while it waits in that, run such calls."""

    def __init__(self, loop: asyncio.AbstractEventLoop, jobs: JobQueue) -> None:
        self.loop = weakref.ref(loop)
        self._jobs = jobs
        self._has_rung = False

    def interrupt(self) -> None:
        loop = self.loop()
        if loop is None or self._has_rung:
            return
        try:
            self._has_rung = True
            loop.call_soon_threadsafe(self._run)
        except BaseException as exc:
            self._has_rung = False  # a Ctrl-C, say: whoever rings next tries again
            if type(exc) is not RuntimeError or not loop.is_closed():
                raise

    def _run(self) -> None:
        self._has_rung = False
        if self._jobs.run_one():
            self.interrupt()  # the loop's own tasks come in between


class _AwaitedEvent(threading.Event):
    """Waits as one waits for an Unfuture."""

    def __init__(self) -> None:
        super().__init__()
        self._told: Unfuture[None] = Unfuture()

    def set(self) -> None:
        super().set()
        self._told._complete(_common.FINISHED, None)

    def clear(self) -> None:
        super().clear()
        self._told = Unfuture()

    def wait(self, timeout: float | None = None) -> bool:
        with suppress(TimeoutError):
            self._told._wait(timeout, cancels=False)
        return self.is_set()


class SingleThreadExecutor(ThreadExecutor):
    """A thread executor with one thread, for what belongs in one: a connection, say, or a device.

    All functions run in that thread, never two at once. While a call waits, the thread runs those
    calls that it has made, itself or through others: a function that it waits for, one that is
    called by a coroutine that it waits for, and so on. Each runs to its end before the wait goes
    on. All other calls begin when none is in progress, in the order in which they were made.

    Such calls run in `result()` and `exception()`; while it waits for a stream or a context
    manager; in `concurrent.futures.wait()` and `as_completed()`, given Unfutures; and where a task
    awaits an Unfuture in a loop that the call runs itself, by `asyncio.run()` say: there they run
    between the steps of the tasks, and hold them up. Who made a call is known by its context. It is
    lost where another one begins, as in a new `threading.Thread`: calls from there are others'.

    A call that waits, without a timeout and outside of a loop of its own, for one that can only
    begin after it gets a RuntimeError. Two such executors whose calls wait for each other's can
    stop each other, as two locks can that are taken in either order.

    A `ThreadExecutor(1)` is another thing: when a call waits, a spare thread takes its place.

    :param thread_name_prefix: begins the name of the thread.
    :param initializer: called in the thread before its first job; if it raises, the executor is
        broken and refuses work with `BrokenThreadPool`.
    :param initargs: the arguments for `initializer`.
    :raises TypeError: if `initializer` is not callable.
    """

    _nesting = _Nesting()

    def __init__(
        self,
        thread_name_prefix: str = "",
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(1, thread_name_prefix, initializer, initargs, spare_workers=0)
        self._pool = object()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Unfuture[T]:
        """Has the thread call `fn(*args, **kwargs)`.

        :raises RuntimeError: after `shutdown`.
        :raises BrokenThreadPool: if the initializer failed.
        """
        # In the thread itself it is made by the one that runs, whatever context that has entered.
        call = _Call(self._pool, _here.call or _common.nested_in.get())
        unfuture = self._jobs.submit(_Nested(fn, call), args, kwargs)
        while (outer := call.innermost(self._pool)) is not None:
            outer.queued.append(unfuture)
            if outer.is_live:
                self._jobs.ring()
                break
            # It has ended in between, and may not have seen it.
            _common.take_out(outer.queued, unfuture)
        return unfuture

    def _way(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Unfuture[Any]:
        """For `way_into`: by `submit`, since a subclass may do more there."""
        return self.submit(function, *args, **kwargs)

    def _after_fork(self) -> None:
        super()._after_fork()
        self._pool = object()  # the calls in progress stayed with the parent
