"""Every published claim that is checked, one declaration each: what is compared, how it is computed, what it rests on.

A claim in figures has a published value and one computed from summaries; a claim in words holds or not, by a run or a
counter. ``basis`` says whether the outcome can come out otherwise (``mechanism``) or follows from how the design is
defined (``by definition``). Confounders are what else differs between the published runs and these.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fleet.validate import groups as g
from fleet.validate.experiments import MEANT_TO_FAIL
from fleet.validate.published import COUNTERS

Summary = Mapping[str, Any]
Results = Mapping[str, Summary]
"""Summaries by name of the cell (fleet/validate/experiments.py)."""

STAGES = ("track", "classify", "migrate")

KERNELS = "published guests ran different kernels (ours 6.10; TPP, Memtis and the H-TPP host 5.15)"
POPULATE = "the published elapsed time may include populating the array"
BACKGROUND = "about 2.75 M local flushes are background in every published column"
UPDATES = "the number of updates is not published (assumed 4e8 x 3, per thread or in all)"
VMM = "H-TPP was ported by the authors; its source is not public"
UNITS = (
    "how the published cores were measured, and whether with migration, is not said; modelled agent CPU of all stages"
)
ONE_RUN = "one published run a point, no spread"


@dataclass(frozen=True)
class Claim:
    """One claim."""

    key: str
    statement: str
    basis: str
    cells: tuple[str, ...]
    """Cells that it is computed from."""
    published: str = ""
    """Key of the published figure; empty for a claim in words."""
    value: Callable[[Results], float] | None = None
    neutral: Callable[[Results], float] = lambda results: 1.0
    """Where the effect would be absent: the same side of it as the published value is the same direction."""
    holds: Callable[[Results], tuple[bool, str]] | None = None
    """Of a claim in words: whether it does, and the evidence."""
    may_die: tuple[str, ...] = ()
    """Cells of which a VM's death is evidence."""
    needs: tuple[str, ...] = ()
    """Dimensionless groups."""
    costs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Unpublished costs that may decide it, the most decisive first -> the cells that one can move."""
    quick: int = 1
    """How many of them, from the first, a quick check moves."""
    confounders: tuple[str, ...] = ()


def flushes(summary: Summary) -> int:
    """The seed's total: tlb_flush + remote_tlb_flush + the guest's requests and local flushes (docs/output.md)."""
    return sum(vm["flushes"]["total"] for vm in summary["vms"])


def raw(summary: Summary) -> dict[str, int]:
    """The raw counters of the seed's last table, and their sum, over all VMs."""
    places = [vm["kvm"] | vm["vmstat"] for vm in summary["vms"]]
    found = {name: sum(place[name] for place in places) for name in COUNTERS}
    return found | {"total": flushes(summary)}


def elapsed_s(summary: Summary, populate: bool = False) -> float:
    """Virtual time of the run phase, with that of populating on demand."""
    times = summary["elapsed"]
    return times["virtual_s"] + (times["populate_virtual_s"] if populate else 0.0)


def cores(summary: Summary) -> float:
    """Cores that tiering burns in all guests: modelled CPU-seconds a virtual second."""
    return float(sum(vm["agent_cpu"]["modelled_cores"] for vm in summary["vms"]))


def stage_cores(summary: Summary) -> dict[str, float]:
    """The same by stage: track, classify, migrate."""
    found = dict.fromkeys(STAGES, 0.0)
    for vm in summary["vms"]:
        for stage in STAGES:
            found[stage] += vm["agent_cpu"]["modelled_s"][stage] / vm["virtual_s"]
    return found


def stolen_cores(summary: Summary) -> float:
    """vCPUs that tiering took from the guests in all, in cores."""
    return sum(vm["agent_cpu"]["stolen_s"] / vm["virtual_s"] for vm in summary["vms"])


def invepts(summary: Summary) -> int:
    """INVEPT executed on behalf of the VMs: of the global type, as KVM takes for a remote flush."""
    return sum(vm["instructions"]["invept_global"] for vm in summary["vms"])


def executions_per_request(summary: Summary) -> float:
    """Flushes that KVM executed for each request that kicked a vCPU; 0 without requests."""
    requests = sum(vm["kvm"]["remote_tlb_flush"] for vm in summary["vms"])
    return sum(vm["kvm"]["tlb_flush"] for vm in summary["vms"]) / requests if requests else 0.0


def _ratio(of: Callable[[Summary], float], above: str, below: str) -> Callable[[Results], float]:
    def value(results: Results) -> float:
        divisor = of(results[below])
        return of(results[above]) / divisor if divisor else float("inf")

    return value


def _guest_designs(results: Results) -> tuple[bool, str]:
    baseline = invepts(results["words/none"])
    net = {
        name.removeprefix("words/"): invepts(summary) - baseline
        for name, summary in results.items()
        if name.startswith("words/")
        and name.removeprefix("words/") in ("g-tpp", "hyperplace", "memtis", "hemem")
        and summary["outcome"] == "ok"
    }
    moved = {name: _moved(results[f"words/{name}"]) for name in net}
    shown = ", ".join(f"{name} {count} (moved {moved[name]} pages)" for name, count in net.items())
    return not any(net.values()), f"INVEPT executed, net of {baseline} without tiering: {shown}"


def _moved(summary: Summary) -> int:
    return sum(vm["migration"]["promoted_pages"] + vm["migration"]["demoted_pages"] for vm in summary["vms"])


def _host_design(results: Results) -> tuple[bool, str]:
    found, baseline = invepts(results["words/h-tpp"]), invepts(results["words/none"])
    by_address = sum(vm["instructions"]["invlpg"] for vm in results["words/h-tpp"]["vms"])
    text = f"h-tpp executed {found} INVEPT and {by_address} flushes by address; without tiering {baseline}"
    return found > baseline and by_address == 0, text


def _isolation(results: Results) -> tuple[bool, str]:
    def foreign(name: str) -> int:
        return sum(vm["pebs"].get("foreign_records_visible", 0) for vm in results[name]["vms"])

    records = sum(vm["pebs"]["records"] for vm in results["words/pebs-own"]["vms"])
    own, shared = foreign("words/pebs-own"), foreign("words/pebs-shared")
    text = f"of {records} records others could read {own}; in a buffer shared by all (no hardware) {shared}"
    return records > 0 and own == 0 and shared > 0, text


_LEGACY = (MEANT_TO_FAIL, "words/pebs-legacy-populated", "words/pebs-ept-friendly")


def _legacy(results: Results) -> tuple[bool, str]:
    def end(name: str) -> str:
        summary = results[name]
        return summary["errors"][0]["kind"] if summary["errors"] else summary["outcome"]

    lazy, populated, friendly = (end(name) for name in _LEGACY)
    text = f"legacy, lazily populated: {lazy}; legacy, populated at launch: {populated}; EPT-friendly, lazy: {friendly}"
    return (lazy, populated, friendly) == ("pebs_ept_violation", "ok", "ok"), text


def _pml(results: Results) -> tuple[bool, str]:
    pml = [vm["pml"] for vm in results["words/pml"]["vms"]]
    entries, useless = sum(one["entries"] for one in pml), max(one["useless_ratio"] for one in pml)
    return entries > 0 and useless > 0, f"{entries} entries logged, {100 * useless:.1f} % name no page of the workload"


def _poller(results: Results) -> tuple[bool, str]:
    per_vm = min(vm["agent_cpu"]["modelled_cores"] for vm in results["figure/hemem/9"]["vms"])
    return per_vm >= 0.75, f"{per_vm:.2f} cores a VM at least"


_LENGTHS = (g.FAST_SHARE, g.HOT_SHARE, g.LENGTH)
_TPP = (*_LENGTHS, g.SCAN_RATE)
_OURS = (*_LENGTHS, g.EPOCHS, g.SAMPLES, g.FLOOR)
_H, _G, _O = "table/h-tpp", "table/g-tpp", "table/hyperplace"
_H_COSTS = {
    "kick_target": (_H,), "invept": (_H,), "ept_violation": (_H,), "mmu_lock_hold": (_H,),
    "slow.write_bandwidth": (_H, _G),
}  # fmt: skip
_O_COSTS = {
    "load_latency_tag_interval": (_O,), "shootdown_base": (_G, _O), "slow.write_bandwidth": (_O, _G),
    "migrate_sync": (_G, _O),
}  # fmt: skip

CLAIMS = (
    Claim("flushes_h_over_g", "H-TPP issues 4.7x the TLB flushes of G-TPP", "mechanism", (_H, _G),
          "flushes_h_over_g", _ratio(flushes, _H, _G), needs=_TPP, costs=_H_COSTS, quick=2,
          confounders=(BACKGROUND, UPDATES, VMM, KERNELS)),
    Claim("time_h_over_g", "H-TPP takes 2.5x the time of G-TPP", "mechanism", (_H, _G), "time_h_over_g",
          _ratio(elapsed_s, _H, _G), needs=(*_TPP, g.CACHE, g.REACH), costs=_H_COSTS,
          quick=2,
          confounders=(POPULATE, UPDATES, VMM, KERNELS)),
    Claim("executions_per_request", "2.9 flushes are executed for each of H-TPP's requests", "mechanism", (_H,),
          "executions_per_request", lambda results: executions_per_request(results[_H]), needs=_TPP,
          costs={key: (_H,) for key in _H_COSTS}, quick=2, confounders=(VMM, UPDATES)),
    Claim("flushes_ours_over_g", "Ours issues 0.53x the TLB flushes of G-TPP", "mechanism", (_O, _G),
          "flushes_ours_over_g", _ratio(flushes, _O, _G), needs=(*_OURS, g.SCAN_RATE), costs=_O_COSTS,
          confounders=(BACKGROUND, UPDATES, KERNELS)),
    Claim("time_ours_over_g", "Ours takes 0.85x the time of G-TPP", "mechanism", (_O, _G), "time_ours_over_g",
          _ratio(elapsed_s, _O, _G), needs=(*_OURS, g.SCAN_RATE, g.CACHE, g.REACH), costs=_O_COSTS,
          confounders=(POPULATE, UPDATES, KERNELS)),
    Claim("cores_tpp", "TPP in nine guests wastes more than 3.5 of 36 cores", "mechanism",
          ("figure/g-tpp/9", "figure/g-tpp/1"), "cores_tpp", lambda results: cores(results["figure/g-tpp/9"]),
          lambda results: cores(results["figure/g-tpp/1"]), needs=(g.FAST_SHARE, g.FIGURE_LENGTH, g.SCAN_RATE),
          costs={"migrate_sync": ("figure/g-tpp/9",), "hint_fault": ("figure/g-tpp/9",),
                 "shootdown_base": ("figure/g-tpp/9",)},
          confounders=(UNITS, KERNELS, ONE_RUN)),
    Claim("cores_memtis", "Memtis in nine guests wastes about half a core, less than TPP", "mechanism",
          ("figure/memtis/9", "figure/g-tpp/9"), "cores_memtis", lambda results: cores(results["figure/memtis/9"]),
          lambda results: cores(results["figure/g-tpp/9"]), needs=(g.FIGURE_LENGTH, g.QUOTA),
          costs={"drain_record": ("figure/memtis/9",), "classify_record": ("figure/memtis/9",)},
          confounders=(UNITS, KERNELS, ONE_RUN)),
    Claim("cores_hemem", "HeMem's poller wastes a core a VM", "by definition", ("figure/hemem/9",), "cores_hemem",
          lambda results: cores(results["figure/hemem/9"]), lambda results: 0.0, confounders=(UNITS,)),
    Claim("guests_need_no_invept", "Guest designs execute no INVEPT for tiering", "mechanism",
          ("words/none", "words/g-tpp", "words/hyperplace"), holds=_guest_designs),
    Claim("host_needs_invept", "A host design cannot avoid INVEPT: it knows no gVA", "mechanism",
          ("words/none", "words/h-tpp"), holds=_host_design),
    Claim("pebs_isolated", "PEBS samples stay in their VM", "by definition", ("words/pebs-own", "words/pebs-shared"),
          holds=_isolation),
    Claim("legacy_pebs_crashes", "Legacy PEBS with lazily populated memory kills the VM; populating prevents it",
          "mechanism", _LEGACY, holds=_legacy, may_die=_LEGACY),
    Claim("pml_no_filter", "PML cannot filter addresses", "mechanism", ("words/pml",), holds=_pml),
    Claim("poller_core", "A private poller wastes a core a VM", "by definition", ("figure/hemem/9",), holds=_poller),
)  # fmt: skip
