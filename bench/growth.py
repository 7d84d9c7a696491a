"""How time and memory per call grow with the number of pending calls: prints JSON.

    python growth.py PEER [--most CALLS]

Time: so many calls are made, then their results are read; microseconds per call, the median of
three. Memory: the loop, or every worker, is held up while the calls are made; bytes per call.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from measure import pin
from peers import WAYS, make
from peers.base import Peer, Waitable, fan_out
from peers.standard_library import workers
from rows import GROWTH

KINDS = ("coroutine", "function", "chained")


@contextmanager
def held_up(peer: Peer, kind: str) -> Iterator[None]:
    """Nothing that is called in this block begins before its end."""
    go_on = threading.Event()
    busy = threading.Barrier(workers() + 1 if kind == "function" else 2)

    def block() -> None:
        busy.wait(60)
        go_on.wait()

    async def block_loop() -> None:
        block()

    if kind == "function":
        holding = [peer.start_function(block) for _ in range(workers())]
    else:
        holding = [peer.start_coroutine(block_loop)]
    busy.wait(60)
    try:
        yield
    finally:
        go_on.set()
        for each in holding:
            each.result()


def memory(peer: Peer, kind: str, call: Callable[[], Waitable], count: int) -> float:
    gc.collect()
    with held_up(peer, kind):
        calls: list[Waitable | None] = [None] * count
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for index in range(count):
            calls[index] = call()
        taken = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    for each in calls:
        assert each is not None
        each.result()
    return taken / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=WAYS)
    parser.add_argument("--most", type=int, default=GROWTH[-1], help="pending calls")
    parser.add_argument("--cpu", type=int, help="the core to stay on")
    options = parser.parse_args()
    pin(options.cpu)
    peer = make(options.peer)
    result: dict[str, dict[str, dict[int, float]]] = {}
    for kind in KINDS:
        call = getattr(peer, kind)
        sizes = [size for size in GROWTH if size <= options.most]
        times: dict[int, float] = {}
        fan_out(call, sizes[0])
        for size in sizes:
            samples = []
            for _ in range(3):
                gc.collect()
                samples.append(fan_out(call, size) / size * 1e6)
            times[size] = statistics.median(samples)
        result[kind] = {
            "µs": times,
            "bytes": {size: memory(peer, kind, call, size) for size in sizes},
        }
    print(json.dumps(result))
    peer.close()


if __name__ == "__main__":
    main()
