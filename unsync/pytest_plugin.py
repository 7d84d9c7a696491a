"""A pytest plugin: a test fails that leaves work behind, or a call whose failure nobody looked at.

In `conftest.py`:

    pytest_plugins = ["unsync.pytest_plugin"]

Both are found after each test, in the teardown of a fixture that comes before all others, and so
ends after them. What was pending before the test is none of its business. How long to wait for the
work, in seconds, is pytest's setting `unsync_timeout`: 10 if it is left away. After a run that was
interrupted nothing is looked for.

Fixtures of a wider scope (class, module, package, session) answer for their own calls, in their own
teardown. Who made a call is known by its context, as context variables are: so a failure that comes
late, when its maker is over, is put down to no other test.
"""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import pytest

from unsync import _drain, _exit
from unsync._backend import Unfuture, take_unseen
from unsync._common import is_unseen_message, monotonic
from unsync.unsync import ambient_mailbox

__all__ = [
    "pytest_addoption",
    "pytest_configure",
    "pytest_fixture_setup",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "pytest_testnodedown",
    "pytest_unconfigure",
    "unsync_leaves_nothing",
]

_TIMEOUT = "10"


class _Maker:
    """Who makes calls: a test with its own fixtures, or a fixture of a wider scope."""

    def __init__(self, name: str, is_test: bool) -> None:
        self.name = name
        self.is_test = is_test
        # Of calls that it made, and nobody looked at.
        self.failures: list[BaseException] = []
        self.is_over = False
        # Whether it has left work behind: what it has called may fail when it is over.
        self.has_left_work = False

    def has_left_nothing(self) -> bool:
        return self.is_test and self.is_over and not self.has_left_work


class _Watch(logging.Handler):
    """Hears of failed calls that were dropped before anybody looked, and knows who made them."""

    def __init__(self) -> None:
        super().__init__()
        # Set when the run is over. What is torn down only then, since it was interrupted, looks for
        # nothing: Ctrl-C must not wait for what it has interrupted, nor is there anybody left who
        # would report what is raised.
        self.is_over = False
        # Whose code runs now in the main thread, each within the one before: a test, and a fixture
        # that is set up or torn down meanwhile.
        self._makers: list[_Maker] = []
        self._maker: ContextVar[_Maker | None] = ContextVar("unsync_pytest_maker", default=None)
        # What came when its maker was over, with the maker's name.
        self.late: list[tuple[str, BaseException]] = []
        # What there was at the end of the last test; and whether a wider fixture may have made more
        # since then.
        self._known: WeakSet[Unfuture[Any]] = WeakSet()
        self.has_set_up = True
        # What tests have left pending.
        self._left: WeakKeyDictionary[Unfuture[Any], _Maker] = WeakKeyDictionary()

    def emit(self, record: logging.LogRecord) -> None:
        """In the context of the call, in whatever thread."""
        if record.exc_info is not None and is_unseen_message(record.getMessage()):
            failure = record.exc_info[1]
            if failure is not None:
                self._put_down(failure, self._maker.get())

    def _put_down(self, failure: BaseException, maker: _Maker | None) -> None:
        now = self._makers[-1] if self._makers else None
        if maker is None or (maker.has_left_nothing() and now is not None):
            # A thread of the program has a context of its own; and a loop that runs for several
            # tests may have that of an earlier one, which has left nothing that could call now.
            maker = now
        if maker is None:
            self.late.append(("none of the tests", failure))
        elif maker.is_over:
            self.late.append((maker.name, failure))
        else:
            maker.failures.append(failure)

    def begin(self, maker: _Maker) -> None:
        self._makers.append(maker)
        self._maker.set(maker)

    def end(self) -> None:
        self._makers.pop()
        self._maker.set(self._makers[-1] if self._makers else None)

    def is_over_for(self, maker: _Maker, left: list[Unfuture[Any]]) -> None:
        maker.is_over = True
        maker.has_left_work = bool(left)
        self._left.update(dict.fromkeys(left, maker))

    def look_around(self) -> None:
        """What there is before a test is nothing that the test has made."""
        if self.has_set_up:
            self.has_set_up = False
            self._known.update(_exit.all_unfutures())

    def take_all_unseen(self, maker: _Maker) -> None:
        """At the end of a test: the failures whose Unfutures are still there."""
        for unfuture in _exit.all_unfutures():
            former = self._left.get(unfuture)
            if former is None and unfuture in self._known:
                continue  # of a fixture, for whoever asks it
            failure = take_unseen(unfuture)
            if failure is not None:
                self._put_down(failure, former or maker)
            self._known.add(unfuture)


_watch = pytest.StashKey[_Watch]()
_late = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "unsync_timeout", "seconds that a test's work may go on after it", default=_TIMEOUT
    )


def pytest_configure(config: pytest.Config) -> None:
    _timeout(config)  # not at each test
    watch = config.stash[_watch] = _Watch()
    config.stash[_late] = []
    for logger in _loggers():
        logger.addHandler(watch)


def pytest_unconfigure(config: pytest.Config) -> None:
    watch = config.stash.get(_watch, None)
    if watch is not None:
        for logger in _loggers():
            logger.removeHandler(watch)


def _loggers() -> list[logging.Logger]:
    # The first is that of the ambient loop's own exception handler.
    return [logging.getLogger(name) for name in ("asyncio", "unsync")]


@pytest.hookimpl(tryfirst=True)  # before what is left to be torn down is
def pytest_sessionfinish(session: pytest.Session) -> None:
    config: Any = session.config
    watch: _Watch = config.stash[_watch]
    watch.is_over = True
    late: list[str] = config.stash[_late]
    late += [_report(maker, failure) for maker, failure in watch.late]
    if hasattr(config, "workeroutput"):  # one of pytest-xdist's processes, which prints nothing
        config.workeroutput["unsync_late"] = late
    if late and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Of pytest-xdist: what one of its processes has to report."""
    node.config.stash[_late] += getattr(node, "workeroutput", {}).get("unsync_late", ())


def _report(maker: str, failure: BaseException) -> str:
    trace = "".join(traceback.format_exception(failure))
    return f"a call of {maker} failed when that was over, and nobody looked:\n{trace}"


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    late = config.stash[_late]
    if late:
        terminalreporter.section("unsync", red=True)
        for text in late:
            terminalreporter.write_line(text)


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


@pytest.fixture(autouse=True)
def unsync_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """See above.

    :raises ExceptionGroup: after the test, of the failures that nobody looked at.
    """
    watch = request.config.stash[_watch]
    maker = _Maker(request.node.nodeid, is_test=True)
    watch.look_around()
    with _work_of(watch, maker, _timeout(request.config)) as left:
        yield
    if not watch.is_over:
        _raise_for(maker, "this test", left, _timeout(request.config))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Has a fixture of a wider scope answer for the calls of its set-up and teardown."""
    if fixturedef.scope == "function":
        return (yield)
    watch = request.config.stash[_watch]
    watch.has_set_up = True
    maker = _Maker(f"the fixture {fixturedef.argname}", is_test=False)
    timeout = _timeout(request.config)
    teardown = _work_of(watch, maker, timeout)
    begun: list[list[Unfuture[Any]]] = []

    def begin_teardown() -> None:
        begun.append(teardown.__enter__())

    def end_teardown() -> None:
        if begun:
            teardown.__exit__(None, None, None)
            if not watch.is_over:
                _raise_for(maker, maker.name, begun[0], timeout)

    fixturedef.addfinalizer(end_teardown)  # the last one is called first
    watch.begin(maker)
    try:
        return (yield)
    finally:
        watch.end()
        fixturedef.addfinalizer(begin_teardown)


@contextmanager
def _work_of(watch: _Watch, maker: _Maker, timeout: float) -> Iterator[list[Unfuture[Any]]]:
    """In here runs what makes calls; at the end the list has what of them has not ended in time."""
    before = WeakSet(_drain.pending_now(ambient_mailbox))
    left: list[Unfuture[Any]] = []
    watch.begin(maker)
    try:
        yield left
    finally:
        try:
            if not watch.is_over:
                left += _wait(before, timeout)
                # A call that was dropped may have been freed just now: the loop is told of its
                # failure.
                _drain.pending_now(ambient_mailbox)
                if maker.is_test:
                    watch.take_all_unseen(maker)
        finally:
            watch.end()
            watch.is_over_for(maker, left)


def _raise_for(maker: _Maker, name: str, left: list[Unfuture[Any]], timeout: float) -> None:
    if maker.failures:
        raise BaseExceptionGroup(
            f"calls of {name} failed, and nobody looked: {len(maker.failures)}", maker.failures
        )
    if left:
        pytest.fail(
            f"work of {name} had not ended {timeout:g} s after it: {_drain.summary(left)}",
            pytrace=False,
        )


def _wait(before: WeakSet[Unfuture[Any]], timeout: float) -> list[Unfuture[Any]]:
    """What has not ended after so many seconds, of what was not pending before."""
    until = monotonic() + timeout
    while True:
        left = [each for each in _drain.pending_now(ambient_mailbox) if each not in before]
        if not left or not _drain.wait_for_end(left[0], until):
            return left
