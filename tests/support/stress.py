"""Everything at once, counted to the last one: every way into an Unfuture and every way out.

    python tests/support/stress.py --seconds 60 --threads 4

Threads make cases without a pause. A case is one Unfuture that got its work in some way, and a few
observers that wait for it in other ways: in threads, in loops, by callbacks, by chaining; at times
somebody cancels. Whatever wins, each observer must hear of it exactly once, and all of the same.

Meanwhile tasks that await one call after the other, in every way there is, are cancelled in some
moment: each timeout must strike, each task group end, each asyncio.run() end on Ctrl-C.

Without pytest, so that it runs on interpreters that have nothing installed.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import faulthandler
import functools
import itertools
import queue
import random
import signal
import sys
import threading
import time
from _thread import interrupt_main
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeAlias

from unsync import ACCELERATED, InvalidStateError, Unfuture, unsync

# How many cases a thread has open before it waits for its oldest.
OPEN_CASES = 200
# How long a case may take before it counts as hung, in seconds.
PATIENCE = 60.0

CANCELLED = "cancelled"

WITH_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()

# Without the GIL, CPython 3.13 writes the traceback of an exception without a lock: threads that
# raise the same one at once, whosesoever future they waited for, corrupt the interpreter's memory.
RAISES_SAFELY = WITH_GIL or sys.version_info >= (3, 14)


class Failure(Exception):
    """What a case fails with."""


class Case:
    """One Unfuture; `observers` counts what is still expected, `outcomes` has what was heard."""

    def __init__(self, number: int, way_in: str) -> None:
        self.number = number
        self.way_in = way_in
        self.unfuture: Unfuture[Any] = Unfuture()
        self.may_cancel = False
        # Only its producer adds here; each observer appends to its own list in `heard`.
        self.observers: list[str] = []
        self.heard: list[list[object]] = []

    def observer(self, way_out: str) -> Callable[[object], None]:
        """A new one; it is told the outcome: a value, an exception or CANCELLED."""
        heard: list[object] = []
        self.observers.append(way_out)
        self.heard.append(heard)
        return heard.append

    def is_complete(self) -> bool:
        return all(self.heard)

    def check(self) -> object:
        """The outcome.

        :raises AssertionError: if somebody heard twice, or something else than the others.
        """
        said = dict(zip(self.observers, self.heard, strict=True))
        first = self.heard[0][0]
        for heard in self.heard:
            assert len(heard) == 1, f"{self}: heard {len(heard)} times: {said}"
            assert heard[0] is first, f"{self}: not the same for all: {said}"
        if first is CANCELLED:
            assert self.may_cancel, f"{self}: nobody cancelled it: {said}"
        elif isinstance(first, Failure):
            assert first.args == (self.number,), f"{self}: another's failure: {said}"
        else:
            assert first == [self.number], f"{self}: another's result: {said}"
        return first

    def __str__(self) -> str:
        return f"case {self.number} ({self.way_in}, out by {self.observers}), {self.unfuture!r}"


def outcome_of(unfuture: Unfuture[Any]) -> object:
    """Of one that is done."""
    if unfuture.cancelled():
        return CANCELLED
    exc = unfuture.exception()
    return unfuture.result() if exc is None else exc


def interrupt() -> None:
    """As Ctrl-C does."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill"):
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
    else:
        interrupt_main()


def give(number: int, fails: bool) -> list[int]:
    if fails:
        raise Failure(number)
    return [number]


# The work behind the calls.


@unsync
async def coroutine(number: int, fails: bool, steps: int, seconds: float) -> list[int]:
    for _ in range(steps):
        await asyncio.sleep(0)
    if seconds:
        await asyncio.sleep(seconds)
    return give(number, fails)


@unsync
def thread(number: int, fails: bool, seconds: float) -> list[int]:
    if seconds:
        time.sleep(seconds)
    return give(number, fails)


@unsync
def thread_upon_coroutine(number: int, fails: bool) -> list[int]:
    return coroutine(number, fails, 1, 0).result()


@unsync
async def coroutine_upon_thread(number: int, fails: bool) -> list[int]:
    return await thread(number, fails, 0)


@unsync(cpu_bound=True)
def process(number: int, fails: bool) -> list[int]:
    return give(number, fails)


# What is awaited over and over by those who are to be cancelled.


@unsync
async def poll() -> None:
    await asyncio.sleep(0)


@unsync
async def polls() -> AsyncIterator[None]:
    for _ in range(3):
        await asyncio.sleep(0)
        yield None


@unsync
@contextlib.asynccontextmanager
async def polled() -> AsyncIterator[None]:
    await asyncio.sleep(0)
    yield None
    await asyncio.sleep(0)


async def read_polls() -> None:
    async for _ in polls():
        pass


async def enter_polled() -> None:
    async with polled():
        await asyncio.sleep(0)


async def poll_upon_failure() -> None:
    with contextlib.suppress(Failure):
        await coroutine(0, True, 1, 0)


def shielded_poll() -> Awaitable[object]:
    return asyncio.shield(poll())


Poll: TypeAlias = Callable[[], Awaitable[object]]

POLLS: list[Poll] = [
    poll,
    poll,
    poll_upon_failure,
    read_polls,
    enter_polled,
    lambda: poll().future,
    lambda: Unfuture(poll()),
    lambda: Unfuture(poll().future),
    lambda: Unfuture(poll().concurrent_future),
    lambda: poll().then(lambda _: poll()),
    lambda: Unfuture.from_value(None).map(lambda _: poll()),
    lambda: asyncio.gather(poll(), poll()),
    shielded_poll,
    lambda: thread(0, False, 0),
    lambda: thread_upon_coroutine(0, False),
    lambda: coroutine_upon_thread(0, False),
]
if sys.version_info >= (3, 12):  # before, wait_for() itself returns a result in place of a cancel
    POLLS.append(lambda: asyncio.wait_for(poll(), PATIENCE))
# In asyncio.run() a Ctrl-C cancels the task from the signal handler, between any two steps; if that
# is where shield() has seen that its outer future is not cancelled, and is about to set its result,
# the loop reports an InvalidStateError. It does so for any future of asyncio's too (3.11 to 3.13).
POLLS_UNDER_CTRL_C = [each for each in POLLS if each is not shielded_poll]


async def go_on(rng: random.Random, polls: Sequence[Poll] = POLLS) -> None:
    """Until it is cancelled."""
    while True:
        await rng.choice(polls)()


# How a task that goes on may be stopped; each fails if it ends in another way.


async def by_timeout(rng: random.Random) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(rng.random() * 0.004):
            await go_on(rng)
        raise AssertionError("the timeout did not strike")


async def by_wait_for(rng: random.Random) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(go_on(rng), rng.random() * 0.004)
        raise AssertionError("the timeout did not strike")


async def by_task_group(rng: random.Random) -> None:
    async def fail() -> None:
        for _ in range(rng.randrange(5)):
            await rng.choice(POLLS)()
        raise Failure(0)

    async def group() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(go_on(rng))
            group.create_task(fail())

    raised: Any = (await asyncio.gather(group(), return_exceptions=True))[0]
    failures = [type(failure) for failure in raised.exceptions]
    assert failures == [Failure], f"the task group ended with {failures}"


async def by_cancel(rng: random.Random) -> None:
    task = asyncio.ensure_future(go_on(rng))
    for _ in range(rng.randrange(5)):
        await rng.choice(POLLS)()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled(), f"{task} was cancelled and went on"


WAYS_TO_STOP = [by_timeout, by_wait_for, by_task_group, by_cancel]


def mark_cancelled_ones(rounds: int) -> None:
    """As an executor does, while another thread asks each for its result.

    That changes the state of one that is done, for nobody but `concurrent.futures`. Who looks gets
    the same before and after; only ThreadSanitizer sees whether the state is read as an atomic.
    """
    for _ in range(rounds):
        unfuture: Unfuture[Any] = Unfuture()
        unfuture.cancel()
        looks: list[bool] = []
        marked: list[bool] = []

        def look(unfuture: Unfuture[Any], looks: list[bool], marked: list[bool]) -> None:
            while not marked:
                try:
                    unfuture.result()
                except concurrent.futures.CancelledError:
                    looks.append(True)

        looking = threading.Thread(target=look, args=(unfuture, looks, marked))
        looking.start()
        until = time.monotonic() + PATIENCE
        while len(looks) < 20 and time.monotonic() < until:
            time.sleep(0)
        assert not unfuture.set_running_or_notify_cancel()
        marked.append(True)
        looking.join()
        assert unfuture.cancelled()
        assert len(looks) >= 20, "a cancelled one gave no CancelledError"


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def spawn(self, coro: Coroutine[Any, Any, None]) -> None:
        self.loop.call_soon_threadsafe(self._spawn, coro)

    def _spawn(self, coro: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Stress:
    def __init__(self, threads: int, loops: int, processes: bool, seed: int) -> None:
        self._threads = threads
        self._processes = processes
        self._seed = seed
        self._numbers = itertools.count()
        self._loops = [Loop() for _ in range(loops)]
        self._helpers = [threading.Thread(target=self._help) for _ in range(2)]
        self._errands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._executor = concurrent.futures.ThreadPoolExecutor(2)
        self._chunked = unsync(give, executor=self._executor)
        self._until = 0.0
        # These ask for the exception; the other ways out raise it and catch it.
        self._ways_that_look: list[Callable[[Case, random.Random], None]] = [
            self._exception,
            self._wait,
            self._as_completed,
            self._callback,
            self._callback_in_loop,
            self._gather,
            self._asyncio_wait,
            self._view,
        ]
        # What went wrong; then everything stops.
        self._faults: list[BaseException] = []

    def run(self, seconds: float) -> Counter[str]:
        """Returns how many cases there were of each kind, and how many of each outcome."""
        self._until = time.monotonic() + seconds
        counts = [Counter[str]() for _ in range(self._threads)]
        producers = [
            threading.Thread(target=self._produce, args=(random.Random(self._seed + i), count))
            for i, count in enumerate(counts)
        ]
        for started in self._helpers + producers:
            started.start()
        loops = [unsync.loop, *(each.loop for each in self._loops)]
        stopping = [
            asyncio.run_coroutine_threadsafe(
                self._stop_over_and_over(random.Random(f"{self._seed} in loop {i}")), loop
            )
            for i, loop in enumerate(loops)
        ]
        try:
            counts.append(self._interrupt_over_and_over(random.Random(f"{self._seed} in main")))
        except BaseException as exc:
            self._faults.append(exc)
        for producer in producers:
            producer.join()
        counts += [each.result(2 * PATIENCE) for each in stopping]
        for _ in self._helpers:
            self._errands.put(None)
        for helper in self._helpers:
            helper.join()
        self._executor.shutdown()
        for loop in self._loops:
            loop.close()
        if self._faults:
            raise self._faults[0]
        return sum(counts, Counter())

    def _produce(self, rng: random.Random, counts: Counter[str]) -> None:
        open_cases: deque[Case] = deque()
        try:
            while time.monotonic() < self._until and not self._faults:
                open_cases.append(self._open(rng))
                while open_cases and open_cases[0].is_complete():
                    self._close(open_cases.popleft(), counts)
                if len(open_cases) >= OPEN_CASES:
                    self._await(open_cases[0])
            while open_cases:
                self._await(open_cases[0])
                self._close(open_cases.popleft(), counts)
        except BaseException as exc:
            self._faults.append(exc)

    def _await(self, case: Case) -> None:
        until = time.monotonic() + PATIENCE
        while not case.is_complete():
            if self._faults:
                raise RuntimeError("another thread found a fault") from self._faults[0]
            if time.monotonic() > until:
                faulthandler.dump_traceback(all_threads=True)
                silent = [
                    way for way, heard in zip(case.observers, case.heard, strict=True) if not heard
                ]
                raise AssertionError(f"{case}: after {PATIENCE} s {silent} heard nothing")
            time.sleep(0.0005)

    @staticmethod
    def _close(case: Case, counts: Counter[str]) -> None:
        outcome = case.check()
        counts["cases"] += 1
        counts["observers"] += len(case.observers)
        counts[f"in: {case.way_in}"] += 1
        for way_out in case.observers:
            counts[f"out: {way_out}"] += 1
        if outcome is CANCELLED:
            counts["ended: cancelled"] += 1
        else:
            counts["ended: failed" if isinstance(outcome, Failure) else "ended: result"] += 1

    async def _stop_over_and_over(self, rng: random.Random) -> Counter[str]:
        """In one of the loops; each way at least once."""
        counts = Counter[str]()
        try:
            while not self._faults:
                if len(counts) < len(WAYS_TO_STOP):
                    way = WAYS_TO_STOP[len(counts)]
                elif time.monotonic() < self._until:
                    way = rng.choice(WAYS_TO_STOP)
                else:
                    break
                task = asyncio.ensure_future(way(rng))
                done, _ = await asyncio.wait([task], timeout=PATIENCE)
                assert done, f"{way.__name__}: after {PATIENCE} s it has not ended: {task}"
                task.result()
                counts[f"stopped: {way.__name__}"] += 1
        except BaseException as exc:
            self._faults.append(exc)
        return counts

    def _interrupt_over_and_over(self, rng: random.Random) -> Counter[str]:
        """In the main thread, the only one that asyncio.run() cares for signals in."""
        counts = Counter[str]()
        if threading.current_thread() is not threading.main_thread():
            return counts
        # What a shell starts in the background has none.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        async def main() -> None:
            for _ in range(rng.randrange(3)):
                await rng.choice(POLLS_UNDER_CTRL_C)()
            self._errands.put(interrupt)
            await go_on(rng, POLLS_UNDER_CTRL_C)

        while not self._faults and (time.monotonic() < self._until or not counts):
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            try:
                asyncio.run(main())
            except KeyboardInterrupt:
                counts["stopped: by_ctrl_c"] += 1
            else:
                raise AssertionError("asyncio.run() ended without an interrupt")
            finally:
                faulthandler.cancel_dump_traceback_later()
        return counts

    def _help(self) -> None:
        """Sets, waits and cancels from outside, in whatever order the errands come."""
        try:
            while (errand := self._errands.get()) is not None:
                errand()
        except BaseException as exc:
            self._faults.append(exc)

    # Ways in.

    def _open(self, rng: random.Random) -> Case:
        ways_in: list[Callable[[Case, random.Random], Unfuture[Any]]] = [
            self._call_coroutine,
            self._call_coroutine,
            self._call_thread,
            self._call_nested,
            self._call_in_chunk,
            self._set_from_outside,
            self._wrap_concurrent,
            self._wrap_asyncio,
            self._wrap_unfuture,
            self._chain,
        ]
        way_in = rng.choice(ways_in)
        if self._processes and rng.random() < 0.01:
            way_in = self._call_process
        case = Case(next(self._numbers), way_in.__name__[1:])
        case.may_cancel = rng.random() < 0.15
        case.unfuture = way_in(case, rng)
        ways_out: list[Callable[[Case, random.Random], None]] = [
            self._result,
            self._result_with_timeouts,
            self._exception,
            self._wait,
            self._as_completed,
            self._callback,
            self._callback_in_loop,
            self._await_in_loop,
            self._await_with_timeouts,
            self._gather,
            self._asyncio_wait,
            self._loop_of_its_own,
            self._then,
            self._view,
        ]
        # One that costs a thread or a loop is chosen less often.
        weights = [4, 2, 1, 1, 1, 6, 4, 8, 2, 2, 1, 0.2, 4, 1]
        chosen = rng.choices(ways_out, weights, k=rng.randint(1, 4))
        if not RAISES_SAFELY:
            raising = [way_out for way_out in chosen if way_out not in self._ways_that_look]
            chosen = [way_out for way_out in chosen if way_out not in raising] + raising[:1]
        for way_out in chosen:
            way_out(case, rng)
        if case.may_cancel:
            self._cancel(case, rng)
        return case

    def _call_coroutine(self, case: Case, rng: random.Random) -> Unfuture[Any]:
        seconds = rng.choice([0, 0, 0, 0.001])
        return coroutine(case.number, rng.random() < 0.2, rng.choice([0, 0, 1, 3]), seconds)

    def _call_thread(self, case: Case, rng: random.Random) -> Unfuture[Any]:
        return thread(case.number, rng.random() < 0.2, rng.choice([0, 0, 0, 0.001]))

    def _call_nested(self, case: Case, rng: random.Random) -> Unfuture[Any]:
        return rng.choice([thread_upon_coroutine, coroutine_upon_thread])(
            case.number, rng.random() < 0.2
        )

    def _call_in_chunk(self, case: Case, rng: random.Random) -> Unfuture[Any]:
        """One of three calls that go together; nobody hears of the other two."""
        fails = [rng.random() < 0.2, False, False]
        chunksize = rng.choice([1, 3])
        return unsync.calls(self._chunked, [case.number] * 3, fails, chunksize=chunksize)[0]

    def _call_process(self, case: Case, rng: random.Random) -> Unfuture[Any]:
        return process(case.number, rng.random() < 0.2)

    def _set_from_outside(self, case: Case, rng: random.Random) -> Unfuture[Any]:
        unfuture: Unfuture[Any] = Unfuture()
        runs_before = rng.random() < 0.2
        setters = rng.choice([1, 2])
        won: list[bool] = []  # by each setter, whether it was first

        def set_outcome(fails: bool) -> None:
            try:
                if fails:
                    unfuture.set_exception(Failure(case.number))
                else:
                    unfuture.set_result([case.number])
            except InvalidStateError:
                won.append(False)
            else:
                won.append(True)

        def count() -> None:
            """After all have tried: one of them was first, or a cancellation."""
            if len(won) < setters:
                self._errands.put(count)
            elif sum(won) != (not unfuture.cancelled()):
                raise AssertionError(f"{case}: {won} of its setters were first")

        if runs_before:
            unfuture.set_running_or_notify_cancel()
        for _ in range(setters):
            self._errands.put(functools.partial(set_outcome, rng.random() < 0.3))
        self._errands.put(count)
        return unfuture

    def _wrap_concurrent(self, case: Case, rng: random.Random) -> Unfuture[Any]:
        return Unfuture(self._executor.submit(give, case.number, rng.random() < 0.2))

    def _wrap_asyncio(self, case: Case, rng: random.Random) -> Unfuture[Any]:
        loop = rng.choice(self._loops).loop
        future: asyncio.Future[Any] = loop.create_future()
        fails = rng.random() < 0.2

        def finish() -> None:
            if future.done():
                return
            if fails:
                future.set_exception(Failure(case.number))
            else:
                future.set_result([case.number])

        if rng.random() < 0.5:
            loop.call_soon_threadsafe(finish)
            return Unfuture(future)
        unfuture = Unfuture(future)
        loop.call_soon_threadsafe(finish)
        return unfuture

    def _wrap_unfuture(self, case: Case, rng: random.Random) -> Unfuture[Any]:
        return Unfuture(self._call_coroutine(case, rng))

    def _chain(self, case: Case, rng: random.Random) -> Unfuture[Any]:
        source = rng.choice([self._call_coroutine, self._call_thread])(case, rng)

        async def pass_on(source: Unfuture[Any]) -> Any:
            return await source

        continuations: list[Callable[[Unfuture[Any]], Any]] = [
            lambda source: source.result(),
            lambda source: source,
            pass_on,
        ]
        return source.then(rng.choice(continuations))

    # Ways out.

    def _result(self, case: Case, rng: random.Random) -> None:
        tell, unfuture = case.observer("result"), case.unfuture
        if rng.random() < 0.8:
            self._errands.put(lambda: tell(self._get(unfuture, None)))
        else:
            tell(self._get(unfuture, None))

    @staticmethod
    def _get(unfuture: Unfuture[Any], timeout: float | None) -> object:
        try:
            return unfuture.result(timeout)
        except Failure as failure:
            return failure
        except concurrent.futures.CancelledError:
            return CANCELLED

    def _result_with_timeouts(self, case: Case, rng: random.Random) -> None:
        tell, unfuture = case.observer("result(timeout)"), case.unfuture
        timeout = rng.choice([0, 1e-6, 1e-5, 1e-4, 1e-3])

        def patiently() -> None:
            while True:
                with contextlib.suppress(concurrent.futures.TimeoutError):
                    tell(self._get(unfuture, timeout))
                    return

        self._errands.put(patiently)

    def _exception(self, case: Case, rng: random.Random) -> None:
        tell, unfuture = case.observer("exception"), case.unfuture

        def look() -> None:
            try:
                exc = unfuture.exception(PATIENCE)
            except concurrent.futures.CancelledError:
                tell(CANCELLED)
            else:
                tell(unfuture.result() if exc is None else exc)

        self._errands.put(look)

    def _wait(self, case: Case, rng: random.Random) -> None:
        tell, unfuture = case.observer("wait"), case.unfuture

        def wait() -> None:
            futures: Any = [unfuture]
            done, _ = concurrent.futures.wait(futures, PATIENCE)
            assert done == {*futures}, f"{case}: wait() timed out"
            tell(outcome_of(unfuture))

        self._errands.put(wait)

    def _as_completed(self, case: Case, rng: random.Random) -> None:
        tell, unfuture = case.observer("as_completed"), case.unfuture
        other = coroutine(case.number, False, 0, 0)

        def wait() -> None:
            futures: Any = [unfuture, other]
            done = {*concurrent.futures.as_completed(futures, PATIENCE)}
            assert done == {*futures}
            tell(outcome_of(unfuture))

        self._errands.put(wait)

    def _callback(self, case: Case, rng: random.Random) -> None:
        tell = case.observer("callback")
        case.unfuture.add_done_callback(lambda unfuture: tell(outcome_of(unfuture)))

    def _callback_in_loop(self, case: Case, rng: random.Random) -> None:
        tell, unfuture = case.observer("callback in a loop"), case.unfuture

        async def add() -> None:
            unfuture.add_done_callback(lambda unfuture: tell(outcome_of(unfuture)))

        rng.choice(self._loops).spawn(add())

    def _await_in_loop(self, case: Case, rng: random.Random) -> None:
        tell, unfuture = case.observer("await"), case.unfuture
        rng.choice(self._loops).spawn(self._awaiting(tell, unfuture))

    @staticmethod
    async def _awaiting(tell: Callable[[object], None], unfuture: Unfuture[Any]) -> None:
        try:
            tell(await unfuture)
        except Failure as failure:
            tell(failure)
        except asyncio.CancelledError:
            tell(CANCELLED)

    def _await_with_timeouts(self, case: Case, rng: random.Random) -> None:
        tell, unfuture = case.observer("wait_for"), case.unfuture
        timeout = rng.choice([0, 1e-5, 1e-4, 1e-3])

        async def patiently() -> None:
            while True:
                try:
                    tell(await asyncio.wait_for(asyncio.shield(unfuture), timeout))
                except TimeoutError:
                    continue
                except Failure as failure:
                    tell(failure)
                except asyncio.CancelledError:
                    tell(CANCELLED)
                return

        rng.choice(self._loops).spawn(patiently())

    def _gather(self, case: Case, rng: random.Random) -> None:
        tell, unfuture = case.observer("gather"), case.unfuture

        async def gather() -> None:
            other = coroutine(case.number, False, 0, 0)
            outcome: Any = (await asyncio.gather(unfuture, other, return_exceptions=True))[0]
            tell(CANCELLED if isinstance(outcome, asyncio.CancelledError) else outcome)

        rng.choice(self._loops).spawn(gather())

    def _asyncio_wait(self, case: Case, rng: random.Random) -> None:
        tell, unfuture = case.observer("asyncio.wait"), case.unfuture

        async def wait() -> None:
            futures: Any = {unfuture}
            done, _ = await asyncio.wait(futures, timeout=PATIENCE)
            assert done == futures, f"{case}: asyncio.wait() timed out"
            tell(outcome_of(unfuture))

        rng.choice(self._loops).spawn(wait())

    def _loop_of_its_own(self, case: Case, rng: random.Random) -> None:
        tell, unfuture = case.observer("await in a loop of its own"), case.unfuture
        self._errands.put(lambda: asyncio.run(self._awaiting(tell, unfuture)))

    def _then(self, case: Case, rng: random.Random) -> None:
        tell = case.observer("then")
        target = case.unfuture.then(lambda source: source.result())
        target.add_done_callback(lambda target: tell(outcome_of(target)))

    def _view(self, case: Case, rng: random.Random) -> None:
        tell, unfuture = case.observer("concurrent_future"), case.unfuture

        def observe(future: concurrent.futures.Future[Any]) -> None:
            if future.cancelled():
                tell(CANCELLED)
            else:
                exc = future.exception()
                tell(future.result() if exc is None else exc)

        unfuture.concurrent_future.add_done_callback(observe)

    def _cancel(self, case: Case, rng: random.Random) -> None:
        unfuture = case.unfuture
        how = rng.randrange(3)
        if how == 0:
            unfuture.cancel()
        elif how == 1:
            self._errands.put(unfuture.cancel)
        else:
            rng.choice(self._loops).loop.call_soon_threadsafe(unfuture.cancel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--no-processes", action="store_true")
    parser.add_argument("--switch-interval", type=float, default=None, help="in seconds")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(
        f"unsync, {'compiled' if ACCELERATED else 'pure'} core, Python {sys.version.split()[0]} "
        f"{'with' if WITH_GIL else 'without'} the GIL; seed {seed}",
        flush=True,
    )
    if options.switch_interval is not None:
        sys.setswitchinterval(options.switch_interval)
    mark_cancelled_ones(20)
    stress = Stress(options.threads, options.loops, not options.no_processes, seed)
    counts = stress.run(options.seconds)
    for what, count in sorted(counts.items()):
        print(f"{count:9,} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
