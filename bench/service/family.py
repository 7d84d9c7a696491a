"""A process and all below it, as Linux's /proc tells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def family(pid: int) -> Iterator[int]:
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = path.read_text().split()
        except OSError:
            continue  # it has ended meanwhile
        for each in below:
            yield from family(int(each))


def memory(pid: int) -> int:
    """Bytes that all of them have in memory; what several share counts once."""
    return sum(map(_share, family(pid)))


def _share(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
