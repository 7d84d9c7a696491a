"""The pipeline: every record is accounted for, though a worker and a connection are killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import databases
from support.needs import packages

import unsync

reason = databases.missing()
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(reason is not None, reason=str(reason)),
    packages("asyncpg", "redis", "rich"),
]

CHECKOUT = Path(__file__).resolve().parent.parent.parent
BENCH = CHECKOUT / "bench"
RECORDS, BATCH = 5_000, 50

WAYS = ("unsync", "asyncio")

sys.path.insert(0, str(BENCH))  # what is imported from there imports the packages that it needs


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What each way reports."""
    run = subprocess.run(
        [
            *(sys.executable, str(BENCH / "service" / "pipeline.py")),
            *("--records", str(RECORDS), "--batch", str(BATCH)),
        ],
        env=os.environ | {"PYTHONPATH": str(Path(unsync.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    # Nor did anything go wrong that nobody was told of.
    assert "Traceback" not in run.stderr, run.stderr
    assert "never retrieved" not in run.stderr, run.stderr
    assert f"{RECORDS}/{RECORDS}" in run.stderr  # the bar
    found = {line["way"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert {*found} == {*WAYS}
    return found


@pytest.mark.parametrize("way", WAYS)
def test_every_record_is_accounted_for(found: dict[str, Any], way: str) -> None:
    line = found[way]
    # How the memory grows is sampled, and needs a machine that is not busy.
    assert [each for each in line["problems"] if not each.startswith("memory_growth")] == []
    accounted = line["accounted"]
    assert accounted["sales"] == accounted["different"] == RECORDS
    assert accounted["number_sum"] == sum(range(RECORDS))
    for fault in line["faults"].values():
        assert fault["killed"] >= 1
        assert fault["made_again"] >= 1
    assert line["records_per_second"] > 0


@pytest.mark.parametrize("way", WAYS)
def test_the_reader_waits_for_the_others(found: dict[str, Any], way: str) -> None:
    from service import pipeline_work

    most = pipeline_work.READ_AHEAD + pipeline_work.IN_FLIGHT + 1
    assert 0 < found[way]["most_ahead"] <= most * BATCH < RECORDS / 4


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    from service import pipeline, pipeline_work

    job = pipeline_work.Job(tmp_path / "sales", 100, 10, "", "")
    pipeline_work.write_sales(job.path, job.count)
    expected = pipeline_work.expected(job.path)
    assert expected["sales"] == 100
    assert expected["number_sum"] == sum(range(100))
    assert sum(sales for sales, _ in expected["by_sale"].values()) == 100
    fault = {"killed": 1, "made_again": 1}
    right = {
        "accounted": expected,
        "most_ahead": 130,
        "memory_growth": pipeline.MOST_GROWTH,
        "memory_above_a_tenth": pipeline.MOST_GROWTH,
        "faults": {"worker": fault, "connection": fault},
    }
    assert pipeline.problems(right, expected, job, True) == []

    def told(*path: str, value: object) -> str:
        wrong: Any = json.loads(json.dumps(right))
        place = wrong
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (problem,) = pipeline.problems(wrong, expected, job, True)
        return problem

    for what, value in expected.items():
        if isinstance(value, dict):
            region = next(iter(value))
            assert f"{what}, {region}: [1, 2] in the" in told(
                "accounted", what, region, value=[1, 2]
            )
            assert f"{what}, new" in told("accounted", what, "new", value=[1, 2])
        else:
            assert f"{what}: 99 in the" in told("accounted", what, value=99)
    assert "131 sales were on their way" in told("most_ahead", value=131)
    for growth in ("memory_growth", "memory_above_a_tenth"):
        assert growth in told(growth, value=pipeline.MOST_GROWTH + 1)
    for name in ("worker", "connection"):
        assert f"no {name} was killed" in told("faults", name, "made_again", value=0)


def test_what_is_made_of_a_sale() -> None:
    from service import pipeline_work

    known = {7: pipeline_work.customer(7)}
    region, rate, address = known[7].split(",")
    sales = [(1, 7, 1000, address), (2, 7, 50, "elsewhere")]
    regions = pipeline_work.by_region(sales, known)
    ((found, enriched),) = regions.items()
    rows, total = pipeline_work.aggregate(found, enriched)
    taxed = [cents + cents * int(rate) // 100 for cents in (1000, 50)]
    assert total == (region, 2, sum(taxed))
    assert [row[:3] for row in rows] == [(1, region, taxed[0]), (2, region, taxed[1])]
    assert rows[0][3] == 1 > rows[1][3] >= 0


def test_the_page_shows_the_pipeline_as_it_is() -> None:
    page = (CHECKOUT / "docs" / "how-to" / "pipeline.md").read_text()
    mark = "# bench/service/pipeline_unsync.py\n"
    blocks = re.findall(rf"^```python\n{mark}(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == page.count("```python") >= 4
    source = (BENCH / "service" / "pipeline_unsync.py").read_text()
    for block in blocks:
        assert block.strip("\n") in source, block
