"""Run a function that computes in other processes, so that it can use every core."""

import os
import time

from unsync import unsync


@unsync(cpu_bound=True)
def count_primes(limit: int) -> tuple[int, int]:
    """Count the primes below `limit`; return the count and the id of the process that counted."""
    count = sum(
        all(number % divisor for divisor in range(2, int(number**0.5) + 1))
        for number in range(2, limit)
    )
    return count, os.getpid()


# Where processes are spawned, each of them imports this file: the guard below keeps it from
# starting processes of its own.
def main() -> None:
    start = time.perf_counter()
    tasks = {limit: count_primes(limit) for limit in (10_000, 20_000, 30_000, 40_000)}
    print(f"Process {os.getpid()} asked")
    for limit, task in tasks.items():
        count, process = task.result()
        print(f"Process {process} found {count} primes below {limit}")
    print(f"Executed in {time.perf_counter() - start} seconds")


if __name__ == "__main__":
    main()
