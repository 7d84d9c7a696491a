"""How many instructions a call takes, counted by valgrind: the same whatever else the machine does.

    python bench/instructions.py            # of the unsync that this Python imports
    PYTHONPATH=/another/checkout python bench/instructions.py

To compare two versions to a percent, where times differ by more from run to run. It counts what all
threads do in user space, not what the system does for them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable

from unsync import Unfuture, unsync

BATCH = 200
BATCHES = 40


@unsync
async def answer() -> int:
    return 42


@unsync
def function() -> int:
    return 42


def then() -> Unfuture[int]:
    return answer().then(Unfuture.result)


CALLS: dict[str, Callable[[], Unfuture[int]]] = {
    "coroutine": answer,
    "function": function,
    "then": then,
}


def work(kind: str, batches: int) -> None:
    call = CALLS[kind]
    for _ in range(batches + 1):  # the first starts what there is to start
        for unfuture in [call() for _ in range(BATCH)]:
            unfuture.result()


def count(kind: str, batches: int) -> int:
    command = [
        *("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"),
        *(sys.executable, __file__, "--work", kind, str(batches)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found, done.stderr
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", nargs=2, metavar=("KIND", "BATCHES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work[0], int(options.work[1]))
        return
    for kind in CALLS:
        each = (count(kind, BATCHES) - count(kind, 0)) / (BATCH * BATCHES)
        print(f"{kind:12} {each:8,.0f} instructions per call")


if __name__ == "__main__":
    main()
