"""oracle: the upper bound, for free."""

import pytest

from proto.costs import Costs
from tests.small_fleet import run_fleet, small_guest


@pytest.mark.parametrize("layout", ["end", "start", "scattered"])
def test_the_hot_set_is_fast_from_the_start_wherever_it_lies(layout: str, costs: Costs) -> None:
    report = run_fleet(small_guest(costs, "oracle", workload={"layout": layout}))[0]
    best = report["hotness"]["oracle_fast_ratio"]
    assert best > 0.9
    # The fast node keeps its low watermark, and page-table pages live there too: those pages are cold ones.
    assert best - 0.01 < report["access"]["fast_ratio"] <= best + 0.001
    assert report["hotness"]["recall"] == 1.0


def test_it_costs_nothing(costs: Costs) -> None:
    report = run_fleet(small_guest(costs, "oracle"))[0]
    assert report["flushes"]["total"] == 0
    assert report["migration"]["bytes"] == 0
    assert report["agent_cpu"]["modelled_s"]["total"] == 0
    assert report["agent_cpu"]["stolen_s"] == 0


def test_no_design_does_better(costs: Costs) -> None:
    best = run_fleet(small_guest(costs, "oracle"))[0]["hotness"]["oracle_fast_ratio"]
    for policy in ("none", "g-tpp", "h-tpp", "hyperplace"):
        assert run_fleet(small_guest(costs, policy))[0]["access"]["fast_ratio"] < best
