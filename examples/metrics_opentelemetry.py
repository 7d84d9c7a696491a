"""unsync's counts for OpenTelemetry, through its own SDK.

    pip install opentelemetry-sdk

In a service an exporter's reader would take the place of the one in memory.
"""

from collections.abc import Callable, Iterable
from itertools import product

from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from unsync import unsync

WAYS = ("coroutines", "threads", "processes", "executors")
ENDS = ("finished", "failed", "cancelled")


def instrument(meter: Meter) -> None:
    """Has `meter` ask for the counts whenever they are collected."""

    def calls(_: CallbackOptions) -> Iterable[Observation]:
        stats = unsync.stats()
        for way, end in product(WAYS, ENDS):
            count = getattr(getattr(stats, way), end)
            yield Observation(count, {"unsync.way": way, "unsync.end": end})

    def pending(_: CallbackOptions) -> Iterable[Observation]:
        stats = unsync.stats()
        for way in WAYS:
            yield Observation(getattr(stats, way).pending, {"unsync.way": way})

    def one(name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda _: [Observation(getattr(unsync.stats(), name))]

    meter.create_observable_counter("unsync.calls", [calls], "{call}", "Calls that ended")
    meter.create_observable_up_down_counter("unsync.calls.pending", [pending], "{call}")
    for name in ("wakeups", "wakeups_saved"):
        meter.create_observable_counter(f"unsync.{name}", [one(name)], "{wakeup}")
    for name in ("loop_queue", "thread_queue", "workers", "workers_idle", "workers_waiting"):
        meter.create_observable_gauge(f"unsync.{name}", [one(name)])
    meter.create_observable_gauge("unsync.loop_lag", [one("loop_lag")], "s")


@unsync
async def halve(number: int) -> float:
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number / 2


def main() -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    instrument(provider.get_meter("unsync"))
    for call in [halve(number) for number in range(10)]:
        call.exception()
    data = reader.get_metrics_data()
    assert data is not None
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.data.data_points:
            print(metric.name, dict(point.attributes or {}), point.value)  # type: ignore[union-attr]
    provider.shutdown()


if __name__ == "__main__":
    main()
