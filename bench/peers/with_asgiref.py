"""asgiref: `async_to_sync`, which makes a loop for each call, and `sync_to_async`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from asgiref.sync import async_to_sync, sync_to_async

from peers import base
from peers.standard_library import workers


class Asgiref(base.Peer):
    modules = "asgiref.sync"
    reasons: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("coroutine_fan_out", "yielding_fan_out", "producers", "call"),
            "a call from a thread blocks until it is done",
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
        "pending": "has no futures",
    }

    def __init__(self) -> None:
        self.blocking: Any = async_to_sync(base.coroutine)
        self.blocking_yielding: Any = async_to_sync(base.yielding)
        self.awaited_function: Any = sync_to_async(
            base.function, thread_sensitive=False, executor=ThreadPoolExecutor(workers())
        )

    def coroutine_each(self, count: int) -> float:
        return base.block_for_each(self.blocking, count)

    def yielding_each(self, count: int) -> float:
        return base.block_for_each(self.blocking_yielding, count)

    def decoration(self, count: int) -> float:
        return base.decorations(async_to_sync, count)
