"""The ways to do the work. Each is measured in a process and an environment of its own."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peers.base import Peer


@dataclass(frozen=True)
class Way:
    """A column of the comparison.

    :param label: what the tables call it.
    :param module: of this package, has the class of the same purpose.
    :param requirements: what pip installs for it; "." is this checkout.
    :param versions: the distributions whose versions are reported.
    :param variables: of the environment that it runs in.
    """

    label: str
    module: str
    kind: str
    requirements: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


PURE = {"UNSYNC_NO_EXTENSIONS": "1"}

WAYS = {
    "unsync": Way("unsync", "ours", "Ours", (".",), ("unsync",)),
    "uvloop": Way(
        "unsync on uvloop", "ours", "OursOnUvloop", (".", "uvloop"), ("unsync", "uvloop")
    ),
    "fallback": Way("unsync, pure Python", "ours", "Ours", (".",), ("unsync",), PURE),
    "upstream": Way("unsync 1.4.0", "upstream", "Upstream", ("unsync==1.4.0",), ("unsync",)),
    "stdlib": Way("standard library", "standard_library", "StandardLibrary"),
    "to_thread": Way("asyncio.to_thread", "standard_library", "ToThread"),
    "stdlib_uvloop": Way(
        "standard library on uvloop", "standard_library", "OnUvloop", ("uvloop",), ("uvloop",)
    ),
    "asgiref": Way("asgiref", "with_asgiref", "Asgiref", ("asgiref",), ("asgiref",)),
    "anyio": Way("anyio", "with_anyio", "Anyio", ("anyio",), ("anyio",)),
    "synchronicity": Way(
        "synchronicity",
        "with_synchronicity",
        "Synchronicity",
        ("synchronicity",),
        ("synchronicity",),
    ),
    "aiothreads": Way(
        "aiothreads", "with_aiothreads", "Aiothreads", ("aiothreads",), ("aiothreads",)
    ),
}


def make(name: str) -> Peer:
    """The peer itself, in whose environment this runs."""
    way = WAYS[name]
    peer: Peer = getattr(importlib.import_module(f"peers.{way.module}"), way.kind)()
    return peer
