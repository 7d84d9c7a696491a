"""What all tests share: the fixtures, and the check that the right package is tested.

Each folder has a conftest of its own beside this one, for what only its tests need.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import under_test
from support.needs import pytest_terminal_summary  # noqa: F401  a hook
from support.processes import block_cloudpickle
from support.waiting import PATIENCE, wait_until

from unsync import unsync


def pytest_configure(config: pytest.Config) -> None:
    """Makes the profile that hypothesis is about to look for, where somebody asks for one."""
    if config.getoption("--hypothesis-profile", default=None):
        import hypothesis

        hypothesis.settings.register_profile("full", max_examples=1000, deadline=None)


def pytest_report_header() -> str:
    return f"unsync: {under_test.CORE} core from {under_test.FOLDER}"


def pytest_sessionstart() -> None:
    wrong = under_test.wrong_package()
    if wrong is not None:
        raise pytest.UsageError(wrong)
    # What a shell starts in the background ignores SIGINT, and so would all programs that tests
    # start and send it to.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# A test may be run by several threads at once, which then share its fixtures. These may be shared.
# Of the others some set what all threads share, as `fresh` does; some are an executor or a folder
# of the test's own; and most start programs, as `run_python` does: four threads would only start
# four of them, each in a process of its own.
SHAREABLE = {
    "_foreign_loop",
    "_frozen",
    "_hurry",
    "_leaves_nothing",
    "_looks_often",
    "closed_in_the_end",
    "foreign",
    "in_thread",
    "loop",
    "outcomes",
    "pool",
    "request",
    "spawned",
    "without_cloudpickle",
}


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
    the interpreter, `env` is added to the environment. It must end within twice PATIENCE seconds:
    what it waits for by itself fails before.
    """

    def run(
        program: str, *flags: str, timeout: float = 2 * PATIENCE, env: dict[str, str] | None = None
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


@pytest.fixture(scope="module")
def without_cloudpickle() -> Iterator[None]:
    """Here, that is; processes are told by their initializer."""
    known = {name: sys.modules[name] for name in sys.modules if name.startswith("cloudpickle")}
    block_cloudpickle()
    yield
    del sys.modules["cloudpickle"]
    sys.modules.update(known)


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
