"""The bridge between threads and asyncio: mark any function, get one future for both worlds."""

from unsync._backend import ACCELERATED
from unsync._common import CancelledError, InvalidStateError
from unsync.streams import Stream
from unsync.unsync import Unfuture, unsync

__all__ = [
    "ACCELERATED",
    "CancelledError",
    "InvalidStateError",
    "Stream",
    "Unfuture",
    "__version__",
    "unsync",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        # Not at import: finding it takes longer than everything else.
        from importlib.metadata import version

        return version("unsync")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
