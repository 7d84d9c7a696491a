"""What both cores share: states, errors, wording, and the paths that need no speed.

Nothing here knows the decorator or the executors; the cores know nothing else of the package.
"""

from __future__ import annotations

import _thread
import asyncio
import builtins
import concurrent.futures
import functools
import inspect
import logging
import math
import os
import queue
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine
from types import CoroutineType, FunctionType, GeneratorType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from contextvars import Context
    from types import TracebackType

    from unsync._core_py import Unfuture

logger = logging.getLogger("unsync")

# What the cores count of the work in one place: started, finished, failed, cancelled, pending.
WorkCounts = tuple[int, int, int, int, int]
# Of a mailbox: that with wakeups and wakeups saved; then items left in it, the lag in seconds.
MailboxCounts = tuple[tuple[int, int, int, int, int, int, int], int, float]
# Of a job queue: that, jobs in the line, workers, idle ones, ones that wait.
QueueCounts = tuple[WorkCounts, int, int, int, int]

running_loop = asyncio._get_running_loop

# Set by the exit handlers, before they break what still runs.
exiting = False

# Our threads are daemonic: what blocks in one must not keep the process from its end. Most
# sub-interpreters allow none; there Python waits for them, after `threading`'s own exit hooks.
DAEMONIC: bool = getattr(_thread, "daemon_threads_allowed", lambda: True)()

# The life of an Unfuture. Everything from CANCELLED on is final for those who wait.
PENDING, RUNNING, CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, FAILED = range(6)

# The names that concurrent.futures.wait() and as_completed() look for in `_state`.
STATE_NAMES = (
    "PENDING",
    "RUNNING",
    "CANCELLED",
    "CANCELLED_AND_NOTIFIED",
    "FINISHED",
    "FINISHED",
)


# What a continuation most often returns: of these types nothing can be awaited.
PLAIN_TYPES: frozenset[type] = frozenset(
    {
        bool,
        bytearray,
        bytes,
        complex,
        dict,
        float,
        frozenset,
        int,
        list,
        set,
        str,
        tuple,
        type(None),
    }
)


class InvalidStateError(asyncio.InvalidStateError, concurrent.futures.InvalidStateError):
    """The operation does not fit the Unfuture's state: asyncio's and concurrent.futures' error."""


class CancelledError(concurrent.futures.CancelledError, asyncio.CancelledError):
    """What a cancelled Unfuture raises to a thread: asyncio's and concurrent.futures' error."""


if sys.version_info >= (3, 11):
    TimedOutError = builtins.TimeoutError
else:

    class TimedOutError(
        concurrent.futures.TimeoutError, asyncio.TimeoutError, builtins.TimeoutError
    ):
        """Python 3.11 made these three one; before, this one satisfies whoever catches any."""


def already_done_error(unfuture: Unfuture[Any]) -> InvalidStateError:
    return InvalidStateError(f"this Unfuture already has its outcome: {unfuture!r}")


def exhausted_error(
    workers: int, unfuture: Unfuture[Any], failure: Exception | None
) -> RuntimeError:
    error = RuntimeError(
        f"all {workers} threads of the pool wait for calls that would need one more thread, and so "
        f"{unfuture!r} would be waited for for ever; wait for it in a coroutine, with 'await', or "
        "make the pool with more spare_workers"
    )
    error.__cause__ = failure  # why there is not one more thread
    return error


def full_error(limit: int, room: int, patient: bool) -> queue.Full:
    why = "; in an event loop it does not wait" if patient else ""
    return queue.Full(
        f"all {limit} threads are at work and {room} calls wait for them, which is all the room "
        f"there is (max_queued={room}){why}; call again later"
    )


def would_deadlock_error(unfuture: Unfuture[Any]) -> InvalidStateError:
    return InvalidStateError(
        f"{unfuture!r} is not done, and waiting for it in unsync.thread would block the ambient "
        "event loop for ever; use 'await' instead"
    )


def orphan_error() -> RuntimeError:
    return RuntimeError(
        f"the work behind this Unfuture belongs to the process that forked this one "
        f"(pid {os.getpid()}) and will never finish here; call the function again"
    )


def cancelled_error(message: object, in_loop: bool) -> asyncio.CancelledError:
    """The error for whoever looks at a cancelled Unfuture.

    In a running loop it is asyncio's own, so that `except Exception` in a coroutine never
    swallows a cancellation; in a plain thread it satisfies both worlds.
    """
    kind = asyncio.CancelledError if in_loop else CancelledError
    return kind() if message is None else kind(message)


def awaited_exception(exc: BaseException) -> BaseException:
    """The form of `exc` that can be raised by `await` (a StopIteration would end it quietly)."""
    if isinstance(exc, StopIteration):
        wrapped = RuntimeError("StopIteration cannot be raised out of an await")
        wrapped.__cause__ = exc
        return wrapped
    return exc


def without_this_frame(failure: BaseException) -> BaseException:
    """For who caught it: the frame tells the user nothing, and may hold what holds the failure."""
    traceback = failure.__traceback__
    return failure.with_traceback(None if traceback is None else traceback.tb_next)


def thrown(kind: object, value: object, traceback: object) -> BaseException:
    """The exception for an iterator's `throw`, which takes what generators take.

    :raises TypeError: if the arguments do not make one.
    """
    if (value, traceback) != (None, None) and sys.version_info >= (3, 12):
        warnings.warn(
            "the (type, value, traceback) form of throw() is deprecated, pass the exception alone",
            DeprecationWarning,
            stacklevel=3,
        )
    if isinstance(kind, type) and issubclass(kind, BaseException):
        if isinstance(value, kind):
            exc: BaseException = value
        else:
            arguments = value if isinstance(value, tuple) else () if value is None else (value,)
            exc = kind(*arguments)
    elif isinstance(kind, BaseException) and value is None:
        exc = kind
    else:
        raise TypeError(f"throw() takes an exception, not {kind!r} and {value!r}")
    return exc if traceback is None else exc.with_traceback(cast("TracebackType", traceback))


def check_exception(exception: object) -> BaseException:
    """An instance for `set_exception`.

    :raises TypeError: if it is neither an exception nor an exception class.
    """
    if isinstance(exception, type) and issubclass(exception, BaseException):
        return exception()
    if isinstance(exception, BaseException):
        return exception
    raise TypeError(f"set_exception() takes an exception or an exception class, not {exception!r}")


def check_callable(what: str, function: object) -> None:
    if not callable(function):
        raise TypeError(f"{what} must be callable, not {function!r}")


def is_coroutine(value: object) -> bool:
    return isinstance(value, Coroutine)


def is_awaitable(value: object) -> bool:
    if isinstance(value, GeneratorType):
        return inspect.isawaitable(value)
    return hasattr(type(value), "__await__")


def report_failed_callback(
    callback: Callable[[Unfuture[Any]], object],
    unfuture: Unfuture[Any],
    context: Context,
    failure: BaseException,
    loop: asyncio.AbstractEventLoop,
    is_ambient: bool,
) -> None:
    """Has the loop report a failure of `callback` as it reports those of its own callbacks."""
    if is_ambient and isinstance(failure, (KeyboardInterrupt, SystemExit)):
        # It would leave the loop, where nobody runs it who could hear of it.
        log_failed_callback(callback, unfuture, failure)
        return

    @functools.wraps(callback, updated=())
    def fail_again(_: Unfuture[Any]) -> None:
        raise failure

    # In a copy: that somebody else is in the context now may be what failed.
    loop.call_soon(fail_again, unfuture, context=context.copy())


def report_slow(loop: asyncio.AbstractEventLoop, what: object, seconds: float) -> None:
    """Warns of what held up a loop in debug mode, as the loop does for its own callbacks.

    :param what: the task or the Unfuture whose function it was.
    """
    if seconds >= getattr(loop, "slow_callback_duration", math.inf):
        logging.getLogger("asyncio").warning("Executing %r took %.3f seconds", what, seconds)


def log_failed_callback(
    callback: Callable[[Unfuture[Any]], object], unfuture: Unfuture[Any], failure: BaseException
) -> None:
    logger.error("exception calling callback for %r: %r", unfuture, callback, exc_info=failure)


async def wait_for_awaitable(awaitable: Any) -> Any:
    return await awaitable


def close_unstarted(coroutine: object) -> None:
    """Ends a coroutine that will not run, so that nobody is told it was never awaited."""
    close = getattr(coroutine, "close", None)
    if close is None:
        return  # a function that was said to be a coroutine function, and is none
    try:
        close()
    except BaseException:
        logger.exception("closing %r failed", coroutine)


def outcome_of_asyncio(future: asyncio.Future[Any]) -> tuple[int, Any]:
    """(status, outcome) of a done asyncio future; its failure counts as seen from here on."""
    if future.cancelled():
        try:
            future.result()
        except asyncio.CancelledError as cancelled:
            return CANCELLED, cancelled.args[0] if cancelled.args else None
    exc = future.exception()
    if exc is not None:
        return FAILED, exc
    return FINISHED, future.result()


# These always have a name.
_NAMED = {CoroutineType, FunctionType}


def name_of(thing: object) -> str:
    """The qualified name of a function, of a coroutine, or of a task's coroutine."""
    if type(thing) is asyncio.Task:
        thing = thing.get_coro()
    if type(thing) in _NAMED:
        return cast("FunctionType", thing).__qualname__
    try:
        while isinstance(thing, functools.partial):
            thing = thing.func
        if asyncio.isfuture(thing):
            thing = cast("asyncio.Task[Any]", thing).get_coro()
        name = getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None)
    except Exception:  # a callable object may have anything of its own there
        name = None
    return name if isinstance(name, str) and name else type(thing).__qualname__


# Which Unfutures are being described, and by which threads: a result may lead back to its Unfuture.
_describing: set[tuple[int, int]] = set()


def describe(unfuture: Unfuture[Any], status: int, outcome: Any, behind: object) -> str:
    """The text of `repr(unfuture)`: state, what is behind it, outcome.

    :param behind: the name of a function, the Unfuture or the mirror whose outcome it will have.
    """
    kind = type(unfuture).__name__
    key = id(unfuture), threading.get_ident()
    if key in _describing:
        return f"<{kind} ...>"
    _describing.add(key)
    try:
        text = STATE_NAMES[status].lower().replace("_and_notified", "")
        if isinstance(behind, str):
            text += f" function={behind}"
        elif behind is not None and status < CANCELLED:
            label = "future" if isinstance(behind, Mirror) else "unfuture"
            text += f" {label}={_short_repr(behind)}"
        if status == FINISHED:
            text += f" result={_short_repr(outcome)}"
        elif status == FAILED:
            text += f" exception={_short_repr(outcome)}"
    finally:
        _describing.discard(key)
    return f"<{kind} {text}>"


def _short_repr(value: object) -> str:
    try:
        text = repr(value)
    except Exception as exc:
        text = f"<unprintable {type(value).__name__}: {type(exc).__name__}>"
    return text if len(text) <= 200 else f"{text[:197]}..."


def report_unseen_failure(
    unfuture: Unfuture[Any], exc: BaseException, loop: asyncio.AbstractEventLoop | None
) -> None:
    """Reports a failure that nobody looked at, as asyncio does when such a future dies.

    The ambient loop's exception handler hears of it in the loop's own thread; without a usable
    loop the same words go to the log. What broke only because the interpreter exits is no news.
    """
    if exiting and _is_of_the_exit(exc):
        return
    context: dict[str, Any] = {
        "message": f"{type(unfuture).__name__} exception was never retrieved",
        "exception": exc,
        "future": unfuture,
    }
    if loop is not None and not sys.is_finalizing():
        try:
            if running_loop() is loop:
                loop.call_exception_handler(context)
            else:
                loop.call_soon_threadsafe(loop.call_exception_handler, context)
        except RuntimeError:
            pass  # the loop was closed: the log is left
        else:
            return
    logger.error("%s\nfuture: %r", context["message"], unfuture, exc_info=exc)


def _is_of_the_exit(exc: BaseException) -> bool:
    """Whether it only says that its work came too late for this interpreter."""
    if isinstance(exc, (concurrent.futures.BrokenExecutor, concurrent.futures.CancelledError)):
        return True
    return isinstance(exc, RuntimeError) and "after interpreter shutdown" in str(exc)


def rebuild(cls: type[Unfuture[Any]] | None, status: int, outcome: Any) -> Unfuture[Any]:
    """What a pickled Unfuture names: makes the same finished one, on whichever core is in use."""
    from unsync import Unfuture

    unfuture = (cls or Unfuture).__new__(cls or Unfuture)
    unfuture._complete(status, outcome)
    return unfuture


# A thread of a pool that waits while no other is at work looks this often, in seconds, whether it
# will be woken.
LOOK_AGAIN_SECONDS = 1.0


def waits_for_ever(
    unfuture_class: type[Unfuture[Any]],
    queued: dict[int, Unfuture[Any]],
    waits: list[tuple[Unfuture[Any], Unfuture[Any]]],
) -> bool:
    """Whether all that a pool's threads wait for hangs upon jobs that no thread is left for.

    What a task waits for can only be seen in its loop, so the ambient one is asked. Some of it
    cannot be seen at all: what is to be set by hand, say. That counts as hope.

    :param queued: the jobs that have no thread, by their ids.
    :param waits: what each thread works on, and what it waits for.
    """

    async def look() -> bool:
        return _waits_for_ever(queued, waits)

    call = unfuture_class(look())
    try:
        found: bool = call.result(LOOK_AGAIN_SECONDS)
    except (TimedOutError, concurrent.futures.CancelledError):
        call.cancel()
        return False  # the loop is kept from its work, or ends
    return found


def _waits_for_ever(
    queued: dict[int, Unfuture[Any]], waits: list[tuple[Unfuture[Any], Unfuture[Any]]]
) -> bool:
    loop = running_loop()
    worked_on = {id(job): awaited for job, awaited in waits}
    seen: dict[int, object] = {}
    upon: dict[int, list[object]] = {}
    todo: list[object] = [awaited for _, awaited in waits]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        behind = [worked_on[id(thing)]] if id(thing) in worked_on else _behind(thing, loop)
        for other in behind:
            upon.setdefault(id(other), []).append(thing)
        todo += behind
    hopeless: set[int] = set()
    todo = [thing for key, thing in seen.items() if key in queued]
    while todo:
        thing = todo.pop()
        if id(thing) not in hopeless:
            hopeless.add(id(thing))
            todo += upon.get(id(thing), ())
    return all(id(awaited) in hopeless for _, awaited in waits)


def _behind(thing: Any, loop: asyncio.AbstractEventLoop | None) -> list[Any]:
    """What an Unfuture, one await of it, a task or the future of a `gather` waits for."""
    if hasattr(thing, "_behind"):
        behind = thing._behind()
        return [] if behind is None else [behind]
    if not asyncio.isfuture(thing) or thing.get_loop() is not loop:
        return []
    behind = getattr(thing, "_fut_waiter", None)
    return [*getattr(thing, "_children", ()), *([] if behind is None else [behind])]


class Waiters:
    """What concurrent.futures.wait() and as_completed() ask of a future; made only when asked for.

    `condition` guards `waiters` and, from then on, the change of the Unfuture's state.

    :param pool_wait: what a thread of a pool must be in while it waits.
    """

    __slots__ = ("condition", "waiters")

    def __init__(self, pool_wait: Callable[[], AbstractContextManager[None]]) -> None:
        self.condition = threading.Condition()
        self.waiters: list[Any] = _WaiterList(pool_wait)

    def tell(self, unfuture: Unfuture[Any], status: int) -> None:
        """Tells everybody who waits; the caller holds `condition`."""
        for waiter in self.waiters:
            if status == FINISHED:
                waiter.add_result(unfuture)
            elif status == FAILED:
                waiter.add_exception(unfuture)
            else:
                waiter.add_cancelled(unfuture)
        self.condition.notify_all()


class _WaiterList(list[Any]):
    """The waiters; the event that one of them is going to wait for tells the thread's pool."""

    def __init__(self, pool_wait: Callable[[], AbstractContextManager[None]]) -> None:
        self._pool_wait = pool_wait

    def append(self, waiter: Any) -> None:
        if type(getattr(waiter, "event", None)) is threading.Event and not waiter.event.is_set():
            waiter.event = _ToldEvent(self._pool_wait)
        super().append(waiter)


class _ToldEvent(threading.Event):
    def __init__(self, pool_wait: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self._pool_wait = pool_wait

    def wait(self, timeout: float | None = None) -> bool:
        with self._pool_wait():
            return super().wait(timeout)


class Mirror:
    """Keeps an Unfuture and the future of another kind that it wraps alike, both ways."""

    __slots__ = ("function",)

    # The name of the function behind the wrapped one, where it is known.
    function: str | None

    def attach(self) -> None:
        """Begins to mirror.

        :raises RuntimeError: if the future is pending and its loop is closed.
        """
        raise NotImplementedError

    def cancel(self, message: object) -> bool:
        """Asks the wrapped future to cancel; False if it cannot any more."""
        raise NotImplementedError

    def running(self) -> bool:
        raise NotImplementedError

    def push(self, status: int, outcome: Any) -> None:
        """Gives the wrapped future the outcome that somebody set on the Unfuture."""
        raise NotImplementedError


_MAY_LOOK = sys.version_info >= (3, 14)
# Python has it from 3.13 on.
has_gil: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)


class AsyncioMirror(Mirror):
    """The wrapped one is an asyncio future, touched in its own loop only.

    But where there is a lock, the GIL or from Python 3.14 on the future's, everybody may ask
    whether it is done: then it will not change.
    """

    __slots__ = ("_future", "_loop", "_target")

    def __init__(self, target: Unfuture[Any], future: asyncio.Future[Any]) -> None:
        self.function = None
        self._target = target
        self._future = future
        self._loop = future.get_loop()

    def __repr__(self) -> str:
        # Not the future's own: only the loop's thread may look at its callbacks.
        name = f" {name_of(self._future)}" if isinstance(self._future, asyncio.Task) else ""
        return f"<{type(self._future).__name__}{name}>"

    def attach(self) -> None:
        if _MAY_LOOK or has_gil() or running_loop() is self._loop or not self._loop.is_running():
            self._look()
        else:
            self._in_loop(self._look)

    def _look(self) -> None:
        if self._future.done():
            self._copy(self._future)
        else:
            self._in_loop(self._future.add_done_callback, self._copy)

    def _in_loop(self, function: Callable[..., object], *args: Any) -> None:
        if running_loop() is self._loop:
            function(*args)
        else:
            self._loop.call_soon_threadsafe(function, *args)

    def _copy(self, future: asyncio.Future[Any]) -> None:
        self._target._complete(*outcome_of_asyncio(future))

    def cancel(self, message: object) -> bool:
        try:
            self._in_loop(self._future.cancel, message)
        except RuntimeError:
            self._target._complete(CANCELLED, message)  # the loop is closed: nobody else will
        return True

    def running(self) -> bool:
        return False

    def push(self, status: int, outcome: Any) -> None:
        if isinstance(self._future, asyncio.Task):
            return  # a task has only its coroutine's outcome
        try:
            self._in_loop(self._set, status, outcome)
        except RuntimeError:
            logger.debug("%r: its loop is closed, the outcome stays here", self._future)

    def _set(self, status: int, outcome: Any) -> None:
        if self._future.done():
            return
        if status == FINISHED:
            self._future.set_result(outcome)
        else:
            self._future.set_exception(awaited_exception(outcome))
            self._future.exception()  # the Unfuture is the one to report it


class ConcurrentMirror(Mirror):
    """The wrapped one is a concurrent future."""

    __slots__ = ("_future", "_target")

    def __init__(self, target: Unfuture[Any], future: concurrent.futures.Future[Any]) -> None:
        self.function = None
        self._target = target
        self._future = future

    def __repr__(self) -> str:
        return repr(self._future)

    def attach(self) -> None:
        self._future.add_done_callback(_CopyOutcome(self._target))

    def cancel(self, message: object) -> bool:
        return self._future.cancel()

    def running(self) -> bool:
        return self._future.running()

    def push(self, status: int, outcome: Any) -> None:
        try:
            if status == FINISHED:
                self._future.set_result(outcome)
            else:
                self._future.set_exception(outcome)
        except concurrent.futures.InvalidStateError:
            logger.debug("%r already has an outcome of its own", self._future)


class _CopyOutcome:
    """Called by a concurrent future that is done, which keeps whom it has called.

    So this lets go of the Unfuture: else the outcome, large as it may be, would live in a cycle.
    """

    __slots__ = ("_target",)

    def __init__(self, target: Unfuture[Any]) -> None:
        self._target: Unfuture[Any] | None = target

    def __call__(self, future: concurrent.futures.Future[Any]) -> None:
        target, self._target = self._target, None
        assert target is not None
        if future.cancelled():
            target._complete(CANCELLED, None)
            return
        exc = future.exception()
        if exc is not None:
            target._complete(FAILED, exc)
        else:
            target._complete(FINISHED, future.result())


def is_asyncio_future(value: object) -> bool:
    """`asyncio.isfuture`, which without the GIL must not look into one that another loop sets."""
    return isinstance(value, asyncio.Future) or asyncio.isfuture(value)


def mirror_of(target: Unfuture[Any], source: object) -> Mirror:
    """The mirror for what `Unfuture(source)` was given.

    :raises TypeError: if `source` is no future.
    """
    if is_asyncio_future(source):
        return AsyncioMirror(target, cast("asyncio.Future[Any]", source))
    if isinstance(source, concurrent.futures.Future):
        return ConcurrentMirror(target, source)
    raise TypeError(
        "Unfuture() takes nothing, an asyncio future or task, a concurrent future or a coroutine, "
        f"not {source!r}; for a value there is Unfuture.from_value()"
    )
