"""Futures of the two classic kinds that show an Unfuture, for code that insists on their classes.

Made only when asked for, a new one each time: one that two tasks share would tell both of a cancel
that came too late for one of them. The Unfuture stays in charge: what is asked of a view is asked
of it, and its outcome is the view's. It holds a view only while somebody waits for that one.

It is set by the two functions at the end, and is no argument of `__init__`, which anybody can call
again, with the class itself, say: up to 3.13.0 CPython crashes where code that has called a method
of instances calls it of their class, without arguments (`str.split()`). A fuzz test came upon that.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from unsync import _common
from unsync._common import (
    CANCELLED,
    FAILED,
    FINISHED,
    CancelRequest,
    WaiterList,
    awaited_exception,
    logger,
    running_loop,
)

if TYPE_CHECKING:
    from contextvars import Context

    from unsync._common import PoolWait
    from unsync._core_py import Unfuture

T = TypeVar("T")

# The core's ways to be told, in the thread that finishes it: before whoever waits, and after. The
# first gives what `NoMore` takes out again.
WhenDone = Callable[["Unfuture[Any]", Callable[["Unfuture[Any]"], object]], object]
NoMore = Callable[["Unfuture[Any]", Any], None]

# For who finds that there has been a fork.
_fork_lock = threading.RLock()


def after_fork() -> None:
    """Run in the child."""
    global _fork_lock
    _fork_lock = threading.RLock()


class _Teller(weakref.ref[Any]):
    """What waits at the Unfuture for a view. It is taken out when the view goes.

    Who looks at a view now and then would else leave one there for each look. It holds nothing that
    leads to the Unfuture, but a view that somebody waits for.
    """

    __slots__ = ("_no_more", "_place", "_unfuture", "held")

    _no_more: NoMore
    _place: Any
    _unfuture: weakref.ref[Unfuture[Any]]
    held: object

    def attach(self, unfuture: Unfuture[Any], when_done: WhenDone, no_more: NoMore) -> None:
        self.held = None
        self._no_more = no_more
        self._unfuture = weakref.ref(unfuture)
        self._place = None
        self._place = when_done(unfuture, self)
        if unfuture.done():
            self._place = None  # which leads back to this one, and may have been left before that

    def __call__(self, unfuture: Unfuture[Any]) -> None:  # type: ignore[override]
        view = super().__call__()
        self.held = self._place = None
        if view is not None:
            view.tell(unfuture)

    def view_is_gone(self) -> None:
        """Called wherever the last one lets go of it."""
        place, self._place = self._place, None
        unfuture = self._unfuture()
        if place is not None and unfuture is not None:
            self._no_more(unfuture, place)


class _AsyncioView(asyncio.Future[T]):
    """Belongs to one loop, as every asyncio future does."""

    _unfuture: Unfuture[T]
    _in_worker: Callable[[], bool]
    _teller: _Teller | None = None
    # How many callbacks were added in a thread of a pool, whose loop waits by them.
    _waiting: int = 0
    # The last one whose answer comes later. They are answered in the order they were made, so if
    # this one was heard, so were those before it.
    _request: CancelRequest | None = None

    def cancel(self, msg: Any | None = None) -> bool:
        request = CancelRequest(msg)
        if request.repeats(self._request):
            return True
        answer = self._unfuture._request_cancel(request)
        if request.awaited:
            self._request = request
        return answer

    def set_result(self, result: T, /) -> None:
        self._unfuture.set_result(result)

    def set_exception(self, exception: type | BaseException, /) -> None:
        self._unfuture.set_exception(exception)

    # Looking at it is looking at the Unfuture, which is the one to report what nobody looked at.

    def result(self) -> T:
        self._look()
        return super().result()

    def exception(self) -> BaseException | None:
        self._look()
        return super().exception()

    def __await__(self) -> Generator[Any, None, T]:
        try:
            return (yield from super().__await__())
        finally:
            self._look()

    __iter__ = __await__

    def _look(self) -> None:
        if self.done():
            self._unfuture._get_snapshot()

    # A task of a loop that runs in a thread of a pool waits: that thread must be made up for.

    def add_done_callback(
        self, fn: Callable[[Any], object], /, *, context: Context | None = None
    ) -> None:
        super().add_done_callback(fn, context=context)
        if self.done():
            return
        if self._teller is not None:
            self._teller.held = self
        if self._in_worker():
            self._waiting += 1
            if self._waiting == 1:
                self._unfuture.add_done_callback(self._end_wait)

    def remove_done_callback(self, fn: Callable[[Any], object], /) -> int:
        removed = super().remove_done_callback(fn)
        if self._teller is not None and not self._callbacks:
            self._teller.held = None
        if self._waiting:
            self._waiting = max(self._waiting - removed, 0)
            if not self._waiting:
                self._unfuture.remove_done_callback(self._end_wait)
        return removed

    def _end_wait(self, unfuture: Unfuture[T]) -> None:
        """The Unfuture has told the pool."""

    def tell(self, unfuture: Unfuture[T]) -> None:
        """Called by the thread that finished the Unfuture."""
        loop = self.get_loop()
        if running_loop() is loop:
            self.follow()
            return
        try:
            loop.call_soon_threadsafe(self.follow)
        except RuntimeError:
            if not loop.is_closed():
                raise
        except BaseException:
            # A Ctrl-C, and nobody else would tell it. It follows once.
            loop.call_soon_threadsafe(self.follow)
            raise

    def follow(self) -> None:
        """Called in the loop's thread, or before anybody else has it."""
        if self.done():
            return
        status, outcome = self._unfuture._peek()
        if status < CANCELLED:
            return
        if self._teller is not None:
            self._teller.held = None
        if self._request is not None and self._request.was_lost():
            super().cancel(self._request.message)
        elif status == FINISHED:
            super().set_result(outcome)
        elif status == FAILED:
            super().set_exception(awaited_exception(outcome))
            super().exception()  # the Unfuture is the one to report it
        else:
            super().cancel(outcome)


class _ConcurrentView(concurrent.futures.Future[T]):
    _unfuture: Unfuture[T]
    _in_worker: Callable[[], bool]
    _waiters: list[Any]  # for wait() and as_completed()
    _pool_wait: PoolWait
    _when_told: WhenDone
    _teller: _Teller | None = None
    _process: int = 0  # it is in, as far as it knows
    # Whether it is held until it has called its callbacks. Who does has a mark in `__dict__`.
    _is_held: bool = False

    if not TYPE_CHECKING:
        # In `__dict__`, as in the parent. Whatever asks for its state takes this first.

        @property
        def _condition(self) -> threading.Condition:
            if self._process != _common.process:
                self._disown()
            return self.__dict__["_condition"]

        @_condition.setter
        def _condition(self, condition: threading.Condition) -> None:
            self.__dict__["_condition"] = condition

    def _disown(self) -> None:
        """In a forked child: what its Unfuture has become there; who waited is with the parent."""
        with _fork_lock:
            if self._process != _common.process:
                # A thread of the parent may have been in the middle of it.
                self._condition = threading.Condition()
                self._waiters = WaiterList(self._pool_wait)
                self._process = _common.process
        if self._unfuture.done():
            self.follow()

    def cancel(self) -> bool:
        return self._unfuture.cancel()

    def _request_cancel(self, request: CancelRequest) -> bool:
        return self._unfuture._request_cancel(request)

    def running(self) -> bool:
        return self._unfuture.running()

    def set_running_or_notify_cancel(self) -> bool:
        return self._unfuture.set_running_or_notify_cancel()

    def set_result(self, result: T) -> None:
        self._unfuture.set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        self._unfuture.set_exception(exception)

    # Waiting for it is waiting for the Unfuture, and looking at it looking at that one.

    def result(self, timeout: float | None = None) -> T:
        self._wait(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._wait(timeout)
        return super().exception(timeout)

    def _wait(self, timeout: float | None) -> None:
        unfuture = self._unfuture
        unfuture._wait(timeout)
        unfuture._get_snapshot()
        self.follow()

    def _get_snapshot(self) -> tuple[bool, bool, T | None, BaseException | None]:
        return self._unfuture._get_snapshot()

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        if not self._is_held and not self.done():
            # First: once it is done, `fn` is called there and then.
            self._when_told(self._unfuture, self.call_back)
            self._is_held = True
        super().add_done_callback(fn)
        # By asyncio.wrap_future(), say: a loop that runs in a thread of a pool waits by it.
        if not self.done() and self._in_worker() and running_loop() is not None:
            self._unfuture.add_done_callback(_end_wait)

    def tell(self, unfuture: Unfuture[T]) -> None:
        """Called by the thread that finished the Unfuture."""
        self.follow()

    def follow(self) -> None:
        """Called by who has come upon the Unfuture's end: the thread that finished it, others."""
        if self.done() and not self.cancelled():
            return
        status, outcome = self._unfuture._peek()
        if status < CANCELLED:
            return
        # Somebody else may be faster.
        with suppress(concurrent.futures.InvalidStateError):
            if status == FINISHED:
                super().set_result(outcome)
            elif status == FAILED:
                super().set_exception(outcome)
            else:
                super().cancel()
                with self._condition:
                    if self._state == "CANCELLED":
                        super().set_running_or_notify_cancel()  # tells wait() and as_completed()

    def _invoke_callbacks(self) -> None:
        """Not here, for what follows is bookkeeping: the callbacks' turn comes with the others'."""

    def call_back(self, _: object) -> None:
        """Called by the thread that finished the Unfuture, when all who wait have been told."""
        self.follow()
        if not self.done():
            return  # it is too early
        mark = object()
        if self.__dict__.setdefault("_caller", mark) is not mark:
            return  # two threads had it held
        raised: BaseException | None = None
        for callback in self._done_callbacks:  # type: ignore[attr-defined]
            try:
                callback(self)
            except Exception:
                logger.exception("exception calling callback for %r", self)
            except BaseException as exc:
                raised = raised or exc
        if raised is not None:
            raise raised


def _end_wait(unfuture: Unfuture[Any]) -> None:
    """The Unfuture has told the pool."""


def _follow_or_wait(
    view: _AsyncioView[T] | _ConcurrentView[T],
    when_done: WhenDone,
    no_more: NoMore,
) -> None:
    if view._unfuture.done():
        view.follow()  # here and now: nobody else has it yet
    else:
        view._teller = _Teller(view, _Teller.view_is_gone)
        view._teller.attach(view._unfuture, when_done, no_more)


def asyncio_view(
    unfuture: Unfuture[T],
    loop: asyncio.AbstractEventLoop,
    when_done: WhenDone,
    no_more: NoMore,
    in_worker: Callable[[], bool],
) -> asyncio.Future[T]:
    view: _AsyncioView[T] = _AsyncioView(loop=loop)
    view._unfuture = unfuture
    view._in_worker = in_worker
    _follow_or_wait(view, when_done, no_more)
    return view


def concurrent_view(
    unfuture: Unfuture[T],
    when_done: WhenDone,
    when_told: WhenDone,
    no_more: NoMore,
    in_worker: Callable[[], bool],
    pool_wait: PoolWait,
) -> concurrent.futures.Future[T]:
    view: _ConcurrentView[T] = _ConcurrentView()
    view._unfuture = unfuture
    view._in_worker = in_worker
    view._pool_wait = pool_wait
    view._when_told = when_told
    view._process = _common.process
    view._waiters = WaiterList(pool_wait)
    _follow_or_wait(view, when_done, no_more)
    return view
