"""Whether anything leaks: memory, descriptors, threads and objects, over every path there is.

    python bench/soak.py --minutes 2
    python bench/soak.py --hours 8

Each round is a run of the stress test (`tests/support/stress.py`: results, failures, cancellations,
timeouts, loops that come and go), and what that leaves out: streams, context managers, a pool of
processes that loses one, an end and a new start. After the warm-up the numbers must stay where they
are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.stress import Stress

from unsync import ACCELERATED, Unfuture, unsync

WARM_UP = 4
ROUND_SECONDS = 3.0


class Boom(Exception):
    pass


@unsync
async def count_in_loop(until: int) -> AsyncIterator[int]:
    for number in range(until):
        yield number


@unsync
def count_in_thread(until: int) -> Iterator[int]:
    yield from range(until)
    if until == 13:
        raise Boom


@unsync
@contextlib.asynccontextmanager
async def session() -> AsyncIterator[str]:
    yield "session"


@unsync
async def never() -> None:
    await asyncio.sleep(3600)


@unsync(cpu_bound=True)
def process_id() -> int:
    return os.getpid()


@unsync(cpu_bound=True)
def sleep_in_process() -> None:
    time.sleep(60)


def streams_and_context_managers() -> None:
    for _ in range(50):
        assert len(list(count_in_loop(20))) == len(list(count_in_thread(20))) == 20
        next(iter(count_in_loop(1000)))  # and left early
        with contextlib.suppress(Boom):
            list(count_in_thread(13))
        with session() as name:
            assert name == "session"


def what_waits_when_its_loop_ends() -> None:
    async def main() -> None:
        waiting = asyncio.ensure_future(unfuture)
        await asyncio.wait({waiting}, timeout=0.001)

    unfuture: Unfuture[int] = Unfuture()
    asyncio.run(main())
    unfuture.cancel()


def a_process_that_is_killed() -> None:
    pool = process_id().result()
    calls = [sleep_in_process() for _ in range(3)]
    os.kill(pool, signal.SIGKILL)
    for call in calls:
        assert call.exception() is not None
    assert process_id().result() != pool


def an_end_and_a_new_start() -> None:
    calls = [never() for _ in range(100)]
    assert unsync.shutdown(30)
    assert all(call.cancelled() for call in calls)


class Sizes(NamedTuple):
    """At the end of a round, with nothing pending."""

    memory: int
    """Resident, in bytes."""
    descriptors: int
    threads: int
    objects: int
    """That the garbage collector knows."""


# How much more of each there may be at the end than after the warm-up: what the allocator and
# Python's own caches take now and then, which does not grow with time.
SLACK = Sizes(memory=3 * 2**20, descriptors=0, threads=0, objects=20)


def measure() -> Sizes:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    descriptors = len(os.listdir("/proc/self/fd"))
    return Sizes(resident, descriptors, threading.active_count(), len(gc.get_objects()))


def soak(seconds: float, seed: int) -> list[Sizes]:
    """The sizes after each round."""
    until = time.monotonic() + seconds
    rounds: list[tuple[int, ...]] = []  # of plain ones, which the collector does not count
    print(f"{'round':>5} {'MiB':>8} {'files':>6} {'threads':>7} {'objects':>8}", flush=True)
    while time.monotonic() < until or len(rounds) < 3 * WARM_UP:
        Stress(threads=2, loops=2, processes=True, seed=seed + len(rounds)).run(ROUND_SECONDS)
        streams_and_context_managers()
        what_waits_when_its_loop_ends()
        a_process_that_is_killed()
        an_end_and_a_new_start()
        sizes = measure()
        rounds.append(tuple(sizes))
        print(
            f"{len(rounds):5} {sizes.memory / 2**20:8.2f} {sizes.descriptors:6} "
            f"{sizes.threads:7} {sizes.objects:8}",
            flush=True,
        )
    return [Sizes(*each) for each in rounds]


def growth(rounds: list[Sizes]) -> dict[str, float]:
    """Of each size: the median of the last third less that of the first third, warm-up apart."""
    steady = rounds[WARM_UP:]
    third = len(steady) // 3
    return {
        name: statistics.median(getattr(each, name) for each in steady[-third:])
        - statistics.median(getattr(each, name) for each in steady[:third])
        for name in Sizes._fields
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--output", type=Path, help="write the sizes there, as JSON")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    core = "compiled" if ACCELERATED else "pure"
    print(f"unsync, {core} core, Python {sys.version.split()[0]}; seed {seed}")
    rounds = soak(options.minutes * 60 + options.hours * 3600, seed)
    grown = growth(rounds)
    if options.output:
        sizes = [each._asdict() for each in rounds]
        options.output.write_text(json.dumps({"core": core, "rounds": sizes, "growth": grown}))
    leaks = [name for name, more in grown.items() if more > getattr(SLACK, name)]
    print("grew by", ", ".join(f"{more:.0f} ({name})" for name, more in grown.items()))
    if leaks:
        print(f"which is a leak: {', '.join(leaks)}")
    return bool(leaks)


if __name__ == "__main__":
    sys.exit(main())
