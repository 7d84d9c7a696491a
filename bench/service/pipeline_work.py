"""What both ways of the pipeline share: the sales, what is made of them, who watches and who harms.

A sale is a line of a file. Redis knows its customer: the region, the tax rate and the address,
which is compared with the one that was typed in. That takes time, and the GIL: so it is for
processes.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import islice
from pathlib import Path
from typing import IO, Any

import redis
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from service.family import memory

READ_AHEAD = 4  # batches that are read and wait
IN_FLIGHT = 8  # batches on their way from there to the database
CHUNK = 10  # calls of `aggregate` in a parcel to a process: there are REGIONS of them in a batch
REQUESTS = 10  # to Redis for a batch
REDIS_CONNECTIONS = 8
POSTGRES_CONNECTIONS = 4
WORKERS = os.cpu_count() or 1
ATTEMPTS = 5
PAUSE = 0.05  # seconds before Redis is asked again

REST = 0.1  # seconds that something rests before it is killed

CUSTOMERS = 10_000
REGIONS = 20

SCHEMA = """
    DROP TABLE IF EXISTS sales, totals;
    -- No key: that each sale is there once is to be found out.
    CREATE TABLE sales (id bigint, region text, cents bigint, likeness real);
    CREATE TABLE totals (region text, sales bigint, cents bigint);
"""

# Plain tuples: they travel faster.
Sale = tuple[int, int, int, str]
"""Number, customer, cents and the address that was typed in."""
Enriched = tuple[int, int, int, str, str]
"""Number, cents, tax rate, the address that was typed in and the one that is known."""
Row = tuple[int, str, int, float]
Total = tuple[str, int, int]
Regions = dict[str, list[Enriched]]
Aggregate = tuple[list[Row], Total]


@dataclass(frozen=True)
class Job:
    path: Path
    count: int
    """Of the sales in the file."""
    batch: int
    """Sales that are read, looked up and written at once."""
    postgres: str
    redis: str


# The sales.


def customer(number: int) -> str:
    """What Redis knows of a customer."""
    return f"region {number % REGIONS},{number % 7 + 15},{address(number)}"


def address(number: int) -> str:
    chance = random.Random(number)
    syllables = [chance.choice("bdfgklmnprst") + chance.choice("aeiou") for _ in range(20)]
    return " ".join("".join(syllables[at : at + 4]).title() for at in range(0, 20, 4))


def write_sales(path: Path, count: int) -> None:
    chance = random.Random(count)
    addresses = [address(number) for number in range(CUSTOMERS)]
    with path.open("w") as file:
        for number in range(count):
            who = chance.randrange(CUSTOMERS)
            typed = addresses[who] if chance.random() < 0.9 else chance.choice(addresses)
            file.write(f"{number},{who},{chance.randrange(100, 100_000)},{typed}\n")


def parse(line: str) -> Sale:
    number, who, cents, typed = line.rstrip("\n").split(",")
    return int(number), int(who), int(cents), typed


def next_batch(file: IO[str], size: int) -> list[Sale]:
    return [parse(line) for line in islice(file, size)]


def parts(customers: list[int]) -> list[list[int]]:
    """What each request to Redis asks for."""
    size = -(-len(customers) // REQUESTS)
    return [customers[at : at + size] for at in range(0, len(customers), size)]


def by_region(sales: list[Sale], known: dict[int, str]) -> Regions:
    found: Regions = {}
    for number, who, cents, typed in sales:
        region, rate, address = known[who].split(",")
        found.setdefault(region, []).append((number, cents, int(rate), typed, address))
    return found


def aggregate(region: str, sales: list[Enriched]) -> Aggregate:
    """The sales of one region in a batch: what is written of each, and of all."""
    rows: list[Row] = []
    total = 0
    for number, cents, rate, typed, address in sales:
        gross = cents + cents * rate // 100
        total += gross
        likeness = SequenceMatcher(None, typed, address, autojunk=False).ratio()
        rows.append((number, region, gross, likeness))
    return rows, (region, len(rows), total)


# Whether each is accounted for.

Account = dict[str, Any]


def expected(path: Path) -> Account:
    """What the file says, read from its beginning to its end without any pipeline."""
    known = [customer(number).split(",") for number in range(CUSTOMERS)]
    count = number_sum = doubtful = 0
    sales: Counter[str] = Counter()
    cents_of: Counter[str] = Counter()
    with path.open() as lines:
        for line in lines:
            number, who, cents, typed = parse(line)
            region, rate, address = known[who]
            count += 1
            number_sum += number
            doubtful += typed != address
            sales[region] += 1
            cents_of[region] += cents + cents * int(rate) // 100
    totals = {region: [sales[region], cents_of[region]] for region in sorted(sales)}
    return {
        "sales": count,
        "different": count,
        "number_sum": number_sum,
        "doubtful": doubtful,
        "by_sale": totals,
        "by_total": totals,
    }


async def accounted(database: Any) -> Account:
    """The same as the database says.

    :param database: a connection of asyncpg.
    """
    of_all = await database.fetchrow(
        "SELECT count(*) AS sales, count(DISTINCT id) AS different, sum(id)::bigint AS number_sum,"
        " count(*) FILTER (WHERE likeness < 1) AS doubtful FROM sales"
    )
    by_sale = await database.fetch(
        "SELECT region, count(*), sum(cents)::bigint FROM sales GROUP BY region"
    )
    by_total = await database.fetch(
        "SELECT region, sum(sales)::bigint, sum(cents)::bigint FROM totals GROUP BY region"
    )
    return {
        **of_all,
        "by_sale": {region: [sales, cents] for region, sales, cents in sorted(by_sale)},
        "by_total": {region: [sales, cents] for region, sales, cents in sorted(by_total)},
    }


# Who watches, and who harms.


@dataclass
class Fault:
    """Something that is killed, and the calls that were made again for that."""

    strike: Callable[[], bool]
    killed: int = 0
    made_again: int = 0
    noticed: threading.Event = field(default_factory=threading.Event)

    def harm(self, over: threading.Event) -> None:
        """Kills one, and if that was of no consequence, since nobody needed it, another one."""
        while not over.is_set() and not self.noticed.is_set():
            self.killed += self.strike()
            self.noticed.wait(0.5)

    def notice(self, calls: int) -> None:
        self.made_again += calls
        self.noticed.set()


class Watch:
    """Told by a pipeline how far it is: draws the bar, and has something killed on the way.

    A worker process is killed when a third is written, a connection to Redis when two thirds are.
    """

    def __init__(self, job: Job, with_faults: bool) -> None:
        self.count = count = job.count
        self.read = 0  # belongs to who reads, and so does the next
        self.most_ahead = 0
        self.written = 0  # belongs to who is told of what is written
        self.at: dict[str, float] = {}  # time.monotonic(), which all processes share
        self.worker = Fault(kill_a_worker)
        self.connection = Fault(lambda: kill_a_connection(job.redis))
        self._due = {count // 4: self._mark_quarter}
        if with_faults:
            self._due[count // 3] = lambda: self._start(self.worker)
            self._due[2 * count // 3] = lambda: self._start(self.connection)
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    def __enter__(self) -> Watch:
        self.at["start"] = time.monotonic()
        self.processor = -time.process_time()  # seconds, of this process alone
        self._bar.start()
        self._task = self._bar.add_task("sales written", total=self.count)
        return self

    def __exit__(self, *_: object) -> None:
        self.at["end"] = time.monotonic()
        self.processor += time.process_time()
        self._bar.stop()
        self._over.set()
        for thread in self._threads:
            thread.join()

    def has_read(self, count: int) -> None:
        self.read += count
        self.most_ahead = max(self.most_ahead, self.read - self.written)

    def has_written(self, count: int) -> None:
        self.written += count
        self._bar.advance(self._task, count)
        for place in [place for place in self._due if place <= self.written]:
            self._due.pop(place)()

    def _mark_quarter(self) -> None:
        self.at["quarter"] = time.monotonic()

    def _start(self, fault: Fault) -> None:
        thread = threading.Thread(target=fault.harm, args=(self._over,), daemon=True)
        thread.start()
        self._threads.append(thread)


def kill_a_worker() -> bool:
    """Whether there was one."""
    workers = [each.pid for each in multiprocessing.active_children() if each.pid is not None]
    # They rest first, so that the pipeline is waiting for them.
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(REST)
    for pid in workers[:1]:
        os.kill(pid, signal.SIGKILL)
    for pid in workers[1:]:
        os.kill(pid, signal.SIGCONT)
    return bool(workers)


def kill_a_connection(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        ours = [each["id"] for each in client.client_list() if each["name"] == "pipeline"]
        if not ours:
            return False
        with client.pipeline(transaction=False) as at_once:
            # The server rests first, so that the pipeline is waiting for it. Then it does this
            # before it answers what came later.
            at_once.client_pause(int(REST * 1000))
            at_once.client_kill_filter(_id=ours[0])
            _, killed = at_once.execute()
    return bool(killed)


# The memory of a process and all below it, on Linux.


class Memory(threading.Thread):
    """Looks at it every so often: pairs of time.monotonic() and bytes.

    What processes share, since one was forked from the other, counts once.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.seen: list[tuple[float, int]] = []
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.05):
            self.seen.append((time.monotonic(), memory(self.pid)))

    def stop(self) -> None:
        self._over.set()
        self.join()

    def between(self, start: float, end: float) -> list[int]:
        return [size for at, size in self.seen if start <= at <= end]
