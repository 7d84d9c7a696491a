"""Measures one peer, in whose environment this runs: prints a line of JSON for each row.

    python measure.py PEER [ROW ...]

A figure is the median of a few samples, of so many operations that a sample takes no more than
about a second. The garbage collector is left as Python sets it, and run before each sample.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from peers import WAYS, make
from peers.base import Peer
from rows import BY_NAME, ROWS, Row

# A sample of a slow peer has fewer operations, so as not to take much longer than this.
SAMPLE_SECONDS = 0.5
# Where two cores are free, the system may put two threads that wake each other onto one of them or
# onto both, at very different costs, and then stays with its choice: each sample starts from idle.
IDLE_SECONDS = 0.02
SCALE = {"µs": 1e6, "ms": 1e3, "bytes": 1}


def pin(cpu: int | None) -> None:
    """Keeps this process, and what it starts, on one core."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})


def versions_of(peer: str) -> dict[str, str]:
    versions = {}
    for name in WAYS[peer].versions:
        with suppress(PackageNotFoundError):  # a checkout that is on the path, not installed
            versions[name] = version(name)
    return versions


def measure(peer: Peer, row: Row, seconds: float, share: float) -> dict[str, object]:
    """The row's figure, or the reason why there is none.

    :param seconds: after which no further sample is begun.
    :param share: of the row's count.
    """
    reason = peer.reasons.get(row.name)
    if reason is not None:
        return {"row": row.name, "reason": reason}
    work = getattr(peer, row.name)
    count = max(64, int(row.count * share)) if row.count > 64 else row.count
    try:
        if row.unit == "µs":
            trial = min(count, 64)
            for _ in range(2):  # the first one may start threads
                spent = work(trial) / trial
            if spent * count > SAMPLE_SECONDS:
                count = max(64, int(SAMPLE_SECONDS / spent))
            work(count)
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while not samples or (time.perf_counter() < end and len(samples) < 9):
            gc.collect()
            time.sleep(IDLE_SECONDS)
            samples.append(work(count) / count * SCALE[row.unit])
            if row.unit != "µs":
                break
    except NotImplementedError as exc:
        return {"row": row.name, "reason": str(exc) or "not measured"}
    return {"row": row.name, "figure": statistics.median(samples), "count": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=WAYS)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="all, if none is named")
    parser.add_argument("--seconds", type=float, default=0.3, help="to spend on a row, about")
    parser.add_argument("--cpu", type=int, help="the core to stay on")
    parser.add_argument("--share", type=float, default=1.0, help="of the operations of a sample")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(BY_NAME):
        parser.error(
            f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(BY_NAME)}"
        )
    pin(options.cpu)
    print(json.dumps({"versions": versions_of(options.peer)}), flush=True)
    peer = make(options.peer)
    for row in ROWS:
        if not options.rows or row.name in options.rows:
            print(json.dumps(measure(peer, row, options.seconds, options.share)), flush=True)
    peer.close()


if __name__ == "__main__":
    main()
