"""This project: either core, on asyncio's loop or on uvloop."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from peers import base
from unsync import Unfuture, unsync


def value_of(unfuture: Unfuture[int]) -> int:
    return unfuture.result()


def one_more(unfuture: Unfuture[int]) -> int:
    return unfuture.result() + 1


class Ours(base.Peer):
    modules = "unsync"
    coroutine = awaited_coroutine = staticmethod(unsync(base.coroutine))
    yielding = staticmethod(unsync(base.yielding))
    function = awaited_function = staticmethod(unsync(base.function))
    values = staticmethod(unsync(base.values))
    async_values = staticmethod(unsync(base.async_values))

    def close(self) -> None:
        unsync.shutdown()

    def in_the_loop(self, work: Coroutine[Any, Any, float]) -> float:
        return Unfuture[float](work).result()

    def start_coroutine(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        marked: Callable[[], Any] = unsync(function)
        return marked()

    def start_function(self, function: Callable[[], Any]) -> Any:
        return unsync(function)()

    def chained(self) -> Unfuture[int]:
        return self.coroutine().then(value_of)

    def then_chain(self, count: int) -> float:
        return base.chain(self.coroutine, one_more, count)

    def stream_async(self, count: int) -> float:
        return base.read(self.async_values, count)

    def stream_threads(self, count: int) -> float:
        return base.read(self.values, count)

    def stream_to_loop(self, count: int) -> float:
        return self.in_own_loop(base.read_in_loop(self.values, count))

    def set_result(self, count: int) -> float:
        return base.set_results(Unfuture, Unfuture, count)

    def pending(self, count: int) -> float:
        return base.bytes_each(Unfuture, count)

    def decoration(self, count: int) -> float:
        return base.decorations(unsync, count)


class OursOnUvloop(Ours):
    reasons: ClassVar[dict[str, str]] = {"import_time": "as without uvloop"}

    def __init__(self) -> None:
        import uvloop

        unsync.loop_factory = uvloop.new_event_loop
        self.run = uvloop.run

    def in_own_loop(self, work: Coroutine[Any, Any, float]) -> float:
        seconds: float = self.run(work)
        return seconds
