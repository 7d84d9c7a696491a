"""anyio: a blocking portal to a loop in a thread, and `to_thread.run_sync`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, ClassVar

import anyio.to_thread
from anyio.from_thread import start_blocking_portal

from peers import base
from peers.standard_library import workers


class Anyio(base.Peer):
    modules = "anyio.from_thread, anyio.to_thread"
    reasons: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("function_each", "function_fan_out"), "calls threads from a loop only"),
        **dict.fromkeys(("then_each", "then_chain"), "has no chaining"),
        **dict.fromkeys(
            ("loop_coroutine", "loop_gather_coroutines"), "in a loop a coroutine is just awaited"
        ),
        **dict.fromkeys(("set_result", "pending"), "has no futures of its own"),
        "decoration": "marks nothing",
    }

    def __init__(self) -> None:
        self.manager = start_blocking_portal()
        self.portal = self.manager.__enter__()

    def close(self) -> None:
        self.manager.__exit__(None, None, None)

    def coroutine(self) -> Future[int]:
        future: Future[int] = self.portal.start_task_soon(base.coroutine)
        return future

    def yielding(self) -> Future[int]:
        future: Future[int] = self.portal.start_task_soon(base.yielding)
        return future

    async def awaited_function(self) -> int:
        value: int = await anyio.to_thread.run_sync(base.function)
        return value

    async def within_limit(self, work: Coroutine[Any, Any, float]) -> float:
        """As many threads as the others have."""
        anyio.to_thread.current_default_thread_limiter().total_tokens = workers()
        return await work

    def in_the_loop(self, work: Coroutine[Any, Any, float]) -> float:
        seconds: float = self.portal.call(self.within_limit, work)
        return seconds

    def in_own_loop(self, work: Coroutine[Any, Any, float]) -> float:
        return asyncio.run(self.within_limit(work))
