"""asgiref. In a WSGI server each call has a loop of its own, so clients are made for each call.

Several calls at once are one call of a coroutine that gathers them: it knows no other way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async

CLIENTS = "afresh"


def one(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    called: Callable[..., Any] = async_to_sync(function)
    return called


def many(
    function: Callable[[Any], Coroutine[Any, Any, Any]],
) -> Callable[[Iterable[Any]], list[Any]]:
    from service.clients import afresh

    assert function is afresh.get
    return one(afresh.get_at_once)


def close() -> None:
    """Each loop has ended with its call."""


def prepare(threads: int) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads))


def offload(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    # Its default, thread_sensitive=True, would run all calls in one thread.
    called: Callable[..., Awaitable[Any]] = sync_to_async(function, thread_sensitive=False)
    return called
