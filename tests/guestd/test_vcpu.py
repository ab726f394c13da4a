"""vCPUs at power-on, and the ledger that moves with the clock."""

import numpy as np

from guestd.vcpu import CLOCK, LAST_BLOCK, RANDOM, TAG_LEFT, book, new_vcpus, total_time
from proto.costs import Costs
from proto.counters import LEDGER, C, new_counters


def test_power_on_is_empty_and_every_vcpu_tags_on_its_own(costs: Costs) -> None:
    vcpus = new_vcpus(4, costs, 9)
    assert not any(array.any() for name, array in vcpus._asdict().items() if name not in ("field", "context"))
    assert (vcpus.field[:, LAST_BLOCK] == -1).all()
    assert vcpus.context[:, 0].tolist() == [[0, 1 + vcpu, 1] for vcpu in range(4)], "a VPID each"
    span = 2 * costs.load_latency_tag_interval - 1
    assert ((vcpus.field[:, TAG_LEFT] >= 1) & (vcpus.field[:, TAG_LEFT] <= span)).all()
    assert np.unique(vcpus.field[:, RANDOM]).size == 4
    assert (new_vcpus(4, costs, 9).field == vcpus.field).all()
    assert (new_vcpus(4, costs, 10).field[:, RANDOM] != vcpus.field[:, RANDOM]).all()


def test_a_clock_moves_with_its_ledger(costs: Costs) -> None:
    vcpus, counters = new_vcpus(3, costs, 1), new_counters()
    for part in range(LEDGER):
        book(vcpus, part % 3, part, 10 + part)
    book(vcpus, np.array([0, 2]), 4, 100)
    assert vcpus.field[:, CLOCK].tolist() == vcpus.ledger.sum(axis=1).tolist()
    total_time(vcpus, counters)
    times = [int(counters[C.time__think_ps + part]) for part in range(LEDGER)]
    assert times == [10 + part + (200 if part == 4 else 0) for part in range(LEDGER)]
