"""What is measured: the rows of the comparison, and what they must show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One piece of work, done by every peer that can.

    :param name: of the method of a peer that does it.
    :param count: how many operations make one sample; fewer if they take too long.
    :param unit: of the figure, which is per operation.
    """

    name: str
    group: str
    label: str
    count: int
    unit: str = "µs"


ROWS = (
    Row("coroutine_each", "coroutines", "coroutine, wait for each", 2000),
    Row("coroutine_fan_out", "coroutines", "coroutines, fan out", 10_000),
    Row("yielding_each", "coroutines", "coroutine with one yield, wait for each", 2000),
    Row("yielding_fan_out", "coroutines", "coroutines with one yield, fan out", 10_000),
    Row("producers", "coroutines", "coroutines, fan out from 4 threads at once", 10_000),
    Row("call", "coroutines", "call until it returns, beyond the bare call", 1000),
    Row("function_each", "threads", "thread function, wait for each", 2000),
    Row("function_fan_out", "threads", "thread functions, fan out", 10_000),
    Row("then_each", "chains", "`.then` on each, fan out", 10_000),
    Row("then_chain", "chains", "`.then` chain, per link", 10_000),
    Row("loop_function", "in the loop", "in the loop, await a thread function", 2000),
    Row("loop_gather_functions", "in the loop", "in the loop, gather thread functions", 10_000),
    Row("loop_coroutine", "in the loop", "in the loop, await a coroutine call", 2000),
    Row("loop_gather_coroutines", "in the loop", "in the loop, gather coroutine calls", 10_000),
    Row("set_result", "in the loop", "a future made, set in a thread, awaited in the loop", 10_000),
    Row("foreign_function", "in another loop", "in another loop, await a thread function", 2000),
    Row("foreign_gather", "in another loop", "in another loop, gather thread functions", 10_000),
    Row(
        "foreign_64",
        "in another loop",
        "in another loop, 64 coroutines await thread functions",
        3200,
    ),
    Row("stream_async", "streams", "async generator, each value to a thread", 10_000),
    Row("stream_threads", "streams", "generator in a thread, each value to another", 10_000),
    Row("stream_to_loop", "streams", "generator in a thread, each value to a loop", 10_000),
    Row("pending", "costs", "one pending future", 10_000, "bytes"),
    Row("decoration", "costs", "marking a function", 1000),
    Row("import_time", "costs", "import, beyond asyncio and concurrent.futures", 5, "ms"),
    Row("bare_send", "floors", "send into a bare coroutine", 10_000),
    Row("eager_task", "floors", "an eager task in one loop, fan out", 10_000),
    Row("two_switches", "floors", "two thread switches", 5000),
)

BY_NAME = {row.name: row for row in ROWS}


@dataclass(frozen=True)
class Target:
    """`peer` must be at least `times` as fast as `other`, pinned, at `row`.

    :param other_row: what `other` does, if it is not `row`.
    """

    row: str
    times: float
    other: str = "upstream"
    other_row: str | None = None
    peer: str = "unsync"


@dataclass(frozen=True)
class Limit:
    """`peer` must not take more than `most` of the row's unit."""

    row: str
    most: float
    peer: str = "unsync"


TARGETS = (
    Target("coroutine_each", 3.3),
    Target("coroutine_fan_out", 14),
    # At most 1.6 times the cost of the eager task.
    Target("coroutine_fan_out", 1 / 1.6, "stdlib", "eager_task"),
    Target("yielding_fan_out", 4),
    Target("function_each", 6),
    Target("function_each", 2, "stdlib"),
    Target("function_fan_out", 70),
    Target("function_fan_out", 16, "stdlib"),
    Target("then_each", 20),
    Target("then_chain", 45),
    Target("loop_function", 3.5),
    Target("loop_function", 2.2, "stdlib"),
    Target("loop_coroutine", 12),
    Target("loop_gather_functions", 20),
    Target("set_result", 20),
    Target("producers", 12),
    Target("foreign_64", 6, "to_thread"),
    Target("foreign_64", 15, "anyio"),
    Target("pending", 15),
    # Not where one coroutine is waited for at a time: there thread switches are most of the time,
    # for the fallback as for upstream.
    *(
        Target(row.name, 1.5, peer="fallback")
        for row in ROWS
        if row.group in {"coroutines", "threads", "chains", "in the loop"}
        and row.name not in {"coroutine_each", "yielding_each", "call"}
    ),
)

LIMITS = (Limit("call", 0.6),)

# Pending calls, from the fewest to the most; time and memory per call must not grow beyond this.
GROWTH = (1000, 10_000, 100_000, 1_000_000)
GROWTH_LIMIT = 1.5
