"""How a call gets into another process, and its outcome back.

Both are pickled here, not left to the executor: what cannot travel is an error that names it, for
its caller alone, and never the death of a worker or of the whole pool.

What a process can import travels by reference, as pickle has it. What it cannot (closures, lambdas,
what was typed at a prompt) travels by value, which takes cloudpickle.
"""

from __future__ import annotations

import importlib
import io
import itertools
import opcode
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from functools import cache, partial
from types import BuiltinFunctionType, CodeType, CoroutineType, FrameType, FunctionType, ModuleType
from typing import Any, TypeVar

from unsync._backend import Unfuture
from unsync._common import name_of

__all__ = [
    "ContextCall",
    "Reference",
    "no_way_back",
    "pack",
    "pack_failure",
    "reducers",
    "reference_to",
    "run",
]

T = TypeVar("T")


class Reference:
    """A function that the worker process finds by name, below the decorators above it.

    :param peels: how many decorators, static- or classmethods to take off what the name gives.
    """

    __slots__ = ("_module", "_peels", "_qualname")

    def __init__(self, module: str, qualname: str, peels: int) -> None:
        self._module = module
        self._qualname = qualname
        self._peels = peels

    @property
    def name(self) -> str:
        return self._qualname

    def __reduce__(self) -> tuple[Any, ...]:
        return Reference, (self._module, self._qualname, self._peels)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._find()(*args, **kwargs)

    def _find(self) -> Callable[..., Any]:
        try:
            found = _look_up(self._module, self._qualname)
            for _ in range(self._peels):
                found = _peel(found)
        except (AttributeError, ImportError) as exc:
            if main_s_file() is None and self._module == "__main__":
                advice = (
                    "What is typed in at a prompt, or stands in a main module that is not imported "
                    f"there, can travel by value: {_INSTALL}"
                )
            else:
                advice = (
                    "It must be defined whenever the module is imported, outside "
                    "`if __name__ == '__main__':`, and not typed in at a prompt"
                )
            raise RuntimeError(
                f"process {os.getpid()} cannot find the function {self._qualname!r} in the module "
                f"{self._module!r}: {exc}. {advice}"
            ) from exc
        assert callable(found)
        return found


def _look_up(module: str, qualname: str) -> object:
    found: object = sys.modules.get(module) or importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return found


def is_importable(thing: object) -> bool:
    """Whether any process finds it by its name: what is in the main module is not meant."""
    module = getattr(thing, "__module__", None)
    qualname = getattr(thing, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str) or module in _MAIN:
        return False
    try:
        return _look_up(module, qualname) is thing
    except (AttributeError, ImportError):
        return False


# The main module's names: a worker that was spawned knows its parent's by both of them, one that it
# starts in turn only by the first.
_MAIN = ("__main__", "__mp_main__")


def _peel(found: object) -> object:
    """What is below one decorator, static- or classmethod, or bound method."""
    return getattr(found, "__func__", None) or getattr(found, "__wrapped__")  # noqa: B009


def reference_to(function: Callable[..., Any], has_our_main: bool = False) -> Any:
    """What to pickle in place of `function`; whoever unpickles it gets what can be called.

    What has no name to be found by (instances, bound methods) travels by its own pickle; so does a
    partial, but for a function in it that is found below a decorator.

    :param has_our_main: whether the process that it goes to can import this program's main module.
    :raises pickle.PicklingError: if the function can go neither by reference nor by value.
    """
    if isinstance(function, partial):
        below = reference_to(function.func, has_our_main)
        if isinstance(below, Reference) and below._peels:
            return partial(below, *function.args, **function.keywords)
        return function
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    reference = None
    if isinstance(module, str) and isinstance(qualname, str):
        try:
            found = _look_up(module, qualname)
            for peels in itertools.count():
                if found is function:
                    name = _MAIN[0] if module in _MAIN else module
                    reference = Reference(name, qualname, peels)
                    break
                found = _peel(found)
        except (AttributeError, ImportError):
            pass
    if reference is not None:
        if module not in _MAIN or (has_our_main and _is_from_main_s_file(function)):
            return reference
    elif not isinstance(function, FunctionType):
        return function
    import pickle  # which takes longer to import than all the rest of unsync

    try:
        return _Parcel(_dumps_by_value(function))
    except Exception as exc:
        is_missing = isinstance(exc, ModuleNotFoundError) and exc.name == "cloudpickle"
        if reference is not None and (has_our_main or is_missing):
            return reference  # it may be found: a forked process has it
        if not is_missing:
            raise pickle.PicklingError(
                f"the function {qualname} cannot go to another process: {exc}"
            ) from exc
        missing = exc
    if "<lambda>" in function.__qualname__:
        why = "it is a lambda"
    elif "<locals>" in function.__qualname__:
        why = "it is defined inside another function"
    else:
        why = f"the name {qualname!r} in the module {module!r} is not this function"
    raise pickle.PicklingError(
        f"cannot send the function {qualname!r} to another process, where it is looked up by name: "
        f"{why}. Define it at the top level of a module (or in a class there); or have it travel "
        f"by value: {_INSTALL}; or leave cpu_bound=True away to run it in a thread"
    ) from missing


_INSTALL = "pip install cloudpickle"


def main_s_file() -> str | None:
    """What a process that is started anew imports as its main module; None at a prompt."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if file == "<stdin>":
        # multiprocessing takes it for a file, too: workers would end because it cannot be found.
        del main.__file__  # type: ignore[union-attr]
        return None
    return file


def has_our_main(imports_main: bool) -> bool:
    """Whether a process finds this program's main module, if it imports what its starter does."""
    return imports_main and main_s_file() is not None


def _is_from_main_s_file(function: Callable[..., Any]) -> bool:
    """Whether the main module's file defines the function, and not what was typed in afterwards."""
    below: object = function
    with suppress(AttributeError):
        while True:
            below = _peel(below)
    code = getattr(below, "__code__", None)
    return not isinstance(code, CodeType) or code.co_filename == main_s_file()


def whole(result: object) -> object:
    """What a function returned; if that is a coroutine, what comes of it, as in our own threads.

    The executor that made the call knows no such thing, so its thread or process waits.
    """
    return Unfuture(result).result() if type(result) is CoroutineType else result


def call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> object:
    return whole(function(*args, **kwargs))


class ContextCall:
    """A function with its caller's context, for executors that may or may not leave the process.

    Called here, the context counts. Pickled, it leaves the context behind: contexts do not pickle.
    The arguments given by name are kept in here: some executors' `submit` takes names as its own.
    """

    __slots__ = ("_context", "_function", "_kwargs")

    def __init__(
        self, function: Callable[..., Any], context: Context, kwargs: dict[str, Any]
    ) -> None:
        self._function = function
        self._context = context
        self._kwargs = kwargs

    @property
    def __name__(self) -> str:
        # Dask groups its statistics by it, and never forgets a group.
        return name_of(self._function)

    def __call__(self, /, *args: Any) -> Any:
        # A partial, since PyPy's Context.run() has names for its own arguments.
        return self._context.run(partial(call, self._function, *args, **self._kwargs))

    def __reduce__(self) -> tuple[Any, ...]:
        function = _dumps(reference_to(self._function), has_our_main=False)
        return _SentCall, (self.__name__, function, self._kwargs)

    def __dask_tokenize__(self) -> str:
        # Dask takes equal calls for one if it is not told otherwise. Here each is a call.
        from uuid import uuid4

        return uuid4().hex


class _SentCall:
    """What a `ContextCall` is elsewhere.

    The function is unpickled where it is called, and not before: Dask's scheduler only passes it
    on, may not have its module, and could not pickle again what has come by value.
    """

    __slots__ = ("_function", "_kwargs", "_name")

    def __init__(self, name: str, function: bytes, kwargs: dict[str, Any]) -> None:
        self._name = name
        self._function = function
        self._kwargs = kwargs

    def __reduce__(self) -> tuple[Any, ...]:
        return _SentCall, (self._name, self._function, self._kwargs)

    def __call__(self, /, *args: Any) -> Any:
        import pickle

        result = call(pickle.loads(self._function), *args, **self._kwargs)
        # Who waits for a result that Dask cannot send back would wait for ever.
        protocol = sys.modules.get("distributed.protocol")
        if protocol is not None and type(result) not in _PLAIN:
            try:
                protocol.serialize(result, on_error="raise")
            except Exception as exc:
                raise no_way_back(self._name, result, exc) from exc
        return result


# A call as it travels. What pickles it is imported when it is needed: that takes longer than all
# the rest of unsync.

# Of these types every value pickles, and a copy more would only cost time.
_PLAIN = (bool, bytes, complex, float, int, str, type(None))


def _dumps(value: object, has_our_main: bool = True, buffers: list[Any] | None = None) -> bytes:
    """Pickles by reference what can be imported where it goes, else by value if it can be.

    :param buffers: gets the large ones, of arrays for one, that are left out for it.
    """
    take = None if buffers is None else buffers.append
    try:
        pickled = _dumps_by_reference(value, take)
    except Exception:
        if buffers is not None:
            buffers.clear()
        try:
            return _dumps_by_value(value)
        except Exception:
            pass  # what pickle itself says is clearer
        raise
    if not has_our_main and b"_main__" in pickled:  # which is in both names of the main module
        with suppress(Exception):
            return _dumps_by_value(value)
    return pickled


def _dumps_by_reference(value: object, take: Callable[[Any], None] | None = None) -> bytes:
    from multiprocessing.reduction import ForkingPickler

    buffer = io.BytesIO()
    # Protocol 5, which older Pythons do not choose by themselves, spares large buffers two copies.
    ForkingPickler(buffer, 5, True, take).dump(value)
    return buffer.getvalue()


# How objects of these types are reduced when they travel by value.
reducers: dict[type, Callable[[Any], Any]] = {}


def _dumps_by_value(value: object) -> bytes:
    """:raises ModuleNotFoundError: without cloudpickle."""
    buffer = io.BytesIO()
    _value_pickler()(buffer).dump(value)
    return buffer.getvalue()


@cache
def _value_pickler() -> Any:
    cloudpickle: Any = importlib.import_module("cloudpickle")
    table = {**cloudpickle.Pickler.dispatch_table, **reducers}
    return type("ValuePickler", (cloudpickle.Pickler,), {"dispatch_table": table})


def pack(
    function: Callable[..., Any],
    call: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    has_our_main: bool,
) -> tuple[str, bytes]:
    """The arguments for `run`, which travel as they are.

    :param call: what `reference_to` gave for the function.
    :raises pickle.PicklingError: if the function or an argument cannot travel; it says which.
    """
    name = name_of(function)
    try:
        return name, _dumps((call, args, kwargs), has_our_main)
    except Exception as exc:
        import pickle

        what = _culprit(name, call, args, kwargs)
        raise pickle.PicklingError(f"{what} cannot go to another process: {exc}") from exc


def _culprit(
    name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    named = [(f"the function {name}", function)]
    named += [(f"argument {place} of {name}", value) for place, value in enumerate(args, 1)]
    named += [(f"the argument {key!r} of {name}", value) for key, value in kwargs.items()]
    for what, value in named:
        try:
            _dumps(value)
        except Exception:
            return what if value is function else f"{what}, of type {type(value).__qualname__},"
    return f"a call of {name}"


def run(name: str, parcel: bytes) -> object:
    """In the worker process: makes the call.

    :raises pickle.PicklingError: if the result or the exception cannot travel back.
    :raises pickle.UnpicklingError: if the arguments cannot be unpacked here.
    """
    import pickle

    error: Exception
    try:
        function, args, kwargs = pickle.loads(parcel)
    except Exception as exc:
        why = f"the arguments of {name} cannot be unpickled in process {os.getpid()}: {exc}"
        error = _told(pickle.UnpicklingError(why), exc)
        if isinstance(exc, (AttributeError, ImportError, NameError)):
            _add_note(error)
    else:
        try:
            result = call(function, *args, **kwargs)
        except BaseException as exc:
            carried = pack_failure(name, exc)
            if isinstance(carried, Exception):
                error = carried
            else:
                try:
                    pickle.loads(_dumps_by_reference(exc))
                except Exception:
                    # The executor will pickle what is raised in its own way, which cannot do that.
                    error = _carrier_of(exc, carried)
                else:
                    raise
        else:
            if type(result) in _PLAIN:
                return result
            buffers: list[Any] = []
            try:
                pickled = _dumps(result, buffers=buffers)
            except Exception as exc:
                error = no_way_back(name, result, exc)
            else:
                # With buffers that was only a test: the executor pickles them itself, and copies
                # them less.
                return result if buffers else _Parcel(pickled)
    raise error


# What the next failure in this process is told that may come of what this process lacks, as a note;
# None for nothing.
_note: str | None = None


def set_up_process(note: str | None) -> None:
    """In a worker process of our own pool, before its first call.

    :param note: what the first failure there is told that may come of what the process lacks.
    """
    import signal

    global _note
    _note = note
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_to_parent)


def _leave_to_parent(number: int, frame: FrameType | None) -> None:
    """What Ctrl-C does in a worker process: nothing, as long as there is who ends it.

    It comes to all processes of a terminal or kernel, and is meant for the program, which may go on
    and whose end ends its workers. It is not ignored as by SIG_IGN, which what the worker starts
    would inherit.
    """
    import multiprocessing
    import signal

    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        signal.default_int_handler(number, frame)


def _add_note(failure: BaseException) -> None:
    global _note
    note, _note = _note, None
    if note is not None:
        with suppress(Exception):
            failure.add_note(note)


def _may_lack_state(failure: BaseException) -> bool:
    """Whether it may come of what the program sets when it runs, which is not in this process.

    A global or a module that is not there, or a global which is still as it was imported: None, or
    empty. What a `raise` raises is what the function has to say, and not looked at.
    """
    traceback = failure.__traceback__
    text = failure.args[0] if failure.args else None
    if traceback is None or (type(text) is str and "Unfuture" in text):
        return False  # that comes of `then`: see `hint_at_map`
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    # Of these two some are raised by a `raise` of Python's own, or by a module's `__getattr__`.
    if isinstance(failure, ImportError) and "importlib" in str(frame.f_globals.get("__name__")):
        return True
    if isinstance(failure, AttributeError) and isinstance(failure.obj, ModuleType):
        return True
    if frame.f_code.co_code[traceback.tb_lasti] == opcode.opmap["RAISE_VARARGS"]:
        return False
    if isinstance(failure, (ImportError, NameError)):
        return not isinstance(failure, UnboundLocalError)
    if isinstance(failure, AttributeError):
        return _looks_at_globals(frame)
    if type(failure) is TypeError:
        return type(text) is str and "NoneType" in text and _looks_at_globals(frame)
    return type(failure) in (KeyError, IndexError) and _looks_at_globals(frame)


def _looks_at_globals(frame: FrameType) -> bool:
    """Whether its code names a global that is neither function, class nor module.

    In its own module, or as what it names in a class or module.
    """
    names = frame.f_code.co_names
    there = [frame.f_globals.get(name) for name in names if name in frame.f_globals]
    spaces = [vars(thing) for thing in there if isinstance(thing, (ModuleType, type))]
    there += [space[name] for space in spaces for name in names if name in space]
    return any(
        not isinstance(thing, (BuiltinFunctionType, FunctionType, ModuleType, type))
        and not hasattr(type(thing), "__get__")  # methods and the like
        and not hasattr(thing, "__wrapped__")
        for thing in there
    )


def _told(error: Exception, cause: BaseException) -> Exception:
    """Gives the error its cause as text: with tblib, which Dask brings, causes travel as well."""
    import traceback

    error.__cause__ = RuntimeError("".join(["\n", *traceback.format_exception(cause)]))
    return error


def _dumps_as_it_is(failure: object) -> bytes:
    """Pickles exceptions, in groups too, with no need for their `__init__`.

    That may want more than the arguments which an exception keeps, and by which pickle makes it
    anew: many libraries have such.
    """
    from multiprocessing.reduction import ForkingPickler

    buffer = io.BytesIO()
    try:
        _failure_pickler(ForkingPickler)(buffer, 5).dump(failure)
    except Exception:  # its class travels by value, as one of a notebook
        buffer = io.BytesIO()
        _failure_pickler(_value_pickler())(buffer, 5).dump(failure)
    return buffer.getvalue()


@cache
def _failure_pickler(base: Any) -> Any:
    class FailurePickler(base):  # type: ignore[misc]
        def reducer_override(self, thing: object) -> Any:
            if isinstance(thing, BaseException):
                reduced = thing.__reduce_ex__(5)
                if isinstance(reduced, tuple) and reduced[0] is type(thing):
                    return _remake, reduced[:2], *reduced[2:]
            override = getattr(super(), "reducer_override", None)
            return NotImplemented if override is None else override(thing)

    return FailurePickler


def _remake(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    failure = cls.__new__(cls, *args)
    if isinstance(failure, OSError):
        OSError.__init__(failure, *args)  # which finds the error number among them
    return failure


def pack_failure(name: str, failure: BaseException) -> bytes | Exception:
    """What a call raised, pickled; or what to raise in its place, if it cannot travel back."""
    import pickle

    with suppress(Exception):  # a failure may be anything
        if _note is not None and _may_lack_state(failure):
            _add_note(failure)
    try:
        return dumps_failure(failure)
    except Exception as why:
        return _told(
            pickle.PicklingError(
                f"{name} raised {failure!r}, which cannot come back from another process: {why}"
            ),
            failure,
        )


def dumps_failure(failure: object) -> bytes:
    """Pickles an exception, or what holds one.

    :raises Exception: if that cannot be unpickled.
    """
    import pickle

    try:
        carried = _dumps(failure)
        pickle.loads(carried)
    except Exception:
        with suppress(Exception):
            carried = _dumps_as_it_is(failure)
            pickle.loads(carried)
            return carried
        raise
    return carried


def no_way_back(name: str, result: object, why: Exception) -> Exception:
    """What to raise in place of a result that cannot travel back."""
    import pickle

    return _told(
        pickle.PicklingError(
            f"the result of {name}, of type {type(result).__qualname__}, cannot come back from "
            f"another process: {why}"
        ),
        why,
    )


class _Parcel:
    """What was pickled already: whoever unpickles the parcel gets it."""

    __slots__ = ("_pickled",)

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    def __reduce__(self) -> tuple[Any, ...]:
        import pickle

        return pickle.loads, (self._pickled,)


class _Carrier(Exception):
    """A pickled exception, which whoever unpickles the carrier gets."""

    _pickled: bytes

    def __reduce__(self) -> tuple[Any, ...]:
        import pickle

        return pickle.loads, (self._pickled,)


def _carrier_of(failure: BaseException, pickled: bytes) -> _Carrier:
    """One that looks like the failure: the executor sends its traceback along, as text."""
    kind = type(failure)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    text = repr(failure)
    with suppress(Exception):
        text = str(failure)
    carrier: _Carrier = type(kind.__name__, (_Carrier,), names)(text)
    carrier._pickled = pickled
    if isinstance(failure, BaseExceptionGroup):
        _told(carrier, failure)
    else:
        carrier.__cause__, carrier.__context__ = failure.__cause__, failure.__context__
        carrier.__suppress_context__ = failure.__suppress_context__
        with suppress(Exception):  # somebody may have put anything there
            for note in getattr(failure, "__notes__", ()):
                carrier.add_note(note)
    return carrier.with_traceback(failure.__traceback__)
