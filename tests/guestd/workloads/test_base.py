"""The contract of a generator: it fills all of a buffer and nothing but dense pages of its own space."""

import numpy as np
import pytest

from guestd.workloads.base import Buffer
from guestd.workloads.registry import workloads
from proto.config import Scalar
from proto.costs import Costs
from tests.guestd.machines import guest_config


@pytest.mark.parametrize("name", ["gups", "scan"])
@pytest.mark.parametrize("params", [{}, {"footprint": 0.05}])
def test_generators_stay_in_their_space_and_populate_what_they_will_touch(
    name: str, params: dict[str, Scalar], costs: Costs
) -> None:
    workload = workloads()[name].create(guest_config(costs, workload=name, workload_params=params, vcpus=2))
    buffer = Buffer(np.full(50_000, -1, np.int64), np.full(50_000, 9, np.uint8), np.full(50_000, -1, np.int32))
    populated: set[int] = set()
    for vcpu in (0, 1):
        while count := workload.populate(vcpu, buffer):
            populated |= set((buffer.address[:count] >> 12).tolist())
    for vcpu in (0, 1):
        assert workload.generate(vcpu, buffer) == 50_000
        assert set((buffer.address >> 12).tolist()) <= populated
        assert buffer.kind.max() <= 2 and buffer.think_ps.min() >= 0
    heat = workload.heat()
    assert heat is not None
    assert set(np.flatnonzero(heat).tolist()) == populated
    assert heat.size == workload.space.pages
