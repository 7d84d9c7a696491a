"""Picks the core: the compiled one where it is there, else its twin in plain Python.

`UNSYNC_NO_EXTENSIONS`, if it is set and not empty, selects the fallback, as PyPy does by itself. So
do sub-interpreters: the compiled core belongs to one interpreter of a process. And so does gevent's
or eventlet's monkey patching, which makes greenlets of threads: the compiled core's locks are the
system's, which hold up all of them.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from unsync._common import GREEN_BY

__all__ = [
    "ACCELERATED",
    "BIND_CLASS",
    "BIND_INSTANCE",
    "BIND_NOTHING",
    "Batch",
    "Counter",
    "JobQueue",
    "Launcher",
    "Mailbox",
    "Route",
    "Unfuture",
    "after_fork",
    "are_all_of",
    "call_each",
    "fill_batches",
    "in_home_thread",
    "name_of_call",
    "set_home",
    "show_to_collector",
    "take_unseen",
    "tell_watcher",
    "waiting_upon",
    "watch_calls",
    "when_done",
    "when_told",
]

ACCELERATED: bool
"""Whether the compiled core is in use."""

WHY_PURE: str | None
"""Why it is not, for people to read; None if it is."""


def _why_not() -> str | None:
    if os.environ.get("UNSYNC_NO_EXTENSIONS"):
        return "UNSYNC_NO_EXTENSIONS asks for it"
    if sys.implementation.name != "cpython":
        return f"this is {sys.implementation.name}"
    if GREEN_BY is not None:
        return f"{GREEN_BY} has made greenlets of the threads"
    return None


WHY_PURE = _why_not()
if TYPE_CHECKING or WHY_PURE is not None:
    from unsync import _core_py as _core

    ACCELERATED = False
else:
    try:
        import unsync._core as _core

        ACCELERATED = True
    except ImportError as exc:
        # These two are quiet; one that is there and does not load is a fault to see.
        was_not_built = isinstance(exc, ModuleNotFoundError) and exc.name == "unsync._core"
        is_of_another_interpreter = not was_not_built and "interpreter" in str(exc)
        if not (was_not_built or is_of_another_interpreter):
            raise
        from unsync import _core_py as _core

        ACCELERATED = False
        WHY_PURE = "this is a sub-interpreter" if not was_not_built else "the other was not built"

BIND_CLASS = _core.BIND_CLASS
BIND_INSTANCE = _core.BIND_INSTANCE
BIND_NOTHING = _core.BIND_NOTHING
Batch = _core.Batch
Counter = _core.Counter
JobQueue = _core.JobQueue
Launcher = _core.Launcher
Mailbox = _core.Mailbox
Route = _core.Route
Unfuture = _core.Unfuture
after_fork = _core.after_fork
are_all_of = _core.are_all_of
call_each = _core.call_each
fill_batches = _core.fill_batches
in_home_thread = _core.in_home_thread
name_of_call = _core.name_of_call
set_home = _core.set_home
show_to_collector = _core.show_to_collector
take_unseen = _core.take_unseen
tell_watcher = _core.tell_watcher
waiting_upon = _core.waiting_upon
watch_calls = _core.watch_calls
when_done = _core.when_done
when_told = _core.when_told
