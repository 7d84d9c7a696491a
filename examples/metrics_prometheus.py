"""unsync's counts for Prometheus, through its own client.

    pip install prometheus-client

In a service `start_http_server(port)` would serve what is printed here.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from unsync import unsync


class UnsyncCollector(Collector):
    """Asks for the counts when Prometheus does: nothing is done in between."""

    def collect(self) -> Iterator[Metric]:
        stats = unsync.stats()
        calls = CounterMetricFamily("unsync_calls", "Calls that ended", labels=["way", "end"])
        started = CounterMetricFamily("unsync_calls_started", "Calls that began", labels=["way"])
        pending = GaugeMetricFamily("unsync_calls_pending", "Calls that go on", labels=["way"])
        for way in ("coroutines", "threads", "processes", "executors"):
            work = getattr(stats, way)
            started.add_metric([way], work.started)
            pending.add_metric([way], work.pending)
            for end in ("finished", "failed", "cancelled"):
                calls.add_metric([way, end], getattr(work, end))
        yield from (calls, started, pending)

        queued = GaugeMetricFamily("unsync_queued", "What waits for its turn", labels=["where"])
        queued.add_metric(["loop"], stats.loop_queue)
        queued.add_metric(["threads"], stats.thread_queue)
        yield queued
        workers = GaugeMetricFamily("unsync_workers", "Threads of the pools", labels=["state"])
        workers.add_metric(["idle"], stats.workers_idle)
        workers.add_metric(["waiting"], stats.workers_waiting)
        workers.add_metric(["busy"], stats.workers - stats.workers_idle - stats.workers_waiting)
        yield workers
        yield CounterMetricFamily("unsync_wakeups", "Of the loop", value=stats.wakeups)
        yield CounterMetricFamily("unsync_wakeups_saved", "By batching", value=stats.wakeups_saved)
        yield GaugeMetricFamily("unsync_loop_lag_seconds", "Of the loop", value=stats.loop_lag)


@unsync
async def halve(number: int) -> float:
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number / 2


def main() -> None:
    registry = CollectorRegistry()
    registry.register(UnsyncCollector())
    for call in [halve(number) for number in range(10)]:
        call.exception()
    print(generate_latest(registry).decode(), end="")


if __name__ == "__main__":
    main()
