"""`unsync` as type checkers see it: what marking each kind of function gives.

Not imported at run time. No class can say what calling it gives other than itself, so `unsync` is
described by a protocol. A marked function is a plain callable to them, since those become methods
where they stand in a class.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable
from contextlib import _AsyncGeneratorContextManager
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

from unsync._ambient import LoopFactory
from unsync._core_py import Launcher, Unfuture
from unsync._stats import Stats
from unsync.context_managers import AmbientContextManager
from unsync.executors import Engine
from unsync.streams import Stream

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C")


class _Nothing:
    """Nobody returns it: only a function that returns `Any` matches it, and in mypy some others.

    Without this such a function would match what is tried first. That what is given then is of
    another type keeps mypy from mixing all that it could be into an untyped callable.
    """


# mypy takes this name for true, whatever is assigned to it, and no other checker does.
MYPY: Literal[False] = False

if MYPY:

    class _GivesAnything(Launcher[..., Any], Generic[P]):
        """A marked function of which it is not known what it returns.

        To mypy that is also a regular function that returns a type variable without a bound: it
        takes the variable for `_Nothing`, in the parameters as well, where that is wrong for every
        argument. So arguments are not looked at.
        """

else:

    class _GivesAnything(Launcher[P, Any], Generic[P]):
        """A marked function of which it is not known what it returns."""


class Mark(Protocol):
    """Marks functions: `unsync` itself, and what `unsync(option=...)` gives.

    The kinds stand in the order in which they are tried: what a call gives decides.
    """

    @overload
    def __call__(
        self,
        func: Callable[P, _Nothing],
        /,
        *,
        cpu_bound: bool = False,
        executor: Engine | None = None,
    ) -> _GivesAnything[P]: ...
    @overload
    def __call__(
        self, func: staticmethod[P, Coroutine[Any, Any, T]], /
    ) -> staticmethod[P, Unfuture[T]]: ...
    @overload
    def __call__(
        self,
        func: staticmethod[P, T],
        /,
        *,
        cpu_bound: bool = False,
        executor: Engine | None = None,
    ) -> staticmethod[P, Unfuture[T]]: ...
    @overload
    def __call__(
        self, func: classmethod[C, P, Coroutine[Any, Any, T]], /
    ) -> classmethod[C, P, Unfuture[T]]: ...
    @overload
    def __call__(
        self,
        func: classmethod[C, P, T],
        /,
        *,
        cpu_bound: bool = False,
        executor: Engine | None = None,
    ) -> classmethod[C, P, Unfuture[T]]: ...
    @overload
    def __call__(  # pyright: ignore[reportOverlappingOverload]
        self, func: Callable[P, _AsyncGeneratorContextManager[T]], /
    ) -> Callable[P, AmbientContextManager[T]]: ...
    @overload
    def __call__(
        self, func: Callable[P, AsyncIterator[T]], /, *, read_ahead: int | None = None
    ) -> Callable[P, Stream[T]]: ...
    @overload
    def __call__(
        self,
        func: Callable[P, Generator[T, Any, Any]],
        /,
        *,
        executor: Engine | None = None,
        read_ahead: int | None = None,
    ) -> Callable[P, Stream[T]]: ...
    @overload
    def __call__(
        self, func: Callable[P, Coroutine[Any, Any, T]], /
    ) -> Callable[P, Unfuture[T]]: ...
    @overload
    def __call__(
        self,
        func: Callable[P, T],
        /,
        *,
        cpu_bound: bool = False,
        executor: Engine | None = None,
    ) -> Callable[P, Unfuture[T]]: ...
    @overload
    def __call__(
        self,
        *,
        cpu_bound: bool = False,
        executor: Engine | None = None,
        read_ahead: int | None = None,
    ) -> Mark: ...


class Unsync(Mark, Protocol):
    """The decorator, with what is set on it for all functions."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...
    @property
    def thread(self) -> threading.Thread: ...
    @property
    def loop_factory(self) -> LoopFactory | None: ...
    @loop_factory.setter
    def loop_factory(self, factory: LoopFactory | None, /) -> None: ...
    @property
    def thread_executor(self) -> concurrent.futures.Executor: ...
    @thread_executor.setter
    def thread_executor(self, executor: Engine | None, /) -> None: ...
    @property
    def process_executor(self) -> concurrent.futures.Executor: ...
    @process_executor.setter
    def process_executor(self, executor: Engine | None, /) -> None: ...
    @property
    def exit_timeout(self) -> float | None: ...
    @exit_timeout.setter
    def exit_timeout(self, timeout: float | None, /) -> None: ...
    def calls(
        self,
        function: Callable[..., Unfuture[T]],
        iterable: Iterable[Any],
        /,
        *iterables: Iterable[Any],
        chunksize: int | None = None,
    ) -> list[Unfuture[T]]: ...
    def map(
        self,
        function: Callable[..., Unfuture[T]],
        iterable: Iterable[Any],
        /,
        *iterables: Iterable[Any],
        chunksize: int | None = None,
        in_order: bool = True,
        read_ahead: int | None = None,
    ) -> Stream[T]: ...
    def drain(self, timeout: float | None = None) -> bool: ...
    def shutdown(self, timeout: float | None = None, *, drain: bool = False) -> bool: ...
    def stats(self) -> Stats: ...
