"""A pipeline: sales from a file, through threads, Redis and processes, into PostgreSQL.

    python bench/service/pipeline.py [--records N] [--rounds N] [--without-faults] [WAY ...]

A stream of sales is read in threads, enriched by concurrent lookups in Redis, aggregated in
processes, and written with COPY, with back-pressure, a bar and a bounded memory. On the way one
worker process and one connection to Redis are killed. For each way and round a line of JSON says
how fast it was and what it took; and what is wrong, if anything is: a sale that is not accounted
for, memory or batches in flight that are not bounded, a fault that did not strike. Then the command
fails.

Servers and pipelines run in processes of their own. `pipeline_unsync.py` is the pipeline,
`pipeline_asyncio.py` the same with the standard library alone.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))

import asyncpg
from redis import asyncio as redis
from support import databases

from service import pipeline_work as work

WAYS = ("unsync", "asyncio")
# By how much the peak of all processes of the pipeline may be above that of the first quarter, and
# above that of a run with a tenth of the records. All of 100,000 at once take twice as much.
MOST_GROWTH = 16 * 2**20
PATIENCE = 600


def run_here(way: str, job: work.Job, with_faults: bool) -> dict[str, Any]:
    """Runs one way in this process."""
    # Not forked beside threads: the second pool is started when there are some.
    multiprocessing.set_start_method("forkserver")
    run = importlib.import_module(f"service.pipeline_{way}").run
    with work.Watch(job, with_faults) as watch:
        run(job, watch)
    faults = {"worker": watch.worker, "connection": watch.connection}
    return {
        "at": watch.at,
        "processor_seconds": watch.processor,
        "most_ahead": watch.most_ahead,
        "faults": {
            name: {"killed": fault.killed, "made_again": fault.made_again}
            for name, fault in faults.items()
        },
    }


def run_there(way: str, job: work.Job, with_faults: bool) -> dict[str, Any]:
    """Runs one way in a process of its own, and looks at the memory of it and its workers."""
    sizes = ("--records", str(job.count), "--batch", str(job.batch))
    places = ("--file", str(job.path), "--postgres", job.postgres, "--redis", job.redis)
    command = [sys.executable, __file__, *sizes, *places, way]
    if not with_faults:
        command.append("--without-faults")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        memory = work.Memory(process.pid)
        memory.start()
        try:
            output, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            memory.stop()
    if process.returncode:
        raise RuntimeError(f"the pipeline with {way} ended with {process.returncode}")
    found: dict[str, Any] = json.loads(output)
    at = found.pop("at")
    seconds = at["end"] - at["start"]
    found = {"way": way, "records": job.count, "seconds": seconds, **found}
    found["records_per_second"] = job.count / seconds
    if sys.platform == "linux":
        first = max(memory.between(at["start"], at["quarter"]), default=0)
        others = max(memory.between(at["quarter"], at["end"]), default=0)
        found["memory_peak"] = max(first, others)
        found["memory_growth"] = others - first
    return found


def problems(
    found: dict[str, Any], expected: work.Account, job: work.Job, with_faults: bool
) -> list[str]:
    """What a run is to be blamed for."""
    wrong = [
        f"{what}: {there!r} in the database, {value!r} in the file"
        for what, there, value in differences(found["accounted"], expected)
    ]
    most_ahead = (work.READ_AHEAD + work.IN_FLIGHT + 1) * job.batch
    if found["most_ahead"] > most_ahead:
        wrong.append(f"{found['most_ahead']} sales were on their way, more than {most_ahead}")
    wrong += [
        f"{growth}: {found[growth]} bytes"
        for growth in ("memory_growth", "memory_above_a_tenth")
        if found.get(growth, 0) > MOST_GROWTH
    ]
    for name, fault in found["faults"].items():
        if with_faults and not fault["made_again"]:
            wrong.append(f"no {name} was killed that anybody had needed")
    return wrong


def differences(there: work.Account, expected: work.Account) -> Iterator[tuple[str, Any, Any]]:
    for what, value in expected.items():
        if not isinstance(value, dict):
            if there[what] != value:
                yield what, there[what], value
            continue
        for key in sorted({*value, *there[what]}):
            if there[what].get(key) != value.get(key):
                yield f"{what}, {key}", there[what].get(key), value.get(key)


async def prepare(found: databases.Databases) -> None:
    async with redis.Redis.from_url(found.redis) as lookups:
        customers = range(work.CUSTOMERS)
        await lookups.mset({f"customer:{number}": work.customer(number) for number in customers})


async def empty_tables(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(work.SCHEMA)
    await connection.close()


async def look(url: str) -> work.Account:
    connection = await asyncpg.connect(url)
    account = await work.accounted(connection)
    await connection.close()
    return account


def compare(ways: list[str], count: int, batch: int, rounds: int, with_faults: bool) -> int:
    wrong = 0
    with databases.databases() as found, tempfile.TemporaryDirectory() as folder:
        servers = (found.postgres, found.redis)
        job = work.Job(Path(folder, "sales.csv"), count, batch, *servers)
        work.write_sales(job.path, count)
        expected = work.expected(job.path)
        asyncio.run(prepare(found))
        peaks: dict[str, int] = {}
        if count // 10 >= 20 * batch:  # so that as many batches are on their way
            tenth = work.Job(Path(folder, "tenth.csv"), count // 10, batch, *servers)
            work.write_sales(tenth.path, tenth.count)
            for way in ways:
                asyncio.run(empty_tables(job.postgres))
                peaks[way] = run_there(way, tenth, False).get("memory_peak", 0)
        for number in range(rounds):
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                asyncio.run(empty_tables(job.postgres))
                result = run_there(way, job, with_faults)
                if peaks.get(way):
                    result["memory_above_a_tenth"] = result["memory_peak"] - peaks[way]
                result["accounted"] = asyncio.run(look(job.postgres))
                result["problems"] = problems(result, expected, job, with_faults)
                wrong += len(result["problems"])
                for regions in ("by_sale", "by_total"):
                    result["accounted"][regions] = len(result["accounted"][regions])
                print(json.dumps(result), flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=500, help="records that go together")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--without-faults", action="store_true")
    for place in ("--file", "--postgres", "--redis"):
        parser.add_argument(place, help=argparse.SUPPRESS)  # for run_there()
    options = parser.parse_args()
    ways = options.ways or [*WAYS]
    if unknown := {*ways} - {*WAYS}:
        parser.error(f"no way {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    with_faults = not options.without_faults
    if options.file is not None:
        job = work.Job(
            Path(options.file), options.records, options.batch, options.postgres, options.redis
        )
        print(json.dumps(run_here(ways[0], job, with_faults)))
        return 0
    return bool(compare(ways, options.records, options.batch, options.rounds, with_faults))


if __name__ == "__main__":
    sys.exit(main())
