"""Many small calls in processes: one by one, and in chunks; prints a table in Markdown.

    python bench/fan_out.py

Milliseconds for all calls and their results, the median over some programs and their rounds, in
which all ways take their turns, in another order each time: what ran before leaves its mark. In one
program the same two processes serve all ways. Two programs differ by more than the ways do; so then
follow the ratios, and how sure they are.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain

from unsync import unsync

WORKERS = 2
CHUNKS = (64, 256, 1024)


def nothing(x: int) -> int:
    return x + 1


def little(x: int) -> int:
    """A few microseconds of work: between one and four, by the machine."""
    return x + 1 + 0 * sum(range(250))


pool = ProcessPoolExecutor(WORKERS)

PEER = "`ProcessPoolExecutor.map`"

Way = Callable[[Iterable[int], "int | None"], Iterable[int]]
# The function, the way and the chunk size.
Case = tuple[str, str, "int | None"]


def ways(function: Callable[[int], int]) -> dict[str, Way]:
    marked = unsync(function, executor=pool)
    return {
        "`submit`, one by one": lambda xs, _: [
            future.result() for future in [pool.submit(function, x) for x in xs]
        ],
        "`@unsync` calls, one by one": lambda xs, _: [
            call.result() for call in [marked(x) for x in xs]
        ],
        PEER: lambda xs, size: pool.map(function, xs, chunksize=size or 1),
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


def in_rounds(rounds: int, calls: int, seed: int) -> list[tuple[str, str, int | None, float]]:
    """In one program: of each timing function, way, chunk size and milliseconds."""
    timings: list[tuple[str, str, int | None, float]] = []
    for function in (nothing, little):
        turns = [
            (name, way, size)
            for name, way in ways(function).items()
            for size in ((None,) if "one by one" in name else (*CHUNKS, None))
            if size or "Executor" not in name
        ]
        shuffle = random.Random(seed).shuffle
        for number in range(rounds + 1):
            shuffle(turns)
            for name, way, size in turns:
                if number != 1 and size is None and "one by one" in name:
                    continue  # which take long, and differ by more than the rounds do
                taken = measure(way, calls, size)
                if number:  # the first starts what there is to start
                    timings.append((function.__name__, name, size, taken))
    return timings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--programs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8, help="in each program")
    parser.add_argument("--seed", type=int, help="be one of the programs, and print JSON")
    options = parser.parse_args()
    if options.seed is not None:
        print(json.dumps(in_rounds(options.rounds, options.calls, options.seed)))
        pool.shutdown()
        return
    numbers = [f"--calls={options.calls}", f"--rounds={options.rounds}"]
    spent: dict[Case, list[list[float]]] = {}
    for seed in range(options.programs):
        command = [sys.executable, __file__, *numbers, f"--seed={seed}"]
        printed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        program: dict[Case, list[float]] = {}
        for function, name, size, taken in json.loads(printed):
            program.setdefault((function, name, size), []).append(taken)
        for case, timings in program.items():
            spent.setdefault(case, []).append(timings)
    heads = [f"chunks of {size}" for size in CHUNKS]
    for function in (nothing, little):
        rows = {}
        for name in ways(function):
            cells = [spent.get((function.__name__, name, size)) for size in (*CHUNKS, None)]
            rows[name] = [
                f"{statistics.median(chain(*cell)):.1f}" if cell else "-" for cell in cells
            ]
        show(
            f"{options.calls} calls of `{function.__name__}` (ms)", [*heads, "no size given"], rows
        )
    if options.programs < 2:
        return
    for function in (nothing, little):
        rows = {
            name: [
                times(spent[function.__name__, name, size], spent[function.__name__, PEER, size])
                for size in CHUNKS
            ]
            for name in ways(function)
            if "one by one" not in name and name != PEER
        }
        show(f"`{function.__name__}`, times the time of {PEER}", heads, rows)


def show(what: str, heads: list[str], rows: dict[str, list[str]]) -> None:
    print(f"\n| {' | '.join([what, *heads])} |")
    print(f"| --- |{' ---: |' * len(heads)}")
    for name, texts in rows.items():
        print(f"| {' | '.join([name, *texts])} |", flush=True)


def times(ours: list[list[float]], theirs: list[list[float]]) -> str:
    """The ratio, and two standard errors; of each program by itself, since they differ more."""
    ratios = [
        math.log(statistics.fmean(each) / statistics.fmean(other))
        for each, other in zip(ours, theirs, strict=True)
    ]
    error = statistics.stdev(ratios) / math.sqrt(len(ratios))
    return f"{math.exp(statistics.fmean(ratios)):.2f} ± {2 * error:.2f}"


if __name__ == "__main__":
    main()
