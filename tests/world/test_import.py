"""What `import unsync` loads, and what it leaves until somebody asks for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import typing
import zipapp
from collections.abc import Callable
from pathlib import Path

import pytest

import unsync as package
from unsync import unsync

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

# What has to be there: the settings, where work runs, what marking a function takes. A module more
# is time more, in each process that imports unsync.
ALWAYS = {
    "unsync",
    "unsync._ambient",
    "unsync._backend",
    "unsync._common",
    "unsync._core" if package.ACCELERATED else "unsync._core_py",
    "unsync._counts",
    "unsync._travel",
    "unsync._views",
    "unsync.executors",
    "unsync.unsync",
}

# Some programs never need these.
LATER = {
    "unsync._single_thread",
    "unsync._stats",
    "unsync.context_managers",
    "unsync.fan_out",
    "unsync.streams",
}

# What unsync needs of the standard library, beyond its two parents. `ThreadExecutor` is a
# `ThreadPoolExecutor`, whose module, with `queue`, has to be loaded early: it registers what it
# does at exit, and once the exit has begun it cannot. `typing` comes with asyncio before 3.14,
# `__future__` with lazy annotations.
BASIS = """
    import sys
    import __future__, asyncio, concurrent.futures, concurrent.futures.thread, typing
    before = set(sys.modules)
"""


def test_importing_loads_no_more_than_is_known(run_python: RunPython) -> None:
    run = run_python(
        BASIS
        + """
    import unsync
    print(*sorted(set(sys.modules) - before))
    """
    )
    # What Cython brings along is made, not looked for.
    loaded = {
        name
        for name in run.stdout.split()
        if name != "cython_runtime" and not name.startswith("_cython_")
    }
    assert (loaded, run.stderr) == (ALWAYS, "")


# Each with the modules that it loads, all that they need in turn included.
CONTEXT_MANAGERS = {"unsync.context_managers"}
STREAMS = {"unsync.streams"}
FAN_OUT = {"unsync.fan_out", "unsync.streams"}
STATS = {"unsync._stats"}
SINGLE_THREAD = {"unsync._single_thread"}
USES = {
    "import unsync; dir(unsync)": set(),
    "from unsync import unsync; unsync(len)": set(),
    "from unsync import unsync; unsync(len)([]).result()": set(),
    "from unsync import unsync; unsync.shutdown()": set(),
    "import unsync; unsync.AmbientContextManager.__enter__": CONTEXT_MANAGERS,
    "import unsync; unsync.Stream.close": STREAMS,
    "import unsync; unsync.context_managers.AmbientContextManager": CONTEXT_MANAGERS,
    "import unsync; unsync.fan_out.make_calls": FAN_OUT,
    "import unsync; unsync.streams.Stream": STREAMS,
    "from unsync import AmbientContextManager": CONTEXT_MANAGERS,
    "from unsync import Stream": STREAMS,
    "from unsync import streams": STREAMS,
    "from unsync import *; Stream; AmbientContextManager": CONTEXT_MANAGERS | STREAMS,
    "from unsync.unsync import AmbientContextManager": CONTEXT_MANAGERS,
    "from unsync.unsync import Stream": STREAMS,
    "from unsync.unsync import *; Stream; AmbientContextManager": CONTEXT_MANAGERS | STREAMS,
    "from unsync import unsync; unsync.stats().coroutines.pending": STATS,
    "from unsync import unsync; unsync.calls(unsync(len), ['']).pop().result()": FAN_OUT,
    "from unsync import unsync; list(unsync.map(unsync(len), ['']))": FAN_OUT,
    "from unsync import unsync; list(unsync(lambda: (yield))())": STREAMS,
    "from unsync.executors import ThreadExecutor": set(),
    "from unsync.executors import SingleThreadExecutor": SINGLE_THREAD,
    "from unsync.executors import *; SingleThreadExecutor": SINGLE_THREAD,
}


@pytest.mark.parametrize("program", USES)
def test_the_rest_is_loaded_by_what_needs_it(run_python: RunPython, program: str) -> None:
    run = run_python(f"""
        import sys
        {program}
        print(*sorted({LATER!r}.intersection(sys.modules)))
    """)
    assert (set(run.stdout.split()), run.stderr) == (USES[program], "")


def test_marking_loads_what_the_calls_will_need(run_python: RunPython) -> None:
    """So that a call need not look for it."""
    run = run_python("""
        import contextlib, sys
        from unsync import unsync

        @unsync
        async def stream():
            yield

        print("unsync.streams" in sys.modules, "unsync.context_managers" in sys.modules)

        @unsync
        @contextlib.asynccontextmanager
        async def manager():
            yield

        print("unsync.context_managers" in sys.modules)
    """)
    assert (run.stdout, run.stderr) == ("True False\nTrue\n", "")


def test_what_is_not_loaded_is_listed(run_python: RunPython) -> None:
    run = run_python("""
        import unsync
        before = dir(unsync)
        for name in before:
            getattr(unsync, name)
        print(before == dir(unsync), *[name for name in before if not name.startswith("_")])
    """)
    names = (
        "ACCELERATED AmbientContextManager CancelledError InvalidStateError Stream Unfuture "
        "context_managers executors fan_out streams unsync"
    )
    assert (run.stdout, run.stderr) == (f"True {names}\n", "")


@pytest.mark.parametrize("module", [package, sys.modules["unsync.unsync"]])
def test_a_name_that_is_not_there_is_an_error(module: object) -> None:
    with pytest.raises(AttributeError, match=r"module 'unsync.*' has no attribute 'nothing'"):
        module.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_annotations_find_what_they_name() -> None:
    assert typing.get_type_hints(type(unsync).map)["return"] == package.Stream[typing.Any]
    assert typing.get_type_hints(type(unsync).stats)["return"] is type(unsync.stats())


def test_threads_may_ask_at_once(run_python: RunPython) -> None:
    run = run_python("""
        import sys, threading
        import unsync

        sys.setswitchinterval(1e-6)
        asks = [
            lambda: unsync.Stream,
            lambda: unsync.streams.Stream,
            lambda: type(unsync.unsync(lambda: (yield))()),
            lambda: type(unsync.unsync.map(unsync.unsync(len), [""])),
        ] * 4
        barrier = threading.Barrier(len(asks))
        found = []

        def work(ask):
            barrier.wait()
            found.append(ask())

        threads = [threading.Thread(target=work, args=[ask]) for ask in asks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(len(found), set(found))
    """)
    assert (run.stdout, run.stderr) == ("16 {<class 'unsync.streams.Stream'>}\n", "")


def test_calls_of_other_executors_end_while_what_drains_is_loaded(run_python: RunPython) -> None:
    """When its module is there, and nothing is in it yet."""
    run = run_python(
        """
        import importlib.abc, importlib.util, sys
        from concurrent.futures import ThreadPoolExecutor
        from unsync import unsync

        class Slow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
            def find_spec(self, name, path, target=None):
                if name != "unsync._drain":
                    return None
                sys.meta_path.remove(self)
                spec = importlib.util.find_spec(name)
                self.loader, spec.loader = spec.loader, self
                return spec

            def create_module(self, spec):
                return self.loader.create_module(spec)

            def exec_module(self, module):
                assert sys.modules["unsync._drain"] is module
                with ThreadPoolExecutor(1) as threads:
                    call = unsync(abs, executor=threads)(-1)
                print(call.result())
                self.loader.exec_module(module)

        sys.meta_path.insert(0, Slow())
        print(unsync.drain())
        """
    )
    assert (run.stdout, run.stderr) == ("1\nTrue\n", "")


def test_at_exit_it_can_be_asked_for_still(run_python: RunPython) -> None:
    run = run_python("""
        import atexit
        import gc
        import unsync

        class Late:
            def __del__(self):
                print(unsync.Stream, unsync.unsync.stats().threads)

        @atexit.register
        def ask():
            print(unsync.AmbientContextManager)
            Late()
            gc.collect()  # PyPy calls no `__del__` before
    """)
    assert run.stdout == (
        "<class 'unsync.context_managers.AmbientContextManager'>\n"
        "<class 'unsync.streams.Stream'> "
        "Work(started=0, finished=0, failed=0, cancelled=0, pending=0)\n"
    )
    assert run.stderr == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fork_waits_for_a_thread_that_imports(run_python: RunPython) -> None:
    """Else the child would have a lock that nobody gives back, and wait for it for ever."""
    run = run_python(
        """
        import os, signal, sys, threading
        from unsync import unsync

        importing, forked = threading.Event(), threading.Event()

        class Slow:
            @staticmethod
            def find_spec(name, path, target=None):
                if name == "unsync.streams" and threading.current_thread() is importer:
                    importing.set()
                    forked.wait(0.5)  # it is not to be seen: the fork waits

        @unsync
        def number():
            return 1

        sys.meta_path.insert(0, Slow)
        os.register_at_fork(after_in_parent=forked.set)
        importer = threading.Thread(target=unsync, args=[lambda: (yield)])
        importer.start()
        importing.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            values = list(unsync.map(number, *[[]]))
            os._exit(len(values))
        _, status = os.waitpid(child, 0)
        importer.join()
        print(os.waitstatus_to_exitcode(status))
        """,
        "-W",
        "ignore:This process:DeprecationWarning",
    )
    assert (run.stdout, run.stderr) == ("0\n", "")


def test_a_zip_application_runs_and_has_a_version(tmp_path: Path) -> None:
    """A zip file holds no extension and no metadata, so it is the fallback, of unknown version."""
    folder = tmp_path / "app"
    sources = Path(package.__file__).parent
    shutil.copytree(
        sources, folder / "unsync", ignore=shutil.ignore_patterns("_core.*", "__pycache__")
    )
    (folder / "__main__.py").write_text(
        textwrap.dedent(
            """
            import unsync

            @unsync.unsync
            async def add(number):
                return number + 1

            @unsync.unsync
            def values():
                yield 1

            print(unsync.__version__, unsync.ACCELERATED, add(1).result(), list(values()))
            """
        )
    )
    zipapp.create_archive(folder, tmp_path / "app.pyz")
    # Without site-packages, where unsync may be installed.
    command = [sys.executable, "-I", "-S", "-W", "error", str(tmp_path / "app.pyz")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (run.stdout, run.stderr) == ("unknown False 2 [1]\n", "")
