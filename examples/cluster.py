"""One program in threads, in processes and on a cluster: all that changes is a setting.

    python examples/cluster.py threads
    python examples/cluster.py processes
    python examples/cluster.py dask                      # a cluster started here for the while
    python examples/cluster.py tcp://127.0.0.1:8786      # a cluster that runs already

The last one needs a scheduler and workers, each started by a command of its own, here or on other
machines: `dask scheduler --host 127.0.0.1`, and `dask worker tcp://127.0.0.1:8786 --nthreads 1`.
"""

import os
import random
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager

from unsync import unsync

DARTS = 20_000


@unsync(cpu_bound=True)
def throw_darts(seed: int) -> tuple[int, int]:
    """Say in which process how many of the darts hit the quarter of a circle.

    Whoever runs it again with the same seed gets the same: a cluster does that if a worker dies.
    """
    dice = random.Random(seed)
    hits = sum(dice.random() ** 2 + dice.random() ** 2 < 1 for _ in range(DARTS))
    return os.getpid(), hits


@contextmanager
def engine(name: str) -> Iterator[Executor]:
    if name == "threads":
        yield unsync.thread_executor
    elif name == "processes":
        with ProcessPoolExecutor() as pool:
            yield pool
    else:
        from distributed import Client

        local = {"threads_per_worker": 1, "dashboard_address": ":0"}
        with Client(**local) if name == "dask" else Client(name) as client:
            yield client.get_executor(pure=False)  # without it, calls that look equal run once


def main() -> None:
    with engine(sys.argv[1] if len(sys.argv) > 1 else "processes") as executor:
        unsync.process_executor = executor
        calls = [throw_darts(seed) for seed in range(20)]
        results = [call.result() for call in calls]
    pids = {pid for pid, _ in results}
    print(len(calls), "calls in", "this process" if pids == {os.getpid()} else "others")
    print("Pi is about", 4 * sum(hits for _, hits in results) / (len(results) * DARTS))


if __name__ == "__main__":
    main()
