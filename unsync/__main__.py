"""`python -m unsync`: what is in use here, whether it works, and what the compiled core brings.

For bug reports and for sceptics. The exit status is 0, or 1 if a check failed. Where the compiled
core is installed but cannot be loaded, importing unsync fails, and says why.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from unsync import ACCELERATED, Unfuture, _backend, _common, executors, unsync

# How long a check may take, in seconds: the first process may have much to import.
_PATIENCE = 60.0
# How long each row is measured, and how many operations make a sample.
_ROW_SECONDS = 0.2
_BATCH = 500


@unsync
async def _coroutine() -> int:
    return 42


@unsync
def _function() -> int:
    return 42


async def _awaited() -> int:
    return await _function() + await _coroutine()


def _then() -> Unfuture[int]:
    return _coroutine().then(Unfuture.result)


# What is tried, and what must come of it.
CHECKS: dict[str, tuple[Callable[[], object], object]] = {
    "a coroutine, waited for in a thread": (lambda: _coroutine().result(_PATIENCE), 42),
    "a function in a thread": (lambda: _function().result(_PATIENCE), 42),
    "both, awaited in another event loop": (lambda: asyncio.run(_awaited()), 84),
    "a continuation": (lambda: _then().result(_PATIENCE), 42),
    "a function in a process": (
        lambda: unsync(os.getpid, cpu_bound=True)().result(_PATIENCE) != os.getpid(),
        True,
    ),
}


def describe() -> dict[str, Any]:
    """What is in use: for each thing its name or version, None for what is not installed."""
    threads = unsync.thread_executor
    assert isinstance(threads, executors.ThreadExecutor)
    return {
        "unsync": _version_of("unsync"),
        "core": "compiled" if ACCELERATED else "pure",
        "file": getattr(_backend, "_core").__file__,  # noqa: B009
        "asked_for_pure": bool(os.environ.get("UNSYNC_NO_EXTENSIONS")),
        "why_pure": _backend.WHY_PURE,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "gil": _common.has_gil(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "loop": type(unsync.loop).__name__,
        "uvloop": _version_of("uvloop"),
        "threads": threads._max_workers,
        "start_method": executors.start_method(),
        "start_methods": multiprocessing.get_all_start_methods(),
        "cloudpickle": _version_of("cloudpickle"),
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check() -> dict[str, str | None]:
    """Tries everything once: what went wrong, or None, for each check."""
    return {name: _fault_of(work, expected) for name, (work, expected) in CHECKS.items()}


def _fault_of(work: Callable[[], object], expected: object) -> str | None:
    try:
        found = work()
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return None if found == expected else f"gave {found!r}, not {expected!r}"


def _each() -> None:
    for _ in range(_BATCH):
        _coroutine().result()


def _fan_out(call: Callable[[], Unfuture[int]]) -> None:
    for unfuture in [call() for _ in range(_BATCH)]:
        unfuture.result()


ROWS: dict[str, Callable[[], None]] = {
    "coroutine, wait for each": _each,
    "coroutines, fan out": lambda: _fan_out(_coroutine),
    "thread functions, fan out": lambda: _fan_out(_function),
    "continuations, fan out": lambda: _fan_out(_then),
}


def measure() -> dict[str, float]:
    """Microseconds per operation on the core in use; the median of some samples."""
    figures = {}
    for name, work in ROWS.items():
        work()
        samples: list[float] = []
        end = time.perf_counter() + _ROW_SECONDS
        while not samples or time.perf_counter() < end:
            begun = time.perf_counter()
            work()
            samples.append((time.perf_counter() - begun) / _BATCH * 1e6)
        figures[name] = statistics.median(samples)
    return figures


def measure_both() -> dict[str, dict[str, float]]:
    """The figures of each core that there is, each measured in a process of its own."""
    figures = {}
    for core, without in ("compiled", ""), ("pure", "1"):
        if core == "compiled" and not ACCELERATED:
            continue
        done = subprocess.run(
            [sys.executable, "-m", "unsync", "--measure"],
            env={**os.environ, "UNSYNC_NO_EXTENSIONS": without},
            stdout=subprocess.PIPE,
            check=True,
        )
        figures[core] = json.loads(done.stdout)
    return figures


def _show(facts: dict[str, Any]) -> None:
    why = "" if facts["why_pure"] is None else f": {facts['why_pure']}"
    print(f"unsync {facts['unsync'] or '(not installed)'}, {facts['core']} core{why}")
    print(f"  {facts['file']}")
    gil = "with" if facts["gil"] else "without"
    print(
        f"{facts['implementation']} {facts['python']}, {gil} the GIL, on {facts['system']} with "
        f"{facts['cpus']} cores"
    )
    print(f"event loop: {facts['loop']}; uvloop: {facts['uvloop'] or 'not installed'}")
    print(f"threads: up to {facts['threads']}, not counting those that wait for others")
    print(
        f"processes: by {facts['start_method']}, of {', '.join(facts['start_methods'])}; "
        f"cloudpickle: {facts['cloudpickle'] or 'not installed'}"
    )
    print()
    for name, fault in facts["checks"].items():
        print(f"{name:38} {'ok' if fault is None else 'FAILED: ' + fault}")
    print()
    cores = [*facts["figures"]]
    print(f"{'microseconds per operation':38}", *(f"{core:>9}" for core in cores))
    for name in ROWS:
        print(f"{name:38}", *(f"{facts['figures'][core][name]:9.2f}" for core in cores))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unsync",
        description="Say what is in use here, whether it works, and what the compiled core brings.",
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure()))
        return 0
    facts = {**describe(), "checks": check(), "figures": measure_both()}
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)
    return 1 if any(facts["checks"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
