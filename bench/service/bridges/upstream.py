"""unsync 1.4.0: the same import name, so it is installed in an environment of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import unsync as package

CLIENTS = "kept"
unsync: Any = package.unsync

if os.environ.get("SERVICE_LOOP") == "uvloop":
    import uvloop

    uvloop.install()  # it has no setting of its own, and makes its loop as the policy says


def one(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    marked = unsync(function)
    return lambda *values: marked(*values).result()


def many(
    function: Callable[[Any], Coroutine[Any, Any, Any]],
) -> Callable[[Iterable[Any]], list[Any]]:
    marked = unsync(function)
    return lambda values: [call.result() for call in [marked(value) for value in values]]


def close() -> None:
    """It has nothing to end its loop with."""
