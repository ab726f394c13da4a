"""Every registered workload: named as it says, documented, and runs without losing a page."""

from pathlib import Path

import numpy as np
import pytest

from guestd.workloads.base import Buffer, Workload
from guestd.workloads.registry import workloads
from proto.config import Scalar
from proto.costs import Costs
from proto.trace import LOAD, Trace, TraceMeta, write_trace
from tests.guestd.machines import guest_config, run_guest


def test_the_issue_s_workloads_are_there() -> None:
    assert {"gups", "scan", "trace"} <= set(workloads())


@pytest.mark.parametrize("name", workloads())
def test_names_and_parameters_are_documented(name: str) -> None:
    kind = workloads()[name]
    assert kind.name == name and kind.summary
    for param in kind.params:
        assert param.help and param.source, param.name
        if param.choices:
            assert param.default in param.choices
        if param.minimum is not None and param.maximum is not None:
            assert param.minimum <= float(param.default) <= param.maximum
    assert len({param.name for param in kind.params}) == len(kind.params)


@pytest.mark.parametrize("name", workloads())
def test_a_run_keeps_every_page(name: str, tmp_path: Path, costs: Costs) -> None:
    params: dict[str, Scalar] = {}
    if name == "trace":
        address = np.arange(0, 1 << 21, 4096, dtype=np.uint64) + np.uint64(0x5555_5560_0000)
        columns = np.full(512, LOAD, np.uint8), np.full(512, 8, np.uint16), np.full(512, 100, np.uint32)
        write_trace(tmp_path / "t.trace", Trace(address, *columns, TraceMeta(source="test")))
        params["file"] = str(tmp_path / "t.trace")
    _, report = run_guest(guest_config(costs, workload=name, workload_params=params, vcpus=2))
    assert report["transactions"] > 0
    assert report["integrity"]["mismatches"] == 0
    assert report["integrity"]["pages_checked"] == (512 if name == "trace" else 4096 * 7 // 8)


def test_a_workload_that_says_nothing_has_no_first_touch_and_no_heat() -> None:
    plain = Workload()
    assert plain.populate(0, Buffer(np.zeros(1, np.int64), np.zeros(1, np.uint8), np.zeros(1, np.int32))) == 0
    assert plain.heat() is None
