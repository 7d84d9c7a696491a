"""What tests do to the processes of a pool."""

from __future__ import annotations

import sys

from unsync import _travel


def block_cloudpickle() -> None:
    """From now on this process is one in which cloudpickle is not installed."""
    _travel._value_pickler.cache_clear()
    sys.modules["cloudpickle"] = None  # type: ignore[assignment]
