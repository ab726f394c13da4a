"""A guest's part of summary.json (design: summary.md): counters of the run phase, populating kept apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from guestd.machine import S
from guestd.meter import CALLS, Snapshot, meter_cost_ns
from guestd.vcpu import CLOCK, LATENCY_BIN_SHIFT
from proto.arrays import Words
from proto.counters import EXIT_PARTS, STOLEN_PARTS, C, flush_totals, split, sum_parts
from proto.entry import HUGE
from proto.units import PAGE_SIZE, PS_PER_NS, PS_PER_S, TABLE_PAGES

if TYPE_CHECKING:
    from guestd.guest import Guest


def percentiles_ns(histogram: Words) -> dict[str, float]:
    """p50, p90, p99 of a latency histogram (int64[LATENCY_BINS]), upper edge of the bin, ns."""
    cumulative = np.cumsum(histogram)
    total = int(cumulative[-1])
    if total == 0:
        return {}
    return {
        f"p{p}": float((int(np.searchsorted(cumulative, -(-total * p // 100))) + 1) << LATENCY_BIN_SHIFT) / PS_PER_NS
        for p in (50, 90, 99)
    }


def build_report(guest: Guest) -> dict[str, Any]:
    """Everything of a VM but what only its process knows (wait4, resident memory, round-trip times)."""
    config, machine, meter = guest.config, guest.machine, guest.meter
    now, boot = Snapshot.take(machine.counters, meter, guest.agent_cpu_ns()), Snapshot.at_boot()
    populated = guest.populated or boot
    ended = guest.ended_ps or guest.now
    run_start = guest.run_started_ps if guest.populated else ended
    run_ps = max(1, ended - run_start)
    groups = split(machine.counters - populated.counters)
    before = split(populated.counters)
    whole = split(machine.counters)
    access, vmstat, kvm, clock = groups["access"], groups["vmstat"], groups["kvm"], groups["time"]
    total = access["total"]
    vcpu_ps = run_ps * config.vcpus
    report: dict[str, Any] = {
        "id": config.vm,
        "name": config.name,
        "policy": config.policy_label,
        "workload": config.workload,
        "vcpus": config.vcpus,
        "memory": {
            "total_bytes": config.total_pages * PAGE_SIZE,
            "fast_bytes": config.fast_pages * PAGE_SIZE,
            "slow_bytes": config.slow_pages * PAGE_SIZE,
            "huge_bytes": int(np.count_nonzero(machine.tables.upper & HUGE)) * TABLE_PAGES * PAGE_SIZE,
        },
        "outcome": "ok" if guest.finished else "stopped",
        "transactions": total,
        "virtual_s": run_ps / PS_PER_S,
        "populate_virtual_s": (run_start - guest.started_ps) / PS_PER_S,
        "throughput_mops": total / (run_ps / PS_PER_S) / 1e6,
        "access": {
            **{key: value for key, value in access.items() if key != "walk_ps"},
            "fast_ratio": access["fast"] / max(1, total),
            "llc_hit_ratio": access["llc_hits"] / max(1, total),
            "tlb_miss_ratio": access["tlb_misses"] / max(1, total),
            "walk_ns_mean": access["walk_ps"] / PS_PER_NS / max(1, access["walks"]),
            "latency_ns": percentiles_ns(machine.vcpus.histogram.sum(axis=0)),
        },
        "vmstat": vmstat,
        "kvm": {
            **kvm,
            "executions_per_request": kvm["tlb_flush"] / max(1, kvm["remote_tlb_flush"]),
            "exits": groups["exit"],
            "guest_mode_ratio": 1 - sum_parts(clock, EXIT_PARTS) / vcpu_ps,
        },
        "instructions": groups["instr"],
        "flushes": flush_totals(vmstat, kvm),
        "migration": {
            "promoted_pages": vmstat["pgpromote_success"],
            "demoted_pages": vmstat["pgdemote_kswapd"] + vmstat["pgexchange_success"],
            "swapped_pairs": vmstat["pgexchange_success"],
            "failed_pages": vmstat["pgmigrate_fail"],
            "bytes": groups["bytes"]["migrated"],
        },
        "agent_cpu": {
            "where": "guest",
            **now.cpu_since(populated),
            "floor_s": guest.activations * guest.null_activation_ns / 1e9,
            "activations": guest.activations,
            **now.cores_since(populated, run_ps / PS_PER_S),
            "stolen_s": sum_parts(clock, STOLEN_PARTS) / PS_PER_S,
        },
        "time": {name.removesuffix("_ps") + "_s": value / PS_PER_S for name, value in clock.items()},
        "vcpu_time": [
            {"clock_ps": int(row[CLOCK]) - guest.booted_ps,
             **{index.name.removeprefix("time__"): int(ledger[index - C.time__think_ps])
                for index in C if index.name.startswith("time__")}}
            for row, ledger in zip(machine.vcpus.field, machine.vcpus.ledger, strict=True)
        ],
        "process_cpu": {"meter_s": int(meter.book[CALLS]) * meter_cost_ns() / 1e9},
        "integrity": {
            "pages_checked": guest.pages_checked,
            **whole["integrity"],
            "pages_brought_back": guest.pages_brought_back,
        },
        "populate": {
            "vmstat": before["vmstat"],
            "kvm": {**before["kvm"], "exits": before["exit"]},
            "flushes": flush_totals(before["vmstat"], before["kvm"]),
            "agent_cpu": populated.cpu_since(boot),
        },
    }  # fmt: skip
    if guest.tiering.by_definition:
        report["agent_cpu"]["by_definition"] = list(guest.tiering.by_definition)
    if guest.sampling or config.host.pebs == "shared":
        report["pebs"] = {**groups["pebs"], **guest.perf.pmu.report()}
        if drained := whole["pebs"]["drained_records"]:
            spent = {"measured": meter.measured_s()["track"], "modelled": meter.modelled_s()["track"]}
            report["pebs"]["cpu_ns_per_sample"] = {name: spent_s * 1e9 / drained for name, spent_s in spent.items()}
    if config.host.pml:
        entries = whole["pml"]["entries"]
        report["pml"] = {
            "entries": entries,
            "full_exits": whole["exit"]["pml_full"],
            "useless_ratio": whole["pml"]["useless"] / max(1, entries),
            "copied_again": whole["pml"]["copied_again"],
        }
    return report | guest.watch.report()


def progress(guest: Guest) -> float:
    """Share of the run phase that is done, 0 to 1."""
    if guest.phase != "run":
        return float(guest.finished)
    if guest.config.run_ps:
        # The run begins where the vCPU is that was the last to populate, which may be past the barrier.
        return min(1.0, max(0, guest.now - guest.run_started_ps) / guest.config.run_ps)
    return 1.0 - int(guest.machine.state[S.LEFT]) / guest.config.transactions


def huge_pages(guest: Guest) -> int:
    """4 KiB pages of either page table that 2 MiB entries map."""
    of_guest, of_host = guest.config.kernel.thp == "always", guest.config.host.backs_huge
    tables = guest.machine.tables
    mapped = np.count_nonzero(tables.upper & HUGE) if of_guest else 0
    return TABLE_PAGES * int(mapped + (np.count_nonzero(tables.ept_pde & HUGE) if of_host else 0))
