"""How tests wait: for events, with patience, never for a length of time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from support.under_test import WITH_GIL

from unsync import unsync

Loop = TypeVar("Loop", bound=asyncio.AbstractEventLoop)

# In seconds. Long enough for a machine on which ten others want each core, where a process takes
# five seconds to start; a test that waits so long for something has failed. Programs that tests run
# as text have it as a number.
PATIENCE = 60.0


def wait_until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Waits for what happens in another thread and gives no event; fails after PATIENCE seconds."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, f"{what} did not come true in {PATIENCE} s"
        time.sleep(0.001)


def wait_until_suspended(name: str, count: int = 1) -> list[asyncio.Task[Any]]:
    """Waits for that many tasks of the ambient loop called `name` to wait; gives them all."""

    async def look() -> list[asyncio.Task[Any]]:
        return [task for task in asyncio.all_tasks() if task.get_name() == name]

    def found() -> list[asyncio.Task[Any]]:
        return asyncio.run_coroutine_threadsafe(look(), unsync.loop).result(PATIENCE)

    wait_until(lambda: len(found()) >= count, f"{name} to be suspended")
    return found()


@contextlib.contextmanager
def ambient_loop_held() -> Iterator[Callable[[], None]]:
    """Inside, the ambient loop starts nothing; unless what it gives is called before."""
    held, gate = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        assert gate.wait(PATIENCE)

    unsync.loop.call_soon_threadsafe(hold)
    assert held.wait(PATIENCE)
    try:
        yield gate.set
    finally:
        gate.set()


def running(loop: Loop) -> Iterator[Loop]:
    """The body of a fixture: the loop, running in a thread of its own until the test ends."""
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    loop.close()


def wait_until_gone(*references: weakref.ref[Any]) -> None:
    """Waits for the end of what other threads may hold for a moment more, on their way out.

    Without the GIL a thing that others let go dies when the thread that made it next runs Python
    code, so the ambient loop and a worker are given some.
    """

    async def step() -> None:
        pass

    def are_gone() -> bool:
        if not WITH_GIL:
            unsync(step)().result(PATIENCE)
            unsync(int)().result(PATIENCE)
        if sys.implementation.name != "cpython":
            collect()
        return all(reference() is None for reference in references)

    wait_until(are_gone, f"the end of {references}")


def collect() -> None:
    """Collects garbage, on interpreters that need more than one round too."""
    for _ in range(3):
        gc.collect()


class InterruptedLoop(asyncio.SelectorEventLoop):
    """Waking it from another thread raises a KeyboardInterrupt, so many times."""

    interrupts = 0

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        return super().call_soon_threadsafe(*args, **kwargs)
