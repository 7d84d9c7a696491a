"""The work that `instructions.py` counts, in a process of its own that valgrind or strace watches.

    python bench/counted.py rows            # their names
    python bench/counted.py count ROW...    # the work, with marks around what is counted
    python bench/counted.py bytes ROW...    # what each call takes that is on its way

The work is that of the comparison benchmark, `peers/ours.py`, and a little more. Where that looks
at its clock, this makes the system call `getsid`, which nothing else makes: that is the mark.

Nothing that is counted may depend on how fast the machine is at the moment. So a clock that the
core looks at moves only when it is looked at, no thread is asked for the GIL before it waits, and
all threads share one processor. The garbage collector is off: whether one of its runs falls into
a batch hangs on what ran before, and was up to 14 % of a row. What is left is which of two threads
goes on when one has woken the other.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

# Before unsync takes `monotonic` for its own. A microsecond passes with each look.
time.monotonic = itertools.count(1.0, 1e-6).__next__

from peers import base, ours  # noqa: E402

from unsync import ACCELERATED, Unfuture, unsync  # noqa: E402
from unsync.executors import ThreadExecutor  # noqa: E402

# How often a row's work is done before anything of it is counted.
WARM_UP = 2
PENDING = 1000


@dataclass(frozen=True)
class Row:
    """A row of the table.

    :param name: of the method of `Counted` that does the work.
    :param count: how many calls are counted as one batch.
    :param batches: of which the cheapest counts. Where two threads wake each other for each call,
        now and then the wrong one goes on, which costs a few thousand instructions: there batches
        are so small that some are without that.
    """

    name: str
    label: str
    count: int = 200
    batches: int = 5


ROWS = (
    Row("coroutine_each", "coroutine, wait for each", 8, 40),
    Row("function_each", "thread function, wait for each"),
    Row("coroutine_fan_out", "coroutines, fan out"),
    Row("function_fan_out", "thread functions, fan out"),
    Row("then_each", "`.then` on each, fan out"),
    Row("map_each", "`.map` on each, fan out"),
    Row("then_wait", "`.then`, wait for each", 8, 40),
    Row("then_chain", "`.then` chain, per link"),
    Row("unfuture", "an Unfuture made, set and looked at"),
    Row("callback", "an Unfuture made with a callback, and set"),
    Row("loop_coroutine", "in the loop, await a coroutine call"),
    Row("loop_function", "in the loop, await a thread function", 8, 40),
    Row("loop_gather_coroutines", "in the loop, gather coroutine calls"),
    Row("loop_gather_functions", "in the loop, gather thread functions"),
    Row("foreign_coroutine", "in another loop, await a coroutine call", 4, 40),
    Row("foreign_function", "in another loop, await a thread function", 4, 40),
    Row("foreign_gather", "in another loop, gather thread functions"),
    Row("foreign_64", "in another loop, 64 await thread functions", 640),
    Row("stream_threads", "generator in a thread, each value to another", 1000),
    Row("calls", "`unsync.calls` of thread functions", 1000),
    Row("map", "`unsync.map` of thread functions", 1000),
    Row("process_each", "process call, wait for each", 4, 40),
)
BY_NAME = {row.name: row for row in ROWS}


def mark() -> float:
    """Tells whoever counts that a part begins or ends; in place of the peers' clock."""
    os.getsid(0)
    return 0.0


def take(value: int) -> int:
    return value


@unsync
def returned(value: int) -> int:
    return value


@unsync(cpu_bound=True)
def in_process() -> int:
    return 1


def set_and_read() -> Unfuture[int]:
    unfuture: Unfuture[int] = Unfuture()
    unfuture.set_result(1)
    return unfuture


class Counted(ours.Ours):
    def map_each(self, count: int) -> float:
        return base.fan_out(lambda: self.coroutine().map(take), count)

    def then_wait(self, count: int) -> float:
        return base.wait_for_each(self.chained, count)

    def unfuture(self, count: int) -> float:
        return base.wait_for_each(set_and_read, count)

    def callback(self, count: int) -> float:
        seen: list[Unfuture[int]] = []

        def called_back() -> Unfuture[int]:
            unfuture: Unfuture[int] = Unfuture()
            unfuture.add_done_callback(seen.append)
            unfuture.set_result(1)
            return unfuture

        seconds = base.wait_for_each(called_back, count)
        base.check(len(seen), count)
        return seconds

    def foreign_coroutine(self, count: int) -> float:
        return self.in_own_loop(base.await_each(self.awaited_coroutine, count))

    def calls(self, count: int) -> float:
        return base.read(
            lambda ones: [call.result() for call in unsync.calls(returned, [1] * ones)], count
        )

    def map(self, count: int) -> float:
        return base.read(lambda ones: unsync.map(returned, [1] * ones), count)

    def process_each(self, count: int) -> float:
        return base.wait_for_each(in_process, count)


def pending(peer: Counted) -> dict[str, Callable[[], object]]:
    """What makes a call of the row that is then on its way."""

    def with_callback() -> Unfuture[int]:
        unfuture: Unfuture[int] = Unfuture()
        unfuture.add_done_callback(print)
        return unfuture

    ends: list[Unfuture[int]] = [Unfuture()]

    def link() -> Unfuture[int]:
        ends[0] = ends[0].then(ours.one_more)
        return ends[0]

    return {
        "coroutine_fan_out": peer.coroutine,
        "function_fan_out": peer.function,
        "then_each": peer.chained,
        "map_each": lambda: peer.coroutine().map(take),
        "then_chain": link,
        "unfuture": Unfuture,
        "callback": with_callback,
    }


def bytes_each(make: Callable[[], object]) -> float:
    """What a call takes while neither the ambient loop nor any other thread can work on it."""
    unsync.thread_executor = ThreadExecutor(1)
    gate = threading.Event()
    held = threading.Barrier(3)

    def hold() -> None:
        held.wait()
        gate.wait()

    unsync.loop.call_soon_threadsafe(hold)
    held_worker = unsync.thread_executor.submit(hold)
    held.wait()
    kept: list[object] = [make() for _ in range(100)]
    gc.collect()
    tracemalloc.start()
    try:
        kept = [kept, *[None] * PENDING]
        before = tracemalloc.get_traced_memory()[0]
        for index in range(PENDING):
            kept[index + 1] = make()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        gate.set()
    held_worker.result()
    return taken / PENDING


def count(peer: Counted, name: str) -> None:
    """Does the work, with marks, and says how much there was of it."""
    work = getattr(peer, name)
    row = BY_NAME[name]
    for batch in range(WARM_UP + row.batches):
        base.perf_counter = mark if batch >= WARM_UP else float  # type: ignore[attr-defined]
        gc.collect()
        try:
            work(row.count)
        except Exception:
            if batch:
                raise
            traceback.print_exc()  # another version of the package, which cannot do this
            return
    print(json.dumps({"row": name, "count": row.count, "batches": row.batches}), flush=True)


def main() -> None:
    what, *names = sys.argv[1:]
    if what == "rows":
        print(*BY_NAME)
        return
    meant = not os.environ["UNSYNC_NO_EXTENSIONS"]
    assert meant == ACCELERATED, "the wrong core"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    sys.setswitchinterval(1000)
    gc.disable()
    peer = Counted()
    gc.collect()
    gc.freeze()  # so that a collection before each batch costs little
    if what == "bytes":
        makers = pending(peer)
        print(json.dumps({name: bytes_each(makers[name]) for name in names if name in makers}))
        os._exit(0)
    for name in names:
        count(peer, name)
        unsync.shutdown()  # the next row starts its threads anew


if __name__ == "__main__":
    main()
