"""Shows how far many calls have come: a bar that grows whenever one of them ends."""

import concurrent.futures

from rich.progress import track

from unsync import unsync


@unsync(cpu_bound=True)
def count_primes(first: int, last: int) -> int:
    return sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(max(first, 2), last))


def main() -> None:
    calls = [count_primes(start, start + 1000) for start in range(0, 20_000, 1000)]
    # Unfutures can be given to `as_completed` themselves; this way type checkers know it, too.
    ended = concurrent.futures.as_completed([call.concurrent_future for call in calls])
    found = sum(call.result() for call in track(ended, "Counting primes", total=len(calls)))
    print(f"There are {found} primes below 20000")


if __name__ == "__main__":
    main()
