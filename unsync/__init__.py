"""The bridge between threads and asyncio: mark any function, get one future for both worlds."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from unsync._backend import ACCELERATED
from unsync._common import CancelledError, InvalidStateError
from unsync.unsync import Unfuture, unsync

if TYPE_CHECKING:
    from unsync import _drain as _drain
    from unsync import _exit as _exit
    from unsync import _single_thread as _single_thread
    from unsync import _stats as _stats
    from unsync import context_managers as context_managers
    from unsync import fan_out as fan_out
    from unsync import streams as streams
    from unsync.context_managers import AmbientContextManager
    from unsync.streams import Stream

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

# What is imported when somebody asks for it, since many programs never do: the names, and in which
# modules they are.
_LATER = {
    "AmbientContextManager": "context_managers",
    "Stream": "streams",
    "_drain": "_drain",
    "_exit": "_exit",
    "_single_thread": "_single_thread",
    "_stats": "_stats",
    "context_managers": "context_managers",
    "fan_out": "fan_out",
    "streams": "streams",
}

if not TYPE_CHECKING:  # which would take any name for one that is there

    def __getattr__(name: str) -> object:
        if name == "__version__":
            # Not at import: finding it takes longer than everything else. There is none where
            # nothing was installed, as in a frozen program or a zip file, or something is left of
            # it, which Python 3.15 tells by other exceptions.
            try:
                from importlib.metadata import metadata

                return metadata("unsync").get("Version", "unknown")
            except (ImportError, OSError, LookupError):
                return "unknown"
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_advice(name)}")
        from importlib import import_module

        found = import_module(f"unsync.{_LATER[name]}")
        if name != _LATER[name]:
            found = getattr(found, name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


def _advice(name: str) -> str:
    """For who looks here for what the decorator of the same name has."""
    if name.startswith("_") or name not in vars(type(unsync)):
        return ""
    return f": the decorator has it; write `from unsync import unsync`, and then `unsync.{name}`"


class _Package(ModuleType):
    """The class of this module, which takes no setting of the decorator: it would do nothing."""

    def __setattr__(self, name: str, value: object) -> None:
        advice = _advice(name)
        if advice:
            raise AttributeError(f"{name!r} cannot be set on the module {__name__!r}{advice}")
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[object, ...]:
        # cloudpickle and its like know how modules travel, but of no other class than theirs.
        return __import__, (__name__,)


sys.modules[__name__].__class__ = _Package

del TYPE_CHECKING, ModuleType, sys  # no names of this package
