"""No bridge: blocking clients in the handler's thread, where several calls come one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

CLIENTS = "blocking"


def one(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def many(function: Callable[[Any], Any]) -> Callable[[Iterable[Any]], list[Any]]:
    return lambda values: [function(value) for value in values]


def close() -> None:
    """There is nothing."""
