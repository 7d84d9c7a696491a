"""A pytest plugin: a test fails that leaves work behind, or a call whose failure nobody looked at.

In `conftest.py`:

    pytest_plugins = ["unsync.pytest_plugin"]

Both are found after each test, in the teardown of a fixture that comes before all others, and so
ends after them. What was pending before the test is none of its business. How long to wait for the
work, in seconds, is pytest's setting `unsync_timeout`: 10 if it is left away. After a run that was
interrupted nothing is looked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from unsync import _drain, _exit
from unsync._backend import Unfuture, take_unseen
from unsync._common import is_unseen_message, monotonic
from unsync.unsync import ambient_mailbox

__all__ = [
    "pytest_addoption",
    "pytest_configure",
    "pytest_sessionfinish",
    "unsync_leaves_nothing",
]

_TIMEOUT = "10"

# Set when the run is over. The fixture of a test that is torn down only then, since the test was
# interrupted, looks for nothing: Ctrl-C must not wait for what it has interrupted, nor is there
# anybody left who would report what is raised.
_is_over = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "unsync_timeout", "seconds that a test's work may go on after it", default=_TIMEOUT
    )


def pytest_configure(config: pytest.Config) -> None:
    _timeout(config)  # not at each test


@pytest.hookimpl(tryfirst=True)  # before what is left to be torn down is
def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_is_over] = True


def _timeout(config: pytest.Config) -> float:
    """:raises pytest.UsageError: if it is no number, or less than 0."""
    given = config.getini("unsync_timeout")
    try:
        timeout = float(given)
    except ValueError:
        timeout = math.nan
    if not timeout >= 0:  # as nan is not
        raise pytest.UsageError(
            f"unsync_timeout must be a number of seconds, at least 0, not {given!r}"
        )
    return timeout


class _Listener(logging.Handler):
    """Hears of failed calls that were dropped before anybody looked."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None and is_unseen_message(record.getMessage()):
            failure = record.exc_info[1]
            if failure is not None:
                self.failures.append(failure)


@pytest.fixture(autouse=True)
def unsync_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """See above.

    :raises ExceptionGroup: after the test, of the failures that nobody looked at.
    """
    timeout = _timeout(request.config)
    before = {*_drain.pending_now(ambient_mailbox())}
    with _heard() as heard:
        yield
        if request.config.stash.get(_is_over, False):
            return
        left = _wait(before, timeout)
        # A call that was dropped may have been freed just now: the loop is told of its failure.
        _drain.pending_now(ambient_mailbox())
    unseen: list[Any] = [take_unseen(each) for each in _exit.all_unfutures()]
    failures = [each for each in [*heard, *unseen] if each is not None]
    if failures:
        raise BaseExceptionGroup(
            f"calls of this test failed, and nobody looked: {len(failures)}", failures
        )
    if left:
        pytest.fail(
            f"work of this test had not ended {timeout:g} s after it: {_drain.summary(left)}",
            pytrace=False,
        )


@contextmanager
def _heard() -> Iterator[list[BaseException]]:
    """The failures that are reported meanwhile."""
    listener = _Listener()
    # The first is that of the ambient loop's own exception handler.
    loggers = [logging.getLogger(name) for name in ("asyncio", "unsync")]
    for logger in loggers:
        logger.addHandler(listener)
    try:
        yield listener.failures
    finally:
        for logger in loggers:
            logger.removeHandler(listener)


def _wait(before: set[Unfuture[Any]], timeout: float) -> list[Unfuture[Any]]:
    """What has not ended after so many seconds, of what was not pending before."""
    until = monotonic() + timeout
    while True:
        left = [each for each in _drain.pending_now(ambient_mailbox()) if each not in before]
        if not left or not _drain.wait_for_end(left[0], until):
            return left
