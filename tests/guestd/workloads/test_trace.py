"""Replay: the program's own addresses, every page that it touched, its compute, over and over, on several vCPUs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.workloads.base import Buffer
from guestd.workloads.trace import TraceReplay
from proto.config import Scalar
from proto.costs import Costs
from proto.errors import TraceError
from proto.trace import LLC_HIT, LOAD, MODIFY, STORE, Trace, TraceMeta, touched_pages, write_trace
from tests.guestd.machines import guest_config, run_guest

HEAP, STACK = 0x5555_5577_0000, 0x7FFF_FFFD_E000


def trace_of(references: list[tuple[int, int, int, int]], **meta: Any) -> Trace:
    """From (address, kind, size, compute)."""
    address, kind, size, compute = zip(*references, strict=True)
    return Trace(
        np.array(address, np.uint64),
        np.array(kind, np.uint8),
        np.array(size, np.uint16),
        np.array(compute, np.uint32),
        TraceMeta(source="test", **meta),
    )


def replay(costs: Costs, path: Path, trace: Trace, vcpus: int = 1, **params: Scalar) -> TraceReplay:
    write_trace(path, trace)
    return TraceReplay(
        guest_config(costs, workload="trace", workload_params={"file": str(path), **params}, vcpus=vcpus)
    )


def generate(workload: TraceReplay, vcpu: int, count: int) -> Buffer:
    buffer = Buffer(np.zeros(count, np.int64), np.zeros(count, np.uint8), np.zeros(count, np.int32))
    assert workload.generate(vcpu, buffer) == count
    return buffer


def gvas(workload: TraceReplay, buffer: Buffer) -> list[int]:
    """The program's own addresses of dense ones."""
    gva: list[int] = (workload.space.gva(buffer.address >> 12) + (buffer.address & 4095)).tolist()
    return gva


def expected(trace: Trace) -> list[tuple[int, int]]:
    """(gVA, kind) of each access in plain Python: the first byte, then the first of each further page."""
    found = []
    for address, kind, size in zip(trace.address.tolist(), trace.kind.tolist(), trace.size.tolist(), strict=True):
        found.append((address, kind))
        page = address // 4096 + 1
        while page * 4096 <= address + size - 1:
            found.append((page * 4096, kind))
            page += 1
    return found


REFERENCES = st.lists(
    st.tuples(
        st.builds(lambda base, offset: base + offset, st.sampled_from((HEAP, HEAP + (300 << 20), STACK)),
                  st.integers(0, 1 << 22)),
        st.sampled_from((LOAD, STORE, MODIFY)),
        st.integers(1, 9000),
        st.integers(0, 5000),
    ),
    min_size=1,
    max_size=40,
)  # fmt: skip


@given(references=REFERENCES)
def test_dense_addresses_convert_back_to_the_program_s_own(
    references: list[tuple[int, int, int, int]], tmp_path_factory: pytest.TempPathFactory, costs: Costs
) -> None:
    trace = trace_of(references)
    workload = replay(costs, tmp_path_factory.mktemp("trace") / "t.trace", trace)
    wanted = expected(trace)
    buffer = generate(workload, 0, 2 * len(wanted) + 3)
    repeated = (wanted * 6)[: 2 * len(wanted) + 3]
    assert list(zip(gvas(workload, buffer), buffer.kind.tolist(), strict=True)) == repeated
    pages = np.unique(workload.space.gva(buffer.address >> 12) >> 12)
    assert pages.tolist() == touched_pages(trace).tolist()
    heat = workload.heat()
    assert heat is not None
    assert heat.tolist() == np.bincount(
        [address >> 12 for address in buffer.address[: len(wanted)]], minlength=workload.space.pages
    ).tolist()  # fmt: skip


def test_an_access_across_a_page_boundary_touches_both_and_thinks_once(tmp_path: Path, costs: Costs) -> None:
    trace = trace_of([(HEAP + 4090, LOAD, 16, 7)], compute_unit="instruction")
    workload = replay(costs, tmp_path / "t.trace", trace, think_ns=2.0)
    buffer = generate(workload, 0, 4)
    assert gvas(workload, buffer) == 2 * [HEAP + 4090, HEAP + 4096]
    assert buffer.think_ps.tolist() == 2 * [14_000, 0]


@pytest.mark.parametrize(
    ("unit", "dropped", "think_ns", "ps"),
    [
        ("instruction", 0.0, -1.0, 10 * 150),
        ("ns", 0.0, -1.0, 10 * 1000),
        ("reference", 3.0, -1.0, 10 * 500 + 3 * 500),
        ("reference", 3.0, 2.0, 10 * 2000 + 3 * 2000),
    ],
)
def test_compute_is_charged_in_the_recording_s_own_unit(
    unit: str, dropped: float, think_ns: float, ps: int, tmp_path: Path, costs: Costs
) -> None:
    trace = trace_of([(HEAP, LOAD, 8, 10)], compute_unit=unit, dropped_per_reference=dropped)
    workload = replay(costs, tmp_path / "t.trace", trace, think_ns=think_ns)
    assert generate(workload, 0, 1).think_ps.tolist() == [ps]


def test_vcpus_start_an_equal_part_further_on(tmp_path: Path, costs: Costs) -> None:
    trace = trace_of([(HEAP + 4096 * page, LOAD, 8, 0) for page in range(9)])
    workload = replay(costs, tmp_path / "t.trace", trace, vcpus=3)
    starts = [(gvas(workload, generate(workload, vcpu, 9))[0] - HEAP) // 4096 for vcpu in range(3)]
    assert starts == [0, 3, 6]


@pytest.mark.parametrize("vcpus", [1, 3])
def test_a_run_touches_exactly_the_pages_of_the_trace(vcpus: int, tmp_path: Path, costs: Costs) -> None:
    pages = np.random.default_rng(1).integers(0, 900, 3000)
    trace = trace_of([(HEAP + 4096 * int(page) + 4092 * (int(page) % 5 == 0), STORE, 8, 30) for page in pages])
    path = tmp_path / "t.trace"
    write_trace(path, trace)
    config = guest_config(costs, workload="trace", workload_params={"file": str(path)}, vcpus=vcpus)
    _, report = run_guest(config)
    assert report["integrity"]["mismatches"] == 0
    assert report["integrity"]["pages_checked"] == len(touched_pages(trace))
    assert report["transactions"] > 3 * 3000, "it repeats until the run ends"


@pytest.mark.parametrize("llc_filter", [True, False])
def test_references_go_through_the_vms_share_of_the_llc(llc_filter: bool, tmp_path: Path, costs: Costs) -> None:
    """A loop of 100 lines: in a cache of 160 all but the first round hits; without a filter nothing does."""
    trace = trace_of([(HEAP + 64 * line, STORE, 8, 0) for line in range(100)])
    workload = replay(costs, tmp_path / "t.trace", trace, vcpus=2, llc_filter=llc_filter)
    workload.set_llc(100 * 1024)
    kinds = np.concatenate([generate(workload, 0, 150).kind, generate(workload, 1, 50).kind])
    assert kinds.tolist() == [STORE] * 100 + [STORE | LLC_HIT if llc_filter else STORE] * 100
    workload.set_llc(0)
    assert set(generate(workload, 0, 100).kind.tolist()) == {STORE}


def test_a_replay_that_fits_the_llc_meets_memory_once(tmp_path: Path, costs: Costs) -> None:
    trace = trace_of([(HEAP + 4096 * page, LOAD, 8, 10) for page in range(600)])
    path = tmp_path / "t.trace"
    write_trace(path, trace)
    config = guest_config(costs, workload="trace", workload_params={"file": str(path)}, vcpus=2)
    _, report = run_guest(config, llc_bytes=1 << 30)
    assert report["access"]["total"] - report["access"]["llc_hits"] == 600
    _, report = run_guest(config, llc_bytes=1)
    assert report["access"]["llc_hits"] == 0


def test_no_trace_is_an_error_that_names_the_file(tmp_path: Path, costs: Costs) -> None:
    with pytest.raises(TraceError, match=r"missing\.trace"):
        TraceReplay(guest_config(costs, workload="trace", workload_params={"file": str(tmp_path / "missing.trace")}))
