"""The compiled core and its twin offer the same, and the right one of them is chosen."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import pickle
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import GenericAlias, ModuleType
from typing import Any

import pytest

import unsync as package
from unsync import _backend, _common, _core_py

RunPython = Callable[..., subprocess.CompletedProcess[str]]

# PyPy takes the fallback, whatever lies there.
HAS_COMPILED = (
    sys.implementation.name == "cpython" and importlib.util.find_spec("unsync._core") is not None
)
needs_compiled = pytest.mark.skipif(not HAS_COMPILED, reason="no compiled core was built")

CLASSES = ["Batch", "Counter", "JobQueue", "Launcher", "Mailbox", "Route", "Unfuture"]
FUNCTIONS = [
    "after_fork",
    "are_all_of",
    "call_each",
    "fill_batches",
    "in_home_thread",
    "name_of_call",
    "set_home",
    "show_to_collector",
    "take_unseen",
    "tell_watcher",
    "waiting_upon",
    "watch_calls",
    "when_done",
    "when_told",
]
CONSTANTS = ["BIND_CLASS", "BIND_INSTANCE", "BIND_NOTHING"]

# What an Unfuture shows of itself to asyncio, concurrent.futures and the rest of the package.
UNFUTURE_HOOKS = [
    "_asyncio_future_blocking",
    "_cancel_message",
    "_complete",
    "_condition",
    "_make_cancelled_error",
    "_name_function",
    "_state",
    "_waiters",
]


@pytest.fixture(params=["compiled", "pure"])
def core(request: pytest.FixtureRequest) -> Any:
    """Each of the cores, whichever is in use."""
    if request.param == "pure":
        return _core_py
    return compiled_core()


def compiled_core() -> ModuleType:
    if not HAS_COMPILED:
        pytest.skip("no compiled core was built")
    return importlib.import_module("unsync._core")


def public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def members() -> Iterator[tuple[str, str]]:
    """The public attributes of the classes, as the twin in Python has them."""
    for class_name in CLASSES:
        for name in sorted(public(getattr(_core_py, class_name))):
            yield class_name, name


METHODS = [
    (class_name, name)
    for class_name, name in members()
    if callable(getattr(getattr(_core_py, class_name), name))
]


def shape(function: Callable[..., Any]) -> list[tuple[str, object, object]]:
    """The parameters, but for annotations, which only the twin in Python has.

    And but for whether `self` may be given by name: never to a method in C.
    """
    return [
        (
            parameter.name,
            parameter.default,
            parameter.POSITIONAL_OR_KEYWORD if parameter.name == "self" else parameter.kind,
        )
        for parameter in inspect.signature(function).parameters.values()
    ]


def test_the_lists_above_are_complete() -> None:
    assert sorted(_core_py.__all__) == sorted(CLASSES + FUNCTIONS + CONSTANTS)


@needs_compiled
def test_the_compiled_core_has_each_public_name_of_its_twin() -> None:
    missing = set(_core_py.__all__) - public(compiled_core())
    assert missing == set()


@needs_compiled
@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_equal(name: str) -> None:
    assert getattr(compiled_core(), name) == getattr(_core_py, name)


@needs_compiled
@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_the_same_public_attributes(name: str) -> None:
    assert public(getattr(compiled_core(), name)) == public(getattr(_core_py, name))


def test_an_unfuture_has_all_that_the_seed_and_its_two_parents_have(core: Any) -> None:
    assert public(core.Unfuture) == {
        "add_done_callback",
        "cancel",
        "cancelled",
        "concurrent_future",
        "done",
        "exception",
        "from_value",
        "future",
        "get_loop",
        "map",
        "remove_done_callback",
        "result",
        "running",
        "set_exception",
        "set_result",
        "set_running_or_notify_cancel",
        "set_value",
        "then",
    }


@needs_compiled
@pytest.mark.parametrize("name", UNFUTURE_HOOKS)
def test_unfutures_have_the_same_hooks(name: str) -> None:
    ours, twins = compiled_core().Unfuture, _core_py.Unfuture
    assert hasattr(ours, name)
    assert hasattr(twins, name)
    assert callable(getattr(ours, name)) == callable(getattr(twins, name))


@needs_compiled
@pytest.mark.parametrize(("class_name", "name"), METHODS)
def test_methods_have_the_same_signatures(class_name: str, name: str) -> None:
    ours = getattr(getattr(compiled_core(), class_name), name)
    twins = getattr(getattr(_core_py, class_name), name)
    assert shape(ours) == shape(twins)


@needs_compiled
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_same_signatures(name: str) -> None:
    assert shape(getattr(compiled_core(), name)) == shape(getattr(_core_py, name))


@needs_compiled
@pytest.mark.parametrize("name", CLASSES + FUNCTIONS)
def test_classes_and_functions_have_the_same_docstrings(name: str) -> None:
    ours, twins = getattr(compiled_core(), name), getattr(_core_py, name)
    assert inspect.getdoc(ours) == inspect.getdoc(twins)
    assert inspect.getdoc(twins)


@needs_compiled
@pytest.mark.parametrize(
    ("class_name", "name"),
    [*members(), ("Unfuture", "__await__"), ("Unfuture", "__reduce__")],
)
def test_attributes_have_the_same_docstrings(class_name: str, name: str) -> None:
    ours = getattr(getattr(compiled_core(), class_name), name)
    twins = getattr(getattr(_core_py, class_name), name)
    if isinstance(twins, bool) or inspect.ismemberdescriptor(twins):
        return  # a plain value, or a slot, has no docstring of its own
    assert inspect.getdoc(ours) == inspect.getdoc(twins)
    if callable(twins) and not name.startswith("_") and class_name == "Unfuture":
        assert inspect.getdoc(twins)


@needs_compiled
@pytest.mark.parametrize("class_name", CLASSES)
def test_classes_offer_the_same_special_methods(class_name: str) -> None:
    special = [
        "__await__",
        "__call__",
        "__class_getitem__",
        "__del__",
        "__eq__",
        "__get__",
        "__hash__",
        "__iter__",
        "__len__",
        "__next__",
        "__set__",
    ]
    ours, twins = getattr(compiled_core(), class_name), getattr(_core_py, class_name)
    for name in special:
        assert hasattr(ours, name) == hasattr(twins, name), name


# The special methods whose signatures a compiled class does not tell, and the constructors.


def test_an_unfuture_takes_its_source_by_name_too(core: Any) -> None:
    source = core.Unfuture.from_value(1)
    assert core.Unfuture(source=source).result() == core.Unfuture(source).result() == 1
    assert not core.Unfuture().done()
    assert not core.Unfuture(None).done()
    with pytest.raises(TypeError):
        core.Unfuture(None, None)
    with pytest.raises(TypeError):
        core.Unfuture(value=1)


def test_an_unfuture_can_be_awaited_and_not_iterated_over(core: Any) -> None:
    unfuture = core.Unfuture.from_value(1)
    iterator = unfuture.__await__()
    assert iter(iterator) is iterator
    with pytest.raises(StopIteration) as info:
        next(iterator)
    assert info.value.value == 1
    with pytest.raises(TypeError, match="await"):
        iter(unfuture)


def test_an_unfuture_can_be_weakly_referenced(core: Any) -> None:
    unfuture = core.Unfuture()
    assert weakref.ref(unfuture)() is unfuture


@pytest.mark.parametrize("name", ["Unfuture", "Launcher"])
def test_generic_classes_can_be_subscripted(core: Any, name: str) -> None:
    cls = getattr(core, name)
    arguments = ([int], str) if name == "Launcher" else int
    assert cls[arguments].__origin__ is cls


def test_instances_have_no_dict(core: Any) -> None:
    """It would cost memory in each call."""
    queue = core.JobQueue(1, list)
    for instance in (
        core.Unfuture(),
        core.Launcher(len, core.Route(queue.submit)),
        queue,
        core.Route(queue.submit),
    ):
        assert not hasattr(instance, "__dict__")
        with pytest.raises(AttributeError):
            instance.anything = 1


def test_an_unfuture_can_be_subclassed(core: Any) -> None:
    class Sub(core.Unfuture):  # type: ignore[misc, name-defined]
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    sub = Sub("mine")
    assert (sub.name, type(sub)) == ("mine", Sub)
    sub.set_result(1)
    assert sub.result() == 1
    assert repr(sub) == "<Sub finished result=1>"


def test_from_value_makes_one_of_the_class_it_is_called_on(core: Any) -> None:
    class Sub(core.Unfuture):  # type: ignore[misc, name-defined]
        pass

    assert type(Sub.from_value(1)) is Sub


def test_a_launcher_can_be_subclassed_and_binds(core: Any) -> None:
    class Sub(core.Launcher):  # type: ignore[misc, name-defined]
        pass

    def submit(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return core.Unfuture.from_value((function, args, kwargs))

    route = core.Route(submit=submit)
    assert route.submit is submit
    launcher = Sub(len, route)
    assert launcher(1, a=2).result() == (len, (1,), {"a": 2})
    assert launcher(self=3).result() == (len, (), {"self": 3})
    assert launcher.__get__(5)().result() == (len, (5,), {})
    assert launcher.__get__(5, int)().result() == (len, (5,), {})
    assert launcher.__get__(None, int) is launcher
    by_class = Sub(len, route, core.BIND_CLASS)
    assert by_class.__get__(5)().result() == (len, (int,), {})
    assert by_class.__get__(None, int)().result() == (len, (int,), {})
    by_nothing = Sub(function=len, route=route, binding=core.BIND_NOTHING)
    assert by_nothing.__get__(5, int) is by_nothing.__get__(None, int) is by_nothing


def test_a_route_can_be_changed(core: Any) -> None:
    """Both to a queue's own way in, which is called directly, and back."""
    seen: list[str] = []
    queue = core.JobQueue(limit=1, spawn=lambda: seen.append("spawned"))
    route = core.Route(lambda *call: seen.append("before"))
    launcher = core.Launcher(len, route)
    launcher()
    route.submit = queue.submit
    unfuture = launcher("abc")
    route.submit = lambda *call: seen.append("after")
    launcher()
    assert seen == ["before", "spawned", "after"]
    queue.close(RuntimeError)
    queue.work()
    assert unfuture.result() == 3


def test_finished_unfutures_have_the_same_text(core: Any) -> None:
    failed, cancelled = core.Unfuture(), core.Unfuture()
    failed.set_exception(ValueError("no"))
    assert failed.exception() is not None
    cancelled.cancel()
    assert repr(core.Unfuture()) == "<Unfuture pending>"
    assert repr(core.Unfuture.from_value("v")) == "<Unfuture finished result='v'>"
    assert repr(failed) == "<Unfuture finished exception=ValueError('no')>"
    assert repr(cancelled) == "<Unfuture cancelled>"


# Which core is chosen.

SHOW = """
    import unsync
    from unsync import _backend
    print(unsync.ACCELERATED, unsync.Unfuture.__module__, _backend.Launcher.__module__)
"""


def test_accelerated_tells_which_core_is_in_use() -> None:
    compiled = package.Unfuture.__module__ == "unsync._core"
    assert package.ACCELERATED is _backend.ACCELERATED is compiled
    for name in _core_py.__all__:
        twins = getattr(_core_py, name)
        assert name in CONSTANTS or (getattr(_backend, name) is twins) is not compiled


@needs_compiled
def test_without_the_switch_the_compiled_core_is_used(
    run_python: RunPython, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNSYNC_NO_EXTENSIONS", raising=False)
    run = run_python(SHOW)
    assert (run.stdout, run.stderr) == ("True unsync._core unsync._core\n", "")


@needs_compiled
def test_an_empty_switch_counts_as_unset(run_python: RunPython) -> None:
    run = run_python(SHOW, env={"UNSYNC_NO_EXTENSIONS": ""})
    assert (run.stdout, run.stderr) == ("True unsync._core unsync._core\n", "")


@pytest.mark.parametrize("value", ["1", "yes", "0"])
def test_the_switch_selects_the_fallback(run_python: RunPython, value: str) -> None:
    run = run_python(SHOW, env={"UNSYNC_NO_EXTENSIONS": value})
    assert (run.stdout, run.stderr) == ("False unsync._core_py unsync._core_py\n", "")


def test_another_implementation_of_python_selects_the_fallback(run_python: RunPython) -> None:
    program = """
    import sys
    sys.implementation.name = "pypy"
    """
    run = run_python(program + SHOW, env={"UNSYNC_NO_EXTENSIONS": ""})
    assert (run.stdout, run.stderr) == ("False unsync._core_py unsync._core_py\n", "")


IMPORTER = """
    import sys
    from importlib.abc import Loader, MetaPathFinder
    from importlib.machinery import ModuleSpec

    class Broken(MetaPathFinder, Loader):
        def find_spec(self, name, path, target=None):
            return ModuleSpec(name, self) if name == "unsync._core" else None

        def exec_module(self, module):
            {fault}

    sys.meta_path.insert(0, Broken())
"""


def test_a_core_that_was_not_built_selects_the_fallback_quietly(run_python: RunPython) -> None:
    fault = "raise ModuleNotFoundError('no core', name='unsync._core')"
    run = run_python(IMPORTER.format(fault=fault) + SHOW, env={"UNSYNC_NO_EXTENSIONS": ""})
    assert (run.stdout, run.stderr) == ("False unsync._core_py unsync._core_py\n", "")


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="it looks for no extension")
@pytest.mark.parametrize(
    "fault",
    [
        "raise ImportError('undefined symbol', name='unsync._core')",
        "raise ModuleNotFoundError('a part is missing', name='unsync._other')",
        "raise SystemError('built for another Python')",
    ],
)
def test_a_compiled_core_that_does_not_load_is_an_error(run_python: RunPython, fault: str) -> None:
    run = run_python(IMPORTER.format(fault=fault) + SHOW, env={"UNSYNC_NO_EXTENSIONS": ""})
    assert run.returncode != 0
    assert run.stdout == ""
    assert fault.split("'")[1] in run.stderr


def test_the_generic_classes_take_type_arguments(core: Any) -> None:
    alias = core.Unfuture[int]
    assert isinstance(alias, GenericAlias)
    assert alias.__args__ == (int,)
    assert type(alias()) is core.Unfuture

    class Sub(alias):  # type: ignore[misc]
        pass

    assert issubclass(Sub, core.Unfuture)


def test_the_version_is_told_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a frozen program or a zip file."""
    monkeypatch.setattr(
        importlib.metadata.Distribution, "discover", lambda *args, **kwargs: iter(())
    )
    assert package.__version__ == "unknown"


@pytest.mark.parametrize("metadata", [None, "", "Name: unsync\n"])
def test_the_version_is_told_where_it_was_uninstalled_in_part(
    metadata: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "unsync-1.dist-info"
    folder.mkdir()
    if metadata is not None:
        (folder / "METADATA").write_text(metadata)
    # The only one: where there is another, Python 3.15 takes that.
    found = [*importlib.metadata.distributions(name="unsync", path=[str(tmp_path)])]
    assert len(found) == 1
    monkeypatch.setattr(
        importlib.metadata.Distribution, "discover", lambda *args, **kwargs: iter(found)
    )
    assert package.__version__ == "unknown"


def test_no_module_shows_the_clock_that_waits_go_by() -> None:
    """freezegun would replace it wherever it is shown, and then no time would pass."""
    for name in [*package._LATER.values(), "pytest_plugin"]:
        importlib.import_module(f"unsync.{name}")
    modules = {name: module for name, module in sys.modules.items() if name.startswith("unsync.")}
    assert {_backend._core.__name__, "unsync.fan_out"} <= modules.keys()
    for module in modules.values():
        shown = [name for name in dir(module) if getattr(module, name, None) is time.monotonic]
        assert not shown, module


# Settings and methods of the decorator, looked for on the module of the same name.

OF_THE_DECORATOR = [
    *("calls", "drain", "exit_timeout", "loop", "loop_factory", "map", "process_executor"),
    *("shutdown", "stats", "thread", "thread_executor"),
]


def test_the_list_of_what_the_decorator_has_is_complete() -> None:
    assert {name for name in vars(type(package.unsync)) if name[0] != "_"} == {*OF_THE_DECORATOR}


@pytest.mark.parametrize("name", OF_THE_DECORATOR)
def test_what_the_decorator_has_is_not_the_modules_and_the_error_says_so(name: str) -> None:
    advice = rf"from unsync import unsync`, and then `unsync\.{name}`"
    module: Any = package
    with pytest.raises(
        AttributeError, match=rf"module 'unsync' has no attribute '{name}': .*{advice}"
    ):
        getattr(module, name)
    with pytest.raises(
        AttributeError, match=rf"'{name}' cannot be set .*module 'unsync': .*{advice}"
    ):
        setattr(module, name, None)
    assert not hasattr(module, name)
    assert name not in dir(module)
    assert name not in vars(module)


def test_other_attributes_of_the_module_can_be_set_and_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module: Any = package
    with monkeypatch.context() as patch:
        patch.setattr(module, "Unfuture", int)
        patch.setattr(module, "mine", 1, raising=False)
        patch.delattr(module, "CancelledError")
        assert (module.Unfuture, module.mine, hasattr(module, "CancelledError")) == (int, 1, False)
    assert (module.Unfuture, hasattr(module, "mine")) == (_backend.Unfuture, False)
    assert module.CancelledError is _common.CancelledError
    assert isinstance(module, ModuleType)
    assert repr(module).startswith("<module 'unsync' from ")


def test_the_module_can_be_loaded_anew(run_python: RunPython) -> None:
    run = run_python("""
        import importlib, unsync
        importlib.reload(unsync)
        try:
            unsync.thread_executor = None
        except AttributeError:
            print("refused")
    """)
    assert (run.stdout, run.stderr) == ("refused\n", "")


def test_the_module_travels() -> None:
    """cloudpickle, which knows how modules do, knows them by their class."""
    assert pickle.loads(pickle.dumps(package)) is package
