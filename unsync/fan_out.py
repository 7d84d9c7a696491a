"""Fan-out: many calls of one function that go in chunks, one parcel and one wakeup for each.

A chunk is one job for its executor. There it is called, and makes its calls; or it is pickled, and
what comes back is the list of their outcomes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from contextvars import Context, copy_context
from itertools import chain, islice, repeat, starmap
from types import TracebackType
from typing import Any, TypeVar, cast, final

from unsync import _common, _travel, executors
from unsync._backend import (
    Batch,
    Route,
    Unfuture,
    are_all_of,
    call_each,
    fill_batches,
    when_done,
)
from unsync.streams import READ_AHEAD, Channel, Stream, settle

__all__ = ["Target", "make_calls", "stream_calls"]

T = TypeVar("T")

# What a chunk is to its executor: an Unfuture if that is ours, else its own future. An Unfuture of
# that one would be made, and told of its end, for nobody.
_Job = Unfuture[Any] | concurrent.futures.Future[Any]

# How many chunks each worker gets, where the number of calls is known: so that one whose calls take
# longer than the others' does not keep the rest waiting for long.
_SHARES = 4
# The largest chunk that nobody asked for. In one of so many small calls a call's share of what the
# chunk costs is less than what the call costs itself.
_MOST = 1024
# Where it is not known chunks grow up to this, from one call on.
_MOST_GROWN = 256

# Not less than so many calls of a stream are on their way in chunks, so that small ones, too, are
# launched several at a time: each time wakes the threads of the executor.
_READ_AHEAD = 4096

_PLAIN: frozenset[type] = frozenset(_travel._PLAIN)


class Target:
    """What is called, and how.

    :param function: the marked function, or what was made of it.
    :param below: what it marks, to be called with `args`, the arguments of the call, and `kwargs`.
    :param route: where chunks go; None where single calls cost as little.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        below: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        route: Route | None,
        workers: int,
    ) -> None:
        self.function = function
        self.below = below
        self.args = args
        self.kwargs = kwargs
        self.route = route
        self.workers = workers
        self.name = _common.name_of(below)
        # Whether an item is one argument, not a tuple of them: tuples cost time.
        self.bare = False
        self._outward: dict[bool, tuple[bool, Any, bytes | None]] = {}

    def read(self, iterables: tuple[Iterable[Any], ...]) -> Iterator[Any]:
        """The items: what the iterables have for each call."""
        self.bare = len(iterables) == 1 and not self.args and self.route is not None
        return iter(iterables[0]) if self.bare else zip(*iterables, strict=False)

    def arguments(self, items: list[Any]) -> list[tuple[Any, ...]]:
        """Of each call."""
        if self.bare:
            return list(zip(items, strict=False))
        return [(*self.args, *item) for item in items] if self.args else items

    def are_plain(self, items: list[Any]) -> bool:
        """Whether no argument can change, or be something that does not pickle."""
        values = items if self.bare else chain.from_iterable(items)
        return are_all_of(self.args, _PLAIN) and are_all_of(values, _PLAIN)

    def outward(self, imports_main: bool) -> tuple[bool, Any, bytes | None]:
        """How it goes to a process, found out once.

        Whether our main module is found there; what `_travel.reference_to` gives; and that as
        `_found` takes it, if it is a function that travels by reference or by value.

        :raises pickle.PicklingError: if the function cannot go to another process.
        """
        found = self._outward.get(imports_main)
        if found is None:
            has_our_main = _travel.has_our_main(imports_main)
            function = _travel.reference_to(self.below, has_our_main)
            packed = None
            if isinstance(function, _travel.Reference):
                packed = _travel._dumps(function)
            elif isinstance(function, _travel._Parcel):
                packed = _ByValue(function._pickled)
            found = has_our_main, function, packed
            self._outward[imports_main] = found
        return found


def make_calls(
    target: Target, iterables: tuple[Iterable[Any], ...], chunksize: int | None
) -> list[Unfuture[Any]]:
    """What `unsync.calls()` gives."""
    _check("calls", iterables, chunksize)
    # Everything is read before anything is called: it may raise.
    items = target.read(iterables)
    if target.route is None:
        return _call_each(target.function, [*items])
    if chunksize is None:
        read = [*items]
        chunksize = _share(len(read), target.workers)
        items = iter(read)
    chunks: list[_Followed] = []
    context = copy_context()
    while part := [*islice(items, chunksize)]:
        chunks.append(_Followed(target, part, context))
    shares: list[list[Unfuture[Any]]] = []
    # What a pool of processes takes out of its line at once: they begin while the rest is made.
    first = target.workers + 1
    try:
        for some in (chunks[:first], chunks[first:]):
            shares += fill_batches(some)
            for chunk in some:
                chunk.launch(target.route)
                chunk.follow()
    except BaseException:
        for chunk in chunks:
            chunk.drop()  # an interrupt: nobody will hear of these
        raise
    # It is made last, since the garbage collector looks at all that is in it.
    return [*chain.from_iterable(shares)]


def _call_each(function: Callable[..., Any], items: list[tuple[Any, ...]]) -> list[Unfuture[Any]]:
    made: list[Unfuture[Any]] = []
    try:
        for args in items:
            made.append(_call(function, args))  # noqa: PERF401
    except BaseException:
        for call in made:
            _drop(call)
        raise
    return made


def stream_calls(
    target: Target,
    iterables: tuple[Iterable[Any], ...],
    chunksize: int | None,
    in_order: bool,
    read_ahead: int | None,
) -> Stream[Any]:
    """What `unsync.map()` gives."""
    _check("map", iterables, chunksize)
    if read_ahead is not None and chunksize is not None and read_ahead < chunksize:
        raise ValueError(
            f"read_ahead must be at least chunksize, which is {chunksize!r}, not {read_ahead!r}"
        )
    in_flight = _SHARES * target.workers
    lengths = [len(each) for each in iterables if isinstance(each, Sized)]
    if target.route is None:
        most = 1
    elif chunksize is not None:
        most = chunksize
    else:
        most = _share(min(lengths), target.workers) if lengths else _MOST_GROWN
        if read_ahead is not None:
            most = max(1, min(most, read_ahead // in_flight))
    first = most if chunksize is not None or lengths else 1
    if read_ahead is None:
        read_ahead = max(READ_AHEAD if most == 1 else _READ_AHEAD, in_flight * most)
    items = target.read(iterables)
    outlet = _InOrder if in_order else _AsCompleted
    channel: _Outlet[Any] = outlet(target, items, first, most, read_ahead)
    channel.go_on()
    return Stream(channel)


def _check(what: str, iterables: tuple[Iterable[Any], ...], chunksize: object) -> None:
    if not iterables:
        raise TypeError(f"unsync.{what}() needs at least one iterable of arguments")
    if chunksize is None:
        return
    if not isinstance(chunksize, int):
        raise TypeError(f"chunksize must be a number of calls, or None, not {chunksize!r}")
    if chunksize < 1:
        raise ValueError(f"chunksize must be at least 1, not {chunksize!r}")


def _share(length: int, workers: int) -> int:
    return max(1, min(_MOST, -(-length // (workers * _SHARES))))


def _call(function: Callable[..., Any], args: tuple[Any, ...]) -> Unfuture[Any]:
    try:
        unfuture: Unfuture[Any] = function(*args)
    except Exception as exc:
        unfuture = Unfuture()
        unfuture.set_exception(exc)
    return unfuture


def _drop(call: _Job) -> None:
    """Cancels it if it has not begun; if it has, what comes of it is no news."""
    if not call.cancel() and isinstance(call, Unfuture):
        when_done(call, _look_away)


def _look_away(call: Unfuture[Any]) -> None:
    if not call.cancelled():
        call.exception()


def _failure(job: _Job, exc: BaseException) -> BaseException:
    """What a done one has failed with, if the caller caught this when it asked for its result."""
    if isinstance(exc, (asyncio.CancelledError, concurrent.futures.CancelledError)):
        return asyncio.CancelledError()
    if exc is not job.exception():
        raise exc  # an interrupt
    return _common.without_this_frame(exc)


class _Chunk(Batch):
    """Some calls as one job: called where its executor runs it, in this process or another."""

    __slots__ = ("__weakref__", "dropped", "followed", "in_pool", "target", "unsent")

    def __init__(self, target: Target, items: list[Any]) -> None:
        super().__init__(target.name, items)
        self.target = target
        self.dropped = False
        self.followed = False
        # Whether the executor, which is not ours, is a pool of threads or processes.
        self.in_pool = False
        # Why calls could not travel, by their places.
        self.unsent: dict[int, Exception] = {}

    @property
    def __name__(self) -> str:
        """Of its job, also in errors."""
        return self.name

    def launch(self, route: Route) -> None:
        try:
            self.job = route.send(self, (), {})
        except Exception as exc:
            # It cannot travel, or the executor takes no work.
            self.job = Unfuture()
            self.job.set_exception(exc)

    def follow(self) -> None:
        """Has `end` called by the thread that finishes the job; at once if it is done."""
        self.followed = True
        job = self.job
        assert job is not None, "it has served before anybody could be told"
        if isinstance(job, Unfuture):
            when_done(job, self.end)
        else:
            calls = self.calls
            job.add_done_callback(self.end)
            self.note_elsewhere(job, calls)

    def note_elsewhere(
        self, job: concurrent.futures.Future[Any], calls: list[Unfuture[Any]]
    ) -> None:
        """For who drains."""
        executors.note_elsewhere(job, calls, self.in_pool)

    def fail(self, job: _Job, exc: BaseException) -> None:
        failure = _failure(job, exc)
        cancelled = job.cancelled()
        if self.counter is not None:
            self.counter.end(not cancelled, cancelled)
        self.give_up(failure, cancelled)

    def give_up(self, failure: BaseException, cancelled: bool) -> None:
        """The job has failed, or was cancelled."""
        raise NotImplementedError

    def drop(self) -> None:
        self.dropped = True
        job = self.job
        if job is not None:
            _drop(job)

    # Here.

    def __call__(self) -> tuple[bool, list[Any]] | None:
        """In a thread: makes the calls; as `_make_each`, but nothing need be pickled."""
        arguments = self.target.arguments(self.items)
        try:
            return False, [self.make(args) for args in arguments if not self.dropped]
        finally:
            del self  # a failure's frames refer to this one

    def make(self, args: tuple[Any, ...]) -> tuple[int, Any]:
        try:
            return _common.FINISHED, copy_context().run(
                functools.partial(_travel.call, self.target.below, *args, **self.target.kwargs)
            )
        except BaseException as exc:
            return _common.FAILED, exc
        finally:
            del self, args  # the error's traceback holds this frame

    # Away.

    def parcel(self, imports_main: bool) -> tuple[Any, ...]:
        """Packs each call as if it travelled alone: what one does to an argument, none other sees.

        Of arguments that cannot change that is true anyway.
        """
        target = self.target
        has_our_main, function, packed = target.outward(imports_main)
        if packed is not None and not target.kwargs and target.are_plain(self.items):
            arguments = self.items if target.bare else target.arguments(self.items)
            return _make_each, target.name, packed, target.bare, arguments
        arguments = target.arguments(self.items)
        parcels = [self.pack(function, has_our_main, *each) for each in enumerate(arguments)]
        return _make_all, target.name, parcels

    def __reduce__(self) -> tuple[Any, ...]:
        """For an executor that pickles its jobs itself."""
        return functools.partial, self.parcel(False)

    def pack(
        self, function: Any, has_our_main: bool, place: int, args: tuple[Any, ...]
    ) -> bytes | None:
        target = self.target
        try:
            return _travel.pack(target.below, function, args, target.kwargs, has_our_main)[1]
        except Exception as exc:
            self.unsent[place] = exc
            return None

    # Back again.

    def outcomes(self, outcomes: list[Any]) -> Iterator[tuple[int, Any]]:
        """Status and outcome of each call, of what came back."""
        for place, outcome in enumerate(outcomes):
            if place in self.unsent:
                yield _common.FAILED, self.unsent[place]
            elif type(outcome) is not tuple:
                yield _common.FINISHED, outcome
            elif type(outcome[1]) is _Pickled:
                yield self.unpack(*outcome)
            else:
                yield outcome

    def unpack(self, status: int, pickled: _Pickled) -> tuple[int, Any]:
        import pickle

        try:
            return status, pickle.loads(pickled)
        except Exception as exc:
            error = pickle.UnpicklingError(
                f"the result of {self.target.name} cannot be unpickled in process {os.getpid()}: "
                f"{exc}"
            )
            error.__cause__ = exc
            return _common.FAILED, error


@final
class _Followed(_Chunk):
    """One whose calls have Unfutures."""

    __slots__ = ("context",)

    def __init__(self, target: Target, items: list[Any], context: Context) -> None:
        super().__init__(target, items)
        # Of who makes the calls.
        self.context = context

    def __call__(self) -> None:
        call: Unfuture[Any] | None = None
        outcome: Any = None
        try:
            for call, args in zip(self.calls, self.target.arguments(self.items), strict=True):
                if call._begin():  # else it was cancelled, or somebody has set its outcome
                    status, outcome = self.make(args)
                    if status == _common.FAILED:
                        self.fail_call(call, outcome)
                    else:
                        call._complete(status, outcome)
        finally:
            del self, call, outcome  # a failure's frames refer to this one

    def drop(self) -> None:
        super().drop()
        # Its calls refer to it, and it to them.
        if self.job is None:
            self.let_go()
        elif not self.followed:
            self.follow()  # which counts its end, too

    def arrive(self, came_back: Any) -> None:
        """Gives the calls their outcomes, unless they have them."""
        calls = self.let_go()
        if came_back is None:
            return  # they were made here
        _, outcomes = came_back
        for call, (status, outcome) in zip(calls, self.outcomes(outcomes), strict=False):
            if status == _common.FAILED:
                self.fail_call(call, outcome)
            else:
                call._complete(status, outcome)
        for call in calls[len(outcomes) :]:
            error = RuntimeError(f"no outcome of {self.target.name} came back")
            self.fail_call(call, error)

    def give_up(self, failure: BaseException, cancelled: bool) -> None:
        for call in self.let_go():
            if cancelled:
                call._complete(_common.CANCELLED, None)
            else:
                self.fail_call(call, failure)

    def fail_call(self, call: Unfuture[Any], failure: BaseException) -> None:
        call._fail_in(self.context, failure)


class _ByValue(bytes):
    """A pickled function."""

    __slots__ = ()


class _Pickled(bytes):
    """An outcome, pickled where the call was made."""

    __slots__ = ()


# In the worker process. Both give whether there are only plain results; and of each call the result
# if it is plain, else status and pickled outcome.


def _make_each(
    name: str, packed: bytes, bare: bool, arguments: list[Any]
) -> tuple[bool, list[Any]]:
    """Where the arguments of all calls are plain: the function need travel but once."""
    function = _found(packed)
    outcomes: list[Any] = []
    plain = True
    left = iter(arguments)
    while len(outcomes) < len(arguments):
        try:
            call_each(function, left, not bare, _PLAIN, outcomes)
            if type(outcomes[-1]) not in _PLAIN:
                plain = False
                outcomes.append(_pack(name, _travel.whole(outcomes.pop())))
        except BaseException as exc:  # entered once for each failure
            plain = False
            outcomes.append(_pack_failure(name, exc))
    return plain, outcomes


def _make_all(name: str, parcels: list[bytes | None]) -> tuple[bool, list[Any]]:
    """:param parcels: of each call what `_travel.run` takes; None for no call."""
    outcomes: list[Any] = []
    plain = True
    for parcel in parcels:
        try:
            if parcel is None:
                plain = False
                result = None
            else:
                result = _travel.run(name, parcel)
            if type(result) not in _PLAIN:
                plain = False
                result = _pack(name, result)
        except BaseException as exc:
            plain = False
            result = _pack_failure(name, exc)
        outcomes.append(result)
    return plain, outcomes


def _found(packed: bytes) -> Any:
    if isinstance(packed, _ByValue):
        import pickle

        return pickle.loads(packed)  # with the globals that it names: it may be large
    reference = _unpacked(packed)
    try:
        return reference._find()
    except Exception:
        return reference  # each call says why


@functools.lru_cache
def _unpacked(reference: bytes) -> Any:
    import pickle

    return pickle.loads(reference)


def _pack(name: str, result: object) -> tuple[int, _Pickled]:
    if type(result) is _travel._Parcel:
        return _common.FINISHED, _Pickled(result._pickled)
    try:
        return _common.FINISHED, _Pickled(_travel._dumps(result))
    except Exception as exc:
        error = _travel.no_way_back(name, result, exc)
    raise error


def _pack_failure(name: str, failure: BaseException) -> tuple[int, _Pickled]:
    from concurrent.futures.process import _ExceptionWithTraceback

    carried = _travel.pack_failure(name, failure)
    if isinstance(carried, Exception):
        failure = carried
    told = _ExceptionWithTraceback(failure, cast(TracebackType, failure.__traceback__))
    return _common.FAILED, _Pickled(_travel.dumps_failure(told))


class _Single:
    """A call that goes alone, as a stream sees it."""

    size = 1

    def __init__(self, outlet: _Outlet[Any], args: tuple[Any, ...]) -> None:
        self.outlet = outlet
        self.job = _call(outlet.target.function, args)
        self.followed = False
        self.moved = False  # its value

    def follow(self) -> None:
        """Has the outlet told when it is done; twice does no harm."""
        when_done(self.job, self.end)
        self.followed = True

    def end(self, _: object) -> None:
        self.outlet.arrive(self)

    def is_done(self) -> bool:
        return self.job.done()

    def drop(self) -> None:
        _drop(self.job)

    def move_to(self, taken: deque[Any]) -> BaseException | None:
        """As that of `_Streamed`."""
        job = self.job
        try:
            if not self.moved:
                value = job.result()
                self.moved = True
                taken.append(value)
        except BaseException as exc:
            return _failure(job, exc)
        else:
            return None
        finally:
            del self, job  # the frame that raised refers to this one


@final
class _Streamed(_Chunk):
    """One whose values go into a stream."""

    __slots__ = ("came", "opened", "outlet")

    def __init__(self, outlet: _Outlet[Any], items: list[Any]) -> None:
        super().__init__(outlet.target, items)
        self.outlet = outlet
        # What came of it: set once, by the thread that finishes its job, before the outlet hears
        # of it.
        self.came: tuple[Any, BaseException | None] | None = None
        # Its values, the first of them last, and the failure after them.
        self.opened: tuple[list[Any], BaseException | None] | None = None

    def arrive(self, came_back: Any) -> None:
        self.come(came_back, None)

    def give_up(self, failure: BaseException, cancelled: bool) -> None:
        self.come(None, failure)

    def come(self, came_back: Any, failure: BaseException | None) -> None:
        self.came = came_back, failure
        self.let_go()
        self.outlet.arrive(self)

    def note_elsewhere(
        self, job: concurrent.futures.Future[Any], calls: list[Unfuture[Any]]
    ) -> None:
        executors.note_elsewhere(job, [], self.in_pool, self.stand_in)

    def stand_in(self) -> Unfuture[Any] | None:
        """Its job as an Unfuture, for who drains; None if that has served."""
        job = self.job
        if job is None:
            return None
        unfuture: Unfuture[Any] = Unfuture(job)
        unfuture._name_function(self.target.below)
        executors.sizes[unfuture] = self.size
        when_done(unfuture, _look_away)  # the stream alone tells of a failure
        return unfuture

    def is_done(self) -> bool:
        return self.came is not None

    def move_to(self, taken: deque[Any]) -> BaseException | None:
        """Of a done one: puts its values there, once; what it failed with after them.

        An interrupt may come in between: each value is in one of the two places then.
        """
        if self.opened is None:
            values, failure = self.unpacked()
            values.reverse()
            self.opened = values, failure
        left, failure = self.opened
        taken.extend(starmap(left.pop, repeat((), len(left))))
        return failure

    def unpacked(self) -> tuple[list[Any], BaseException | None]:
        assert self.came is not None
        came_back, failure = self.came
        if failure is not None:
            return [], failure
        are_values, outcomes = came_back
        if are_values:
            return [*outcomes], None
        values: list[Any] = []
        for status, outcome in self.outcomes(outcomes):
            if status == _common.FAILED:
                return values, outcome
            values.append(outcome)
        return values, None


_Part = _Streamed | _Single


class _Outlet(Channel[T]):
    """The values of calls, which are made when a consumer comes and there is room for more.

    One consumer at a time reads the iterables, and one at a time collects what is done; these may
    be two, so the fields of each are its own.

    :param first: how many calls are in the first chunk; the next has twice as many.
    :param most: how many there are in a chunk at most.
    """

    def __init__(
        self,
        target: Target,
        source: Iterator[Any],
        first: int,
        most: int,
        read_ahead: int,
    ) -> None:
        super().__init__()
        self.target = target
        self.read_ahead = read_ahead
        self.most = min(most, read_ahead)
        # With so many on their way no more are made: several at a time cost less, but the workers
        # must not run out of them, and what waits for something else must do so all at once.
        self.enough = read_ahead // 2 if most > 1 else read_ahead - max(1, read_ahead // 8)
        # No more calls are made. Any thread sets it, once.
        self.stopped = False
        # Who reads the iterables, or wants to: the first of these does, and the next fields are its
        # own. The items: None when all is launched, and known, that came of them; how many calls
        # are in the next chunk; how many were launched; and what the iterables raised.
        self.readers: deque[object] = deque()
        self.source: Iterator[Any] | None = source
        self.size = min(first, read_ahead)
        self.launched = 0
        self.broken: Exception | None = None
        # Of who collects: how many calls, the values of which are there before; and what a call
        # raised, to be told after the values before it.
        self.collected = 0
        self.failure: BaseException | None = None

    # What was launched and not collected.

    def parts(self) -> Collection[_Part]:
        raise NotImplementedError

    def add(self, part: _Part) -> None:
        raise NotImplementedError

    def follow_all(self) -> None:
        """Has no part forgotten of which nobody would say that it is done."""
        for part in [*self.parts()]:
            if not part.followed:
                part.follow()

    def next_done(self) -> _Part | None:
        """The next one whose values are to be taken, if it is done."""
        raise NotImplementedError

    def remove(self, part: _Part) -> None:
        """It is collected."""
        raise NotImplementedError

    def pop(self) -> _Part:
        """Any one, to be dropped.

        :raises LookupError: if there is none.
        """
        raise NotImplementedError

    # Whoever reads the iterables.

    def pending(self) -> int:
        """Of how many calls nobody has taken the values, or more."""
        return self.launched - self.collected + len(self.taken)

    def has_room(self) -> bool:
        """Whether there is room for the next chunk, and somebody who wants it."""
        return not self.stopped and self.pending() + self.size <= self.read_ahead

    def go_on(self) -> None:
        if self.source is None or self.pending() > self.enough or not self.has_room():
            return
        reader, reads = object(), False
        try:
            try:
                # As in `look()`: nothing can interrupt this so that it stays in the line.
                self.readers.append(reader)
                reads = self.readers[0] is reader
                if reads:
                    self.feed()
            finally:
                self.readers.remove(reader)
        finally:
            if reads:
                self.wake_all()  # now it may be known that there is nothing more

    def feed(self) -> None:
        """Makes as many calls as there is room for."""
        try:
            while self.source is not None and self.has_room():
                self.feed_chunk(self.source)
        except Exception as exc:
            self.follow_all()  # a signal handler may have raised it, anywhere
            self.broken = exc
            self.source = None
        except BaseException:
            self.close()  # an interrupt: nobody knows what was left out
            raise

    def feed_chunk(self, source: Iterator[Any]) -> None:
        size = self.size
        self.size = min(2 * size, self.most)
        items: list[Any] = []
        try:
            items += islice(source, size)  # those that come before a failure count
        finally:
            if items:
                self.launch(items)
        if len(items) < size:
            self.source = None

    def launch(self, items: list[Any]) -> None:
        route = self.target.route
        part: _Part
        if route is None:
            part = _Single(self, items[0])
        else:
            part = _Streamed(self, items)
            part.launch(route)
        self.launched += part.size
        self.add(part)
        if self.stopped:
            self.drop_all()  # it was left meanwhile

    # Whoever finishes a part.

    def arrive(self, part: _Part) -> None:
        """It is done. A consumer that begins to wait looks again, then."""
        raise NotImplementedError

    # Consumers.

    def name(self) -> str:
        return self.target.name

    def find(self) -> bool | None:
        if not self.stopped:
            self.collect()
        if self.taken:
            return True
        if self.stopped:
            failure, self.failure = self.failure, None
        elif self.source is None and not self.parts():
            self.stopped = True
            failure, self.broken = self.broken, None
        else:
            return None
        self.wake_all()
        outcome: Unfuture[None] = Unfuture()
        settle(outcome, failure)
        try:
            outcome.result()
        finally:
            del failure, outcome  # the failure's frames refer to this one
        return False

    def collect(self) -> None:
        """Takes the values of what is done, up to what has failed."""
        while (part := self.next_done()) is not None:
            # After an interrupt the part is still there, for who comes next.
            failure = part.move_to(self.taken)
            if failure is not None:
                self.failure = failure
                self.stopped = True
                self.drop_all()
                del part, failure  # whose frames refer to this one
                break
            self.collected += part.size
            self.remove(part)
        if self.closing:  # meanwhile
            self.taken.clear()
            self.failure = None

    def drop_all(self) -> None:
        """What was launched for nothing."""
        while True:
            try:
                part = self.pop()
            except LookupError:
                return
            part.drop()

    def stop(self) -> Unfuture[None]:
        self.closing = self.stopped = True
        self.failure = None
        self.drop_all()
        self.taken.clear()
        self.wake_all()
        return Unfuture.from_value(None)


@final
class _InOrder(_Outlet[T]):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # In the order of the calls.
        self.line: deque[_Part] = deque()

    def parts(self) -> Collection[_Part]:
        return self.line

    def add(self, part: _Part) -> None:
        self.line.append(part)
        # Calls that go alone are asked when it is their turn: most are done long before.
        if self.target.route is not None:
            part.follow()

    def first(self) -> _Part | None:
        try:
            return self.line[0]
        except IndexError:
            return None

    def next_done(self) -> _Part | None:
        first = self.first()
        return None if first is None or not first.is_done() else first

    def remove(self, part: _Part) -> None:
        _common.take_out(self.line, part)

    def pop(self) -> _Part:
        return self.line.pop()

    def arrive(self, part: _Part) -> None:
        if self.waiters and self.next_done() is not None:
            self.wake_all()

    def find(self) -> bool | None:
        found = super().find()
        if found is None and (first := self.first()) is not None and not first.followed:
            first.follow()
        return found


@final
class _AsCompleted(_Outlet[T]):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.out: dict[_Part, None] = {}
        self.completed: deque[_Part] = deque()

    def parts(self) -> Collection[_Part]:
        return self.out

    def add(self, part: _Part) -> None:
        self.out[part] = None
        part.follow()

    def next_done(self) -> _Part | None:
        try:
            return self.completed[0]
        except IndexError:
            return None

    def remove(self, part: _Part) -> None:
        self.out.pop(part, None)
        _common.take_out(self.completed, part)

    def pop(self) -> _Part:
        return self.out.popitem()[0]

    def drop_all(self) -> None:
        super().drop_all()
        self.completed.clear()

    def arrive(self, part: _Part) -> None:
        self.completed.append(part)
        if self.stopped:
            self.completed.clear()  # if it was stopped before it came
        if self.waiters:
            self.wake_all()
