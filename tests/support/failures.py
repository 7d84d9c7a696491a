"""Calls that fail, in each way in which one can, for the tests of what becomes of a failure."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest

from unsync import Unfuture, unsync


class Boom(Exception):
    """A failure that can be referred to weakly."""


def fail() -> None:
    raise Boom("bad")


async def fail_async() -> None:
    raise Boom("bad")


async def wait(unfuture: Unfuture[Any]) -> None:
    try:
        await unfuture
    finally:
        del unfuture


def _fail_by_hand() -> Unfuture[Any]:
    unfuture: Unfuture[Any] = Unfuture()
    unfuture.set_exception(Boom("bad"))
    return unfuture


def _fail_wrapped() -> Unfuture[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_exception(Boom("bad"))
    return Unfuture(future)


FAILURES = {
    "by hand": _fail_by_hand,
    "in a thread": lambda: unsync(fail)(),
    "in a coroutine": lambda: unsync(fail_async)(),
    "in then": lambda: Unfuture.from_value(1).then(lambda _: fail()),
    "in map": lambda: Unfuture.from_value(1).map(lambda _: fail()),
    "in a coroutine of then": lambda: Unfuture.from_value(1).then(lambda _: fail_async()),
    "before then": lambda: unsync(fail)().then(len),
    "in a wrapped future": _fail_wrapped,
}

failures = pytest.mark.parametrize("make", FAILURES.values(), ids=FAILURES.keys())
