"""Calls whatever can be called on whatever the core makes, in an order that nobody would choose.

    python tests/support/fuzz.py [--seconds 5] [--seed N] [--threads 4] [--verbose]

Every public and dunder method of every object of the core that Python code can reach, with random
arguments, from several threads; the private ones, too, where they are compiled. What comes out is a
result or an exception. A crash ends the process: whoever started it finds the seed in the first
line, and Python's own traceback of all threads after it. With the fallback it can only find hangs.

The same seed makes the same choices in each thread; how the threads interleave, nobody can repeat.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextvars
import faulthandler
import gc
import logging
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from unsync import Unfuture, _backend, unsync
from unsync._views import _AsyncioView, _ConcurrentView
from unsync.executors import ThreadExecutor

# What waits, for as long as it is told to: its argument is a short time.
WAITS = {"_wait", "exception", "result", "wait"}
# What asks the future that it is given for its result: that one is done.
ASKS = {"_ended", "call_in_ambient_loop", "end"}
# What is no method to call: it would end or replace what the fuzz itself stands on.
NEVER = {
    "__class__",
    "__init_subclass__",
    "__subclasshook__",
    "work",  # a worker's life, which ends with its queue
}

# What is no attribute to set: whose thread the ambient one is; and a lie that asyncio believes.
NEVER_SET = {"__class__", "done", "thread_id"}

COMPILED = {"unsync._core", "unsync._core_py"}
# Views, and no others of their kinds: asyncio's tasks crash if they are initialized once more.
OURS = (_backend.Batch, _backend.Launcher, Unfuture, _AsyncioView, _ConcurrentView)


@unsync
async def coroutine(value: object = None) -> object:
    await asyncio.sleep(0)
    return value


@unsync
def function(value: object = None) -> object:
    return value


async def plain(value: object = None) -> object:
    return value


class Subclass(Unfuture[Any]):
    pass


class Chunk(_backend.Batch):
    """A batch that takes whatever comes."""

    def fail(self, job: Any, exc: BaseException) -> None:
        for call in self.let_go():
            call.cancel()

    def arrive(self, came_back: Any) -> None:
        self.let_go()


class Unawaitable:
    def __await__(self) -> Generator[Any, None, Any]:
        yield self


class Fuzz:
    """One thread's share: its choices, and the things that it knows."""

    def __init__(self, seed: object, shared: list[Any], verbose: bool = False) -> None:
        self.random = random.Random(str(seed))
        self.shared = shared
        self.verbose = verbose
        self.now = ""
        self.calls = 0
        self.raised = 0

    # What there is.

    def makers(self) -> list[Callable[[], Any]]:
        choose = self.random.choice
        return [
            Unfuture,
            Subclass,
            lambda: Unfuture.__new__(choose([Unfuture, Subclass])),
            coroutine,
            function,
            lambda: coroutine(self.argument()),
            lambda: function(self.argument()),
            lambda: Unfuture(plain()),
            lambda: Unfuture(self.thing(Unfuture)),
            lambda: Unfuture(concurrent.futures.Future()),
            lambda: Unfuture.from_value(self.argument()),
            lambda: self.thing(Unfuture).then(self.function()),
            lambda: self.thing(Unfuture).map(self.function()),
            lambda: self.thing(Unfuture).__await__(),
            lambda: self.thing(Unfuture).future,
            lambda: self.thing(Unfuture).concurrent_future,
            lambda: _backend.Launcher(self.function(), choose([None, self.route()])),
            lambda: _backend.Mailbox(choose([unsync.loop, asyncio.new_event_loop()])),
            lambda: _backend.JobQueue(self.random.randint(0, 2), self.function()),
            self.route,
            _backend.Counter,
            lambda: Chunk("name", [1] * self.random.randint(0, 3)),
            lambda: choose(unsync.calls(choose([coroutine, function]), [(), ()], chunksize=2)),
            self.bare,
            self.found,
        ]

    def bare(self) -> Any:
        """Made by `__new__`, without `__init__`."""
        classes = [_backend.Batch, _backend.Counter, _backend.JobQueue, _backend.Launcher]
        cls: Any = self.random.choice([*classes, _backend.Mailbox, _backend.Route, Unfuture])
        return cls.__new__(cls)

    def found(self) -> Any:
        """What the core made for itself, wherever it is."""
        some = self.random.sample(self.shared, min(8, len(self.shared)))
        found = [t for t in gc.get_referents(*some) if type(t).__module__ in COMPILED]
        return self.random.choice(found) if found else Unfuture()

    def route(self) -> Any:
        return _backend.Route(self.function())

    def thing(self, kind: type | None = None) -> Any:
        known = [thing for thing in list(self.shared) if kind is None or isinstance(thing, kind)]
        return self.random.choice(known) if known else Unfuture()

    def function(self) -> Callable[..., Any]:
        choose = self.random.choice
        thing = self.thing
        return choose(
            [
                print_nothing,
                int,
                fail,
                plain,
                function,
                coroutine,
                lambda *_: thing(),
                lambda *_: Unfuture(),
                lambda *_: thing(Unfuture).cancel(),
                lambda *_: Unawaitable(),
                gc.collect if self.random.random() < 0.01 else print_nothing,
            ]
        )

    def argument(self) -> Any:
        return self.random.choice(
            [
                None,
                0,
                -1,
                2**70,
                0.001,
                float("nan"),
                float("inf"),
                "",
                "name",
                (),
                (1,),
                [],
                {},
                {"x": 1},
                ValueError(),
                ValueError,
                KeyError("x"),
                StopIteration(),
                asyncio.CancelledError(),
                object(),
                contextvars.copy_context(),
                concurrent.futures.Future(),
                frozenset(),
                self.function(),
                self.thing(),
                self.thing(Unfuture),
                type(self.thing()),
            ]
        )

    # What is done.

    def step(self) -> None:
        if self.random.random() < 0.3 or not self.shared:
            self.add(self.attempt(self.random.choice(self.makers())))
            return
        thing = self.thing()
        name = self.random.choice(dir(type(thing)))
        if name in NEVER or (not _backend.ACCELERATED and is_private(name)):
            return
        self.note(type(thing).__name__, name)
        if self.random.random() < 0.1:
            self.add(self.attempt(lambda: getattr(thing, name)))
        elif name in {"__setattr__", "__delattr__"}:
            which = self.random.choice(dir(type(thing)))
            if which not in NEVER_SET:
                method = getattr(thing, name)
                values = (self.argument(),) if name == "__setattr__" else ()
                self.attempt(lambda: method(which, *values))
        else:
            arguments = self.arguments(type(thing).__name__, name)
            self.note(type(thing).__name__, name, *(type(a).__name__ for a in arguments))
            self.add(self.attempt(lambda: getattr(thing, name)(*arguments)))

    def note(self, *what: str) -> None:
        self.now = " ".join(what)
        if self.verbose:
            os.write(2, f"{threading.get_ident()} {self.now}\n".encode())

    def arguments(self, kind: str, name: str) -> tuple[Any, ...]:
        if name in WAITS:
            return (self.random.choice([0, 0.0001, -1, "x", float("nan")]),)
        if name in ASKS or kind == "_TaskDone":
            return (self.random.choice([done((True, [1, 2])), done((True, [])), done(None), None]),)
        return tuple(self.argument() for _ in range(self.random.choice([0, 0, 1, 1, 1, 2, 3])))

    def attempt(self, call: Callable[[], Any]) -> Any:
        self.calls += 1
        try:
            return call()
        except BaseException as exc:  # whatever it is, it is no crash
            self.raised += 1
            if isinstance(exc, MemoryError):
                raise
            return None

    def add(self, thing: Any) -> None:
        """Keeps what the core has made, and drives what a coroutine gave."""
        if isinstance(thing, Coroutine):
            thing.close()
        if not (type(thing).__module__ in COMPILED or isinstance(thing, OURS)):
            return
        if len(self.shared) < 60:
            self.shared.append(thing)
        else:
            self.shared[self.random.randrange(60)] = thing

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            self.step()

    async def run_in_loop(self, until: float) -> None:
        while time.monotonic() < until:
            for _ in range(20):
                self.step()
            awaited = self.thing(Unfuture)
            try:
                await asyncio.wait_for(asyncio.shield(awaited), 0.001)
            except BaseException as exc:
                self.raised += 1
                if isinstance(exc, MemoryError):
                    raise


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def done(value: object) -> Unfuture[Any]:
    return Unfuture.from_value(value)


def print_nothing(*_: object, **__: object) -> None:
    pass


def fail(*_: object) -> None:
    raise ValueError("as it was told")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--verbose", action="store_true", help="each call, before it is made")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}, {'compiled' if _backend.ACCELERATED else 'plain'} core", flush=True)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # what asyncio has to say of it
    unsync.thread_executor = ThreadExecutor(2, spare_workers=4)
    coroutine().result()
    unsync.loop.set_exception_handler(print_nothing)
    shared: list[Any] = [Unfuture()]
    until = time.monotonic() + options.seconds
    shares = [Fuzz((seed, number), shared, options.verbose) for number in range(options.threads)]
    threads = [
        threading.Thread(
            target=share.run if number % 2 else lambda s=share: asyncio.run(s.run_in_loop(until)),
            args=(until,) if number % 2 else (),
            daemon=True,
        )
        for number, share in enumerate(shares)
    ]
    for thread in threads:
        thread.start()
    for thread, share in zip(threads, shares, strict=True):
        thread.join(max(0.0, until - time.monotonic()) + 30)
        if thread.is_alive():
            os.write(1, f"{thread.name} is stuck in: {share.now}\n".encode())
            os.abort()  # for faulthandler to tell where all are, and a debugger why
    calls, raised = sum(s.calls for s in shares), sum(s.raised for s in shares)
    sys.__stdout__.write(f"{calls} calls, {raised} of them raised\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]
    # Half of what it made waits for ever, in the interpreter's end as well.
    os._exit(0)


if __name__ == "__main__":
    main()
