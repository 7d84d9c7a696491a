"""What the tests share. The same suite runs on both cores; `make test` chooses the core.

`UNSYNC_TEST_CORE` (compiled or pure) says which core is meant, so that a run on the wrong one
cannot pass unnoticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import unsync as package
from unsync import unsync

Loop = TypeVar("Loop", bound=asyncio.AbstractEventLoop)

CORE = "compiled" if package.ACCELERATED else "pure"

# Long enough for a loaded machine; a test that waits so long for something has failed.
PATIENCE = 20.0


def pytest_report_header() -> str:
    return f"unsync: {CORE} core from {Path(package.__file__).parent}"


def pytest_sessionstart() -> None:
    meant = os.environ.get("UNSYNC_TEST_CORE")
    if meant is not None and meant != CORE:
        raise pytest.UsageError(f"the {meant} core was to be tested, but this is the {CORE} one")


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing has been started when the test begins, and nothing is left when it ends."""

    def reset() -> None:
        assert unsync.shutdown(timeout=PATIENCE)
        unsync.thread_executor = None
        unsync.process_executor = None
        unsync.loop_factory = None

    reset()
    yield
    reset()


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program in an interpreter of its own, on the core under test.

    The program is written to a file in a folder of its own and run from there; `flags` go to
    the interpreter, `env` is added to the environment. It must end within PATIENCE seconds.
    """

    def run(
        program: str, *flags: str, timeout: float = PATIENCE, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "program.py"
        path.write_text(textwrap.dedent(program))
        return subprocess.run(
            [sys.executable, *flags, str(path)],
            cwd=tmp_path,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run


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


def collect() -> None:
    """Collects garbage, on interpreters that need more than one round too."""
    for _ in range(3):
        gc.collect()


@pytest.fixture
def in_thread() -> Iterator[Callable[[Callable[[], object]], threading.Thread]]:
    """Starts functions in plain threads, which must have ended when the test does."""
    threads: list[threading.Thread] = []

    def start(function: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=function, daemon=True)
        thread.start()
        threads.append(thread)
        return thread

    yield start
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), f"{thread} did not end"
