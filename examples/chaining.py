"""Chain two coroutines with `then`: the second starts when the first has its result."""

import asyncio
import time

from unsync import Unfuture, unsync


@unsync
async def initiate(request: int) -> int:
    await asyncio.sleep(0.1)
    return request + 1


@unsync
async def process(task: Unfuture[int]) -> int:
    await asyncio.sleep(0.1)
    return task.result() * 2  # a continuation receives a finished task: this does not block


def main() -> None:
    start = time.perf_counter()
    print(initiate(3).then(process).result())
    print(f"Executed in {time.perf_counter() - start} seconds")


if __name__ == "__main__":
    main()
