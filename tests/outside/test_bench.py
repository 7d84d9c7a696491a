"""The comparison benchmark measures what it says.

Whether README and docs show what it measured says `bench/report.py --check`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.needs import skip_without

import unsync as package

pytest.importorskip("tracemalloc", reason="the benchmarks ask CPython for memory")

CHECKOUT = Path(__file__).parent.parent.parent
BENCH = CHECKOUT / "bench"
OURS = "unsync" if package.ACCELERATED else "fallback"

once = pytest.mark.once

sys.path.insert(0, str(BENCH))
import report  # noqa: E402
import rows  # noqa: E402
from peers import WAYS  # noqa: E402


def run(script: str, *arguments: str) -> list[dict[str, Any]]:
    # The package itself is found as these tests found it, installed or in the checkout.
    place = str(Path(package.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, str(BENCH / script), *arguments],
        env={**os.environ, "PYTHONPATH": place},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


OTHERS = ("uvloop", "stdlib", "to_thread", "stdlib_uvloop")


@pytest.mark.parametrize("peer", [OURS, *(pytest.param(way, marks=once) for way in OTHERS)])
def test_every_row_has_a_figure_or_a_reason(peer: str) -> None:
    if "uvloop" in peer:
        skip_without("uvloop")
    _, *lines = run("measure.py", peer, "--seconds", "0", "--share", "0.01")
    found = {line["row"]: line for line in lines}
    assert list(found) == [row.name for row in rows.ROWS]
    for name, line in found.items():
        if peer == OURS and rows.BY_NAME[name].group != "floors":
            assert "figure" in line, line
        if "figure" in line:
            assert line["figure"] >= 0
        else:
            assert line["reason"], line


@once
def test_growth_has_a_figure_for_every_size() -> None:
    (result,) = run("growth.py", OURS, "--most", "10000")
    assert set(result) == {"coroutine", "function", "chained"}
    for measured in result.values():
        for unit in ("µs", "bytes"):
            assert set(measured[unit]) == {"1000", "10000"}
            assert all(figure > 0 for figure in measured[unit].values())


@once
def test_fairness_sees_timers_fire_in_the_burst() -> None:
    (result,) = run("fairness.py", OURS, "--calls", "20000")
    assert result["timers"] >= 1
    assert result["median"] <= result["p99"] <= result["most"]


@once
@pytest.mark.parametrize(
    "way", ["bare_pool", "pool", "loky", "dask", "dask_scatter", "shared_memory"]
)
def test_large_data_is_measured_both_ways(way: str) -> None:
    skip_without("numpy")
    if package := {"loky": "loky", "dask": "distributed"}.get(way.partition("_")[0]):
        skip_without(package)
    (result,) = run("large_data.py", way, "--json", "--megabytes", "0.1", "--rounds", "1")
    for kind in ("argument", "result"):
        assert result[kind]["milliseconds"] > 0
        assert result[kind]["megabytes_here"] >= 0


@once
def test_fan_out_has_a_figure_for_every_way_and_chunk() -> None:
    place = str(Path(package.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, str(BENCH / "fan_out.py"), "--calls=200", "--programs=2", "--rounds=1"],
        env={**os.environ, "PYTHONPATH": place},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line]
    assert len(table) == 2 * 8 + 2 * 5
    for way, *cells in table:
        if "`unsync." in way:
            assert all(float(cell.split(" ± ")[0]) > 0 for cell in cells), way


@once
def test_a_wrong_sum_is_not_timed() -> None:
    from peers import base

    class Two:
        def result(self) -> int:
            return 2

    for work in (base.wait_for_each, base.fan_out):
        with pytest.raises(AssertionError, match="10 operations gave 20"):
            work(Two, 10)


def results(figures: dict[str, dict[str, float]]) -> report.Results:
    cells = {
        row: {peer: {"figure": figure} for peer, figure in peers.items()}
        for row, peers in figures.items()
    }
    return {
        "date": "2026-01-02",
        "python": "3.13.9",
        "machine": {"cpu": "a processor", "cores": 2, "system": "Linux x86_64"},
        "rounds": 3,
        "versions": {"unsync": {}, "upstream": {}},
        "growth": {},
        "fairness": {},
        "pinned": cells,
        "unpinned": cells,
    }


@once
def test_a_table_shows_the_best_in_bold_and_a_dash_for_what_is_missing() -> None:
    text = report.table(
        results({"coroutine_each": {"unsync": 4.0, "upstream": 24.04}, "then_each": {"unsync": 1}}),
        "pinned",
        ["unsync", "upstream"],
    )
    assert "| coroutine, wait for each | **4.00** | 24.0 |" in text
    assert "| `.then` on each, fan out | **1.00** | - |" in text


@once
def test_a_target_is_missed_where_the_ratio_is_not_reached() -> None:
    verdicts = report.verdicts(results({"coroutine_each": {"unsync": 10.0, "upstream": 33.0}}))
    found = {what: enough for what, _, _, enough in verdicts}
    assert found["coroutine, wait for each: unsync against unsync 1.4.0"]
    verdicts = report.verdicts(results({"coroutine_each": {"unsync": 10.0, "upstream": 32.9}}))
    found = {what: enough for what, _, _, enough in verdicts}
    assert not found["coroutine, wait for each: unsync against unsync 1.4.0"]
    assert not found["thread function, wait for each: unsync against unsync 1.4.0"]  # no figure


@once
def test_every_target_names_rows_and_peers_that_exist() -> None:
    for target in rows.TARGETS:
        assert {target.row, target.other_row or target.row} <= set(rows.BY_NAME)
        assert {target.peer, target.other} <= set(WAYS)


@once
def test_a_page_without_the_markers_is_refused() -> None:
    assert report.insert("a\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nb", "x", "new") == (
        "a\n<!-- bench:x -->\n\nnew\n<!-- /bench:x -->\nb"
    )
    with pytest.raises(ValueError, match="no markers for bench:x"):
        report.insert("a\n<!-- bench:x -->\n", "x", "new")


@once
def test_a_page_that_shows_other_figures_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "CHECKOUT", tmp_path)
    right, wrong = tmp_path / "right.md", tmp_path / "wrong.md"
    for page in (right, wrong):
        page.write_text("a\n<!-- bench:x -->\n<!-- /bench:x -->\nb")
    report.write_pages({right: {"x": "1"}, wrong: {"x": "2"}})
    assert report.check_pages({right: {"x": "1"}, wrong: {"x": "1"}}, "command") == [
        "wrong.md does not show what was measured: run `command`"
    ]
