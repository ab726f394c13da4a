"""all-fast and all-slow: every page in one tier whatever the ratio, and every design between them."""

from typing import Any

import pytest

from fleet.in_process import InProcessFleet
from fleet.spec import load


def run(policy: str, **flags: Any) -> dict[str, Any]:
    """The report of one VM of 32 MiB at a 256th, resolved as the command line does."""
    flags = {"memory": "8GiB", "scale": "1/256", "vcpus": 2, "seconds": 0.1, "seed": 3} | flags
    experiment = load(None, {"policy": policy} | flags)
    fleet = InProcessFleet(experiment.host_config(), experiment.guests())
    report: dict[str, Any] = fleet.run().reports[0]
    return report


@pytest.mark.parametrize("ratio", ["0.2", "1", "0"])
@pytest.mark.parametrize("workload", ["gups", "scan"])
def test_every_page_is_in_the_one_tier_whatever_the_ratio(workload: str, ratio: str) -> None:
    for policy, share in (("all-fast", 1), ("all-slow", 0)):
        report = run(policy, fast_ratio=ratio, workload=workload)
        memory = report["memory"]
        assert (memory["fast_bytes"], memory["slow_bytes"]) == (share * memory["total_bytes"],
                                                                (1 - share) * memory["total_bytes"])  # fmt: skip
        assert report["access"]["fast_ratio"] == share
        assert report["integrity"]["mismatches"] == 0
        assert report["flushes"]["total"] == report["migration"]["bytes"] == 0
        assert report["agent_cpu"]["modelled_s"]["total"] == report["agent_cpu"]["stolen_s"] == 0


def test_all_else_lies_between_them() -> None:
    reached = {policy: run(policy)["throughput_mops"] for policy in ("all-slow", "none", "oracle", "all-fast")}
    assert list(reached) == sorted(reached, key=lambda policy: reached[policy])


def test_the_whole_of_memory_can_be_used() -> None:
    for policy in ("all-fast", "all-slow"):
        assert load(None, {"policy": policy}).guests()[0].total_pages == 131_072
        fleet = load(None, {"policy": policy, "memory": "32MiB", "seconds": 0.02}, ("workload.footprint=0.97",))
        assert InProcessFleet(fleet.host_config(), fleet.guests()).run().failures == []
