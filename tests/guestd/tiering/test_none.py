"""none: first touch and nothing else."""

from proto.costs import Costs
from tests.small_fleet import new_fleet, run_fleet, small_guest


def test_nothing_is_ever_flushed_moved_or_sampled(costs: Costs) -> None:
    report = run_fleet(small_guest(costs))[0]
    assert report["flushes"] == {"total": 0, "remote_requests": 0, "single": 0}
    assert not any(report["migration"].values())
    assert not any(report["agent_cpu"]["modelled_s"].values())
    assert report["agent_cpu"]["activations"] == 0
    assert "pebs" not in report


def test_pages_stay_where_they_were_first_touched(costs: Costs) -> None:
    fleet = new_fleet(small_guest(costs))
    machine = fleet.guests[0].machine
    while fleet.guests[0].phase == "populate":
        fleet.step()
    frames = machine.gpt >> 12 & 0xFFFFFFF
    fleet.run()
    assert ((machine.gpt >> 12 & 0xFFFFFFF) == frames).all()


def test_the_hot_set_starts_in_slow_memory_as_it_is_touched_last(costs: Costs) -> None:
    ends = run_fleet(small_guest(costs, workload={"layout": "end"}))[0]
    starts = run_fleet(small_guest(costs, workload={"layout": "start"}))[0]
    assert ends["access"]["fast_ratio"] < 0.1
    assert starts["access"]["fast_ratio"] > 0.9
    assert starts["throughput_mops"] > ends["throughput_mops"]
