"""This project. The clients live in the ambient loop, and functions run in its threads."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from unsync import unsync
from unsync.executors import ThreadExecutor

CLIENTS = "kept"

if os.environ.get("SERVICE_LOOP") == "uvloop":
    import uvloop

    unsync.loop_factory = uvloop.new_event_loop


def one(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    marked = unsync(function)
    return lambda *values: marked(*values).result()


def many(
    function: Callable[[Any], Coroutine[Any, Any, Any]],
) -> Callable[[Iterable[Any]], list[Any]]:
    marked = unsync(function)
    return lambda values: [call.result() for call in [marked(value) for value in values]]


def close() -> None:
    unsync.shutdown(10)


def prepare(threads: int) -> None:
    unsync.thread_executor = ThreadExecutor(threads)


def offload(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    marked: Callable[..., Awaitable[Any]] = unsync(function)
    return marked
