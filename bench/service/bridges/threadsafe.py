"""`asyncio.run_coroutine_threadsafe`, with a loop in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterable
from functools import cache
from typing import Any

CLIENTS = "kept"


@cache
def loop() -> asyncio.AbstractEventLoop:
    """Made on first use, which is after the fork."""
    if os.environ.get("SERVICE_LOOP") == "uvloop":
        import uvloop

        made: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    else:
        made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, daemon=True).start()
    return made


def one(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    return lambda *values: asyncio.run_coroutine_threadsafe(function(*values), loop()).result()


def many(
    function: Callable[[Any], Coroutine[Any, Any, Any]],
) -> Callable[[Iterable[Any]], list[Any]]:
    def call(values: Iterable[Any]) -> list[Any]:
        start, here = asyncio.run_coroutine_threadsafe, loop()
        return [made.result() for made in [start(function(value), here) for value in values]]

    return call


def close() -> None:
    loop().call_soon_threadsafe(loop().stop)
