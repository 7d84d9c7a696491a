"""anyio's blocking portal, to a loop in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from functools import cache
from typing import Any

from anyio.from_thread import start_blocking_portal

CLIENTS = "kept"
_managers: list[Any] = []


@cache
def portal() -> Any:
    """Made on first use, which is after the fork."""
    _managers.append(start_blocking_portal())
    return _managers[0].__enter__()


def one(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    return lambda *values: portal().call(function, *values)


def many(
    function: Callable[[Any], Coroutine[Any, Any, Any]],
) -> Callable[[Iterable[Any]], list[Any]]:
    def call(values: Iterable[Any]) -> list[Any]:
        start = portal().start_task_soon
        return [made.result() for made in [start(function, value) for value in values]]

    return call


def close() -> None:
    _managers[0].__exit__(None, None, None)
