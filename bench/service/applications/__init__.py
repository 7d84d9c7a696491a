"""A service for each framework. `SERVICE_BRIDGE` in the environment says how its handlers call."""

from __future__ import annotations

import gc
import os

# Threads of a pool, the server's or the bridge's: the same number for all.
THREADS = int(os.environ["SERVICE_THREADS"])
SEVERAL = 10  # calls that a request makes at once


def settle() -> None:
    """At the end of the start, as the how-to pages advise.

    What was made until now stays, so that the garbage collector need not go through it.
    """
    if os.environ.get("SERVICE_FREEZES"):
        gc.collect()
        gc.freeze()
