"""How long `import unsync` takes, next to what it cannot do without: asyncio, concurrent.futures.

    python bench/import_time.py [--runs N]

Each import has a process of its own; they take turns, so that a machine that slows down favours
none. What Python takes to start is measured too and taken off. All numbers are medians. Where the
system tells it, the processor time is there as well: on a busy machine it says more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from time import perf_counter

try:
    from resource import RUSAGE_CHILDREN, getrusage
except ImportError:  # Windows
    KINDS = ["elapsed"]
else:
    KINDS = ["elapsed", "processor"]

PROGRAMS = {
    "start": "pass",
    "base": "import asyncio, concurrent.futures",
    "unsync": "import unsync",
}


def processor_seconds() -> float:
    """What the processes that this one has waited for have taken so far."""
    if len(KINDS) == 1:
        return 0.0
    usage = getrusage(RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds(program: str) -> tuple[float, float]:
    # With the compiled modules that an installation has, whatever this shell says.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    used, begun = processor_seconds(), perf_counter()
    subprocess.run([sys.executable, "-c", program], env=env, check=True)
    return perf_counter() - begun, processor_seconds() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=101)
    options = parser.parse_args()
    for program in PROGRAMS.values():
        seconds(program)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(options.runs):
        for name, program in PROGRAMS.items():
            samples[name].append(seconds(program))
    for place, kind in enumerate(KINDS):
        start, base, ours = (
            statistics.median(each[place] for each in of_one) * 1e3 for of_one in samples.values()
        )
        print(
            f"{kind} time: asyncio and concurrent.futures {base - start:.1f} ms, unsync "
            f"{ours - start:.1f} ms, {(ours - start) / (base - start):.2f} times as long"
        )
    print("the aim is at most 1.3")


if __name__ == "__main__":
    main()
