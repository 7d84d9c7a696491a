"""How throughput grows from one core to two: prints a table, in operations per second.

    python bench/cores.py

Meant for CPython without the GIL; with it, nothing in here can grow. Each figure is the median of
five runs, with as many producers (threads that do the same at the same time) as it says.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable

from unsync import ACCELERATED, Unfuture, unsync

SECONDS = 0.5
RUNS = 5
BATCH = 50


@unsync
async def answer() -> int:
    return 42


@unsync
def compute() -> int:
    return sum(range(2000))


def futures() -> None:
    for _ in range(BATCH):
        future: Unfuture[int] = Unfuture()
        future.set_result(42)
        future.result()


def functions() -> None:
    for call in [compute() for _ in range(BATCH)]:
        call.result()


def coroutines() -> None:
    for call in [answer() for _ in range(BATCH)]:
        call.result()


def coroutines_between_work() -> None:
    for call in [answer() for _ in range(BATCH)]:
        sum(range(500))
        call.result()


WORK: dict[str, Callable[[], None]] = {
    "futures, each producer its own": futures,
    "thread functions that compute (15 µs)": functions,
    "coroutine calls, fan out": coroutines,
    "coroutine calls, 4 µs of work for each": coroutines_between_work,
}


def throughput(work: Callable[[], None], producers: int) -> float:
    counts = [0] * producers
    start = threading.Barrier(producers + 1)
    until = [0.0]

    def produce(place: int) -> None:
        start.wait()
        count = 0
        while time.perf_counter() < until[0]:
            work()
            count += BATCH
        counts[place] = count

    threads = [threading.Thread(target=produce, args=(i,)) for i in range(producers)]
    for thread in threads:
        thread.start()
    until[0] = time.perf_counter() + SECONDS
    start.wait()
    for thread in threads:
        thread.join()
    return sum(counts) / SECONDS


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    print(
        f"unsync, {'compiled' if ACCELERATED else 'pure'} core, Python {sys.version.split()[0]} "
        f"{'with' if gil else 'without'} the GIL"
    )
    print(f"{'':40}{'1 core':>12}{'2 cores':>12}{'2 cores':>12}{'ratio':>8}")
    print(f"{'producers':40}{1:12}{1:12}{2:12}")
    for label, work in WORK.items():
        figures = []
        for used, producers in ((1, 1), (2, 1), (2, 2)):
            os.sched_setaffinity(0, cores[:used])
            unsync.shutdown()  # its threads start anew, on these cores
            work()
            figures.append(statistics.median(throughput(work, producers) for _ in range(RUNS)))
        one, alone, both = figures
        print(f"{label:40}{one:12,.0f}{alone:12,.0f}{both:12,.0f}{max(alone, both) / one:8.2f}")


if __name__ == "__main__":
    main()
