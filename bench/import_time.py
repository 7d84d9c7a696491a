"""How long `import unsync` takes, next to what it cannot do without: asyncio, concurrent.futures.

    python bench/import_time.py [--runs N]

Each import has a process of its own; they take turns, so that a machine that slows down favours
none. What Python takes to start is measured too and taken off.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from time import perf_counter

PROGRAMS = {
    "start": "pass",
    "base": "import asyncio, concurrent.futures",
    "unsync": "import unsync",
}


def seconds(program: str) -> float:
    # With the compiled modules that an installation has, whatever this shell says.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    begun = perf_counter()
    subprocess.run([sys.executable, "-c", program], env=env, check=True)
    return perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=31)
    options = parser.parse_args()
    for program in PROGRAMS.values():
        seconds(program)
    samples: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(options.runs):
        for name, program in PROGRAMS.items():
            samples[name].append(seconds(program))
    start, base, ours = (statistics.median(each) * 1e3 for each in samples.values())
    print(f"asyncio and concurrent.futures: {base - start:.1f} ms; unsync: {ours - start:.1f} ms")
    print(f"{(ours - start) / (base - start):.2f} times as long; the aim is at most 1.3")


if __name__ == "__main__":
    main()
