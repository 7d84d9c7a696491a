"""The ambient event loop and its thread: started on first use, wound up at shutdown."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from unsync._backend import Mailbox, set_home
from unsync._common import CANCELLED, DAEMONIC, logger, outcome_of_asyncio
from unsync._counts import Book

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

# What the thread may take, beyond the grace given to coroutines, to close its loop.
_CLOSING_SECONDS = 0.5
# How long a thread whose start was interrupted may take to show that it runs.
_STARTING_SECONDS = 0.2


class _AmbientLoop:
    """One loop in its thread, from its start to its end."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, book: Book, ended: Callable[[_AmbientLoop], None]
    ) -> None:
        self.loop = loop
        self._book = book
        self._ended = ended
        self.mailbox = Mailbox(loop)
        self.mailbox.open_bell()
        self.thread = threading.Thread(target=self._run, name="unsync", daemon=DAEMONIC)
        # Set by the thread as soon as it runs.
        self.begun = threading.Event()
        # These two are set before the loop is stopped, by whoever stops it first.
        self._until: float | None = None
        self._stopping = False
        # These belong to the thread.
        self._asked: set[asyncio.Task[object]] = set()
        self._wound_up = False
        self._all_ended = True

    def _run(self) -> None:
        self.begun.set()
        asyncio.set_event_loop(self.loop)
        self.mailbox.thread_id = threading.get_ident()
        try:
            while not self._stopping:
                self._survive(self.loop.run_forever)
            # Again, if a call came in the loop's last turn.
            while not self._wound_up or (self.mailbox.live and not self._time_is_up()):
                self._survive(self._run_wind_up)
        except Exception:
            logger.exception("the ambient event loop failed; the next call starts another")
        finally:
            self._ended(self)
            asyncio.set_event_loop(None)
            self._give_up()
            self.mailbox.close_bell()
            self.loop.close()
            self.mailbox.close()
            self._book.close(self.mailbox)

    @staticmethod
    def _survive(run: Callable[[], object]) -> None:
        # asyncio lets these two out of a task after storing them in it. They are for the caller,
        # who finds them in the Unfuture, not for this thread.
        with suppress(KeyboardInterrupt, SystemExit):
            run()

    def _run_wind_up(self) -> None:
        # A task of our own making: the user's task factory has no say in this.
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
            await asyncio.wait(tasks, timeout=self._until and max(0.0, self._until - monotonic()))
        await self.loop.shutdown_asyncgens()
        self._wound_up = True

    def _time_is_up(self) -> bool:
        return self._until is not None and monotonic() >= self._until

    def stop(self, timeout: float | None) -> bool:
        """Ends it, waiting up to `timeout` seconds; whether everything in it ended in time."""
        if not self._stopping:
            self._until = None if timeout is None else monotonic() + timeout
            self._stopping = True
            with suppress(RuntimeError):  # it is closed already
                self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(None if timeout is None else timeout + _CLOSING_SECONDS)
        if self.thread.is_alive():
            # A coroutine blocks the thread. Those who wait for it, or behind it, must not.
            self._give_up()
            self.mailbox.close()
            return False
        return self._all_ended

    def _give_up(self) -> None:
        """Ends the wait for coroutines that ignored their cancellation, or block the loop."""
        for starting in self.mailbox.starting:
            self._all_ended = False
            starting._complete(CANCELLED, "shutdown")
        for task, unfuture in list(self.mailbox.live.items()):
            if task.done():
                unfuture._complete(*outcome_of_asyncio(task))
            else:
                self._all_ended = False
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                unfuture._complete(CANCELLED, "shutdown")

    def disown(self) -> None:
        """In the child of a fork: what the parent's loop has to do is none of our business."""
        for task in self.mailbox.live:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.mailbox.close()


class Ambient:
    """Holds the ambient loop, if there is one, and how to make the next."""

    def __init__(self) -> None:
        # Guards `_current` and `_factory`; held over a fork.
        self.lock = threading.RLock()
        self.book = Book(7)
        self._current: _AmbientLoop | None = None
        self._factory: LoopFactory | None = None
        # What a parent process left: its loop must be neither used nor closed here.
        self._inherited: list[_AmbientLoop] = []
        set_home(None, self._start)

    def _start(self) -> Mailbox:
        return self._running().mailbox

    def _running(self) -> _AmbientLoop:
        with self.lock:
            current = self._current
            if current is not None:
                return current
            loop = (self._factory or asyncio.new_event_loop)()
            if not isinstance(loop, asyncio.AbstractEventLoop):
                raise TypeError(f"unsync.loop_factory must make an event loop, not {loop!r}")
            current = _AmbientLoop(loop, self.book, self._forget)
            self.book.open(current.mailbox)
            try:
                current.thread.start()
            except BaseException:
                # Ctrl-C, too, may end the wait for a thread that has started and goes on.
                if current.begun.wait(_STARTING_SECONDS):
                    self._use(current)
                else:
                    current.mailbox.close_bell()
                    loop.close()
                    self.book.close(current.mailbox)
                raise
            self._use(current)
            return current

    def _use(self, ambient: _AmbientLoop) -> None:
        self._current = ambient
        set_home(ambient.mailbox, self._start)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._running().loop

    @property
    def thread(self) -> threading.Thread:
        return self._running().thread

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

    def check_not_inside(self) -> None:
        """:raises RuntimeError: in the ambient thread, which cannot wait for its own end."""
        current = self._current
        if current is not None and current.thread is threading.current_thread():
            raise RuntimeError("unsync.shutdown() cannot be called in unsync.thread")

    def stop(self, timeout: float | None) -> bool:
        """Cancels what the loop runs, waits up to `timeout` seconds for it, and closes the loop.

        Returns whether everything ended in time.
        """
        current = self._current
        if current is None:
            return True
        ended = current.stop(timeout)
        self._forget(current)
        return ended

    def _forget(self, ambient: _AmbientLoop) -> None:
        """The next call starts another one."""
        with self.lock:
            if self._current is ambient:
                self._current = None
                set_home(None, self._start)

    def after_fork(self) -> None:
        """In the child: the thread stayed with the parent, and so did its loop's descriptors."""
        self.lock = threading.RLock()
        self.book = Book(7)
        inherited, self._current = self._current, None
        set_home(None, self._start)
        if inherited is not None:
            self._inherited.append(inherited)
            inherited.disown()
