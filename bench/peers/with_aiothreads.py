"""aiothreads: `threaded` functions, to be awaited in a loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from aiothreads import threaded, threaded_iterable

from peers import base
from peers.standard_library import workers


class Aiothreads(base.Peer):
    modules = "aiothreads"
    reasons: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            (
                "coroutine_each",
                "coroutine_fan_out",
                "yielding_each",
                "yielding_fan_out",
                "producers",
                "call",
            ),
            "coroutines are called from its own threads only",
        ),
        **dict.fromkeys(("function_each", "function_fan_out"), "calls threads from a loop only"),
        **dict.fromkeys(("then_each", "then_chain"), "has no chaining"),
        **dict.fromkeys(
            (
                "loop_function",
                "loop_gather_functions",
                "loop_coroutine",
                "loop_gather_coroutines",
                "set_result",
            ),
            "has no loop of its own",
        ),
        "pending": "has no futures of its own",
        "decoration": "refuses coroutine functions",
    }
    awaited_function: Any = staticmethod(threaded(base.function))

    # As far ahead as ours.
    values: Any = staticmethod(threaded_iterable(max_size=64)(base.values))

    def stream_to_loop(self, count: int) -> float:
        return self.in_own_loop(base.read_in_loop(self.values, count))

    async def with_executor(self, work: Coroutine[Any, Any, float]) -> float:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(workers()))
        return await work

    def in_own_loop(self, work: Coroutine[Any, Any, float]) -> float:
        return asyncio.run(self.with_executor(work))
