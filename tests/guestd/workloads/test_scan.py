"""The scan: each vCPU its own share, line by line, over and over."""

import numpy as np
import pytest

from guestd.workloads.base import Buffer
from guestd.workloads.scan import Scan
from proto.costs import Costs
from proto.trace import LOAD, STORE
from tests.guestd.machines import guest_config


def buffer(size: int) -> Buffer:
    return Buffer(np.zeros(size, np.int64), np.zeros(size, np.uint8), np.zeros(size, np.int32))


@pytest.mark.parametrize("write_every", [0, 5])
def test_vcpus_read_their_shares_in_order_and_begin_again(write_every: int, costs: Costs) -> None:
    config = guest_config(
        costs, workload="scan", workload_params={"footprint": 0.1, "write_every": write_every}, vcpus=3
    )
    scan = Scan(config)
    pages = int(4096 * 0.1)
    seen: list[int] = []
    for vcpu in range(3):
        start, end = pages * vcpu // 3, pages * (vcpu + 1) // 3
        lines = (end - start) * 64
        block = buffer(lines + 100)
        assert scan.generate(vcpu, block) == lines + 100
        expected = (scan.first_page + start) * 4096 + np.arange(lines) * 64
        assert (block.address[:lines] == expected).all()
        assert (block.address[lines:] == expected[:100]).all(), "it begins again"
        writes = np.arange(lines) % write_every == 0 if write_every else np.zeros(lines, np.bool_)
        assert (block.kind[:lines] == np.where(writes, STORE, LOAD)).all()
        assert (block.think_ps == 1000).all()
        rest = buffer(10)
        scan.generate(vcpu, rest)
        assert (rest.address == expected[100:110]).all(), "it goes on where it was"
        seen += np.unique(block.address >> 12).tolist()
    assert seen == list(range(scan.first_page, scan.first_page + pages))


def test_populate_touches_each_share_once(costs: Costs) -> None:
    scan = Scan(guest_config(costs, workload="scan", vcpus=2))
    touched: list[int] = []
    for vcpu in (0, 1):
        while count := scan.populate(vcpu, block := buffer(1000)):
            assert (block.kind[:count] == STORE).all()
            touched += (block.address[:count] >> 12).tolist()
    assert touched == list(range(scan.first_page, scan.first_page + scan.pages))
    heat = scan.heat()
    assert heat is not None
    assert np.flatnonzero(heat).tolist() == touched
