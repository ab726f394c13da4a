"""The readable end of a run: a table with a line per VM, the host, what failed, and where the results lie.

Drawn from ``summary.json`` alone, so that `print_summary` shows an old run as it showed it then. It fits 100 columns
and needs neither colour nor a terminal. With many VMs a line stands for a group of equal ones and shows means.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from proto.units import format_bytes

Vm = Mapping[str, Any]

WIDTH = 100
"""Columns that the table may take."""
LOG_LINES = 8
"""Of the last words of a VM that failed; `summary.json` has more."""
MOST_ROWS = 24
"""With more VMs than this, equal ones share a line."""

_COLUMNS = (
    # heading, path in a VM's entry, format
    ("M acc\n/s", "throughput_mops", "{:.2f}"),
    ("fast\n%", "access.fast_ratio", "percent"),
    ("flushes\ntotal", "flushes.total", "count"),
    ("flushes\nremote", "flushes.remote_requests", "count"),
    ("CPU\nmeasured", "agent_cpu.measured_cores", "cores"),
    ("CPU\nmodelled", "agent_cpu.modelled_cores", "cores"),
    ("CPU\nstolen", "stolen_cores", "cores"),
    ("pages\nup", "migration.promoted_pages", "count"),
    ("pages\ndown", "migration.demoted_pages", "count"),
)
_LEGEND = (
    "CPU in cores: CPU-seconds per virtual second. measured: what this machine spent on the agent's",
    "stages; modelled: what a kernel would spend on the emulated host; stolen: vCPU time lost to",
    "management. flushes: TLB flushes; remote: those that the host requested.",
)


def print_summary(summary: Mapping[str, Any], console: Console, where: Path | None = None) -> None:
    """Print the table of ``summary`` to ``console``; ``where``: the run's directory, named in the last line."""
    # On a narrower terminal the lines wrap: a figure cut short would be another figure.
    wide = console.options.update(width=max(WIDTH, console.width))
    console.print(Segments(console.render(vm_table(summary["vms"]), wide)), soft_wrap=True, end="")
    for line in _LEGEND:
        console.print(line, style="dim", highlight=False)
    for line in host_lines(summary.get("host", {})):
        console.print(Text(line))
    vms = summary["vms"]
    for line in (*llc_lines(vms), *flush_lines(vms), *pebs_lines(vms), *truth_lines(vms), *locality_lines(vms)):
        console.print(Text(line))
    for line in leak_lines(summary["vms"]):
        console.print(Text(line), style="red")
    console.print(Text(_run_line(summary)))
    for line in error_lines(summary["errors"]):
        console.print(Text(line), style="red")
    if where is not None:
        console.print(Text(f"results: {where}"), soft_wrap=True)


def vm_table(vms: Sequence[Vm]) -> Table:
    """A line per VM, or the means of equal VMs where there are more than `MOST_ROWS`; ``!``: did not end well."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("vm", no_wrap=True)
    table.add_column("policy", no_wrap=True, overflow="ellipsis", max_width=12)
    table.add_column("workload", no_wrap=True, overflow="ellipsis", max_width=10)
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("mis-\nmatch", justify="right", no_wrap=True)
    for label, members in _rows(vms):
        bad = any(vm["outcome"] != "ok" for vm in members)
        mismatches = _values(members, "integrity.mismatches")
        table.add_row(
            label + ("!" if bad else ""),
            members[0]["policy"],
            members[0]["workload"],
            *(_cell(members, path, form) for _, path, form in _COLUMNS),
            str(sum(map(int, mismatches))) if mismatches else "-",
            style="red" if bad else None,
        )
    return table


def _rows(vms: Sequence[Vm]) -> Iterable[tuple[str, list[Vm]]]:
    if len(vms) <= MOST_ROWS:
        return [(f"vm{vm['id']}", [vm]) for vm in vms]
    groups: dict[tuple[object, ...], list[Vm]] = {}
    for vm in vms:
        key = (vm["policy"], vm["workload"], vm["vcpus"], vm["memory"]["total_bytes"], vm["memory"]["fast_bytes"])
        groups.setdefault((*key, vm["outcome"]), []).append(vm)
    return [(f"{len(group)} x", group) for group in groups.values()]


def _cell(members: Sequence[Vm], path: str, form: str) -> str:
    values = _values(members, path)
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if form == "percent":
        return f"{100 * mean:.1f}"
    if form == "count":
        return format_count(mean)
    return format_cores(mean) if form == "cores" else form.format(mean)


def _values(members: Iterable[Vm], path: str) -> list[float]:
    return [value for vm in members if (value := figure(vm, path)) is not None]


def figure(vm: Vm, path: str) -> float | None:
    """The figure at a dotted path of a VM's entry, and ``stolen_cores``; None where it does not apply."""
    if path == "stolen_cores":
        stolen_s, virtual_s = figure(vm, "agent_cpu.stolen_s"), figure(vm, "virtual_s")
        return stolen_s / virtual_s if stolen_s is not None and virtual_s else None
    value: Any = vm
    for key in path.split("."):
        if key not in value:
            return None
        value = value[key]
    return float(value)


def format_count(count: float) -> str:
    """``9500``, ``12.3k``, ``4.56M``: to three digits or more, in six characters at most below 10**12."""
    for unit, least, suffix in ((1e9, 0.9995e9, "G"), (1e6, 0.9995e6, "M"), (1e3, 1e4, "k")):
        if abs(count) >= least:
            scaled = count / unit
            return f"{scaled:.{2 if abs(scaled) < 10 else 1}f}{suffix}"
    return f"{count:.0f}"


def format_cores(cores: float) -> str:
    """Cores to the thousandth, or to the millionth where that would read as nothing."""
    return f"{cores:.3f}" if cores >= 0.001 or cores == 0 else f"{1e6 * cores:.0f}e-6"


def host_lines(host: Mapping[str, Any]) -> list[str]:
    """The host's CPU, its tiers, and what it refused."""
    if not host:
        return []
    cpu = host["cpu"]
    lines = [f"host: CPU measured {cpu['measured_s']:.2f} s, modelled {cpu['modelled_s']:.2f} s"]
    if refused := {reason: count for reason, count in host.get("refused", {}).items() if count}:
        lines[0] += "; refused messages: " + ", ".join(f"{count} {reason}" for reason, count in refused.items())
    if overcommit := host.get("overcommit"):
        sizes = {key.removesuffix("_bytes"): format_bytes(size) for key, size in overcommit.items() if key != "ratio"}
        pinned = f", {sizes['pinned']} of it pinned" if overcommit["pinned_bytes"] else ""
        lines.append(
            f"  memory: {sizes['promised']} promised, {sizes['backed']} backed{pinned}, {sizes['touched']} touched"
        )
    for tier in host["tiers"]:
        lines.append(
            f"  {tier['name']}: {format_bytes(tier['peak'] * 4096)} of {format_bytes(tier['frames'] * 4096)} used at "
            f"most, utilisation {100 * tier['utilisation']:.1f} %, loaded latency {tier['loaded_latency_ns']:.0f} ns"
        )
    return lines


def llc_lines(vms: Sequence[Vm]) -> list[str]:
    """What of all accesses the last-level cache served: they meet no tier, wherever their pages lie."""
    counted = [vm["access"] for vm in vms if vm.get("access", {}).get("total")]
    if not counted:
        return []
    share = sum(access["llc_hits"] for access in counted) / sum(access["total"] for access in counted)
    return [f"  last-level cache: served {100 * share:.1f} % of accesses"]


def pebs_lines(vms: Sequence[Vm]) -> list[str]:
    """CPU of tracking per PEBS record, by policy."""
    return [
        f"  {policy}: CPU per PEBS record {measured:.0f} ns measured, {modelled:.0f} ns modelled"
        for policy, members in _by_policy(vms, "pebs.cpu_ns_per_sample.measured").items()
        for measured, modelled in [_means(members, "pebs.cpu_ns_per_sample", ("measured", "modelled"))]
    ]


def truth_lines(vms: Sequence[Vm]) -> list[str]:
    """How well each policy knew what was hot, and what it made of it."""
    lines = []
    for policy, members in _by_policy(vms, "hotness.f1").items():
        names = ("precision", "recall", "share_of_oracle")
        precision, recall, share = (100 * value for value in _means(members, "hotness", names))
        what = "hot set" if members[0]["hotness"].get("hot_set") == "policy" else "pages in fast memory"
        lines.append(
            f"  {policy}: of its {what} {precision:.0f} % are truly hot, which is {recall:.0f} % of what is; "
            f"fast ratio {share:.0f} % of the oracle's"
        )
    return lines


def locality_lines(vms: Sequence[Vm]) -> list[str]:
    """What the hottest ranges of each address space hold that fit fast memory, where heat was recorded."""
    lines = []
    for vm in vms:
        if spaces := vm.get("locality"):
            parts = []
            for name, space in spaces.items():
                tree = ""
                if "ranges" in space:
                    tree = f", {100 * space['ranges_fast_ratio']:.0f} % in the tree's ({space['ranges']} ranges)"
                parts.append(f"{name} {100 * space['bins_fast_ratio']:.0f} %{tree}")
            lines.append(f"  vm{vm['id']}: accesses in the hottest 2 MiB that fit fast memory: " + "; ".join(parts))
    return lines


def _by_policy(vms: Iterable[Vm], path: str) -> dict[str, list[Vm]]:
    """The VMs that have a figure, by policy."""
    groups: dict[str, list[Vm]] = {}
    for vm in vms:
        if figure(vm, path) is not None:
            groups.setdefault(vm["policy"], []).append(vm)
    return groups


def _means(members: Sequence[Vm], path: str, names: Sequence[str]) -> list[float]:
    sums = [sum(_values(members, f"{path}.{name}")) for name in names]
    return [total / len(members) for total in sums]


def flush_lines(vms: Sequence[Vm]) -> list[str]:
    """How many INVEPTs a remote flush request led to: one per vCPU at most, fewer where vCPUs were outside."""
    counted = [vm["kvm"] for vm in vms if vm.get("kvm", {}).get("remote_tlb_flush")]
    if not counted:
        return []
    requests = sum(kvm["remote_tlb_flush"] for kvm in counted)
    executions = sum(kvm["tlb_flush"] for kvm in counted) / requests
    return [f"  remote flushes: {format_count(requests)} requests, {executions:.2f} executions each"]


def leak_lines(vms: Sequence[Vm]) -> list[str]:
    """Which VMs could read PEBS records of others."""
    return [
        f"leak: vm{vm['id']} could read {seen} PEBS records of other VMs (host.pebs=shared)"
        for vm in vms
        if (seen := vm.get("pebs", {}).get("foreign_records_visible", 0))
    ]


def _run_line(summary: Mapping[str, Any]) -> str:
    times = summary["elapsed"]
    return (
        f"{summary['outcome']}: {times['virtual_s']:.4g} virtual s in {times['wall_s']:.1f} s; "
        f"digest {summary['digest'].removeprefix('sha256:')[:12]}"
    )


def error_lines(errors: Sequence[Mapping[str, Any]]) -> list[str]:
    """What went wrong, each with the last log lines of its VM below it."""
    lines = []
    for error in errors:
        who = f"vm{error['vm']}" if error.get("vm") is not None else "run"
        lines.append(f"{who} {error['kind']}: {error['message']}")
        log = [line for entry in error.get("log", ()) for line in entry.splitlines() if line.strip()]
        lines += [f"    {line}" for line in log[-LOG_LINES:]]
    return lines
