"""A coroutine in an event loop of its own, with an end to its waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from support.waiting import PATIENCE

Main = Callable[[], Coroutine[Any, Any, Any]]


async def bounded(waiting: Awaitable[Any]) -> Any:
    """Fails after PATIENCE seconds, and stops the loop if not even that gets through."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.stop()
        loop.call_later(1, stop)

    loop.call_later(2 * PATIENCE, stop)
    return await asyncio.wait_for(waiting, PATIENCE)


def in_own_loop(main: Main) -> Any:
    return asyncio.run(bounded(main()))
