"""What the tests of the two cores need: little for the collector to look at, and no companion.

These tests collect garbage hundreds of times. With what other test files and heavy libraries left
in the process, each collection costs 80 ms of CPU instead of 2: two fifths of the suite's time.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import leftovers
from support.waiting import PATIENCE, collect

from unsync import executors, unsync
from unsync.executors import ThreadExecutor

# Libraries that are large, or that change how threads, loops or processes behave.
HEAVY = {"aiohttp", "celery", "django", "distributed", "fastapi", "flask", "loky", "numpy"}
# But for what pytest's plugins have brought: that of random orders seeds numpy where there is one.
HEAVY -= {*sys.modules}


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """What earlier files left alive is seen by no collection of this one.

    And what this one starts has ended at its end: the pools that its tests share, say.

    Tests of leaks and of the collector are in `tests/world/isolated`, where nothing is frozen.
    """
    present = sorted(HEAVY & {*sys.modules})
    assert not present, f"tests/core runs in a process that has imported {', '.join(present)}"
    if hasattr(gc, "freeze"):
        # Frozen they would wait for ever, and who drains for them: some executors of tests forget
        # their calls.
        executors.collect_forgotten_calls()
        gc.collect()
        gc.freeze()
    before = leftovers.threads()
    yield
    leftovers.wait_for_the_end_of("threads", leftovers.threads, before)


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves the process as it found it, so that their order does not matter.

    What a test puts back in time is no concern of this one, which is set up before all other
    fixtures of a test, and so ends after them.
    """
    before, threads, tasks = (
        leftovers.shared_state(request.module),
        leftovers.threads_of_no_pool(),
        leftovers.tasks(),
    )
    yield
    changes = leftovers.changes(before, leftovers.shared_state(request.module))
    assert not changes, "the test left changed: " + "; ".join(changes)
    leftovers.wait_for_the_end_of("threads", leftovers.threads_of_no_pool, threads)
    leftovers.wait_for_the_end_of("tasks", leftovers.tasks, tasks)


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """pytest's own, without what earlier tests have left.

    A failure that nobody looked at is reported when it dies. Where objects are not counted that is
    at some collection, which may be in the middle of another test: here it is before that begins.
    """
    if sys.implementation.name != "cpython":
        collect()
        if leftovers.the_ambient_loop() is not None:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), unsync.loop).result(PATIENCE)
        caplog.clear()
    return caplog


@pytest.fixture
def make_pool(fresh: None) -> Iterator[Callable[..., ThreadExecutor]]:
    """Makes a small thread executor and has unsync use it."""
    made: list[ThreadExecutor] = []

    def make(threads: int, **options: Any) -> ThreadExecutor:
        made.append(ThreadExecutor(threads, **options))
        unsync.thread_executor = made[-1]
        return made[-1]

    yield make
    for executor in made:
        executor.shutdown(wait=False, cancel_futures=True)
        assert executor.join(PATIENCE)
