"""The seed's experiments as runs, at any scale: which VMs and policies, which constants go along with the memory.

``scale`` shrinks memory, caches and updates (fleet/spec.py), so the run takes a share of its virtual time. What a
policy does per second, page or epoch then has to shrink alike, or the emulated run is over before the policy began:
times of policies and their byte constants are scaled here too, and so are the TLBs, as far as their whole numbers and
the tick (1 ms) allow. What cannot be kept is in `fleet.validate.groups`. At scale 1 everything is as the policies
declare it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from fleet.experiment import Experiment
from fleet.spec import load

GIB = 1 << 30
TABLE_POLICIES = ("h-tpp", "g-tpp", "hyperplace")
FIGURE_POLICIES = ("g-tpp", "memtis", "hemem", "hyperplace")
"""Of the scalability figure; one that is not installed is left out and said so."""
WORD_SCALE = Fraction(1, 256)
"""Of the small runs behind claims in words: whether something happens at all does not depend on it."""
MEANT_TO_FAIL = "words/pebs-legacy-meant-to-die"
"""The cell whose VM legacy PEBS kills."""
FIGURE_VMS = (1, 9)
FIGURE_UPDATES = 8_100_000_000
FIGURE_VCPUS, FIGURE_GIB = 36, 144
"""Of all VMs together: nine of Demeter's (4 vCPUs, 16 GiB, of which GUPS's array is 14), so 126 GiB of working set."""
TABLE_UPDATES = 36 * 4 * 10**8 * 3
"""An assumption: the seed gives no count. Demeter's scripts run 4e8 updates x 3 in the 36-vCPU VM; taken per
thread, as in all it would be 4 M updates/s on 36 vCPUs over the published 300 s, 9 us each: no tier is so slow."""
FULL_TABLE_UPDATES = 4 * 10**8 * 3
"""With ``--full``: the other reading, 4e8 x 3 in total, which a small machine can emulate."""

_TICK_US, _SHORTEST_TICK_US = 4000, 1000
_SWITCH_US = 8000
_SCAN_MB, _SCAN_MS = 256, 100
"""The kernel's scanner: 256 MB at most each 100 ms (MAX_SCAN_WINDOW), 2560 MB/s; the same as guestd/tiering/tpp.py."""
_TICKS_A_PASS = 4
"""So that rounding a pass up to a tick changes the rate by less than a quarter."""
_MEMTIS = {
    "quota_interval_ms": 15000, "cooling_samples": 2_000_000, "cooling_growth_pages": 2_621_440,
    "adaptation_samples": 100_000, "kmigrated_ms": 500, "demotion_mark_min_mb": 50, "demotion_mark_max_mb": 1000,
    "promotion_mark_min_mb": 100, "promotion_mark_max_mb": 1500, "direct_demotion_mb": 100,
}  # fmt: skip
"""Its times, counts of samples and byte constants, as guestd/tiering declares them."""
_LEAST_STLB, _LEAST_WALK_CACHE = 64, 4


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    scale: Fraction
    updates: int
    """Of the table's VM, before scale."""
    policies: frozenset[str]
    """Installed ones."""
    seed: int = 1


def plan(scale: Fraction, updates: int | None = None, seed: int = 1) -> Plan:
    """The plan at a scale; ``updates`` None: the assumption that fits it."""
    from guestd.tiering.registry import policies

    default = FULL_TABLE_UPDATES if scale == 1 else TABLE_UPDATES
    return Plan(scale, default if updates is None else updates, frozenset(policies()), seed)


def cells(of: Plan) -> dict[str, Experiment]:
    """Every run of the check by name: ``table/POLICY``, ``figure/POLICY/VMS``, ``words/...``."""
    found = {f"table/{policy}": table_cell(of, policy) for policy in TABLE_POLICIES}
    for policy in FIGURE_POLICIES:
        if policy in of.policies:
            found |= {f"figure/{policy}/{vms}": figure_cell(of, policy, vms) for vms in FIGURE_VMS}
    return found | word_cells(of)


def table_cell(of: Plan, policy: str) -> Experiment:
    """GUPS on the one big VM: 36 vCPUs, 144 GiB, a quarter of it fast."""
    flags = {
        "vcpus": FIGURE_VCPUS, "memory": "144GiB", "fast_ratio": "1/4", "transactions": of.updates,
        "policy": policy, "scale": str(of.scale), "seed": of.seed, "sample": "1s",
    }  # fmt: skip
    return _load(flags, machine(of.scale) | constants(policy, of.scale))


def figure_cell(of: Plan, policy: str, vms: int) -> Experiment:
    """The same host divided among ``vms`` VMs; updates and working set too. A fifth is fast, as in Demeter's VMs."""
    flags = {
        "vms": vms, "vcpus": FIGURE_VCPUS // vms, "memory": FIGURE_GIB * GIB // vms, "fast_ratio": "1/5",
        "transactions": FIGURE_UPDATES // vms, "policy": policy, "scale": str(of.scale), "seed": of.seed,
        "sample": "1s",
    }  # fmt: skip
    # What samples cost a second depends on epoch and sampling period, which therefore stay as they are; the walk at
    # each ranking shrinks with the memory then (docs/validation.md).
    scaled = {} if policy == "hyperplace" else constants(policy, of.scale)
    return _load(flags, machine(of.scale) | scaled)


def word_cells(of: Plan) -> dict[str, Experiment]:
    """Small runs behind the claims in words."""
    base: dict[str, object] = {
        "vcpus": 2, "memory": "16GiB", "fast_ratio": "1/4", "seconds": 0.5, "scale": str(WORD_SCALE), "seed": of.seed,
    }  # fmt: skip
    sampling = {"policy.load_period": 29, "policy.load_latency_ns": 3, "policy.epoch_ms": 20}
    found = {}
    for policy in ("none", *TABLE_POLICIES, *FIGURE_POLICIES):
        if policy in of.policies:
            settings = machine(WORD_SCALE) | constants(policy, WORD_SCALE)
            found[f"words/{policy}"] = _load(base | {"policy": policy}, settings)
    hyperplace = base | {"policy": "hyperplace", "seconds": 0.1}
    lazy = sampling | {"host.pebs": "legacy", "guest.ds_prefault": "false"}
    found |= {
        "words/pebs-own": _load(hyperplace | {"vms": 2}, sampling),
        "words/pebs-shared": _load(hyperplace | {"vms": 2}, sampling | {"host.pebs": "shared"}),
        MEANT_TO_FAIL: _load(hyperplace, lazy),
        "words/pebs-legacy-populated": _load(hyperplace, lazy | {"host.populate": "true"}),
        "words/pebs-ept-friendly": _load(hyperplace, sampling | {"guest.ds_prefault": "false"}),
        "words/pml": _load(base | {"policy": "none"}, {"host.pml": "true", "host.pml_harvest": "50ms"}),
    }
    return found


def tick_us(scale: Fraction) -> int:
    """Scheduler tick of a scaled run: 4 ms (CONFIG_HZ=250), shortened with the scale down to 1 ms."""
    return max(_SHORTEST_TICK_US, round(_TICK_US * scale))


def pass_ms(scale: Fraction) -> Fraction:
    """Shortest time between two passes of the NUMA scanner."""
    return max(_SCAN_MS * scale, Fraction(_TICKS_A_PASS * tick_us(scale), 1000)) if scale < 1 else Fraction(_SCAN_MS)


def stlb_entries(scale: Fraction) -> int:
    """Second-level TLB of a scaled run."""
    return _shrunk(2048, scale, _LEAST_STLB)


def machine(scale: Fraction) -> dict[str, object]:
    """Settings of kernel, engine and hardware that go along with the memory; none at scale 1."""
    if scale == 1:
        return {}
    tick = tick_us(scale)
    return {
        "guest.hz": 10**6 // tick,
        "guest.sched_slice": f"{max(tick, round(_SWITCH_US * scale))}us",
        "engine.quantum": f"{10**6 // (10**6 // tick)}us",
        "engine.slice": "1ms",
        "host.stlb_entries": stlb_entries(scale),
        "host.pde_cache_entries": _shrunk(32, scale, _LEAST_WALK_CACHE),
        "host.ept_pde_cache_entries": _shrunk(32, scale, _LEAST_WALK_CACHE),
        "host.nested_tlb_entries": _shrunk(64, scale, _LEAST_WALK_CACHE),
    }


def constants(policy: str, scale: Fraction) -> dict[str, object]:
    """A policy's times, byte constants and sampling period that go along with the memory; none at scale 1."""
    if scale == 1:
        return {}
    if policy.endswith("tpp"):
        return {
            "policy.scan_size_mb": max(1, round(_SCAN_MB * pass_ms(scale) / _SCAN_MS)),
            "policy.scan_period_min_ms": max(1, round(1000 * scale)),
            "policy.scan_period_max_ms": max(1, round(60000 * scale)),
            "policy.scan_delay_ms": round(1000 * scale),
        }
    if policy == "hyperplace":
        return {"policy.epoch_ms": max(1, round(500 * scale)), "policy.load_period": max(1, round(4093 * scale))}
    if policy == "memtis":
        # Its sampling periods stay: the quota holds samples a second, so samples a run shrink as the run does.
        return {f"policy.{name}": max(1, round(value * scale)) for name, value in _MEMTIS.items()}
    return {}


def _shrunk(entries: int, scale: Fraction, least: int) -> int:
    """``entries`` times the largest power of two that is at most ``scale``, at least ``least``."""
    while scale < 1 and entries > least:
        entries //= 2
        scale *= 2
    return entries


def _load(flags: Mapping[str, object], settings: Mapping[str, object]) -> Experiment:
    return load(None, dict(flags), [f"{key}={value}" for key, value in settings.items()])
