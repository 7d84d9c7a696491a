"""No bridge: the blocking function blocks the loop, and with it all other requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any


def prepare(threads: int) -> None:
    pass


def offload(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def call(*values: Any) -> Any:
        return function(*values)

    return call
