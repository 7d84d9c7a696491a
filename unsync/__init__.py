"""The bridge between threads and asyncio: mark any function, get one future for both worlds."""

from unsync._backend import ACCELERATED
from unsync._common import CancelledError, InvalidStateError
from unsync.context_managers import AmbientContextManager
from unsync.streams import Stream
from unsync.unsync import Unfuture, unsync

__all__ = [
    "ACCELERATED",
    "AmbientContextManager",
    "CancelledError",
    "InvalidStateError",
    "Stream",
    "Unfuture",
    "__version__",
    "unsync",
]


__version__: str


def __getattr__(name: str) -> str:
    if name == "__version__":
        # Not at import: finding it takes longer than everything else.
        from importlib.metadata import version

        return version("unsync")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
