"""Mix threads and coroutines: ten threads start, ten coroutines refine, one coroutine collects."""

import asyncio
import time
from collections.abc import Iterable

from unsync import Unfuture, unsync


@unsync
def non_async_function(num: int) -> tuple[int, int]:
    time.sleep(0.1)
    return num, num + 1


@unsync
async def result_continuation(task: Unfuture[tuple[int, int]]) -> tuple[int, int]:
    await asyncio.sleep(0.1)
    num, res = task.result()
    return num, res * 2


@unsync
async def result_processor(tasks: Iterable[Unfuture[tuple[int, int]]]) -> dict[int, int]:
    output = {}
    for task in tasks:
        num, res = await task
        output[num] = res
    return output


def main() -> None:
    start = time.perf_counter()
    tasks = [non_async_function(i).then(result_continuation) for i in range(10)]
    print(result_processor(tasks).result())
    print(f"Executed in {time.perf_counter() - start} seconds")


if __name__ == "__main__":
    main()
