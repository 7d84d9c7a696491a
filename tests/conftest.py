"""What the tests share. The same suite runs on both cores; `make test` chooses the core.

`UNSYNC_TEST_CORE` (compiled or pure) says which core is meant, so that a run on the wrong one
cannot pass unnoticed; `UNSYNC_TEST_INSTALLED`, that it is to be one that was installed, not the
source tree's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import unsync as package
from unsync import _travel, unsync

Loop = TypeVar("Loop", bound=asyncio.AbstractEventLoop)

CORE = "compiled" if package.ACCELERATED else "pure"

WITH_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()

# Long enough for a loaded machine; a test that waits so long for something has failed.
PATIENCE = 20.0


def pytest_report_header() -> str:
    return f"unsync: {CORE} core from {Path(package.__file__).parent}"


def pytest_sessionstart() -> None:
    meant = os.environ.get("UNSYNC_TEST_CORE")
    if meant is not None and meant != CORE:
        raise pytest.UsageError(f"the {meant} core was to be tested, but this is the {CORE} one")
    where = Path(package.__file__).parent.parent
    installed = {Path(sysconfig.get_path(each)).resolve() for each in ("purelib", "platlib")}
    if os.environ.get("UNSYNC_TEST_INSTALLED") and where.resolve() not in installed:
        raise pytest.UsageError(f"what was installed was to be tested, but unsync is from {where}")


def pytest_collection_finish() -> None:
    """What is imported now stays: the tests' many garbage collections need not look at it."""
    if hasattr(gc, "freeze"):
        gc.collect()
        gc.freeze()


# A test may be run by several threads at once, which then share its fixtures. These may be shared.
SHAREABLE = {"request", "loop", "foreign", "outcomes", "without_cloudpickle"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With pytest-run-parallel: which tests run as always, in one thread."""
    if not config.pluginmanager.hasplugin("run-parallel"):
        return
    for item in items:
        assert isinstance(item, pytest.Function)
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if item.get_closest_marker("alone") or {*item.fixturenames} - {*parameters} - SHAREABLE:
            item.add_marker("thread_unsafe")


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


# What multiprocessing says, rarely, of its own bookkeeping (once in some fifty programs that lose a
# pool of spawned processes, without the GIL); and what CPython 3.15 says of the main modules that
# it imports in processes.
QUIET = (
    "-W",
    "ignore:ResourceTracker called reentrantly:UserWarning",
    "-W",
    "ignore:Module globals is missing:DeprecationWarning",
)


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
            [sys.executable, *QUIET, *flags, str(path)],
            cwd=tmp_path,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run


def block_cloudpickle() -> None:
    """From now on this process is one in which cloudpickle is not installed."""
    _travel._value_pickler.cache_clear()
    sys.modules["cloudpickle"] = None  # type: ignore[assignment]


@pytest.fixture(scope="module")
def without_cloudpickle() -> Iterator[None]:
    """Here, that is; processes are told by their initializer."""
    known = {name: sys.modules[name] for name in sys.modules if name.startswith("cloudpickle")}
    block_cloudpickle()
    yield
    del sys.modules["cloudpickle"]
    sys.modules.update(known)


def wait_until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Waits for what happens in another thread and gives no event; fails after PATIENCE seconds."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, f"{what} did not come true in {PATIENCE} s"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def spawned() -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """One pool for the tests that do not care how it was made, without cloudpickle."""
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(1, context, block_cloudpickle)
    yield executor
    executor.shutdown(wait=False, cancel_futures=True)
    try:
        wait_until(lambda: not multiprocessing.active_children(), "the end of the worker")
    finally:
        for process in multiprocessing.active_children():
            process.kill()


@pytest.fixture
def pool(
    spawned: concurrent.futures.ProcessPoolExecutor,
) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    unsync.process_executor = spawned
    yield spawned
    unsync.process_executor = None


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


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that PostgreSQL's own user gets through: those of `tmp_path` are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


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
