"""The pipeline with unsync."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import asyncpg
from redis import asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from service import pipeline_work as work
from service.pipeline_work import Aggregate, Job, Regions, Row, Sale, Total, Watch
from unsync import Unfuture, unsync

aggregate = unsync(work.aggregate, cpu_bound=True)


@unsync(read_ahead=work.READ_AHEAD)
def read(job: Job, watch: Watch) -> Generator[list[Sale], None, None]:
    """In threads; it rests while there is enough ahead."""
    with job.path.open() as file:
        while batch := work.next_batch(file, job.batch):
            watch.has_read(len(batch))
            yield batch


class Pipeline:
    def __init__(
        self,
        lookups: redis.Redis,
        database: asyncpg.Pool[asyncpg.Record],
        watch: Watch,
    ) -> None:
        self.lookups = lookups
        self.database = database
        self.watch = watch

    @unsync
    async def handle(self, batch: list[Sale]) -> int:
        """All that happens to a batch, in the ambient loop; how many are written."""
        known = await self.look_up(sorted({who for _, who, _, _ in batch}))
        rows, totals = await self.aggregate(work.by_region(batch, known))
        await self.write(rows, totals)
        return len(rows)

    async def look_up(self, customers: list[int]) -> dict[int, str]:
        found = await asyncio.gather(*map(self.ask, work.parts(customers)))
        return dict(zip(customers, (each for part in found for each in part), strict=True))

    async def ask(self, customers: list[int], attempts: int = work.ATTEMPTS) -> list[str]:
        """Asks again, on another connection, if the connection is lost."""
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
        """In processes. The calls that died with a worker are made again, in a new pool."""
        calls = dict(self.start(regions))
        for _ in range(1, work.ATTEMPTS):
            await asyncio.gather(*calls.values(), return_exceptions=True)
            lost = {
                region: regions[region]
                for region, call in calls.items()
                if isinstance(call.exception(), BrokenProcessPool)
            }
            if not lost:
                break
            self.watch.worker.notice(len(lost))
            calls.update(self.start(lost))
        found = await asyncio.gather(*calls.values())
        return [row for rows, _ in found for row in rows], [total for _, total in found]

    def start(self, regions: Regions) -> Iterator[tuple[str, Unfuture[Aggregate]]]:
        """A call for each region, several in a parcel."""
        calls = unsync.calls(aggregate, regions, regions.values(), chunksize=work.CHUNK)
        return zip(regions, calls, strict=True)

    async def write(self, rows: list[Row], totals: list[Total]) -> None:
        """All of a batch, or nothing."""
        async with self.database.acquire() as connection, connection.transaction():
            await connection.copy_records_to_table("sales", records=rows)
            await connection.copy_records_to_table("totals", records=totals)


@unsync
@contextlib.asynccontextmanager
async def connected(job: Job, watch: Watch) -> AsyncIterator[Pipeline]:
    pool: Any = redis.BlockingConnectionPool.from_url(
        job.redis,
        max_connections=work.REDIS_CONNECTIONS,  # so many lookups at once; others wait
        client_name="pipeline",
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),  # we do that, and count
    )
    async with (
        redis.Redis.from_pool(pool) as lookups,
        asyncpg.create_pool(
            job.postgres, max_size=work.POSTGRES_CONNECTIONS, min_size=1
        ) as database,
    ):
        yield Pipeline(lookups, database, watch)


def run(job: Job, watch: Watch) -> None:
    with connected(job, watch) as pipeline:
        most = work.IN_FLIGHT
        with (
            read(job, watch) as batches,
            unsync.map(pipeline.handle, batches, in_order=False, read_ahead=most) as written,
        ):
            for count in written:
                watch.has_written(count)
