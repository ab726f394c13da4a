"""What tests of several packages need: a host's costs, guests, and the record of a small run that never happened."""

import os
import signal
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from fleet import hosts, numba_cache
from fleet.experiment import Experiment, Tenant
from fleet.outcome import FleetResult, Outcome, Sample
from proto.config import EngineConfig, GuestConfig, GuestKernel, HostKernel
from proto.costs import Costs
from proto.counters import C, new_counters
from proto.units import PAGE_SIZE, PS_PER_MS, PS_PER_S

MIB = 1 << 20

# Set before the first kernel is imported: the kernels that `fleet run` compiled serve the tests too, and no stale ones.
os.environ.update(numba_cache.environment())

# A shell's background job ignores Ctrl-C, one of nohup a hang-up, and so would all that a test starts and interrupts.
for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, handler)

# No test judges by the clock, so a busy machine must not fail one.
settings.register_profile("fleet", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fleet")


@pytest.fixture(scope="session")
def costs() -> Costs:
    """The costs of the default host profile."""
    return hosts.costs(hosts.load_profile(hosts.DEFAULT_PROFILE))


@pytest.fixture
def experiment(costs: Costs) -> Experiment:
    """Two VMs of one virtual second: g-tpp and hyperplace over gups, 64 MiB each."""
    kernel = GuestKernel(
        hz=250,
        sched_slice_ps=8 * PS_PER_MS,
        single_page_flush_ceiling=33,
        ds_pages=16,
        ds_prefault=True,
        batched_unmap_flush=False,
    )
    tenants = tuple(
        Tenant(
            vms=1,
            policy=policy,
            policy_params={},
            workload="gups",
            workload_params={},
            vcpus=2,
            memory_bytes=64 * MIB,
            fast_ratio=Fraction(1, 4),
            start_ps=0,
            run_ps=PS_PER_S,
            transactions=0,
            kernel=kernel,
        )
        for policy in ("g-tpp", "hyperplace")
    )
    return Experiment(
        name="two",
        seed=7,
        clock="virtual",
        host=hosts.DEFAULT_PROFILE,
        host_overrides={},
        host_kernel=HostKernel(),
        costs=costs,
        scale=Fraction(1),
        engine=EngineConfig(quantum_ps=10 * PS_PER_MS, slice_ps=PS_PER_MS, block=2048),
        sample_ps=100 * PS_PER_MS,
        heat=False,
        hang_timeout_s=60.0,
        tenants=tenants,
    )


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """A sample from (vm, time_ps, phase, agent_cpu_s) and counters by name."""

    def make(vm: int, time_ps: int, phase: str = "run", agent_cpu_s: float = 0.0, **counts: int) -> Sample:
        counters = new_counters()
        for name, count in counts.items():
            counters[C[name]] = count
        return Sample(vm=vm, time_ps=time_ps, phase=phase, counters=counters.tobytes(), agent_cpu_s=agent_cpu_s)

    return make


@pytest.fixture
def make_report() -> Callable[[GuestConfig], dict[str, Any]]:
    """A guest's complete report, as the launcher hands it over; its figures differ from VM to VM."""
    return _report


@pytest.fixture
def result(experiment: Experiment, make_sample: Callable[..., Sample]) -> FleetResult:
    """A run of `experiment` in which all went well: populated after 100 ms, sampled each 100 ms for 1.1 s."""
    samples = []
    for guest in experiment.guests():
        for step in range(1, 12):
            total = 1_000_000 * step + 1_000 * guest.vm
            fast = total * (30 + 40 * guest.vm + step) // 100
            phase = "populate" if step == 1 else "run"
            counts = {"access__total": total, "access__fast": fast, "access__slow": total - fast}
            samples.append(make_sample(guest.vm, step * 100 * PS_PER_MS, phase, 0.01 * step, **counts))
    return FleetResult(
        outcome=Outcome.OK,
        reports={guest.vm: _report(guest) for guest in experiment.guests()},
        failures=[],
        host=_host(),
        samples=samples,
        compile_s=0.5,
        ready_s=0.25,
        wall_s=2.0,
    )


def _report(guest: GuestConfig) -> dict[str, Any]:
    vm = guest.vm
    return {
        "id": vm,
        "policy": guest.policy,
        "workload": guest.workload,
        "vcpus": guest.vcpus,
        "memory": {
            "total_bytes": guest.total_pages * PAGE_SIZE,
            "fast_bytes": guest.fast_pages * PAGE_SIZE,
            "slow_bytes": guest.slow_pages * PAGE_SIZE,
            "backed_bytes": 48 * MIB,
            "touched_bytes": 47 * MIB,
            "pinned_bytes": 0,
            "rss_bytes": 90 * MIB,
            "private_bytes": 60 * MIB,
        },
        "outcome": "ok",
        "transactions": 10_000_000 + vm,
        "virtual_s": 1.0,
        "populate_virtual_s": 0.1,
        "throughput_mops": 10.0 + vm,
        "access": {
            "total": 20_000_000,
            "fast": 7_000_000 + 4_000_000 * vm,
            "slow": 13_000_000 - 4_000_000 * vm,
            "fast_ratio": 0.35 + 0.2 * vm,
            "llc_hits": 2_000_000,
            "llc_hit_ratio": 0.1,
            "tlb_miss_ratio": 0.8,
            "walk_ns_mean": 42.0,
            "latency_ns": {"p50": 80.0, "p90": 310.0, "p99": 320.0},
        },
        "vmstat": {
            "nr_tlb_local_flush_one": 4_000,
            "nr_tlb_local_flush_all": 50,
            "nr_tlb_remote_flush": 300,
            "nr_tlb_remote_flush_received": 300,
            "pgpromote_success": 1_200 + vm,
        },
        "kvm": {
            "tlb_flush": 0,
            "remote_tlb_flush": 0,
            "remote_tlb_flush_requests": 0,
            "exits": {"ept_violation": 16_384},
        },
        "instructions": {"invlpg": 4_000, "invept_global": 0},
        "flushes": {"total": 4_350, "remote_requests": 0, "single": 4_350},
        "pebs": {"records": 9_000 * vm, "pmi": 0, "dropped": 0, "drains": 125 * vm},
        "migration": {
            "promoted_pages": 1_200 + vm,
            "demoted_pages": 1_150,
            "swapped_pairs": 0,
            "failed_pages": 3,
            "bytes": 2_350 * PAGE_SIZE,
        },
        "agent_cpu": {
            "measured_s": {"track": 0.012, "classify": 0.004, "migrate": 0.02, "other": 0.003, "total": 0.036},
            "floor_s": 0.001,
            "modelled_s": {"track": 0.03, "classify": 0.006, "migrate": 0.05, "total": 0.086},
            "measured_cores": 0.036,
            "modelled_cores": 0.086,
            "stolen_s": 0.04 + 0.01 * vm,
            "activations": 125,
        },
        "time": {"exit_s": 0.01, "stolen_s": 0.04},
        "populate": {"vmstat": {"pgfault": 16_384}, "flushes": {"total": 0, "remote_requests": 0, "single": 0}},
        "process_cpu": {
            "wait4_s": 1.5,
            "vcpu_s": 1.2,
            "agent_s": 0.04,
            "control_s": 0.2,
            "runtime_s": 0.05,
            "residue_ratio": 0.0066,
        },
        "hypercalls": {"count": {"ept_fault": 200, "tick": 110}, "rtt_us": {"p50": 120.0, "p99": 900.0}},
        "integrity": {"pages_checked": guest.total_pages, "accesses_checked": 20_000_000, "mismatches": 0},
    }


def _host() -> dict[str, Any]:
    tier = {"frames": 32_768, "used": 8_192, "peak": 8_192, "read_bytes": 1 << 30, "write_bytes": 1 << 29}
    return {
        "cpu": {
            "measured_s": 0.3,
            "modelled_s": 0.1,
            "by_vm": [{"id": vm, "measured_s": 0.15, "modelled_s": 0.05} for vm in range(2)],
        },
        "tiers": [
            {"name": "DDR4", **tier, "utilisation": 0.02, "loaded_latency_ns": 82.5},
            {"name": "PMEM", **tier, "utilisation": 0.31, "loaded_latency_ns": 344.0},
        ],
        "overcommit": {
            "promised_bytes": 128 * MIB,
            "backed_bytes": 96 * MIB,
            "touched_bytes": 94 * MIB,
            "pinned_bytes": 0,
            "ratio": 128 / 96,
        },
        "hypercalls_per_s": 310.0,
        "refused": {"malformed": 0},
    }
