"""The ways to call, one module each: the handlers of all applications are the same but for it.

A module has what its direction needs:

- `one(function)` and `many(function)`, for handlers in threads: they give a function that calls the
  coroutine function with one value, or with each of several at once, and waits for what it gives.
  `close()` ends what was started.
- `offload(function)`, for handlers in a loop: gives a function whose call is awaited, and that
  calls the blocking function in a thread. `prepare(threads)` says how many threads there may be.
- `CLIENTS`: the module of `clients/` that fits. It is imported where it is used: it takes memory.
"""

from __future__ import annotations

import importlib
import os
from typing import Any


def chosen() -> Any:
    """The module that the environment names."""
    return importlib.import_module(f"service.bridges.{os.environ['SERVICE_BRIDGE']}")


def clients_of(bridge: Any) -> Any:
    return importlib.import_module(f"service.clients.{bridge.CLIENTS}")
