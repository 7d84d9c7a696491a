"""Async context managers for threads and for every event loop: by `with` and by `async with`.

A host, one task of the ambient loop, enters the manager, waits for the body to be left, and leaves
the manager: so cancel scopes and timeouts, which belong to one task, work inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar, cast, final

from unsync import _common
from unsync._backend import Launcher, Unfuture, in_home_thread, when_done

__all__ = ["AmbientContextManager", "start"]

# From Python 3.13 on `uncancel()` takes back a cancel that the task has not heard of. Before, one
# that is requested again would strike after the timeout that it is of.
UNCANCEL_TAKES_BACK = sys.version_info >= (3, 13)

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class _Host(Generic[T]):
    """One entering and leaving of a manager."""

    def __init__(self, manager: AbstractAsyncContextManager[T, bool | None]) -> None:
        self.manager = manager
        self.entered: Unfuture[T] = Unfuture()
        # The body has been left, with that exception.
        self.left: Unfuture[BaseException | None] = Unfuture()
        # Somebody cancelled the body's task; belongs to that task until `left` is done.
        self.body_was_cancelled = False
        # The host was cancelled after the body was left, and before it could know that; belongs to
        # the host's task.
        self.cancelled_late = False
        # A cancel that the manager has not heard of when it was left; belongs to the host's task
        # until `ended` is done.
        self.unheard: asyncio.CancelledError | None = None
        work: Any = self.work()
        work.__qualname__ = _name_of(manager)  # which becomes the task's name
        try:
            self.ended: Unfuture[bool] = Unfuture(work)
        except BaseException:
            work.close()  # the ambient loop cannot be started
            raise
        _common.apart.add(self.ended)
        when_done(self.ended, self.is_over)

    def is_over(self, ended: Unfuture[bool]) -> None:
        """The last to hear of it: if it never ran, it cannot have told who wants to enter."""
        if not self.entered.done():
            self.entered.cancel()

    def interrupt(self) -> None:
        """Has the body end, where somebody can; called in the ambient loop."""

    async def work(self) -> bool:
        """Whether the manager suppressed what the body was left with."""
        kind = type(self.manager)
        failure: BaseException | None = None
        interruption: BaseException | None = None
        try:
            try:
                value = await kind.__aenter__(self.manager)
            except asyncio.CancelledError as exc:
                self.entered.cancel(*exc.args[:1])
                return False
            except BaseException as exc:
                if not _set(self.entered.set_exception, _common.without_this_frame(exc)):
                    raise
                return False
            if _set(self.entered.set_result, value):
                failure, interruption = await self.body()
            else:
                failure = interruption = asyncio.CancelledError()  # nobody waits for it any more
            del value
            _note_scopes_of(failure)
            if self.body_was_cancelled:
                await _count_as_cancelled()
            if interruption is not None and (_is_no_failure(failure) or self.cancelled_late):
                # The scope that cancelled this task looks for this one, or whoever leaves the body
                # was cancelled. As in asyncio it takes the place of a failure that is just on its
                # way.
                failure = interruption
            if failure is None:
                await kind.__aexit__(self.manager, None, None, None)
                return False
            suppressed = await kind.__aexit__(
                self.manager, type(failure), failure, failure.__traceback__
            )
            if not suppressed and failure is interruption:
                raise failure
            return bool(suppressed)
        finally:
            self.unheard = _pending_cancel(asyncio.current_task())
            # A failure's traceback leads to this frame, or to that of `__aenter__`, which in newer
            # Pythons refers to its caller's.
            del failure, interruption, self

    async def body(self) -> tuple[BaseException | None, BaseException | None]:
        """What the body was left with, and what cancelled this task meanwhile.

        The manager is left after the body, whatever happens: what it manages is in use there.
        """
        interruption = None
        while True:
            try:
                return await asyncio.shield(self.left), interruption
            except asyncio.CancelledError as cancelled:
                left = self.left.done()
                if left and _says_again(cancelled, self.left.result()):
                    continue
                if interruption is None:
                    interruption = cancelled
                    self.cancelled_late = left
                    self.interrupt()
                elif left and not _says_again(cancelled, interruption):
                    # Somebody else's, who cancelled who leaves the body: the manager is to hear of
                    # it after it has heard that the body was left with the first.
                    self.cancelled_late = True
                    _request_again(asyncio.current_task(), cancelled)
                    return self.left.result(), interruption
                if _common.exiting:
                    # No body is left that could end but those in daemonic threads, which may never
                    # do so.
                    _set(self.left.set_result, cancelled)

    def abort(self, cancelled: asyncio.CancelledError | None = None) -> None:
        """Who wanted to enter goes away, if by a cancel then by that one."""
        if cancelled is None:
            cancelled = asyncio.CancelledError()
        if self.entered.cancel():
            self.ended.cancel(*cancelled.args[:1])
        else:
            _set(self.left.set_result, cancelled)


@final
class _HostOfTask(_Host[T]):
    """The body runs in a task of another loop, and is cancelled with the host."""

    def __init__(self, manager: AbstractAsyncContextManager[T, bool | None]) -> None:
        self.loop = asyncio.get_running_loop()
        # These belong to that loop's thread.
        self.task = asyncio.current_task()
        self.requests = _requests(self.task)
        self.interrupted = False
        super().__init__(manager)

    def interrupt(self) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that is closed runs no body
            self.loop.call_soon_threadsafe(self.cancel_body)

    def cancel_body(self) -> None:
        if self.task is not None and not self.left.done():
            self.interrupted = True
            self.task.cancel()

    def is_cancelled(self) -> bool:
        """Whether somebody has cancelled the body's task since it began, and not the host alone."""
        return _requests(self.task) > self.requests + self.interrupted

    async def leave(self, failure: BaseException | None) -> bool:
        """As in asyncio the manager has the last word: a cancel that it heard is its business."""
        self.body_was_cancelled = self.is_cancelled()
        self.left.set_result(failure)
        left_with, failure = failure, None
        unheard: asyncio.CancelledError | None = None
        try:
            if self.interrupted:
                await self.hear_of_interruption()
            try:
                return await self.ended
            except asyncio.CancelledError as cancelled:
                failure = _failure_of(self.ended)
                if failure is None:
                    if self.is_cancelled():
                        if not cancelled.args and isinstance(left_with, asyncio.CancelledError):
                            return False  # so that one goes on, which may know why
                        if not _is_of_a_scope(cancelled):
                            # A scope that cancelled this task does so again in each turn, and
                            # knows its cancel by what it says.
                            await asyncio.sleep(0)
                    raise
                unheard = cancelled
            except BaseException as exc:
                failure = exc
                unheard = self.unheard
            if unheard is not None and self.is_cancelled() and not _is_of_a_scope(unheard):
                # Nobody has heard of it. A cancel scope would tell again anyway.
                if not UNCANCEL_TAKES_BACK:
                    unheard.__context__ = failure
                    raise unheard
                _request_again(self.task, unheard)
            raise failure
        finally:
            if self.interrupted:
                assert self.task is not None
                self.task.uncancel()
            del self, failure, left_with, unheard  # a failure's traceback leads to this frame

    async def hear_of_interruption(self) -> None:
        """If the body was left before it heard of it."""
        if _pending_cancel(self.task) is not None:
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError as cancelled:
                if self.is_cancelled():
                    _request_again(self.task, cancelled)  # in its next await


@final
class AmbientContextManager(Generic[T]):
    """An async context manager for threads and every loop: `with` here, `async with` there.

    Calling a function marked with `@unsync` and made by `contextlib.asynccontextmanager` gives one.
    Any other manager, that is an object with `__aenter__` and `__aexit__`, can be put into one:
    `with AmbientContextManager(lock): ...`.

    Both methods of the manager run in one task of the ambient loop, with the context variables of
    who entered. In the ambient loop itself `async with` is as if this class were not there.

    If that task is cancelled, by a timeout or a task group that the manager is inside of, the body
    is cancelled if it runs in a loop. A body in a thread cannot be stopped: the outcome of the
    cancelling is raised when it is left.

    It can be entered again once it has been left, if the manager can.

    As contextlib's own it is a decorator, too: each call of the function, which may be a coroutine
    function, is then such a block. One that a call of a marked function gave is made anew for each.

    :param manager: what to enter.
    :raises TypeError: if `manager` is no async context manager; if it is to decorate a function
        that is marked already.
    """

    __slots__ = ("__weakref__", "_free", "_hosts", "_make_again", "_manager")

    def __init__(self, manager: AbstractAsyncContextManager[T, bool | None]) -> None:
        kind = type(manager)
        if not (hasattr(kind, "__aenter__") and hasattr(kind, "__aexit__")):
            raise TypeError(
                "AmbientContextManager() takes an object with __aenter__ and __aexit__, not "
                f"{manager!r}"
            )
        self._manager = manager
        # For each call of a function that it decorates.
        self._make_again: Callable[[], AbstractAsyncContextManager[T, bool | None]] | None = None
        # Taken by who enters it, and put back by who has left it; and what was made meanwhile.
        self._free: deque[None] = deque([None])
        self._hosts: deque[_Host[T]] = deque()

    def __call__(self, func: F) -> F:
        function: Callable[..., Any] = func
        if isinstance(function, Launcher):
            raise TypeError(
                f"the block would be left before the calls of {function!r} have ended: let @unsync "
                "stand above the context manager"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def inside_of_coroutine(*args: Any, **kwargs: Any) -> Any:
                async with self._another():
                    return await function(*args, **kwargs)

            return cast("F", inside_of_coroutine)

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self._another():
                return function(*args, **kwargs)

        return cast("F", inside)

    def _another(self) -> AmbientContextManager[T]:
        make = self._make_again
        return AmbientContextManager(self._manager if make is None else make())

    def __repr__(self) -> str:
        return f"<AmbientContextManager of {self._manager!r}>"

    def __enter__(self) -> T:
        """Enters the manager, and waits until that is done, in a thread.

        :raises BaseException: what the manager raises.
        :raises RuntimeError: in `unsync.thread`, which must use `async with`; if it is entered
            already.
        """
        if in_home_thread():
            raise RuntimeError(
                f"'with {self!r}' in unsync.thread would block the ambient event loop for ever; "
                "use 'async with' instead"
            )
        host = self._begin(_Host)
        try:
            return host.entered.result()
        except BaseException:
            self._take()
            host.abort()
            with contextlib.suppress(asyncio.CancelledError):
                host.ended.result()
            raise
        finally:
            del host  # a failure's traceback leads to this frame

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        """Leaves the manager, and waits until that is done; whether it suppressed `exc`.

        :raises BaseException: what the manager raises.
        """
        host = self._take()
        host.left.set_result(exc)
        try:
            return host.ended.result()
        except asyncio.CancelledError:
            # If it is this thread's own call that was cancelled, the manager is being left.
            host.ended._wait(None)
            raise
        finally:
            del exc, host  # a failure's traceback leads to this frame

    async def __aenter__(self) -> T:
        """`__enter__` in any loop."""
        if in_home_thread():
            return await type(self._manager).__aenter__(self._manager)
        host = self._begin(_HostOfTask)
        try:
            return await host.entered
        except asyncio.CancelledError as cancelled:
            self._take()
            host.abort(cancelled)
            with contextlib.suppress(asyncio.CancelledError):
                await host.ended
            raise
        except BaseException:
            self._take()
            host.abort()
            await host.ended  # who is cancelled in here must hear of it
            raise
        finally:
            del host

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """`__exit__` in any loop."""
        if in_home_thread():
            return await type(self._manager).__aexit__(self._manager, kind, exc, traceback)
        host = self._take()
        assert isinstance(host, _HostOfTask)
        try:
            return await host.leave(exc)
        finally:
            del exc, host  # a failure's traceback leads to this frame

    def _begin(
        self, make: Callable[[AbstractAsyncContextManager[T, bool | None]], _Host[T]]
    ) -> _Host[T]:
        if not _common.take(self._free):
            raise RuntimeError(
                f"{self!r} is entered already; make one for each block that is to enter it"
            )
        try:
            host = make(self._manager)
            self._hosts.append(host)
        except BaseException:
            self._free.append(None)
            raise
        return host

    def _take(self) -> _Host[T]:
        try:
            host = self._hosts.popleft()
        except IndexError:
            raise RuntimeError(f"{self!r} was left before it was entered") from None
        self._free.append(None)
        return host


def _name_of(manager: object) -> str:
    # What asynccontextmanager makes knows its generator.
    named = getattr(manager, "gen", None)
    name = getattr(named, "__qualname__", None)
    return name if isinstance(name, str) else type(manager).__qualname__


def _requests(task: asyncio.Task[Any] | None) -> int:
    """How often the task has been asked to cancel."""
    return 0 if task is None else task.cancelling()


async def _count_as_cancelled() -> None:
    """Lets a timeout that this task leaves know that the cancelling is not its own, or not only."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)


def _pending_cancel(task: asyncio.Task[Any] | None) -> asyncio.CancelledError | None:
    """One that the task has not heard of; asked for in the task."""
    if not getattr(task, "_must_cancel", False):
        return None
    message = getattr(task, "_cancel_message", None)
    return asyncio.CancelledError() if message is None else asyncio.CancelledError(message)


def _request_again(task: asyncio.Task[Any] | None, cancelled: asyncio.CancelledError) -> None:
    """Has the task hear of a cancel in its next await; as asyncio's `TaskGroup` does."""
    assert task is not None
    task.uncancel()
    task.cancel(*cancelled.args[:1])


def _is_of_a_scope(cancelled: asyncio.CancelledError) -> bool:
    return bool(cancelled.args) and _common.is_of_a_scope(cancelled.args[0])


def _chain(failure: BaseException | None) -> Iterator[BaseException]:
    """The failure, and those during whose handling it was raised."""
    seen: set[int] = set()
    while failure is not None and id(failure) not in seen:
        seen.add(id(failure))
        yield failure
        failure = failure.__context__


def _note_scopes_of(failure: BaseException | None) -> None:
    """They go on cancelling who waits for the end of this task."""
    for each in _chain(failure):
        _common.note_scope_of(each)


def _says_again(cancelled: asyncio.CancelledError, failure: BaseException | None) -> bool:
    """Whether it is of a cancel scope of which that failure tells already."""
    return _is_of_a_scope(cancelled) and any(
        each.args == cancelled.args for each in _chain(failure)
    )


def _failure_of(ended: Unfuture[Any]) -> BaseException | None:
    """If it has one that is no cancel."""
    return None if not ended.done() or ended.cancelled() else ended.exception()


def _is_no_failure(failure: BaseException | None) -> bool:
    return failure is None or isinstance(failure, asyncio.CancelledError)


def _set(setter: Callable[[Any], None], value: object) -> bool:
    """Whether the Unfuture had no outcome."""
    try:
        setter(value)
    except asyncio.InvalidStateError:
        return False
    return True


def start(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AmbientContextManager[Any]:
    """What a call of a marked function gives."""
    made: AmbientContextManager[Any] = AmbientContextManager(function(*args, **kwargs))
    made._make_again = functools.partial(function, *args, **kwargs)
    return made
