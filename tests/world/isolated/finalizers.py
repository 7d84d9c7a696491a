"""A `__del__` may make calls, set outcomes and fail, wherever the last reference goes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from support.under_test import WITH_GIL
from support.waiting import PATIENCE, collect, wait_until

from unsync import InvalidStateError, Unfuture, unsync
from unsync.executors import ThreadExecutor


async def give(value: object) -> object:
    return value


def hold(value: object) -> None:
    pass


async def hold_async(value: object) -> None:
    pass


class Thing:
    """Calls `action` when it dies."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def __del__(self) -> None:
        self.action()


def as_a_result(thing: Callable[[], Thing]) -> None:
    unsync(give)(thing()).result(PATIENCE)


def as_a_result_that_nobody_looks_at(thing: Callable[[], Thing]) -> None:
    unsync(thing)()


def as_an_argument_of_a_thread_function(thing: Callable[[], Thing]) -> None:
    unsync(hold)(thing()).result(PATIENCE)


def as_an_argument_of_a_coroutine(thing: Callable[[], Thing]) -> None:
    unsync(hold_async)(thing()).result(PATIENCE)


def of_a_continuation(thing: Callable[[], Thing]) -> None:
    held = thing()
    source: Unfuture[int] = Unfuture()
    target = source.map(lambda _, held=held: None)
    del held
    source.set_result(1)
    target.result(PATIENCE)


def of_a_continuation_that_is_never_called(thing: Callable[[], Thing]) -> None:
    held = thing()
    source: Unfuture[int] = Unfuture()
    source.map(lambda _, held=held: None)
    del held
    source.cancel()


def of_a_callback(thing: Callable[[], Thing]) -> None:
    held = thing()
    unfuture: Unfuture[int] = Unfuture()
    unfuture.add_done_callback(lambda _, held=held: None)
    del held
    unfuture.set_result(1)


def of_one_that_is_dropped_while_it_is_pending(thing: Callable[[], Thing]) -> None:
    held = thing()
    unfuture: Unfuture[int] = Unfuture()
    unfuture.add_done_callback(lambda _, held=held: None)


def of_a_job_that_is_cancelled(thing: Callable[[], Thing]) -> None:
    gate = threading.Event()
    busy = [unsync(gate.wait)(PATIENCE) for _ in range(64)]
    call = unsync(hold)(thing())
    call.cancel()
    gate.set()
    for each in busy:
        each.result(PATIENCE)


PLACES = [
    as_a_result,
    as_a_result_that_nobody_looks_at,
    as_an_argument_of_a_thread_function,
    as_an_argument_of_a_coroutine,
    of_a_continuation,
    of_a_continuation_that_is_never_called,
    of_a_callback,
    of_one_that_is_dropped_while_it_is_pending,
    of_a_job_that_is_cancelled,
]


def settle(condition: Callable[[], object]) -> None:
    def is_so() -> bool:
        if not WITH_GIL:  # things die in the threads that made them
            unsync(give)(1).result(PATIENCE)
            unsync(hold)(1).result(PATIENCE)
        collect()
        return bool(condition())

    wait_until(is_so)


@pytest.mark.parametrize("place", PLACES)
def test_one_that_makes_calls(place: Callable[[Callable[[], Thing]], None]) -> None:
    calls: list[Unfuture[Any]] = []
    outcome: Unfuture[str] = Unfuture()
    following = outcome.then(lambda source: source.result() + " was heard")

    def action() -> None:
        calls.append(unsync(give)("coroutine"))
        calls.append(unsync(hold)(None))
        calls.append(calls[0].then(lambda source: source.result()))
        outcome.set_result("its end")

    place(lambda: Thing(action))
    settle(outcome.done)
    assert [call.result(PATIENCE) for call in calls] == ["coroutine", None, "coroutine"]
    assert following.result(PATIENCE) == "its end was heard"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_fails(
    place: Callable[[Callable[[], Thing]], None], kind: type[BaseException]
) -> None:
    died = threading.Event()

    def action() -> None:
        died.set()
        raise kind("in a finalizer")

    place(lambda: Thing(action))
    settle(died.is_set)
    assert unsync(give)(1).result(PATIENCE) == 1
    assert unsync(int)("2").result(PATIENCE) == 2


# Objects that come back to the library as they die.


class Dying:
    """Its end uses everything that its Unfuture offers, and an executor."""

    deaths: ClassVar[list[bool]] = []

    def __init__(self) -> None:
        self.unfuture: Unfuture[Any] = Unfuture()

    def __call__(self, *args: object) -> None:
        pass

    def __del__(self) -> None:
        unfuture = self.unfuture
        unfuture.add_done_callback(repr)
        unfuture.add_done_callback(id)
        unfuture.remove_done_callback(repr)
        unfuture.then(id).cancel()
        unfuture.cancel()
        assert Unfuture.from_value(1).result() == 1
        self.deaths.append(unfuture.done())


def _die_as_a_result() -> Unfuture[Any]:
    dying = Dying()
    unfuture = dying.unfuture
    Unfuture.from_value(dying)
    return unfuture


def _die_as_its_own_argument() -> Unfuture[Any]:
    with ThreadExecutor(max_workers=1) as executor:
        gate = threading.Event()
        executor.submit(gate.wait, PATIENCE)
        dying = Dying()
        dying.unfuture = unfuture = executor.submit(id, dying)
        del dying
        unfuture.cancel()
        gate.set()
    return unfuture


def _die_as_the_argument_of_a_coroutine() -> Unfuture[Any]:
    async def function(argument: Dying) -> None: ...

    dying = Dying()
    unfuture: Unfuture[Any] = dying.unfuture
    unsync(function)(dying).result(PATIENCE)
    return unfuture


def _die_as_a_removed_callback() -> Unfuture[Any]:
    dying = Dying()
    unfuture = dying.unfuture
    unfuture.add_done_callback(dying)
    unfuture.remove_done_callback(dying)
    return unfuture


def _die_as_a_called_callback() -> Unfuture[Any]:
    dying = Dying()
    unfuture = dying.unfuture
    unfuture.add_done_callback(dying)
    del dying
    unfuture.set_result(1)
    return unfuture


def _die_as_a_continuation() -> Unfuture[Any]:
    dying = Dying()
    unfuture = dying.unfuture
    unfuture.then(dying)
    del dying
    unfuture.cancel()
    return unfuture


def _die_as_a_refused_result() -> Unfuture[Any]:
    dying = Dying()
    unfuture = dying.unfuture
    unfuture.set_result(1)
    with pytest.raises(InvalidStateError):
        unfuture.set_result(dying)
    return unfuture


@pytest.mark.parametrize(
    "die",
    [
        _die_as_a_result,
        _die_as_its_own_argument,
        _die_as_the_argument_of_a_coroutine,
        _die_as_a_removed_callback,
        _die_as_a_called_callback,
        _die_as_a_continuation,
        _die_as_a_refused_result,
    ],
)
def test_an_object_that_uses_the_library_as_it_dies_blocks_nobody(
    die: Callable[[], Unfuture[Any]], in_thread: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[bool] = []
    monkeypatch.setattr(Dying, "deaths", deaths)

    def run() -> None:
        unfuture = die()
        collect()
        wait_until(lambda: deaths, "the object's end")
        assert unfuture.done()

    in_thread(run).join(PATIENCE)
    assert deaths == [True]
