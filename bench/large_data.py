"""What it costs to send a large array to a function in another process, and to get one back.

    python bench/large_data.py [--megabytes N] [--rounds N] [WAY ...]

For each way: the median of the time that a call takes whose argument, or whose result, is an array
of so many megabytes; and by how much the memory of this process and of the worker grew at their
peaks above what they had when they were idle (on Linux). Each way runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from unsync import unsync

MEGABYTE = 1_000_000


# What is called, in the worker.


def take(array: Any) -> float:
    return float(array[-1])


def give(size: int) -> Any:
    return np.ones(size)


def take_shared(name: str, size: int) -> float:
    block = attach(name)
    last = float(np.ndarray(size, buffer=block.buf)[-1])
    block.close()
    return last


def give_shared(name: str, size: int) -> None:
    block = attach(name)
    np.ndarray(size, buffer=block.buf)[:] = 1
    block.close()


def attach(name: str) -> SharedMemory:
    # Before 3.13 whoever attaches tells the resource tracker as well. Here they share one.
    return SharedMemory(name)


# The ways. `call` has a function called in the worker, and waits for what it gives.

Call = Callable[..., Any]


@contextmanager
def bare_pool() -> Iterator[Call]:
    with ProcessPoolExecutor(1) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@contextmanager
def through_unsync(executor: Executor) -> Iterator[Call]:
    unsync.process_executor = executor
    marked = {f: unsync(f, cpu_bound=True) for f in (take, give, take_shared, give_shared)}
    with executor:
        yield lambda function, *args: marked[function](*args).result()


@contextmanager
def pool() -> Iterator[Call]:
    with through_unsync(ProcessPoolExecutor(1)) as call:
        yield call


@contextmanager
def loky() -> Iterator[Call]:
    from loky import ProcessPoolExecutor as LokyExecutor

    with through_unsync(LokyExecutor(1)) as call:
        yield call


@contextmanager
def dask(scatter: bool = False) -> Iterator[Call]:
    from distributed import Client

    warnings.filterwarnings("ignore", "Sending large graph")  # which `scatter` is the answer to
    with (
        Client(n_workers=1, threads_per_worker=1, dashboard_address=None) as client,
        through_unsync(client.get_executor(pure=False)) as call,
    ):

        def call_with_a_future(function: Callable[..., Any], argument: Any) -> Any:
            return call(function, client.scatter(argument) if function is take else argument)

        yield call_with_a_future if scatter else call


@contextmanager
def shared_memory() -> Iterator[Call]:
    with through_unsync(ProcessPoolExecutor(1)) as call:

        def call_with_a_name(function: Callable[..., Any], argument: Any) -> Any:
            is_argument = function is take
            size = argument.size if is_argument else argument
            block = SharedMemory(create=True, size=size * 8)
            array: Any = np.ndarray(size, buffer=block.buf)
            try:
                if is_argument:
                    array[:] = argument
                    return call(take_shared, block.name, size)
                call(give_shared, block.name, size)
                return float(array[-1])
            finally:
                del array
                block.close()
                block.unlink()

        yield call_with_a_name


WAYS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bare_pool": ("`ProcessPoolExecutor.submit`", bare_pool),
    "pool": ("unsync, `ProcessPoolExecutor`", pool),
    "loky": ("unsync, loky", loky),
    "dask": ("unsync, Dask, local cluster", dask),
    "dask_scatter": ("unsync, Dask, argument by `scatter`", partial(dask, scatter=True)),
    "shared_memory": ("unsync, `ProcessPoolExecutor`, name of a `SharedMemory`", shared_memory),
}


# Measuring.


class Memory:
    """The peaks of this process and of those that it started, in bytes above those when idle."""

    def __init__(self) -> None:
        self._idle = {pid: self._reset(pid) for pid in ("self", *children())}

    @staticmethod
    def _reset(pid: str) -> int:
        with suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        return peak(pid)

    def grown(self) -> tuple[int, int]:
        here, *workers = (peak(pid) - idle for pid, idle in self._idle.items())
        return here, max(workers, default=0)


def children() -> list[str]:
    """All processes below this one."""
    found: list[str] = []
    parents = ["self"]
    while parents:
        for path in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            below = path.read_text().split()
            found += below
            parents += below
    return found


def peak(pid: str) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def measure(way: str, megabytes: float, rounds: int) -> dict[str, Any]:
    size = max(1, int(megabytes * MEGABYTE) // 8)
    array = np.ones(size)
    found: dict[str, Any] = {"way": way, "megabytes": megabytes}
    with WAYS[way][1]() as call:
        for kind, function, argument in (("argument", take, array), ("result", give, size)):
            call(function, argument)  # everything is started, and has been imported
            time.sleep(0.2)  # and what that left behind is gone
            memory = Memory()
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                outcome = call(function, argument)
                seconds.append(time.perf_counter() - start)
                last = outcome if isinstance(outcome, float) else float(outcome[-1])
                assert last == 1.0, last
                del outcome
            here, worker = memory.grown()
            found[kind] = {
                "milliseconds": statistics.median(seconds) * 1000,
                "megabytes_here": here / MEGABYTE,
                "megabytes_worker": worker / MEGABYTE,
            }
    return found


def row(found: dict[str, Any]) -> str:
    cells = [WAYS[found["way"]][0]]
    for kind in ("argument", "result"):
        cells.append(f"{found[kind]['milliseconds']:,.0f}")
        cells.append(f"{found[kind]['megabytes_here']:,.0f}")
        cells.append(f"{found[kind]['megabytes_worker']:,.0f}")
    return f"| {' | '.join(cells)} |"


HEAD = """\
| | argument: ms | MB here | MB in the worker | result: ms | MB here | MB in the worker |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one way, in this process")
    options = parser.parse_args()
    if unknown := {*options.ways} - {*WAYS}:
        parser.error(f"no way {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    if options.json:
        for way in options.ways:
            print(json.dumps(measure(way, options.megabytes, options.rounds)))
        return
    print(HEAD)
    for way in options.ways or WAYS:
        settings = ("--megabytes", str(options.megabytes), "--rounds", str(options.rounds))
        command = [sys.executable, __file__, "--json", *settings, way]
        print(row(json.loads(subprocess.check_output(command))), flush=True)


if __name__ == "__main__":
    main()
