"""What both cores share: states, errors, wording, and the paths that need no speed.

Nothing here knows the decorator or the executors; the cores know nothing else of the package.
"""

from __future__ import annotations

import _thread
import asyncio
import concurrent.futures
import functools
import inspect
import logging
import math
import os
import queue
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, MutableSequence
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from types import CoroutineType, FrameType, FunctionType, GeneratorType
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Protocol

    from unsync._core_py import JobQueue, Unfuture

    class PoolWait(Protocol):
        """What a thread is in while it waits, and may be a pool's: `interrupt()` ends the wait."""

        def __call__(self, blocked: Any) -> AbstractContextManager[None]: ...

        # What this thread is going to wait for, which tells its pool.
        def event(self) -> ToldEvent | threading.Event: ...

    class Nesting(Protocol):
        """Which jobs a queue's worker runs itself while it waits, where no other takes its place.

        All of it is for the thread of that worker.
        """

        # Runs one that may run now, on top of the one that waits; whether there was one.
        def run_one(self, jobs: JobQueue) -> bool: ...

        # It begins to wait in a loop of its own, which is to run such jobs.
        def wait_in(self, loop: asyncio.AbstractEventLoop, jobs: JobQueue) -> None: ...

        # What it waits for in `concurrent.futures.wait()` and the like.
        def event(self) -> threading.Event: ...

    class Watcher(Protocol):
        """What the cores tell of calls while somebody drains: see `_drain.py`."""

        def made(
            self,
            unfuture: Unfuture[Any],
            source: Unfuture[Any] | None,
            job: Unfuture[Any] | None,
            context: Context,
        ) -> object:
            """A call or continuation is being made, and nobody else has seen it; or the source of a
            continuation has ended, and nobody has seen yet that it is to be called.

            :param source: of a continuation.
            :param job: what the thread works on, if it is a worker.
            :param context: in which it will run.
            """

        def is_through(self, job: Unfuture[Any]) -> object:
            """A worker has ended its work on it, and will be at it no more."""


T = TypeVar("T")

logger = logging.getLogger("unsync")

# In a test that freezes time freezegun replaces, in each module, what is `time.monotonic`. This is
# not: what waits here ends in real time, as it does in the standard library's locks.
monotonic: Callable[[], float] = functools.partial(time.monotonic)

# What the cores count of the work in one place: started, finished, failed, cancelled, pending.
WorkCounts = tuple[int, int, int, int, int]
# Of a mailbox: that with wakeups and wakeups saved; then items left in it, the lag in seconds.
MailboxCounts = tuple[tuple[int, int, int, int, int, int, int], int, float]
# Of a job queue: that, jobs in the line, workers, idle ones, ones that wait.
QueueCounts = tuple[WorkCounts, int, int, int, int]

# The innermost call of a `SingleThreadExecutor` to which the running code belongs, in whatever
# thread or loop that runs. Coroutines, functions and continuations have it from who called them.
nested_in: ContextVar[Any] = ContextVar("unsync_nested_in", default=None)

# gevent and eventlet make greenlets of one thread out of all threads, by patching modules.


def green_by() -> str | None:
    """What has done so by now, "gevent" or "eventlet"; None if nothing has."""
    for library, module, asked, name in (
        ("gevent", "gevent.monkey", "is_module_patched", "threading"),
        ("eventlet", "eventlet.patcher", "is_monkey_patched", "thread"),
    ):
        is_patched = getattr(sys.modules.get(module), asked, None)
        if is_patched is not None and is_patched(name):
            return library
    return None


# At the import of this module: what came later must not be used.
GREEN_BY = green_by()
_own_get_ident = threading.get_ident


def check_threads() -> None:
    """Called before a thread is started, and before one waits.

    :raises RuntimeError: if threads have become greenlets since unsync was imported: its locks
        would hold up all of them, and the one that would release them as well.
    """
    if threading.get_ident is not _own_get_ident:
        library = green_by()
        if library != GREEN_BY:
            patch = (
                "gevent.monkey.patch_all()" if library == "gevent" else "eventlet.monkey_patch()"
            )
            raise RuntimeError(
                f"{library} has patched Python's threads after unsync was imported, and waiting "
                f"would freeze the whole process; call {patch} before anything imports unsync"
            )


if GREEN_BY is None:
    running_loop = asyncio._get_running_loop
else:

    def running_loop() -> asyncio.AbstractEventLoop | None:
        """The loop that runs in this greenlet; asyncio knows one for all of them."""
        loop = asyncio._get_running_loop()
        if getattr(loop, "_thread_id", None) in (None, threading.get_ident()):
            return loop
        return None


# What a loop of one of these classes runs cannot run it in turn, unless somebody has replaced its
# `run_until_complete`, which they have from a common base.
STOCK_LOOPS: frozenset[type] = frozenset(
    getattr(asyncio, name)
    for name in ("SelectorEventLoop", "ProactorEventLoop")
    if hasattr(asyncio, name)
)
OWN_RUN = asyncio.BaseEventLoop.run_until_complete


def may_be_reentered(kind: type[asyncio.AbstractEventLoop]) -> bool | None:
    """Whether what such a loop runs may run the loop in turn, as Qt's modal dialogs do.

    None if it may not, unless `run_until_complete` is not asyncio's own: nest_asyncio replaces it.
    """
    if kind.__module__ in ("uvloop", "winloop"):
        return False  # they refuse
    return None if kind in STOCK_LOOPS and OWN_RUN.__module__ == "asyncio.base_events" else True


# What waits for its user, not for anything to be done: the coroutines of streams, which rest while
# nobody takes their values, and of context managers that are entered; and what looks for calls that
# wait for ever. Who drains leaves them alone.
apart: WeakSet[Unfuture[Any]] = WeakSet()

# Not asked for each time: that is a system call.
process = os.getpid()


def after_fork() -> None:
    """In the child: what was made before is the parent's."""
    global process
    process = os.getpid()


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


def buried_error(unfuture: Unfuture[Any]) -> RuntimeError:
    return RuntimeError(
        f"{unfuture!r} would be waited for for ever: it hangs upon a call whose turn in this "
        "thread comes after the call that waits, and that one has not made it; wait for it in a "
        "coroutine, with 'await', or in a function that runs elsewhere"
    )


def interrupted_start_error(interrupt: BaseException) -> RuntimeError:
    error = RuntimeError("no thread could be started for this call: its start was interrupted")
    error.__cause__ = interrupt
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


def would_block_error() -> InvalidStateError:
    return InvalidStateError(
        "not all of them are done, and waiting for them in unsync.thread would block the ambient "
        "event loop; use 'await' instead, with asyncio.wait() or asyncio.as_completed()"
    )


def not_iterable_error(unfuture: object) -> TypeError:
    return TypeError(
        f"{unfuture!r} cannot be iterated over: its result can, which .result() gives in a thread "
        "and await in a coroutine"
    )


def no_loop_error(unfuture: Unfuture[Any]) -> RuntimeError:
    return RuntimeError(
        f"no event loop runs in this thread that {unfuture!r} could be awaited in: call "
        "asyncio.gather(), shield() and the like inside a coroutine, or wait for one after the "
        "other, as in [call.result() for call in calls]"
    )


def set_up_error(thing: object) -> RuntimeError:
    return RuntimeError(f"{thing!r} has been set up already")


def circle_error() -> TypeError:
    return TypeError(
        "a continuation cannot return the Unfuture that waits for it, nor one that waits for that"
    )


def refused_running_error(unfuture: Unfuture[Any], status: int) -> RuntimeError:
    why = "what stands behind this Unfuture says itself when it begins"
    return RuntimeError(
        f"{why if status == PENDING else 'this Unfuture is not pending'}: {unfuture!r}"
    )


def orphan_error(what: str = "Unfuture") -> RuntimeError:
    return RuntimeError(
        f"the work behind this {what} belongs to the process that forked this one "
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


def check_context(context: object) -> None:
    """:raises TypeError: if callbacks cannot be called in it."""
    if not isinstance(context, Context):
        raise TypeError(f"a contextvars.Context is needed, not {context!r}")


def check_timeout(timeout: float) -> None:
    """:raises TypeError: if it is no number.
    :raises ValueError: if it is nan, or a number that no float can be.
    """
    try:
        is_nan = math.isnan(timeout)
    except TypeError:
        raise TypeError(f"a timeout is a number of seconds, not {timeout!r}") from None
    except OverflowError:
        raise ValueError("a timeout is a number of seconds, and None is for ever") from None
    if is_nan:
        raise ValueError("a timeout is a number of seconds, not nan")


def seconds_left(until: float | None) -> float | None:
    """Until that time on the monotonic clock; None for ever."""
    return None if until is None else max(0.0, until - monotonic())


def check_outcome(status: int, outcome: object) -> None:
    """For what the core is told by others.

    :raises ValueError: if no Unfuture ends with this status.
    :raises TypeError: if it says that the outcome is an exception, and it is none.
    """
    if not CANCELLED <= status <= FAILED:
        raise ValueError(f"{status!r} is not the status of anything that is done")
    if status == FAILED and not isinstance(outcome, BaseException):
        raise TypeError(f"a failure is an exception, not {outcome!r}")


def is_coroutine(value: object) -> bool:
    return isinstance(value, Coroutine)


def is_awaitable(value: object) -> bool:
    if isinstance(value, GeneratorType):
        return inspect.isawaitable(value)
    return hasattr(type(value), "__await__")


def hint_at_map(failure: BaseException) -> BaseException:
    """Of a function that `then` was given, whose failure may be that it got no result.

    In upstream unsync 1.4 `then` is what `map` is here.
    """
    if type(failure) in (TypeError, AttributeError):
        # That of Python itself. `str(failure)` may be anybody's code.
        text = failure.args[0] if failure.args else None
        if type(text) is str and "Unfuture" in text and not hasattr(failure, "__notes__"):
            failure.add_note(
                "then() gives the function the finished Unfuture; map() would give it its result"
            )
    return failure


_FOLDER = os.path.dirname(__file__)


def warn_if_it_blocks(loop: asyncio.AbstractEventLoop) -> None:
    """In a thread that is going to wait, where that loop runs: in debug mode it warns.

    Once for each place: Python's warnings do so as long as the message is the same.
    """
    if not loop.get_debug():
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and os.path.dirname(frame.f_code.co_filename) == _FOLDER:
        frame = frame.f_back
    if frame is not None:
        warnings.warn_explicit(
            "this waits for an Unfuture and blocks the event loop that runs here; use 'await'",
            RuntimeWarning,
            frame.f_code.co_filename,
            frame.f_lineno,
            frame.f_globals.get("__name__"),
            frame.f_globals.setdefault("__warningregistry__", {}),
        )


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


def log_failed_waking(waiter: object, unfuture: Unfuture[Any], failure: BaseException) -> None:
    logger.error("waking %r for %r failed", waiter, unfuture, exc_info=failure)


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
    unfuture: Unfuture[Any],
    exc: BaseException,
    loop: asyncio.AbstractEventLoop | None,
    failed_in: Context | None,
) -> None:
    """Reports a failure that nobody looked at, as asyncio does when such a future dies.

    The ambient loop's exception handler hears of it in the loop's own thread; without a usable
    loop the same words go to the log. What broke only because the interpreter exits is no news.

    :param failed_in: see `Unfuture._fail_in`.
    """
    if sys.is_finalizing() or (exiting and is_of_the_exit(exc)):
        return  # the interpreter has no more than pieces of what a log needs
    if failed_in is not None:
        # A copy, since it may be in use: a task's is while its callbacks are called.
        failed_in.copy().run(report_unseen_failure, unfuture, exc, loop, None)
        return
    context: dict[str, Any] = {
        "message": _unseen_message(unfuture),
        "exception": exc,
        "future": unfuture,
    }
    if loop is not None:
        try:
            if running_loop() is loop:
                _report_in(loop, context)
            else:
                loop.call_soon_threadsafe(_report_in, loop, context)
        except RuntimeError:
            pass  # the loop was closed: the log is left
        else:
            return
    log_unseen_failure(unfuture, exc)


def _report_in(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """In the loop's thread.

    In debug mode asyncio adds where the callback that runs was made. Here that says nothing of the
    call: it is where the Unfuture happened to be dropped, or where the ambient loop was started.
    """
    handle = getattr(loop, "_current_handle", None)  # asyncio's own loops have it in debug mode
    made_at = getattr(handle, "_source_traceback", None)
    if handle is None or made_at is None:
        loop.call_exception_handler(context)
        return
    handle._source_traceback = None
    try:
        loop.call_exception_handler(context)
    finally:
        handle._source_traceback = made_at


def log_unseen_failure(unfuture: Unfuture[Any], exc: BaseException) -> None:
    logger.error("%s\nfuture: %r", _unseen_message(unfuture), unfuture, exc_info=exc)


def _unseen_message(unfuture: Unfuture[Any]) -> str:
    return f"{type(unfuture).__name__}{_NEVER_RETRIEVED}"


_NEVER_RETRIEVED = " exception was never retrieved"  # asyncio's words


def is_unseen_message(text: str) -> bool:
    """Whether it reports a failure that nobody looked at: asyncio adds lines to it."""
    return text.partition("\n")[0].endswith(_NEVER_RETRIEVED)


def is_of_the_exit(exc: BaseException) -> bool:
    """Whether it may come of what this exit has ended, if it came after that has begun."""
    return isinstance(exc, concurrent.futures.BrokenExecutor) or came_too_late(exc)


def came_too_late(exc: BaseException) -> bool:
    """Whether it only says that its work came too late for this interpreter."""
    if isinstance(exc, concurrent.futures.CancelledError):
        return True
    return isinstance(exc, RuntimeError) and "after interpreter shutdown" in str(exc)


def rebuild(cls: type[Unfuture[Any]] | None, status: int, outcome: Any) -> Unfuture[Any]:
    """What a pickled Unfuture names: makes the same finished one, on whichever core is in use."""
    from unsync import Unfuture

    unfuture = (cls or Unfuture).__new__(cls or Unfuture)
    unfuture._complete(status, outcome)
    return unfuture


# A thread that waits looks this often, in seconds, whether it will be woken: whether the ambient
# loop has heard of what was left for it; in a pool where no other thread is at work, whether that
# will change.
LOOK_AGAIN_SECONDS = 1.0
# How often a thread's start is tried that is interrupted.
START_ATTEMPTS = 3
# A loop that has been woken and does not come for so long, in seconds, is woken again: it may be
# busy, or the wakeup was lost.
WAKE_AGAIN_SECONDS = 0.1


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
    apart.add(call)
    try:
        found: bool = call.result(LOOK_AGAIN_SECONDS)
    except (TimeoutError, concurrent.futures.CancelledError):
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


def take(token: deque[None]) -> bool:
    """Whether it was there: one of all who ask has it, in whatever thread, and without a lock."""
    try:
        token.pop()
    except IndexError:
        return False
    return True


def take_out(line: MutableSequence[T], thing: T) -> bool:
    """Whether it stood there: one of all who ask has it, as with `take`."""
    try:
        line.remove(thing)
    except ValueError:
        return False
    return True


class Waiters:
    """Who waits for an Unfuture in concurrent.futures.wait() or as_completed(), if anybody does.

    Those take the `_condition` of each future, look at its `_state`, put into its `_waiters` who is
    to be told, and let go; for them nothing may change in between. A lock would hold up whoever
    finishes the future: for ever, if a Ctrl-C strikes while they take one after the other, or if a
    signal handler waits in there for a call of the thread that is held up. So there is none. Who
    has taken it sees the state of that moment until he lets go; and is told at once if what he
    enlists for has ended since.

    :param pool_wait: what a thread of a pool must be in while it waits.
    """

    __slots__ = ("_looks", "_told", "enlisted")

    def __init__(self, pool_wait: PoolWait) -> None:
        # All threads change these by operations that are atomic: who is to be told; and who has
        # been, or need not be, with a mark of the thread that has it in hand.
        self.enlisted: list[Any] = WaiterList(pool_wait)
        self._told: dict[Any, object] = {}
        # Of each thread the frames in which it has taken the condition, each within the one before,
        # and the status that it sees there. Nobody else touches what is that thread's.
        self._looks: dict[int, list[tuple[FrameType, int]]] = {}

    def look(self, frame: FrameType, status: int) -> None:
        """This thread sees that status as long as it is in `frame`, or until `look_away`."""
        if status == CANCELLED:
            # No executor will come to say so, and concurrent.futures would wait for that.
            status = CANCELLED_AND_NOTIFIED
        thread = threading.get_ident()
        looks = self._looks.get(thread)
        if looks:
            self.seen()  # which forgets what an interrupt has left
            looks.append((frame, status))
        else:
            self._looks[thread] = [(frame, status)]

    def look_away(self) -> None:
        thread = threading.get_ident()
        looks = self._looks.get(thread)
        if looks and len(looks) > 1:
            looks.pop()
        else:
            self._looks.pop(thread, None)

    def seen(self) -> int | None:
        """The status that this thread sees; None: whatever it is."""
        if not self._looks:
            return None
        looks = self._looks.get(threading.get_ident())
        while looks:
            frame, status = looks[-1]
            if _is_within(frame):
                return status
            del looks[-1]
        return None

    def enlist(self, waiter: Any, unfuture: Unfuture[Any]) -> None:
        seen = self.seen()
        status = unfuture._peek()[0]
        if (status if seen is None else seen) >= CANCELLED:
            self._told[waiter] = None
        self.enlisted.append(waiter)
        status = unfuture._peek()[0]
        if status >= CANCELLED and (raised := self.tell(unfuture, status)) is not None:
            raise raised

    def strike_off(self, waiter: Any) -> None:
        """:raises ValueError: if it is not there."""
        self.enlisted.remove(waiter)
        self._told.pop(waiter, None)

    def tell(self, unfuture: Unfuture[Any], status: int) -> BaseException | None:
        """Tells everybody who has not been told yet; its end shows already.

        Returns what was raised meanwhile, by a Ctrl-C say.
        """
        raised: BaseException | None = None
        for waiter in list(self.enlisted):
            mark = object()
            try:
                if self._told.setdefault(waiter, mark) is mark:
                    _tell(waiter, unfuture, status)
            except BaseException as exc:
                raised = exc
                if self._told.get(waiter) is mark:
                    if unfuture in getattr(waiter, "finished_futures", ()):
                        waiter.event.set()
                    else:
                        _tell(waiter, unfuture, status)
        return raised


def _is_within(frame: FrameType) -> bool:
    """Whether this thread is in that frame."""
    within: FrameType | None = sys._getframe()
    while within is not None and within is not frame:
        within = within.f_back
    return within is not None


class Enlisting:
    """What an Unfuture has for `_condition` and `_waiters`: see `Waiters`."""

    __slots__ = ("_side", "_unfuture")

    def __init__(self, unfuture: Unfuture[Any], side: Waiters) -> None:
        self._unfuture = unfuture
        self._side = side

    def acquire(self) -> bool:
        """For who calls this in the `__enter__` of a context manager."""
        frame = sys._getframe(1)
        self._side.look(frame.f_back or frame, self._unfuture._peek()[0])
        return True

    def __enter__(self) -> bool:
        self._side.look(sys._getframe(1), self._unfuture._peek()[0])
        return True

    def release(self) -> None:
        self._side.look_away()

    def __exit__(self, *_: object) -> None:
        self._side.look_away()

    def append(self, waiter: Any) -> None:
        self._side.enlist(waiter, self._unfuture)

    def remove(self, waiter: Any) -> None:
        self._side.strike_off(waiter)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._side.enlisted)

    def __len__(self) -> int:
        return len(self._side.enlisted)


def _tell(waiter: Any, unfuture: Unfuture[Any], status: int) -> None:
    event = getattr(waiter, "event", None)
    if type(event) is ToldEvent:
        event.tell(waiter, unfuture, status)
    else:
        add_to(waiter, unfuture, status)


def add_to(waiter: Any, unfuture: Unfuture[Any], status: int) -> None:
    """Tells a waiter of the standard library, which takes a lock of its own."""
    if status == FINISHED:
        waiter.add_result(unfuture)
    elif status == FAILED:
        waiter.add_exception(unfuture)
    else:
        waiter.add_cancelled(unfuture)


class WaiterList(list[Any]):
    """The waiters; the event that one of them is going to wait for tells the thread's pool."""

    def __init__(self, pool_wait: PoolWait) -> None:
        self._pool_wait = pool_wait

    def append(self, waiter: Any) -> None:
        if type(getattr(waiter, "event", None)) is threading.Event and not waiter.event.is_set():
            waiter.event = self._pool_wait.event()
        super().append(waiter)


class Latch:
    """An event that is set once. A finalizer may set it while its own thread waits for it.

    `threading.Event` has a lock, which such a finalizer would wait for for ever. Here each waiter
    has a lock of its own: it enlists before it looks, and is released after the latch is set.
    """

    __slots__ = ("_is_set", "_waiters")

    def __init__(self) -> None:
        self._is_set = False
        self._waiters: list[_thread.LockType] = []

    def set(self) -> None:
        self._is_set = True
        while self._waiters:
            try:
                waiter = self._waiters.pop()
            except IndexError:
                return
            waiter.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is set, after at most so many seconds."""
        if not self._is_set and (timeout is None or timeout > 0):
            waiter = _thread.allocate_lock()
            waiter.acquire()
            self._waiters.append(waiter)
            if not self._is_set:
                waiter.acquire(True, -1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        return self._is_set


# How many makings of one thing a thread may be in at once. One signal handler or finalizer may come
# within another, but what comes this often is what making it sets off each time.
MAKINGS_WITHIN = 8


class Making:
    """Held while something is made on first use, by one thread at a time.

    But only until that one waits. The user's own factory may do so while it makes an executor or a
    loop, and so may a finalizer or a signal handler that comes in between: for a call, in another
    thread, which needs the same thing. So whoever waits steps aside before. Then the other thread
    makes one as well, and the first that is there counts.
    """

    # What the compiled core has in place: so its waits ask a C variable. To look into what belongs
    # to the thread took 2 % of the instructions of a call that is waited for.
    note: ClassVar[Callable[[int], object]] = int

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def acquire(self) -> None:
        """For a fork, which must not come while another thread is in the middle of it."""
        self._lock.acquire()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        # First: a handler may come between this and the next line, too.
        by_this_thread.makings.append(self)
        Making.note(1)
        try:
            self._lock.acquire()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.step_aside()
        Making.note(-1)
        by_this_thread.makings.remove(self)

    def step_aside(self) -> None:
        with suppress(RuntimeError):
            while True:
                self._lock.release()

    def depth(self) -> int:
        """How often this thread is within it: what is being made may need what is being made."""
        return by_this_thread.makings.count(self)

    def check_depth(self, what: str) -> None:
        """:raises RuntimeError: in the thread that is within it too often."""
        if self.depth() > MAKINGS_WITHIN:
            raise RuntimeError(
                f"{what} makes a call that needs what it is to make; for that it is called again, "
                "and so on without end. Let it make no such call, or only the first time"
            )


class _ByThisThread(threading.local):
    def __init__(self) -> None:
        self.makings: list[Making] = []


by_this_thread = _ByThisThread()


def let_others_make() -> None:
    """For a thread that is about to wait: others need not wait for what it is making."""
    for making in [*by_this_thread.makings]:
        making.step_aside()


class ToldEvent:
    """The event of a thread that waits in concurrent.futures: its pool is told.

    A `threading.Event` has a lock, and so has the waiter whose event this is. A signal handler of
    the thread that waits may come upon them held, and whoever ends an Unfuture would wait for the
    handler. So that one only leaves here what has ended, and the thread itself tells its waiter.
    """

    __slots__ = ("_bell", "_ended", "_is_set", "_pool_wait")

    def __init__(self, pool_wait: PoolWait) -> None:
        self._pool_wait = pool_wait
        self._is_set = False
        self._ended: deque[tuple[Any, Unfuture[Any], int]] = deque()
        # What the thread waits for; it looks at the above then.
        self._bell = threading.Lock()
        self._bell.acquire()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._ring()

    def tell(self, waiter: Any, unfuture: Unfuture[Any], status: int) -> None:
        """In any thread: has the one that waits tell its waiter."""
        self._ended.append((waiter, unfuture, status))
        self._ring()

    def _ring(self) -> None:
        with suppress(RuntimeError):  # somebody has rung already
            self._bell.release()

    def interrupt(self) -> None:
        self.set()

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        until = math.inf if timeout is None else monotonic() + timeout
        while not self._hear() and (left := until - monotonic()) > 0:
            # It begins to wait anew now and then, and looks whether the loop has to be woken again.
            with self._pool_wait(self):
                self._bell.acquire(timeout=min(left, LOOK_AGAIN_SECONDS))
        return self._hear()

    def _hear(self) -> bool:
        """Whether it is set, by what has ended, too."""
        while self._ended:
            add_to(*self._ended.popleft())
        return self._is_set


# A cancel scope of anyio cancels a task again in each turn of its loop, until the task has left it.
# It says so in these words, by which anyio itself tells its cancels from others. What such a task
# awaits is cancelled only once by each scope: it is not inside of the scope, so it could not shield
# its cleaning up from the next cancel, and httpx would never give a connection back to its pool. No
# other scope can have the same name meanwhile: an await that passes a cancel on ends with what it
# has cancelled, and the scope is around it.
_OF_A_SCOPE = ("Cancelled via cancel scope ", "Cancelled by cancel scope ")
# What tasks have heard from scopes. Each entry is its task's loop's own.
_heard: WeakKeyDictionary[asyncio.Future[Any], set[str]] = WeakKeyDictionary()


def is_of_a_scope(message: object) -> TypeGuard[str]:
    return isinstance(message, str) and message.startswith(_OF_A_SCOPE)


def has_heard(task: asyncio.Future[Any], message: object) -> bool:
    """In its loop: whether it has been told this by a scope before; from now on it has."""
    if not is_of_a_scope(message):
        return False
    heard = _heard.setdefault(task, set())
    before = message in heard
    heard.add(message)
    return before


def note_scope_of(failure: BaseException | None) -> None:
    """In a task: it learns by this failure of a scope that has cancelled somebody else."""
    task = asyncio.current_task()
    if task is not None and isinstance(failure, asyncio.CancelledError) and failure.args:
        has_heard(task, failure.args[0])


class CancelRequest:
    """One call of `cancel()`: the message, and whether what it asks to end has heard of it.

    Made anew by each who cancels, since each must know whether it was in time: who is told True and
    then sees an outcome that nothing heard its request before, has to raise CancelledError.

    `awaited` and `raised` belong to the thread that calls `cancel()`. `heard` is written by the
    thread that the future in question belongs to, before that can have an outcome, and read when
    there is one. `asked` goes from the one thread to the other with the request.

    :param crosses: whether it comes from a thread function that was itself cancelled from a loop,
        and so is as good as one from there.
    """

    __slots__ = ("asked", "awaited", "crosses", "heard", "message", "raised")

    def __init__(self, message: object, crosses: bool = False) -> None:
        self.message = message
        self.crosses = crosses
        # The one whose `cancel()` it is, until there is an answer.
        self.asked: Unfuture[Any] | None = None
        # Whether the answer comes later, from another thread or after a coroutine's first step.
        self.awaited = False
        # What the future's own `cancel()` answered.
        self.heard = False
        # What callbacks raised that goes on to who called `cancel()`.
        self.raised: BaseException | None = None

    def repeats(self, former: CancelRequest | None) -> bool:
        """Whether the same cancel scope has asked for the same thing before."""
        return former is not None and former.message == self.message and is_of_a_scope(self.message)

    def __call__(self, future: asyncio.Future[Any]) -> None:
        """In the thread that `future` belongs to."""
        if has_heard(future, self.message):
            self.heard = not future.done()
        else:
            self.heard = future.cancel(self.message)
        if not self.heard and future.done():
            # Who asked may be told of the end later, by callbacks that are on their way.
            future.get_loop().call_soon(self.came_too_late)
        else:
            self.asked = None

    def came_too_late(self) -> None:
        """What it asked to end had ended: as in asyncio, nobody wants to hear of a failure then."""
        asked, self.asked = self.asked, None
        if asked is not None:
            asked._overlook()

    def is_from_loop(self) -> bool:
        """Whether a function that runs in a thread, and cannot be stopped, is given up for it."""
        return self.crosses or running_loop() is not None

    def was_lost(self) -> bool:
        """When there is an outcome: whether that came without anybody having heard of this."""
        return self.awaited and not self.heard


class Mirror:
    """Keeps an Unfuture and the future of another kind that it wraps alike, both ways."""

    __slots__ = ("_future", "function")

    _future: Any
    # The name of the function behind the wrapped one, where it is known.
    function: str | None

    def attach(self) -> None:
        """Begins to mirror.

        :raises RuntimeError: if the future is pending and its loop is closed.
        """
        raise NotImplementedError

    def cancel(self, request: CancelRequest) -> bool:
        """Asks the wrapped future to cancel; False if neither it nor the Unfuture can any more."""
        raise NotImplementedError

    def running(self) -> bool:
        raise NotImplementedError

    def behind(self) -> Unfuture[Any] | None:
        """If it wraps a view: which Unfuture that shows."""
        return getattr(self._future, "_unfuture", None)

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

    __slots__ = ("_loop", "_target")

    _future: asyncio.Future[Any]

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

    def cancel(self, request: CancelRequest) -> bool:
        if running_loop() is self._loop:
            request(self._future)
            return request.heard
        request.awaited = True
        try:
            self._loop.call_soon_threadsafe(request, self._future)
        except RuntimeError:
            # The loop is closed: nobody else will.
            self._target._complete(CANCELLED, request.message)
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

    __slots__ = ("_target",)

    _future: concurrent.futures.Future[Any]

    def __init__(self, target: Unfuture[Any], future: concurrent.futures.Future[Any]) -> None:
        self.function = None
        self._target = target
        self._future = future

    def __repr__(self) -> str:
        return repr(self._future)

    def attach(self) -> None:
        self._future.add_done_callback(_CopyOutcome(self._target))

    def cancel(self, request: CancelRequest) -> bool:
        # A view asks its Unfuture, which answers later.
        by_request = getattr(self._future, "_request_cancel", None)
        if self._future.cancel() if by_request is None else by_request(request):
            return True
        if request.is_from_loop():
            self._target._complete(CANCELLED, request.message)  # as for any function that runs
        return self._target.cancelled()

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

    __slots__ = ("_context", "_target")

    def __init__(self, target: Unfuture[Any]) -> None:
        self._target: Unfuture[Any] | None = target
        self._context = copy_context()

    def __call__(self, future: concurrent.futures.Future[Any]) -> None:
        target, self._target = self._target, None
        assert target is not None
        if future.cancelled():
            target._complete(CANCELLED, None)
            return
        exc = future.exception()
        if exc is not None:
            target._fail_in(self._context, exc)
        else:
            target._complete(FINISHED, future.result())


def is_asyncio_future(value: object) -> bool:
    """`asyncio.isfuture`, which without the GIL must not look into one that another loop sets."""
    return isinstance(value, asyncio.Future) or asyncio.isfuture(value)


def mirror_of(target: Unfuture[Any], source: object) -> Mirror:
    """The mirror for what `Unfuture(source)` was given.

    :raises TypeError: if `source` is no future, or a view of `target` itself.
    """
    if getattr(source, "_unfuture", None) is target:
        raise circle_error()
    if is_asyncio_future(source):
        return AsyncioMirror(target, cast("asyncio.Future[Any]", source))
    if isinstance(source, concurrent.futures.Future):
        return ConcurrentMirror(target, source)
    raise TypeError(
        "Unfuture() takes nothing, an asyncio future or task, a concurrent future or a coroutine, "
        f"not {source!r}; for a value there is Unfuture.from_value()"
    )
