"""No bridge in the program: FastAPI calls a regular handler in one of anyio's threads."""

from __future__ import annotations

import anyio.to_thread

offload = None


def prepare(threads: int) -> None:
    anyio.to_thread.current_default_thread_limiter().total_tokens = threads
