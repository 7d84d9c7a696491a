"""Many small calls in processes: one by one, and in chunks; prints a table in Markdown.

    python bench/fan_out.py

Milliseconds for all calls and their results, the median of the rounds, in which all ways take their
turns, in another order each time: what ran before leaves its mark. The same two processes serve all
ways: two pools differ by more than the ways do.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor

from unsync import unsync

WORKERS = 2
CHUNKS = (64, 256, 1024)


def nothing(x: int) -> int:
    return x + 1


def little(x: int) -> int:
    """A few microseconds of work: between one and four, by the machine."""
    return x + 1 + 0 * sum(range(250))


pool = ProcessPoolExecutor(WORKERS)

Way = Callable[[Iterable[int], "int | None"], Iterable[int]]


def ways(function: Callable[[int], int]) -> dict[str, Way]:
    marked = unsync(function, executor=pool)
    return {
        "`submit`, one by one": lambda xs, _: [
            future.result() for future in [pool.submit(function, x) for x in xs]
        ],
        "`@unsync` calls, one by one": lambda xs, _: [
            call.result() for call in [marked(x) for x in xs]
        ],
        "`ProcessPoolExecutor.map`": lambda xs, size: pool.map(function, xs, chunksize=size or 1),
        "`unsync.calls`": lambda xs, size: [
            call.result() for call in unsync.calls(marked, xs, chunksize=size)
        ],
        "`unsync.map`": lambda xs, size: unsync.map(marked, xs, chunksize=size),
        "`unsync.map`, as completed": lambda xs, size: unsync.map(
            marked, xs, chunksize=size, in_order=False
        ),
    }


def measure(way: Way, calls: int, size: int | None) -> float:
    gc.collect()
    before = time.perf_counter()
    results = list(way(range(calls), size))
    spent = time.perf_counter() - before
    assert sorted(results) == list(range(1, calls + 1)), "wrong results are not timed"
    return spent * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    heads = "".join(f" | chunks of {size}" for size in CHUNKS)
    for function in (nothing, little):
        turns = [
            (name, way, size)
            for name, way in ways(function).items()
            for size in ((None,) if "one by one" in name else (*CHUNKS, None))
            if size or "Executor" not in name
        ]
        spent: dict[tuple[str, int | None], list[float]] = {}
        shuffle = random.Random(0).shuffle
        for number in range(options.rounds + 1):
            shuffle(turns)
            for name, way, size in turns:
                if number > 2 and size is None and "one by one" in name:
                    continue  # which take long, and differ by more than the rounds do
                taken = measure(way, options.calls, size)
                if number:  # the first starts what there is to start
                    spent.setdefault((name, size), []).append(taken)
        print(f"\n| {options.calls} calls of `{function.__name__}` (ms){heads} | no size given |")
        print(f"| --- |{' ---: |' * (len(CHUNKS) + 1)}")
        for name in ways(function):
            cells = [spent.get((name, size)) for size in (*CHUNKS, None)]
            texts = ["-" if cell is None else f"{statistics.median(cell):.1f}" for cell in cells]
            print(f"| {name} | {' | '.join(texts)} |", flush=True)
    pool.shutdown()


if __name__ == "__main__":
    main()
