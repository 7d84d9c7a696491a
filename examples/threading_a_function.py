"""Run a regular function in threads: ten sleeps of 0.1 s overlap."""

import time

from unsync import unsync


@unsync
def non_async_function(seconds: float) -> str:
    time.sleep(seconds)
    return "Run in parallel!"


def main() -> None:
    start = time.perf_counter()
    tasks = [non_async_function(0.1) for _ in range(10)]
    print([task.result() for task in tasks])
    print(f"Executed in {time.perf_counter() - start} seconds")


if __name__ == "__main__":
    main()
