"""The same pipeline with the standard library alone: asyncio and two executors."""

from __future__ import annotations

import asyncio
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import asyncpg
from redis import asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from service import pipeline_work as work
from service.pipeline_work import Aggregate, Enriched, Job, Regions, Row, Sale, Total, Watch

Chunk = list[tuple[str, list[Enriched]]]


def aggregate_all(chunk: Chunk) -> list[Aggregate]:
    return [work.aggregate(region, sales) for region, sales in chunk]


class Processes:
    """A pool that is made anew when a worker has died."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(work.WORKERS)

    async def aggregate(self, chunk: Chunk, watch: Watch) -> list[Aggregate]:
        loop = asyncio.get_running_loop()
        for _ in range(1, work.ATTEMPTS):
            pool = self.pool
            try:
                return await loop.run_in_executor(pool, aggregate_all, chunk)
            except BrokenProcessPool:
                watch.worker.notice(len(chunk))
                if self.pool is pool:  # else somebody else was faster
                    self.pool = ProcessPoolExecutor(work.WORKERS)
                    pool.shutdown(wait=False)
        return await loop.run_in_executor(self.pool, aggregate_all, chunk)


class Pipeline:
    def __init__(
        self,
        lookups: redis.Redis,
        database: asyncpg.Pool[asyncpg.Record],
        processes: Processes,
        watch: Watch,
    ) -> None:
        self.lookups = lookups
        self.database = database
        self.processes = processes
        self.watch = watch
        self.batches: asyncio.Queue[list[Sale]] = asyncio.Queue(work.READ_AHEAD)

    async def run(self, job: Job) -> None:
        """A reader, and so many who handle a batch after the other."""
        reader = asyncio.create_task(self.read(job))
        handlers = [asyncio.create_task(self.handle_all()) for _ in range(work.IN_FLIGHT)]
        try:
            await asyncio.gather(reader, *handlers)
        finally:
            for task in (reader, *handlers):
                task.cancel()

    async def read(self, job: Job) -> None:
        loop = asyncio.get_running_loop()
        with job.path.open() as file, ThreadPoolExecutor(1) as threads:
            while batch := await loop.run_in_executor(threads, work.next_batch, file, job.batch):
                self.watch.has_read(len(batch))
                await self.batches.put(batch)
        for _ in range(work.IN_FLIGHT):
            await self.batches.put([])  # the end, for each of them

    async def handle_all(self) -> None:
        while batch := await self.batches.get():
            known = await self.look_up(sorted({who for _, who, _, _ in batch}))
            rows, totals = await self.aggregate(work.by_region(batch, known))
            await self.write(rows, totals)
            self.watch.has_written(len(rows))

    async def look_up(self, customers: list[int]) -> dict[int, str]:
        found = await asyncio.gather(*map(self.ask, work.parts(customers)))
        return dict(zip(customers, (each for part in found for each in part), strict=True))

    async def ask(self, customers: list[int], attempts: int = work.ATTEMPTS) -> list[str]:
        keys = [f"customer:{number}" for number in customers]
        try:
            found: Any = await self.lookups.mget(keys)
        except RedisConnectionError:
            if attempts == 1:
                raise
            self.watch.connection.notice(1)
            await asyncio.sleep(work.PAUSE)
            return await self.ask(customers, attempts - 1)
        return found  # type: ignore[no-any-return]

    async def aggregate(self, regions: Regions) -> tuple[list[Row], list[Total]]:
        items = [*regions.items()]
        chunks = [items[i : i + work.CHUNK] for i in range(0, len(items), work.CHUNK)]
        found = await asyncio.gather(
            *(self.processes.aggregate(chunk, self.watch) for chunk in chunks)
        )
        all_of_them = [each for chunk in found for each in chunk]
        return [row for rows, _ in all_of_them for row in rows], [t for _, t in all_of_them]

    async def write(self, rows: list[Row], totals: list[Total]) -> None:
        async with self.database.acquire() as connection, connection.transaction():
            await connection.copy_records_to_table("sales", records=rows)
            await connection.copy_records_to_table("totals", records=totals)


async def main(job: Job, watch: Watch) -> None:
    pool: Any = redis.BlockingConnectionPool.from_url(
        job.redis,
        max_connections=work.REDIS_CONNECTIONS,
        client_name="pipeline",
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
    )
    processes = Processes()
    try:
        async with (
            redis.Redis.from_pool(pool) as lookups,
            asyncpg.create_pool(
                job.postgres, max_size=work.POSTGRES_CONNECTIONS, min_size=1
            ) as database,
        ):
            await Pipeline(lookups, database, processes, watch).run(job)
    finally:
        processes.pool.shutdown()


def run(job: Job, watch: Watch) -> None:
    asyncio.run(main(job, watch))
