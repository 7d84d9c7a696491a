"""How late a timer of the loop fires while a burst of calls is served: prints JSON, milliseconds.

python fairness.py PEER
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading

from measure import pin
from peers import WAYS, make
from peers.base import fan_out

CALLS = 100_000
PERIOD = 0.001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=WAYS)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--cpu", type=int, help="the core to stay on")
    options = parser.parse_args()
    pin(options.cpu)
    peer = make(options.peer)
    begun, over = threading.Event(), threading.Event()
    lateness: list[float] = []

    async def tick() -> None:
        loop = asyncio.get_running_loop()
        while not over.is_set():
            due = loop.time() + PERIOD
            fired = loop.create_future()
            loop.call_at(due, fired.set_result, None)
            begun.set()
            await fired
            lateness.append((loop.time() - due) * 1e3)

    ticking = peer.start_coroutine(tick)
    begun.wait()
    fan_out(peer.coroutine, options.calls)
    late = sorted(lateness)
    over.set()
    ticking.result()
    peer.close()
    print(
        json.dumps(
            {
                "timers": len(late),
                "median": late[len(late) // 2],
                "p99": late[len(late) * 99 // 100],
                "most": late[-1],
            }
        )
    )


if __name__ == "__main__":
    main()
