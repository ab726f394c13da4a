"""Every registered workload: named as it says, documented, and runs without losing a page."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from guestd.workloads.base import Buffer, Workload
from guestd.workloads.registry import workloads
from proto.config import EngineConfig, Scalar
from proto.costs import Costs
from proto.trace import LOAD, Trace, TraceMeta, write_trace
from proto.units import PS_PER_MS
from tests.guestd.machines import guest_config, run_guest
from tests.guestd.test_guest import figures, moved


def test_the_issue_s_workloads_are_there() -> None:
    assert {"gups", "scan", "trace", "btree", "silo", "pagerank", "bfs"} <= set(workloads())


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
    pages = 512 if name == "trace" else 4096 * 7 // 8
    # The size of a real data structure is that of its elements: never more than a page an array off, never much less.
    exact = name in ("gups", "scan", "trace")
    assert (pages if exact else 0.98 * pages) <= report["integrity"]["pages_checked"] <= (pages if exact else pages + 4)


@pytest.mark.parametrize("name", ["btree", "silo", "pagerank", "bfs"])
def test_how_the_emulator_advances_moves_no_figure(name: str, costs: Costs) -> None:
    """Whose vCPU takes which part of a graph hangs on who asks first; what a run shows must not."""
    engine = EngineConfig(quantum_ps=10 * PS_PER_MS, slice_ps=PS_PER_MS, block=2048)

    def run(engine: EngineConfig) -> dict[str, float]:
        config = guest_config(costs, workload=name, total_pages=16384, fast_pages=4096, vcpus=2,
                              run_ps=300 * PS_PER_MS, engine=engine)  # fmt: skip
        return figures(run_guest(config)[1])

    base = run(engine)
    for field in ("quantum_ps", "slice_ps", "block"):
        halved = msgspec.structs.replace(engine, **{field: getattr(engine, field) // 2})
        assert moved(base, run(halved)) == {}, field


def test_a_workload_that_says_nothing_has_no_first_touch_and_no_heat() -> None:
    class Plain(Workload):
        def generate(self, vcpu: int, buffer: Buffer) -> int:
            return buffer.address.size

    plain = Plain()
    assert plain.populate(0, Buffer(np.zeros(1, np.int64), np.zeros(1, np.uint8), np.zeros(1, np.int32))) == 0
    assert plain.heat() is None
