"""Who goes first when a thread wakes another is a guess, made by what was called before.

Whatever the pattern of calls is: each call runs once, in its order, and everybody hears of it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from support.waiting import PATIENCE

from unsync import Unfuture, unsync
from unsync.executors import ThreadExecutor

InThread = Callable[[Callable[[], object]], threading.Thread]

# What ran: how often each number came to each of the two below.
ran: Counter[tuple[str, int]] = Counter()
guard = threading.Lock()


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    ran.clear()


def note(kind: str, number: int) -> int:
    with guard:
        ran[kind, number] += 1
    return number + 1


@unsync
def function(number: int) -> int:
    return note("function", number)


@unsync
async def coroutine(number: int) -> int:
    return note("coroutine", number)


# The patterns: each uses the numbers it is given once for each kind, and waits for all.


def one_by_one(numbers: range) -> None:
    for number in numbers:
        assert function(number).result(PATIENCE) == number + 1
        assert coroutine(number).result(PATIENCE) == number + 1


def one_by_one_apart(numbers: range) -> None:
    for call in function, coroutine:
        for number in numbers:
            assert call(number).result(PATIENCE) == number + 1


def in_one_burst(numbers: range) -> None:
    for call in function, coroutine:
        calls = [call(number) for number in numbers]
        assert [unfuture.result(PATIENCE) for unfuture in calls] == [n + 1 for n in numbers]


def in_growing_bursts(numbers: range) -> None:
    """One call, two calls, three calls: lone calls and bursts by turns."""
    left, size = list(numbers), 0
    while left:
        size = size % 7 + 1
        batch, left = left[:size], left[size:]
        for call in function, coroutine:
            calls = [call(number) for number in batch]
            for number, unfuture in zip(reversed(batch), reversed(calls), strict=True):
                assert unfuture.result(PATIENCE) == number + 1


def two_by_two(numbers: range) -> None:
    """Both kinds on their way together, and the first to be called is waited for last."""
    for number in numbers:
        one, other = function(number), coroutine(number)
        assert (other.result(PATIENCE), one.result(PATIENCE)) == (number + 1, number + 1)


def continued(numbers: range) -> None:
    for number in numbers:
        unfuture = function(number).map(lambda value: coroutine(value - 1))
        assert unfuture.result(PATIENCE) == number + 1


async def await_one_by_one(numbers: range) -> None:
    for number in numbers:
        assert await function(number) == number + 1
        assert await coroutine(number) == number + 1


async def await_all_at_once(numbers: range) -> None:
    for call in function, coroutine:
        assert await asyncio.gather(*map(call, numbers)) == [number + 1 for number in numbers]


async def await_in_tasks(numbers: range) -> None:
    half = len(numbers) // 2
    await asyncio.gather(*map(await_one_by_one, (numbers[:half], numbers[half:])))


def in_the_ambient_loop(
    main: Callable[[range], Coroutine[Any, Any, None]],
) -> Callable[[range], None]:
    return lambda numbers: unsync(main)(numbers).result(PATIENCE)


def in_a_foreign_loop(
    main: Callable[[range], Coroutine[Any, Any, None]],
) -> Callable[[range], None]:
    return lambda numbers: asyncio.run(asyncio.wait_for(main(numbers), PATIENCE))


PATTERNS: dict[str, Callable[[range], None]] = {
    "one by one": one_by_one,
    "one by one, apart": one_by_one_apart,
    "in one burst": in_one_burst,
    "in growing bursts": in_growing_bursts,
    "two by two": two_by_two,
    "continued": continued,
}
for main in await_one_by_one, await_all_at_once, await_in_tasks:
    PATTERNS[f"ambient loop: {main.__name__}"] = in_the_ambient_loop(main)
    PATTERNS[f"foreign loop: {main.__name__}"] = in_a_foreign_loop(main)


def use(*workers: int) -> Any:
    return pytest.mark.parametrize("pool", workers, indirect=True)


@pytest.fixture
def pool(fresh: None, request: pytest.FixtureRequest) -> Iterator[ThreadExecutor]:
    """The thread executor, with so many threads."""
    with ThreadExecutor(request.param) as executor:
        unsync.thread_executor = executor
        yield executor
        unsync.thread_executor = None


@use(1, 3)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_each_call_runs_once_and_is_heard_of(
    pool: ThreadExecutor, pattern: Callable[[range], None]
) -> None:
    numbers = range(300)
    pattern(numbers)
    assert ran == {(kind, n): 1 for kind in ("function", "coroutine") for n in numbers}


@use(1, 3)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_so_it_is_if_several_threads_call_in_one_pattern(
    pool: ThreadExecutor, pattern: Callable[[range], None], in_thread: InThread
) -> None:
    check_all_at_once([pattern] * 4, in_thread)


@use(1, 2, 8)
def test_so_it_is_if_all_patterns_meet(pool: ThreadExecutor, in_thread: InThread) -> None:
    check_all_at_once(list(PATTERNS.values()), in_thread)


def check_all_at_once(patterns: list[Callable[[range], None]], in_thread: InThread) -> None:
    ended: list[int] = []
    start = threading.Barrier(len(patterns))

    def run(pattern: Callable[[range], None], numbers: range) -> Callable[[], None]:
        def body() -> None:
            start.wait(PATIENCE)
            pattern(numbers)
            ended.append(numbers.start)

        return body

    parts = [range(start, start + 200) for start in range(0, 200 * len(patterns), 200)]
    threads = [in_thread(run(pattern, part)) for pattern, part in zip(patterns, parts, strict=True)]
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert sorted(ended) == [part.start for part in parts]
    numbers = range(parts[-1].stop)
    assert ran == {(kind, n): 1 for kind in ("function", "coroutine") for n in numbers}


# Those who wait while others wait for them.


@use(8)
@pytest.mark.parametrize("where", ["thread", "ambient loop", "foreign loop"])
def test_functions_that_wait_for_functions_and_coroutines(pool: ThreadExecutor, where: str) -> None:
    @unsync
    def nest(levels: int) -> int:
        if levels == 0:
            return 0
        below = nest(levels - 1).result(PATIENCE)
        return below + nest_coroutine(levels - 1).result(PATIENCE) + 1

    @unsync
    async def nest_coroutine(levels: int) -> int:
        return 0 if levels == 0 else await nest_coroutine(levels - 1) + await nest(0) + 1

    async def await_all() -> list[int]:
        return [await nest(4) for _ in range(50)]

    if where == "thread":
        outcomes = [nest(4).result(PATIENCE) for _ in range(50)]
    elif where == "ambient loop":
        outcomes = unsync(await_all)().result(PATIENCE)
    else:
        outcomes = asyncio.run(asyncio.wait_for(await_all(), PATIENCE))
    assert outcomes == [4 + (3 + 2 + 1)] * 50


@use(2)
@pytest.mark.parametrize("run_before", [0, 1, 2, 10])
def test_who_made_a_lone_call_goes_on_while_it_waits(pool: ThreadExecutor, run_before: int) -> None:
    """The call cannot end before its caller has gone on."""

    @unsync
    def wait(gate: threading.Event) -> bool:
        return gate.wait(PATIENCE)

    def call() -> Unfuture[bool]:
        gate = threading.Event()
        unfuture = wait(gate)
        gate.set()
        return unfuture

    async def main() -> list[bool]:
        for number in range(run_before):
            await function(number)
        return [await call() for _ in range(10)]

    for number in range(run_before):
        function(number).result(PATIENCE)
    assert [call().result(PATIENCE) for _ in range(10)] == [True] * 10
    assert unsync(main)().result(PATIENCE) == [True] * 10


@use(2)
def test_two_threads_that_answer_each_other(pool: ThreadExecutor) -> None:
    """Each waits for the other's news: whoever is woken must get its turn."""
    rounds = 300
    balls = [Unfuture[int]() for _ in range(2 * rounds + 1)]

    @unsync
    def play(first: int) -> int:
        count = 0
        for number in range(first, 2 * rounds, 2):
            balls[number + 1].set_result(balls[number].result(PATIENCE) + 1)
            count += 1
        return count

    players = [play(0), play(1)]
    balls[0].set_result(0)
    assert [player.result(PATIENCE) for player in players] == [rounds, rounds]
    assert balls[-1].result(0) == 2 * rounds


# The order.


def call_one_by_one(call: Callable[[int], Unfuture[None]]) -> None:
    for number in range(200):
        call(number).result(PATIENCE)


def call_in_bursts(call: Callable[[int], Unfuture[None]]) -> None:
    """One, two, three and so on; only the last of each burst is waited for."""
    number = 0
    for size in range(1, 20):
        for _ in range(size):
            unfuture = call(number)
            number += 1
        unfuture.result(PATIENCE)


def call_and_wait_for_the_one_before(call: Callable[[int], Unfuture[None]]) -> None:
    before = call(0)
    for number in range(1, 200):
        unfuture = call(number)
        before.result(PATIENCE)
        before = unfuture
    before.result(PATIENCE)


def call_from_the_ambient_loop(call: Callable[[int], Unfuture[None]]) -> None:
    @unsync
    async def main() -> None:
        number = 0
        for size in range(1, 20):
            calls = [call(number + more) for more in range(size)]
            number += size
            await calls[size // 2]
        await asyncio.gather(*calls)

    main().result(PATIENCE)


def call_from_a_foreign_loop(call: Callable[[int], Unfuture[None]]) -> None:
    async def main() -> None:
        for number in range(0, 200, 2):
            call(number)
            await call(number + 1)

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


@use(1)
@pytest.mark.parametrize("kind", ["function", "coroutine"])
@pytest.mark.parametrize(
    "make_calls",
    [
        call_one_by_one,
        call_in_bursts,
        call_and_wait_for_the_one_before,
        call_from_the_ambient_loop,
        call_from_a_foreign_loop,
    ],
)
def test_one_thread_takes_the_calls_in_their_order(
    pool: ThreadExecutor, make_calls: Callable[..., None], kind: str
) -> None:
    called: list[int] = []
    begun: list[int] = []

    async def begin(number: int) -> None:
        begun.append(number)

    marked: Any = unsync(begun.append if kind == "function" else begin)

    def call(number: int) -> Unfuture[None]:
        called.append(number)
        return marked(number)

    make_calls(call)
    assert begun == called == list(range(len(called)))
    assert len(called) >= 190


@use(1)
def test_each_threads_calls_keep_their_order_among_the_others(
    pool: ThreadExecutor, in_thread: InThread
) -> None:
    begun: list[tuple[int, int]] = []
    marked = unsync(begun.append)

    def body(caller: int) -> Callable[[], None]:
        patterns = call_one_by_one, call_in_bursts, call_and_wait_for_the_one_before
        return lambda: patterns[caller % 3](lambda number: marked((caller, number)))

    for thread in [in_thread(body(caller)) for caller in range(6)]:
        thread.join(PATIENCE)
    for caller in range(6):
        numbers = [number for who, number in begun if who == caller]
        assert numbers == list(range(190 if caller % 3 == 1 else 200))
