"""unsync 1.4.0: the same import name, so it is installed in an environment of its own.

It has no types, and its `then` passes the value on, not the Unfuture.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

import unsync as package
from peers import base

unsync: Any = package.unsync
Unfuture: Any = package.Unfuture


def same(value: int) -> int:
    return value


def one_more(value: int) -> int:
    return value + 1


async def outcome(work: Coroutine[Any, Any, Any]) -> Any:
    return await work


run = unsync(outcome)


class Upstream(base.Peer):
    modules = "unsync"
    reasons: ClassVar[dict[str, str]] = dict.fromkeys(
        ("foreign_function", "foreign_gather", "foreign_64"), "its futures belong to its own loop"
    )
    coroutine = awaited_coroutine = staticmethod(unsync(base.coroutine))
    yielding = staticmethod(unsync(base.yielding))
    function = awaited_function = staticmethod(unsync(base.function))

    def in_the_loop(self, work: Coroutine[Any, Any, float]) -> float:
        seconds: float = run(work).result()
        return seconds

    def start_coroutine(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return unsync(function)()

    def start_function(self, function: Callable[[], Any]) -> Any:
        return unsync(function)()

    def chained(self) -> Any:
        return self.coroutine().then(same)

    def then_chain(self, count: int) -> float:
        return base.chain(self.coroutine, one_more, count)

    def set_result(self, count: int) -> float:
        return base.set_results(Unfuture, run, count)

    def pending(self, count: int) -> float:
        return base.bytes_each(Unfuture, count)

    def decoration(self, count: int) -> float:
        return base.decorations(unsync, count)
