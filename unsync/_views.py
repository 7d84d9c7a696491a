"""Futures of the two classic kinds that show an Unfuture, for code that insists on their classes.

Made only when asked for. The Unfuture stays in charge: what is asked of a view is asked of it, and
its outcome is the view's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from unsync._core_py import Unfuture

T = TypeVar("T")

# The core's way to be told, in the thread that finishes it.
WhenDone = Callable[["Unfuture[Any]", Callable[["Unfuture[Any]"], object]], None]


class _AsyncioView(asyncio.Future[T]):
    """Belongs to one loop, as every asyncio future does."""

    def __init__(self, unfuture: Unfuture[T], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._unfuture = unfuture

    def cancel(self, msg: Any | None = None) -> bool:
        return self._unfuture.cancel(msg)

    def set_result(self, result: T, /) -> None:
        self._unfuture.set_result(result)

    def set_exception(self, exception: type | BaseException, /) -> None:
        self._unfuture.set_exception(exception)

    def tell(self, unfuture: Unfuture[T]) -> None:
        """Called by the thread that finished the Unfuture."""
        loop = self.get_loop()
        if asyncio._get_running_loop() is loop:
            self.follow()
            return
        try:
            loop.call_soon_threadsafe(self.follow)
        except RuntimeError:
            if not loop.is_closed():
                raise

    def follow(self) -> None:
        if self.done():
            return
        try:
            failure = self._unfuture.exception()
        except asyncio.CancelledError as cancelled:
            super().cancel(*cancelled.args[:1])
            return
        if failure is None:
            super().set_result(self._unfuture.result())
        else:
            super().set_exception(failure)


class _ConcurrentView(concurrent.futures.Future[T]):
    def __init__(self, unfuture: Unfuture[T]) -> None:
        super().__init__()
        self._unfuture = unfuture

    def cancel(self) -> bool:
        return self._unfuture.cancel()

    def running(self) -> bool:
        return self._unfuture.running()

    def set_running_or_notify_cancel(self) -> bool:
        return self._unfuture.set_running_or_notify_cancel()

    def set_result(self, result: T) -> None:
        self._unfuture.set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        self._unfuture.set_exception(exception)

    def follow(self, unfuture: Unfuture[T]) -> None:
        """Called by the thread that finished the Unfuture."""
        try:
            failure = unfuture.exception()
        except asyncio.CancelledError:  # where no loop runs it is concurrent.futures' as well
            super().cancel()
            super().set_running_or_notify_cancel()  # tells wait() and as_completed()
            return
        if failure is None:
            super().set_result(unfuture.result())
        else:
            super().set_exception(failure)


def asyncio_view(unfuture: Unfuture[T], when_done: WhenDone) -> asyncio.Future[T]:
    view = _AsyncioView(unfuture, unfuture.get_loop())
    when_done(unfuture, view.tell)
    return view


def concurrent_view(unfuture: Unfuture[T], when_done: WhenDone) -> concurrent.futures.Future[T]:
    view = _ConcurrentView(unfuture)
    when_done(unfuture, view.follow)
    return view
