"""`loop.run_in_executor`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def prepare(threads: int) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads))


def offload(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    return lambda *values: asyncio.get_running_loop().run_in_executor(None, function, *values)
