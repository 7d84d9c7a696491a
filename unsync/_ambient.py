"""The ambient event loop and its thread: started on first use, wound up at shutdown."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from unsync._backend import Mailbox, Unfuture, set_home
from unsync._common import (
    CANCELLED,
    DAEMONIC,
    GREEN_BY,
    LOOK_AGAIN_SECONDS,
    PENDING,
    START_ATTEMPTS,
    Latch,
    Making,
    check_threads,
    logger,
    monotonic,
    outcome_of_asyncio,
    take,
)
from unsync._counts import Book

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

# What the thread may take, beyond the grace given to coroutines, to close its loop.
_CLOSING_SECONDS = 0.5


def _wake() -> None:
    """Has the loop look at what there is to do."""


@contextmanager
def _aside(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Where threads are greenlets: while the loop waits, it is not the running one.

    asyncio's running loop is that of the one thread that there is, and so of all greenlets. With
    this one step aside, others may have loops of their own, as by `asyncio.run()`.
    """
    selector = getattr(loop, "_selector", None)
    if GREEN_BY is None or selector is None:
        yield
        return
    select, other = selector.select, asyncio._get_running_loop()

    def select_aside(timeout: float | None = None) -> object:
        nonlocal other
        asyncio._set_running_loop(other)
        try:
            return select(timeout)
        finally:
            other = asyncio._get_running_loop()
            asyncio._set_running_loop(loop)

    selector.select = select_aside
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        selector.select = select
        asyncio._set_running_loop(other)


@contextmanager
def _asyncio_logs_nothing() -> Iterator[None]:
    """In this thread, which makes a loop while it makes one.

    asyncio logs which selector a new loop has. A log handler that makes a call, and for which this
    one is made, would be called for it as well, and so on without end.
    """
    me = threading.get_ident()

    def is_by_another(_: logging.LogRecord) -> bool:
        return threading.get_ident() != me

    log = logging.getLogger("asyncio")
    # As the last one: so no other thread, which logs just now, overlooks one when it is taken off.
    log.addFilter(is_by_another)
    try:
        yield
    finally:
        log.removeFilter(is_by_another)


class _AmbientLoop:
    """One loop in its thread, from its start to its end."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        book: Book,
        begins: Callable[[_AmbientLoop], None],
        ended: Callable[[_AmbientLoop], None],
    ) -> None:
        self.loop = loop
        self._book = book
        self._begins = begins
        self._ended = ended
        self.mailbox = Mailbox(loop)
        self.mailbox.open_bell()
        self.thread = self._new_thread()
        # Taken by the thread when it begins, or by whoever gives it up: it belongs to the first.
        self._to_begin: deque[None] = deque([None])
        # By which thread it is started; set when that is done; and when it has begun, or will not.
        self._starter: dict[str, int] = {}
        self._is_started = False
        self._settled = Latch()
        # These two are set before the loop is stopped, by whoever stops it first.
        self._until: float | None = None
        self._stopping = False
        # These belong to the thread.
        self._asked: set[asyncio.Task[object]] = set()
        self._wound_up = False
        # What did not end in time: written by who gives it up.
        self.given_up: list[Unfuture[Any]] = []

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="unsync", daemon=DAEMONIC)

    def start(self) -> None:
        """Starts the thread, unless it is started, or another thread is doing so.

        But if a finalizer or signal handler comes here while its own thread is doing so, it starts
        one as well, since it may wait for a call. The one that begins second ends at once.

        :raises BaseException: why none could be started; or a Ctrl-C that struck meanwhile, which
            keeps the thread from being started if it strikes again and again.
        """
        me = threading.get_ident()
        if self._is_started or not self._to_begin or self._starter.setdefault("", me) != me:
            return
        interrupt: BaseException | None = None
        for _ in range(START_ATTEMPTS):
            try:
                # Each time another one: this may be within the start of the one before.
                self._new_thread().start()
            except Exception:
                if self._give_up_start():
                    raise
            except BaseException as exc:
                interrupt = exc
                if self._to_begin:
                    continue  # whether it was started nobody knows
            self._is_started = True
            break
        else:
            self._give_up_start()
        if interrupt is not None:
            raise interrupt

    def wait_until_begun(self) -> None:
        """Or until it is given up."""
        self._settled.wait()

    def _give_up_start(self) -> bool:
        """Whether the thread has not begun, and now never will."""
        if not take(self._to_begin):
            return False
        self._ended(self)
        self._close()
        self._settled.set()
        return True

    def _run(self) -> None:
        if not take(self._to_begin):
            return
        self.thread = threading.current_thread()
        self._begins(self)
        self._settled.set()
        asyncio.set_event_loop(self.loop)
        self.mailbox.thread_id = threading.get_ident()
        try:
            while not self._stopping:
                self._survive(self._run_forever)
            # Again, if a call came in the loop's last turn.
            while not self._wound_up or (self.mailbox.live and not self._time_is_up()):
                self._survive(self._run_wind_up)
        except Exception:
            logger.exception("the ambient event loop failed; the next call starts another")
        finally:
            self._ended(self)
            asyncio.set_event_loop(None)
            self._give_up()
            self._close()

    def _close(self) -> None:
        self.mailbox.close_bell()
        try:
            self.loop.close()
        except ValueError:
            # It had signal handlers, which only the main thread can remove: see `stop`.
            if not self.loop.is_closed():
                raise
        self.mailbox.close()
        self._book.close(self.mailbox)

    @staticmethod
    def _survive(run: Callable[[], object]) -> None:
        # asyncio lets these two out of a task after storing them in it. They are for the caller,
        # who finds them in the Unfuture, not for this thread.
        with suppress(KeyboardInterrupt, SystemExit):
            run()

    def _run_forever(self) -> None:
        with _aside(self.loop):
            self.loop.run_forever()

    def _run_wind_up(self) -> None:
        # A task of our own making: the user's task factory has no say in this.
        with _aside(self.loop):
            self.loop.run_until_complete(asyncio.Task(self._wind_up(), loop=self.loop))

    async def _wind_up(self) -> None:
        """Cancels all tasks and waits for them, until the time is up."""
        me = asyncio.current_task()
        while tasks := asyncio.all_tasks() - {me}:
            for task in tasks - self._asked:
                task.cancel()
            self._asked |= tasks
            if self._time_is_up():
                break
            # In short waits: somebody may lose patience meanwhile.
            left = math.inf if self._until is None else max(0.0, self._until - monotonic())
            await asyncio.wait(tasks, timeout=min(left, LOOK_AGAIN_SECONDS))
        await self.loop.shutdown_asyncgens()
        self._wound_up = True

    def _time_is_up(self) -> bool:
        return self._until is not None and monotonic() >= self._until

    def begin_to_stop(self, until: float | None) -> None:
        """Has its thread cancel all tasks and wait for them; until then, if that is not None.

        What waits for its turn in the loop does not begin any more, but for what tasks call while
        they clean up.

        In the main thread the signal handlers that were added to the loop are removed first: they
        could not be later, and from now on a Ctrl-C is for whoever waits here.
        """
        if threading.current_thread() is threading.main_thread():
            with suppress(NotImplementedError, RuntimeError):
                for number in signal.valid_signals():
                    self.loop.remove_signal_handler(number)
        if not self._stopping:
            self._until = until
            self._stopping = True
            for unfuture in self.mailbox.waiting():
                unfuture._complete(CANCELLED, "shutdown", PENDING)
            with suppress(RuntimeError):  # it is closed already
                self.loop.call_soon_threadsafe(self.loop.stop)
        self._give_up_start()

    def hurry(self, until: float) -> None:
        """After `begin_to_stop`: no longer than until then."""
        self._until = until if self._until is None else min(until, self._until)

    def join(self, until: float | None) -> bool:
        """After `begin_to_stop`: whether its thread has ended, at that time at the latest."""
        self.wait_until_begun()
        while self.thread.is_alive():
            left = math.inf if until is None else until - monotonic()
            if left <= 0:
                return False
            self.thread.join(min(left, LOOK_AGAIN_SECONDS))
            with suppress(RuntimeError):
                self.loop.call_soon_threadsafe(_wake)  # if the first wakeup was lost
        return True

    def end(self, until: float | None) -> bool:
        """After `begin_to_stop`: the last of it; whether everything in it ended in time."""
        if not self.join(None if until is None else until + _CLOSING_SECONDS):
            # A coroutine blocks the thread. Those who wait for it, or behind it, must not.
            self._give_up()
            self.mailbox.close()
            return False
        return not self.given_up

    def _give_up(self) -> None:
        """Ends the wait for coroutines that ignored their cancellation, or block the loop."""
        for starting in self.mailbox.starting:
            self.given_up.append(starting)
            starting._complete(CANCELLED, "shutdown")
        for task, unfuture in list(self.mailbox.live.items()):
            if task.done():
                unfuture._complete(*outcome_of_asyncio(task))
            else:
                self.given_up.append(unfuture)
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                unfuture._complete(CANCELLED, "shutdown")

    def disown(self) -> None:
        """In the child of a fork: what the parent's loop has to do is none of our business."""
        take(self._to_begin)
        self.mailbox.after_fork()
        for task in self.mailbox.live:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.mailbox.close()


class Ambient:
    """Holds the ambient loop, if there is one, and how to make the next."""

    def __init__(self) -> None:
        # Guards `_holder` and `_factory`; held over a fork, and while a loop is made, but not while
        # its thread starts.
        self.lock = Making()
        self.book = Book(7)
        self._holder: dict[str, _AmbientLoop] = {}
        self._factory: LoopFactory | None = None
        # What a parent process left: its loop must be neither used nor closed here.
        self._inherited: list[_AmbientLoop] = []
        set_home(None, self._start)

    def _start(self) -> Mailbox:
        return self._running().mailbox

    def _running(self) -> _AmbientLoop:
        with self.lock:
            current = self._current
            if current is None:
                current = self._make()
        # Not under the lock: the new thread may want it before it runs, for a finalizer's call.
        current.start()
        return current

    def _make(self) -> _AmbientLoop:
        """The one that counts."""
        check_threads()
        self.lock.check_depth("unsync.loop_factory")
        with _asyncio_logs_nothing() if self.lock.depth() > 1 else nullcontext():
            loop = (self._factory or asyncio.new_event_loop)()
        if not isinstance(loop, asyncio.AbstractEventLoop):
            raise TypeError(f"unsync.loop_factory must make an event loop, not {loop!r}")
        # Others may have made one meanwhile: see `Making`. And the factory may know only one.
        current = self._current
        if current is None or current.loop is not loop:
            made = _AmbientLoop(loop, self.book, self._begins, self.forget)
            current = self._holder.setdefault("", made)
            if current is made:
                self.book.open(made.mailbox)
            else:
                made.mailbox.close_bell()
                loop.close()
        return current

    @property
    def _current(self) -> _AmbientLoop | None:
        return self._holder.get("")

    def _begins(self, ambient: _AmbientLoop) -> None:
        """In its thread: from now on a call finds it without asking here."""
        set_home(ambient.mailbox, self._start)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._running().loop

    @property
    def thread(self) -> threading.Thread:
        current = self._running()
        current.wait_until_begun()
        return current.thread

    @property
    def loop_factory(self) -> LoopFactory | None:
        return self._factory

    @loop_factory.setter
    def loop_factory(self, factory: LoopFactory | None) -> None:
        if factory is not None and not callable(factory):
            raise TypeError(f"unsync.loop_factory must be callable or None, not {factory!r}")
        with self.lock:
            if self._current is not None:
                raise RuntimeError(
                    "unsync.loop_factory was set after the ambient loop had started; set it before "
                    "the first call, or call unsync.shutdown() first"
                )
            self._factory = factory

    def check_not_inside(self, what: str) -> None:
        """:raises RuntimeError: in the ambient thread, which cannot wait for its own end."""
        current = self._current
        if current is not None and current.thread is threading.current_thread():
            raise RuntimeError(f"unsync.{what}() cannot be called in unsync.thread")

    def stop(self, timeout: float | None) -> bool:
        """Cancels what the loop runs, waits up to `timeout` seconds for it, and closes the loop.

        Returns whether everything ended in time.
        """
        until = None if timeout is None else monotonic() + timeout
        current = self.begin_to_stop(until)
        if current is None:
            return True
        ended = current.end(until)
        self.forget(current)
        return ended

    def begin_to_stop(self, until: float | None) -> _AmbientLoop | None:
        """The loop that is there, if there is one; the next call may still come to it."""
        current = self._current
        if current is not None:
            current.begin_to_stop(until)
        return current

    @property
    def mailbox(self) -> Mailbox | None:
        """Of the loop that runs, if one does."""
        current = self._current
        return None if current is None else current.mailbox

    def forget(self, ambient: _AmbientLoop) -> None:
        """The next call starts another one."""
        with self.lock:
            if self._current is ambient:
                # In this order: the next one can come only then.
                set_home(None, self._start)
                del self._holder[""]

    def after_fork(self) -> None:
        """In the child: the thread stayed with the parent, and so did its loop's descriptors."""
        self.lock = Making()
        self.book = Book(7)
        inherited = self._holder.pop("", None)
        set_home(None, self._start)
        if inherited is not None:
            self._inherited.append(inherited)
            inherited.disown()
