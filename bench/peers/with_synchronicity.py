"""synchronicity: blocking interfaces, and futures, for coroutine functions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ClassVar

from synchronicity import Synchronizer

from peers import base


class Synchronicity(base.Peer):
    modules = "synchronicity"
    reasons: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            (
                "function_each",
                "function_fan_out",
                "loop_function",
                "loop_gather_functions",
                "foreign_function",
                "foreign_gather",
                "foreign_64",
            ),
            "runs coroutine functions only",
        ),
        **dict.fromkeys(("then_each", "then_chain"), "has no chaining"),
        **dict.fromkeys(
            ("loop_coroutine", "loop_gather_coroutines"), "in its loop a coroutine is just awaited"
        ),
        **dict.fromkeys(("set_result", "pending"), "has no futures of its own"),
    }

    def __init__(self) -> None:
        self.synchronizer: Any = Synchronizer()
        self.blocking = self.mark(base.coroutine)
        self.blocking_yielding = self.mark(base.yielding)
        self.blocking_values = self.mark(base.async_values)

    def mark(self, function: Callable[..., Any]) -> Any:
        return self.synchronizer.create_blocking(function, f"blocking_{function.__name__}")

    def coroutine(self) -> Future[int]:
        future: Future[int] = self.blocking(_future=True)
        return future

    def yielding(self) -> Future[int]:
        future: Future[int] = self.blocking_yielding(_future=True)
        return future

    def coroutine_each(self, count: int) -> float:
        return base.block_for_each(self.blocking, count)

    def yielding_each(self, count: int) -> float:
        return base.block_for_each(self.blocking_yielding, count)

    def stream_async(self, count: int) -> float:
        return base.read(self.blocking_values, count)

    def decoration(self, count: int) -> float:
        return base.decorations(self.mark, count)
