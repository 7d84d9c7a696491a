"""The end of the interpreter: what functions were given is done, and what is left is told.

As in `concurrent.futures`, functions that threads and processes have accepted are finished; as in
`asyncio.run`, coroutines that are left are cancelled and waited for. In this order:

1. Before Python joins the threads of the program: functions are waited for, with what they call.
2. Python joins those threads; what they call works as always.
3. After that functions are waited for again. Then coroutines are cancelled, and streams closed;
   what these call is waited for as well.

The first step is a hook of `threading`, as those of `concurrent.futures` are, and comes before
them; the third one is a hook of `atexit`. Both are called in the main thread, and this module is
imported by the first of them. Ctrl-C ends the wait, and `unsync.exit_timeout` bounds it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from unsync import _common, executors
from unsync._backend import Unfuture, name_of_call, take_unseen
from unsync._common import (
    CANCELLED,
    FAILED,
    FINISHED,
    came_too_late,
    is_of_the_exit,
    log_unseen_failure,
    logger,
    monotonic,
)
from unsync._drain import Drain, summary

if TYPE_CHECKING:
    from unsync._ambient import Ambient

__all__ = ["End", "all_unfutures", "report_failures"]

# After so many seconds a line on stderr says what is waited for.
_SILENCE = 2.0
# How long coroutines have, in seconds, when nobody is to wait for them any more.
_GRACE = 1.0


class End:
    """The end of this process, from the first hook to the last."""

    def __init__(
        self, ambient: Ambient, pool: executors.ProcessPool, timeout: float | None
    ) -> None:
        self._ambient = ambient
        self._pool = pool
        self._began = monotonic()
        self._until = None if timeout is None else self._began + timeout
        self._has_told = False
        # A Ctrl-C came between two waits; the step that it came in is taken once more.
        self.is_interrupted = False
        # Nothing is waited for any more.
        self._gave_up = False

    def finish_functions(self) -> None:
        """Waits for the functions that were accepted so far, and for what they call."""
        if self._gave_up:
            return
        with Drain(None, only_functions=True) as drain:
            try:
                if not self.is_interrupted and self._wait_for(drain):
                    return
            except KeyboardInterrupt:
                pass
            self._give_up(drain.pending())

    def finish_processes(self) -> None:
        """The same, where `concurrent.futures` would end the pool next: it takes no more work."""
        self.finish_functions()
        self._end_processes()

    def finish(self) -> None:
        """The rest: the threads of the program have ended."""
        self.finish_functions()
        _common.exiting = True
        if not self._gave_up:
            try:
                self._cancel_coroutines()
                self._close_streams()
            except KeyboardInterrupt:
                self._give_up([])
            self.finish_functions()
        self._end_executors()
        report_failures()

    def _wait_in_silence(
        self,
        wait: Callable[[float | None], bool],
        until: float,
        left: Callable[[], list[Unfuture[Any]]],
        what: str,
    ) -> bool:
        """Whether it was over by then. If not it is told, once in all, what is still waited for.

        :param wait: waits until then, and says whether it is over.
        """
        if self._has_told:
            return False
        if wait(until if self._until is None else min(until, self._until)):
            return True
        if (self._until is None or monotonic() < self._until) and (calls := left()):
            self._has_told = True
            bound = "" if self._until is None else ", and so does unsync.exit_timeout"
            _say(f"the exit waits for {what}{summary(calls)} (Ctrl-C ends the wait{bound})")
        return False

    def _wait_for(self, drain: Drain) -> bool:
        silence = self._began + _SILENCE
        return self._wait_in_silence(drain.wait, silence, drain.pending, "") or drain.wait(
            self._until
        )

    def _cancel_coroutines(self) -> None:
        ambient = self._ambient.begin_to_stop(self._until)
        if ambient is None:
            return
        silence = max(self._began + _SILENCE, monotonic() + _GRACE)
        live = ambient.mailbox.live
        what = "what was cancelled: "
        self._wait_in_silence(ambient.join, silence, lambda: list(live.values()), what)
        ambient.end(self._until)
        self._ambient.forget(ambient)
        self._tell_of_losses(ambient.given_up)

    def _close_streams(self) -> None:
        streams: Any = sys.modules.get("unsync.streams")
        if streams is not None:
            for channel in list(streams._InThreads.all):
                with suppress(Exception):  # there is no thread for it
                    channel.close()

    def _give_up(self, functions: list[Unfuture[Any]]) -> None:
        """Cancels what has not begun, and coroutines, and gives these a moment.

        :param functions: those whose calls have not ended.
        """
        _common.exiting = True
        executors.cancel_queued()
        self._pool.stop(0)
        until = monotonic() + _GRACE
        ambient = self._ambient.begin_to_stop(until)
        coroutines: list[Unfuture[Any]] = []
        if ambient is not None:
            with suppress(KeyboardInterrupt):  # again: without the moment
                ambient.hurry(until)
                ambient.end(until)
            self._ambient.forget(ambient)
            coroutines = ambient.given_up
        lost = [call for call in dict.fromkeys([*functions, *coroutines]) if _is_lost(call)]
        self._tell_of_losses(lost)
        for call in lost:
            take_unseen(call)  # it is told with the others
            # A thread of the program may wait for it, and Python for that thread.
            call._complete(CANCELLED, "the interpreter exits")
        self._gave_up = True

    def _tell_of_losses(self, lost: list[Unfuture[Any]]) -> None:
        if lost:
            _say(f"the exit lost {summary(lost)}")

    def _end_executors(self) -> None:
        self._end_processes()
        patience = 0.0 if self._gave_up else _GRACE
        executors.stop_threads(patience)
        self._ambient.stop(patience)

    def _end_processes(self) -> None:
        """They have nothing to do any more. On a busy machine even their end may take long."""
        try:
            self._pool.stop(0.0 if self._gave_up else _common.seconds_left(self._until))
        except KeyboardInterrupt:
            self._give_up([])


# The failures that nobody looked at. While a program runs, each is reported when its Unfuture is
# dropped; at the end those that are left are found by the garbage collector's list of all objects,
# so that calls pay nothing for it.

# So many of one kind are shown with their tracebacks, and so many kinds.
_SHOWN = 3
_KINDS = 10
# After the traceback of the failure that has ended the program: so many lines at most.
_LINES = 5


def report_failures() -> None:
    """By function and kind of exception, while there is an interpreter that can do so."""
    told = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    known = {*map(id, _related(told))}
    was_ended = told is not None and not _is_interactive()
    kinds: dict[tuple[str, type], list[tuple[Unfuture[Any], BaseException]]] = {}
    for unfuture in all_unfutures():
        failure = take_unseen(unfuture)
        if failure is None or came_too_late(failure):
            continue
        # A pool that breaks gives all of its calls the same one.
        if id(failure) not in known or isinstance(failure, BrokenExecutor):
            known.add(id(failure))
            kind = name_of_call(unfuture) or type(unfuture).__name__, type(failure)
            kinds.setdefault(kind, []).append((unfuture, failure))
    # In an order that is the same each time: the collector's is not.
    found = sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0][0]))
    shown = [] if was_ended else found[:_KINDS]
    for (name, _), failures in shown:
        for unfuture, failure in failures[:_SHOWN]:
            log_unseen_failure(unfuture, failure)
        if len(failures) > _SHOWN:
            _log_failures(name, failures[_SHOWN:], "and {} more {} of {}() failed with {}")
    rest = found[len(shown) :]
    lines = _LINES if len(rest) <= _LINES else _LINES - 1
    for (name, _), failures in rest[:lines]:
        _log_failures(name, failures, "nobody looked at it: {} {} of {}() failed with {}")
    if others := [failure for _, failures in rest[lines:] for failure in failures]:
        logger.error("and %d more calls of other functions failed", len(others))


def _is_interactive() -> bool:
    """Whether somebody types in the program, whom an exception that was shown has not ended.

    Prompts set `ps1`, those of Python, IPython and Jupyter.
    """
    return bool(sys.flags.interactive) or hasattr(sys, "ps1")


def all_unfutures() -> list[Unfuture[Any]]:
    return [each for each in gc.get_objects() if issubclass(type(each), Unfuture)]


def _related(failure: BaseException | None) -> list[BaseException]:
    """It, its causes and contexts."""
    found: list[BaseException] = []
    waiting = [failure]
    while waiting:
        each = waiting.pop()
        if each is not None and not any(each is other for other in found):
            found.append(each)
            waiting += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]
    return found


def _log_failures(
    name: str, failures: list[tuple[Unfuture[Any], BaseException]], text: str
) -> None:
    calls = "call" if len(failures) == 1 else "calls"
    logger.error(text.format(len(failures), calls, name, type(failures[0][1]).__qualname__))


def _is_lost(call: Unfuture[Any]) -> bool:
    """Whether it did not end by itself: processes that are terminated break their pool."""
    status, outcome = call._peek()
    return status != FINISHED and not (status == FAILED and not is_of_the_exit(outcome))


def _say(text: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # it is closed
            print(f"unsync: {text}", file=sys.stderr, flush=True)
