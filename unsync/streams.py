"""Streams: what calls of marked generator functions give, to threads and to event loops alike.

A producer, in the ambient loop or in threads of the thread executor, runs the generator and leaves
its values for the consumer, a few ahead of it. While the consumer has enough it rests, and holds no
thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import suppress
from contextvars import copy_context
from itertools import repeat, starmap
from types import TracebackType
from typing import Any, ClassVar, Generic, NoReturn, TypeVar, cast, final

from unsync import _common
from unsync._backend import BIND_NOTHING, Launcher, Route, Unfuture, in_home_thread, when_done

__all__ = ["READ_AHEAD", "Stream", "in_ambient_loop", "in_threads"]

T = TypeVar("T")

# So many values wait for the consumer at most, unless `read_ahead` says otherwise.
READ_AHEAD = 64
# A loop whose consumer finds values all the time has a turn for others after so many seconds, when
# what was read ahead has been taken.
TURN_SECONDS = 0.005


class _Turn:
    """That a thread looks for more, and nobody else does meanwhile."""

    __slots__ = ("thread",)

    thread: int


class Channel(Generic[T]):
    """What brings the values of a stream, as its consumers see it.

    Not the `Stream` itself: who makes the values must not keep alive what its consumers have left.

    There is no lock, since whoever holds one may be interrupted by a signal handler that waits for
    others. What is shared is changed by single operations of a deque. Who brings something shows it
    first, and looks then who waits; a consumer enlists first, and looks then once more whether
    there is something.
    """

    def __init__(self) -> None:
        # In order. Consumers pop them without asking for anything else.
        self.taken: deque[T] = deque()
        # Consumers look for more one after the other: the first of these does. Nobody waits until
        # that one is ready. Who came meanwhile notes it, waits as if there were nothing, and is
        # woken to look again.
        self.turns: deque[_Turn] = deque()
        self.refused: deque[None] = deque()
        # Consumers that wait until there is something.
        self.waiters: deque[Unfuture[None]] = deque()
        # Since when consumers have kept the loop of each thread; that thread's own.
        self.kept: dict[int, float] = {}
        # Nobody wants more of it. Any thread sets it, once.
        self.closing = False
        # Where it was made: only there is somebody who makes values.
        self.process = _common.process

    def find(self) -> bool | None:
        """Whether there is something to take, which it puts there; None if nobody knows yet.

        One thread at a time is in here, but for its own signal handlers and finalizers.

        :raises BaseException: what ended the stream, once.
        """
        raise NotImplementedError

    def go_on(self) -> None:
        """Has more values made, if there is room for them."""
        raise NotImplementedError

    def stop(self) -> Unfuture[None]:
        """As `close()`, in the process where it was made."""
        raise NotImplementedError

    def stops_at_once(self) -> bool:
        """Whether closing it is no wait."""
        return True

    def name(self) -> str:
        """Of the function that was called, for errors."""
        raise NotImplementedError

    def take_returned(self) -> Any:
        """What the generator returned that made the values, if one did; once."""
        return None

    # For consumers.

    def close(self) -> Unfuture[None]:
        """Nobody wants more of it; done when what made the values has ended.

        In a forked child that is the parent's concern: the child must touch nothing of it, since
        threads of the parent may have been at it.
        """
        if self.process == _common.process:
            return self.stop()
        self.closing = True
        self.taken.clear()
        return Unfuture.from_value(None)

    def refill(self) -> Unfuture[None] | bool:
        """Whether there is something to take; an Unfuture if nobody knows before that is done.

        :raises BaseException: what ended the stream, once.
        :raises RuntimeError: in a forked child, unless it was closed.
        """
        if self.process != _common.process:
            if self.closing:
                return False
            raise _common.orphan_error("stream")
        found = self.look()
        self.go_on()
        if found is not None:
            return found
        waiter: Unfuture[None] = Unfuture()
        try:
            self.waiters.append(waiter)
            found = self.look()
            self.go_on()
        except BaseException:
            self.leave(waiter)
            raise
        # Who brought it may have seen nobody; or has woken this one.
        return waiter if found is None or not _common.take_out(self.waiters, waiter) else found

    def look(self) -> bool | None:
        """What `find()` answers; None, too, if another thread is in there: it says when it is not.

        A handler of that very thread goes in, lest it wait for itself.
        """
        while True:
            mine, found = self.look_in_turn()
            if mine:
                return found
            self.refused.append(None)
            if self.turns:
                return None

    def look_in_turn(self) -> tuple[bool, bool | None]:
        """Whether it was this thread's turn, and what it has found then."""
        turn, mine = _Turn(), False
        turn.thread = threading.get_ident()
        try:
            try:
                # Nothing can interrupt these steps so that it stays in the line.
                self.turns.append(turn)
                mine = self.turns[0].thread == turn.thread
                return mine, self.find() if mine else None
            finally:
                self.turns.remove(turn)
        finally:
            if mine and self.refused:
                self.refused.clear()
                self.wake_all()

    def keeps_loop(self) -> bool:
        """For a consumer in a loop that need not wait: whether others are to have a turn.

        Where the producer keeps up, which has a thread of its own, the loop would come to nothing
        else until the end of the stream: no timeout would strike, and no other request be served.
        After each refill it would be a fifth of what a value takes; by the clock it is nothing.
        """
        now, thread = _common.monotonic(), threading.get_ident()
        if now - self.kept.setdefault(thread, now) < TURN_SECONDS:
            return False
        self.kept[thread] = now
        return True

    def has_more(self) -> bool:
        """In a thread: waits until that is known; others may take it first.

        Who is interrupted meanwhile, by Ctrl-C say, closes it, as a generator would have ended: the
        traceback may be kept, and refers to the stream, which would have its work go on.

        :raises BaseException: as `refill()`.
        :raises InvalidStateError: in `unsync.thread`, whether it would have to wait or not: that
            is a matter of time.
        """
        if in_home_thread():
            raise _common.InvalidStateError(
                f"'for' or next() on the stream of {self.name()}() in unsync.thread would block "
                "the ambient event loop; use 'async for' instead, or anext()"
            )
        try:
            return self.wait_for_more()
        except (KeyboardInterrupt, SystemExit):
            self.close()
            raise

    def wait_for_more(self) -> bool:
        while isinstance(found := self.refill(), Unfuture):
            self.wait_for(found, None)
        return found

    def wait_for(self, waiter: Unfuture[None], timeout: float | None) -> None:
        """In a thread: blocks until somebody wakes it, for `timeout` seconds at most."""
        try:
            waiter.result(timeout)
        except BaseException:
            self.leave(waiter)
            raise

    def wake(self, waiter: Unfuture[None] | None) -> None:
        """Wakes that consumer, or the next one if it has stopped waiting."""
        while waiter is not None and not _wake(waiter):
            waiter = self.next_waiter()

    def wake_all(self) -> None:
        """Has all consumers that wait look again."""
        while (waiter := self.next_waiter()) is not None:
            _wake(waiter)

    def next_waiter(self) -> Unfuture[None] | None:
        """Who takes it out wakes it."""
        try:
            return self.waiters.popleft()
        except IndexError:
            return None

    def leave(self, waiter: Unfuture[None]) -> None:
        """That consumer stops waiting: if it was woken meanwhile, another one must be."""
        if not _common.take_out(self.waiters, waiter) and not waiter.cancelled():
            self.wake(self.next_waiter())


class _Generated(Channel[T]):
    """What a generator yields, which a producer runs somewhere else."""

    def __init__(self, read_ahead: int) -> None:
        super().__init__()
        # What was made moves to what is taken when there is nothing left in that, all at once: so
        # the producer rests, and is told to go on, once for many values.
        self.made: deque[T] = deque()
        self.room = (read_ahead + 1) // 2
        # Nobody runs the generator until resume() is called. The producer clears it when it goes
        # on: a Ctrl-C may keep whoever saw it from calling.
        self.resting = False
        self.told_to_close = False  # whether the producer knows by now, or will see
        # Taken by who says that it has ended.
        self.to_end: deque[None] = deque([None])
        # How the generator ended; its failure is told to one consumer, in its turn. And that it
        # has: to ask an Unfuture of the plain core took 4 % of what a value takes. Written after
        # the former, and after `closed`.
        self.ended: Unfuture[None] = Unfuture()
        self.has_ended = False
        # What it returned, if it did; and that, too, one consumer is told.
        self.returned: deque[Any] = deque()
        # How the closing of a generator that was left early ended.
        self.closed: Unfuture[None] = Unfuture()

    def resume(self) -> None:
        """Has the generator run on, or closed if that is asked for; twice does no harm."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """Tells a producer that is at work to close; it sees for itself at the next value."""

    # For the producer.

    def put(self, value: T) -> bool:
        """Leaves a value; whether there is room for another one, and somebody who wants it."""
        self.made.append(value)
        if self.closing:
            self.made.clear()  # if it was closed before it came
            return False
        if self.waiters:
            self.wake(self.next_waiter())
        return len(self.made) < self.room

    def rest(self) -> bool:
        """Whether the producer is to stop until resume() is called.

        A consumer that takes what was made looks afterwards whether it rests, and one that closes.
        """
        self.resting = True
        if self.is_to_go_on():
            self.resting = False
        return self.resting

    def is_to_go_on(self) -> bool:
        """Whether the generator is to be run, for a value more, or to be closed."""
        return self.closing or len(self.made) < self.room

    def finish(self, failure: BaseException | None) -> None:
        """The generator has ended, or nobody is left to run it."""
        if not _common.take(self.to_end):
            return
        closing = self.closing
        if closing and isinstance(failure, asyncio.CancelledError):
            failure = None  # that is how it was interrupted
        # Nobody waits for this one: it only keeps the failure, and reports it if need be.
        settle(self.ended, None if closing else failure)
        if self.closing and not closing:
            self.ended = Unfuture.from_value(None)  # as `stop` does, which may have missed it
        settle(self.closed, failure if closing else None)
        self.has_ended = True
        self.wake_all()

    def is_over(self, producer: Unfuture[None]) -> None:
        """The last to hear of a producer: one that never ran cannot have said that it ended."""
        if producer.cancelled():
            self.finish(asyncio.CancelledError())
        elif (failure := producer.exception()) is not None:
            self.finish(failure)

    # For consumers.

    def find(self) -> bool | None:
        if self.taken:
            return True
        has_ended = self.has_ended  # what it made is there, then
        with suppress(IndexError):  # of a closing that came in between
            self.taken.extend(starmap(self.made.popleft, repeat((), len(self.made))))
        if self.closing:
            self.taken.clear()  # as `put`
        if self.taken:
            return True
        if not has_ended:
            return None
        # Told once; and the failure's traceback is going to refer to this channel.
        ended, self.ended = self.ended, Unfuture.from_value(None)
        try:
            ended.result()
        finally:
            del ended
        return False

    def go_on(self) -> None:
        if self.resting:
            self.resume()

    def take_returned(self) -> Any:
        try:
            return None if self.closing else self.returned.popleft()
        except IndexError:
            return None

    def stops_at_once(self) -> bool:
        return self.has_ended or self.process != _common.process

    def stop(self) -> Unfuture[None]:
        """Has the generator closed where it runs; done when that is done."""
        self.closing = True
        self.made.clear()
        self.taken.clear()
        if self.ended.done():
            # What it failed with was to be told after values that nobody wants any more.
            self.ended = Unfuture.from_value(None)
            return self.closed
        if self.told_to_close:
            return self.closed
        if self.resting:
            self.resume()
        else:
            self.interrupt()
        # Only here: a Ctrl-C may strike before, and the next one who closes must tell it.
        self.told_to_close = True
        return self.closed


@final
class _InThreads(_Generated[T]):
    """Runs a regular generator in jobs, one after the other, each until there is enough."""

    # Those that have not ended, as a loop keeps its tasks. Otherwise the garbage collector could
    # find a stream and its generator in one run: and would close it in its own thread, while the
    # stream has a job close it.
    all: ClassVar[set[_InThreads[Any]]] = set()

    def __init__(
        self,
        generator: Generator[T, Any, Any],
        read_ahead: int,
        launch: Callable[[_InThreads[T]], Unfuture[None]],
    ) -> None:
        super().__init__(read_ahead)
        self.generator = generator
        self.launch = launch
        # One for all jobs, so that a variable that the generator sets stays set.
        self.context = copy_context()
        # How often it came to rest, written by the job that does; and for which of these rests a
        # job was sent.
        self.rests = 0
        self.sent = -1
        # A job takes it when it begins, and puts it back for the next one: where a Ctrl-C left it
        # open whether there is a job, another is sent, and one of the two works.
        self.turn: deque[None] = deque([None])
        self.all.add(self)
        self.resting = True
        try:
            self.resume()
        except BaseException:
            self.close()
            raise

    def name(self) -> str:
        return _common.name_of(self.generator)

    def __reduce__(self) -> NoReturn:
        # Nobody asks a callable for its executor before the first call.
        raise TypeError(
            f"the generator function {_common.name_of(self.generator)} cannot run in a process: a "
            "generator cannot travel; make it a function that returns a list, or let executor= "
            "give threads"
        )

    def finish(self, failure: BaseException | None) -> None:
        self.all.discard(self)
        super().finish(failure)

    def resume(self) -> None:
        rests = self.rests
        if self.sent == rests:
            return  # it is on its way
        try:
            job = self.launch(self)
            self.sent = rests
        except Exception as exc:
            self.finish(exc)  # the executor takes no work
        else:
            when_done(job, self.is_over)

    def work(self) -> None:
        # What the generator calls descends from this job, not from who made the stream.
        call = _common.nested_in.get()
        if call is not None:
            self.context.run(_common.nested_in.set, call)
        # One that was sent for an earlier rest may have its turn after a later one.
        while self.takes_its_turn() and (not self.is_to_go_on() or self.context.run(self.fill)):
            # The next job may be sent, and begin, before this one has ended.
            self.rests += 1
            self.turn.append(None)
            if self.rest():
                return

    def takes_its_turn(self) -> bool:
        taken = _common.take(self.turn)
        if taken:
            self.resting = False
        return taken

    def fill(self) -> bool:
        """Whether the generator has not come to its end."""
        try:
            if self.closing:
                self.generator.close()
            else:
                advance = self.generator.__next__  # a `for` would lose what is returned
                while self.put(advance()):
                    pass
                return True
        except StopIteration as end:
            if end.value is not None:
                self.returned.append(end.value)
            self.finish(None)
        except BaseException as exc:
            self.finish(_common.without_this_frame(exc))
        else:
            self.finish(None)
        return False


@final
class _InAmbientLoop(_Generated[T]):
    """Runs an async generator in one task, so that timeouts and task groups within it work."""

    def __init__(self, generator: AsyncGenerator[T, Any], read_ahead: int) -> None:
        super().__init__(read_ahead)
        self.generator = generator
        self.wakeup: Unfuture[None] | None = None
        self.ending = False  # belongs to the ambient loop's thread
        work: Any = self.work()
        # Which becomes the task's name.
        work.__qualname__ = getattr(generator, "__qualname__", type(generator).__name__)
        self.producer = Unfuture(work)
        _common.apart.add(self.producer)
        when_done(self.producer, self.is_over)

    def name(self) -> str:
        return _common.name_of(self.generator)

    async def work(self) -> None:
        try:
            try:
                async for value in self.generator:
                    while not self.put(value):
                        cancelled = await self.wait_for_room()
                        if cancelled is None or self.closing:
                            break
                        # It reaches the body at its `yield`, as one that comes while the body is at
                        # work reaches it at its `await`: a timeout there must strike, however slow
                        # the consumer is.
                        value = await self.generator.athrow(cancelled)
                    if self.closing:
                        break
            except StopAsyncIteration:
                pass  # that is how the body ended when it was told
            finally:
                cancelled = None  # whose traceback leads to this frame
                self.ending = True
                await self.generator.aclose()
        except BaseException as exc:
            self.finish(_common.without_this_frame(exc))
        else:
            self.finish(None)

    async def wait_for_room(self) -> asyncio.CancelledError | None:
        """Rests until there is room; returns what the task was cancelled by, if it was."""
        while True:
            self.wakeup = Unfuture()
            if not self.rest():
                return None
            try:
                await self.wakeup
            except asyncio.CancelledError as cancelled:
                return cancelled
            finally:
                # Nobody has cleared it if this task was cancelled, or woken by one who was late and
                # meant an earlier rest.
                self.resting = False
            if self.is_to_go_on():
                return None

    def resume(self) -> None:
        assert self.wakeup is not None
        _wake(self.wakeup)

    def interrupt(self) -> None:
        Unfuture(self.cancel())

    async def cancel(self) -> None:
        if not self.ending:
            self.producer.cancel()


def _wake(waiter: Unfuture[None]) -> bool:
    """Whether it still waited."""
    try:
        waiter.set_result(None)
    except asyncio.InvalidStateError:
        return False
    return True


def settle(outcome: Unfuture[None], failure: BaseException | None) -> None:
    """Gives it its outcome, unless who waited for it was cancelled, and it with them."""
    try:
        if failure is None:
            outcome.set_result(None)
        elif isinstance(failure, asyncio.CancelledError):
            outcome.cancel(*failure.args[:1])
        else:
            outcome.set_exception(failure)
    except asyncio.InvalidStateError:
        if failure is not None:
            _common.logger.error(
                "a stream failed while it was closed, and nobody waits for that any more",
                exc_info=failure,
            )


@final
class Stream(Generic[T]):
    """The values of a generator that runs elsewhere: `for` in a thread, `async for` in any loop.

    In `unsync.thread`, where marked coroutines run, `for` is always an `InvalidStateError`.

    Calling a generator function marked with `@unsync` gives one, and starts the generator at once:
    an async generator in the ambient loop, a regular one in the thread executor, in which one
    thread after the other may take its turns. Up to `read_ahead` values are made before somebody
    asks for them; then the generator rests until there is room.

    Each value goes to one consumer, if there are several, in any threads and loops. What the
    generator raises is raised in its turn, after the values before it, to one of them; for the
    others the stream just ends.

    A stream that is left early is closed as a generator is: when `close()` or `aclose()` is called,
    when a `with` or `async with` block is left, when a thread that waits for a value is interrupted
    (`KeyboardInterrupt`, `SystemExit`), or when nobody refers to it any more; a stream to which its
    own generator refers needs one of the former. The generator's `finally` blocks then
    run where the generator runs.

    After a fork the stream, and the generator, are the parent's. Who looks for a value of it in the
    child gets a `RuntimeError`; closing it there does nothing.
    """

    __slots__ = ("__weakref__", "_channel")

    def __init__(self, channel: Channel[T]) -> None:
        self._channel = channel

    def __iter__(self) -> Generator[T, None, Any]:
        """The values, as `next()` gives them: another iterator, since a generator is faster."""
        channel = self._channel
        take = channel.taken.popleft
        while True:
            try:
                while True:
                    yield take()
            except IndexError:
                pass
            if not channel.has_more():
                return channel.take_returned()

    def __next__(self) -> T:
        """Waits for the next value, in a thread.

        :raises StopIteration: at the end; its value, for the first who comes to the end, is what a
            regular generator returned.
        :raises InvalidStateError: in `unsync.thread`, which must use `async for` or `anext()`.
        """
        channel = self._channel
        while True:
            try:
                return channel.taken.popleft()
            except IndexError:
                pass
            if not channel.has_more():
                value = channel.take_returned()
                raise StopIteration if value is None else StopIteration(value)

    def __aiter__(self) -> Stream[T]:
        return self

    async def __anext__(self) -> T:
        channel = self._channel
        while True:
            try:
                return channel.taken.popleft()
            except IndexError:
                pass
            found = channel.refill()
            if found is False:
                raise StopAsyncIteration
            if found is True:
                if channel.keeps_loop():
                    await asyncio.sleep(0)
                continue
            try:
                await found
            except BaseException:
                channel.leave(found)
                raise
            channel.kept[threading.get_ident()] = _common.monotonic()

    def close(self) -> None:
        """Closes the generator, and waits until its `finally` blocks have run, in a thread.

        Values that nobody took are dropped. A coroutine of an async generator that waits is
        cancelled; a regular generator is closed when it comes to its next value. In a forked child
        a stream of the parent is only given up: there is no generator to be closed.

        :raises BaseException: what the generator raises while it is closed.
        :raises InvalidStateError: in `unsync.thread`, which must use `aclose()`, if the generator
            has not ended; it is closed nevertheless.
        """
        channel = self._channel
        # Asked before: a generator in a thread may end at any moment.
        waits = in_home_thread() and not channel.stops_at_once()
        closed = channel.close()
        if waits:
            raise _common.InvalidStateError(
                f"waiting in unsync.thread until the stream of {channel.name()}() is closed would "
                "block the ambient event loop; use 'await stream.aclose()' or 'async with' instead"
            )
        closed._wait(None, cancels=False)
        closed.result()

    async def aclose(self) -> None:
        """`close()` in any loop. Who is cancelled here leaves the closing to go on."""
        await asyncio.shield(self._channel.close())

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Stream[T]:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # The interpreter may have taken the module apart.
        if not getattr(_common, "exiting", True):
            self._channel.close()


Start = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Stream[Any]]


def in_ambient_loop(read_ahead: int) -> Start:
    """Starts streams of async generator functions."""

    def start(
        function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Stream[Any]:
        return Stream(_InAmbientLoop(function(*args, **kwargs), read_ahead))

    return start


def in_threads(read_ahead: int, route: Route) -> Start:
    """Starts streams of regular generator functions.

    :param route: where their jobs go.
    """
    launch = cast(
        "Callable[[_InThreads[Any]], Unfuture[None]]",
        Launcher(_InThreads.work, route, BIND_NOTHING),
    )

    def start(
        function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Stream[Any]:
        return Stream(_InThreads(function(*args, **kwargs), read_ahead, launch))

    return start
