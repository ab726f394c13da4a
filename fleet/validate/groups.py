"""The dimensionless groups of the experiments: which of them a scaled run keeps, and so which claims it can judge.

A claim that needs a group which this scale breaks gets the verdict ``not comparable at this scale``, whatever its
figures look like. A group is kept if it is within a quarter of what it is at full size, or if both are on the same side
of a bound beyond which it no longer matters (a hot set that is many times the TLB's reach misses it either way).
"""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from fleet.validate.experiments import FIGURE_UPDATES, TABLE_UPDATES, Plan, constants, machine, pass_ms, stlb_entries
from fleet.validate.experiments import GIB as _GIB
from proto.units import PAGE_SIZE

KEPT = Fraction(1, 4)

FAST_SHARE = "fast / memory"
HOT_SHARE = "hot set / fast"
CACHE = "footprint / LLC"
LENGTH = "updates per page (length of the run)"
FIGURE_LENGTH = "updates per page (figure)"
SCAN_RATE = "scan rate, pages per run"
PASS = "pages of one scan pass / footprint (256 MB)"
EPOCHS = "epochs per run (500 ms)"
SAMPLES = "samples per epoch / split threshold"
SWITCHES = "drains per epoch (8 ms slices)"
REACH = "hot set / STLB reach"
SAMPLING_RATE = "updates per sample (sampling's CPU)"
FLOOR = "hot set / smallest range (2 MiB)"
QUOTA = "quota windows per run of Memtis (15 s)"

_HOT_BYTES, _FOOTPRINT = 9 * _GIB, 126 * _GIB
_MISSES = 32
"""A hot set of so many times the STLB's reach hits it at most once in as many accesses."""
_FINE = 16
"""Ranges in a hot set: the two at its edges are then an eighth of it at most."""
_PACE = 22_000_000
"""Updates a second where the hot set is in PMEM: only for an idea of how many windows a run has."""


class Group(NamedTuple):
    """A dimensionless group of the experiments, at full size and at this scale."""

    name: str
    full: float
    here: float
    kept: bool
    note: str


class _Rule(NamedTuple):
    name: str
    value: Callable[[Plan], Fraction]
    note: str
    matters_below: int | None = None


def _settings(plan: Plan, policy: str) -> dict[str, object]:
    return machine(plan.scale) | constants(policy, plan.scale)


def _scan_rate(plan: Plan) -> Fraction:
    """Pages scanned while the run makes one update a page: bytes a second times seconds, which go with the scale."""
    size = Fraction(str(_settings(plan, "g-tpp").get("policy.scan_size_mb", 256)))
    return size / pass_ms(plan.scale)


def _pass(plan: Plan) -> Fraction:
    size = Fraction(str(_settings(plan, "g-tpp").get("policy.scan_size_mb", 256)))
    return size * (1 << 20) / (_FOOTPRINT * plan.scale)


def _epoch_ms(plan: Plan) -> Fraction:
    return Fraction(str(_settings(plan, "hyperplace").get("policy.epoch_ms", 500)))


def _period(plan: Plan) -> Fraction:
    return Fraction(str(_settings(plan, "hyperplace").get("policy.load_period", 4093)))


def _quota_s(plan: Plan) -> Fraction:
    return Fraction(str(_settings(plan, "memtis").get("policy.quota_interval_ms", 15000))) / 1000


def _switch_ms(plan: Plan) -> Fraction:
    return Fraction(str(machine(plan.scale).get("guest.sched_slice", "8000us")).removesuffix("us")) / 1000


_RULES = (
    _Rule(FAST_SHARE, lambda plan: Fraction(1, 4), "a share of the memory"),
    _Rule(HOT_SHARE, lambda plan: Fraction(_HOT_BYTES, 36 * _GIB), "shares of the memory"),
    _Rule(CACHE, lambda plan: Fraction(_FOOTPRINT, 54 << 20), "the caches are scaled with the memory"),
    _Rule(LENGTH, lambda plan: Fraction(plan.updates * PAGE_SIZE, _FOOTPRINT), "the count is an assumption"),
    _Rule(FIGURE_LENGTH, lambda plan: Fraction(FIGURE_UPDATES * PAGE_SIZE, _FOOTPRINT), "published: 8.1 billion"),
    _Rule(SCAN_RATE, _scan_rate, "pass and period are scaled"),
    _Rule(PASS, _pass, "a pass is not shorter than four ticks of 1 ms", None),
    _Rule(EPOCHS, lambda plan: plan.scale / _epoch_ms(plan), "the epoch is scaled, in whole ms"),
    _Rule(SAMPLES, lambda plan: _epoch_ms(plan) / _period(plan), "the sampling period is scaled with the epoch"),
    _Rule(SWITCHES, lambda plan: _epoch_ms(plan) / _switch_ms(plan), "a slice is not shorter than a tick of 1 ms"),
    _Rule(REACH, lambda plan: _HOT_BYTES * plan.scale / (stlb_entries(plan.scale) * PAGE_SIZE),
          f"the STLB is scaled, down to 64 entries; above {_MISSES} it does not matter", _MISSES),
    _Rule(SAMPLING_RATE, _period, "fewer updates per sample: sampling and classifying cost too much"),
    _Rule(FLOOR, lambda plan: _HOT_BYTES * plan.scale / (2 << 20),
          f"the smallest range stays; above {_FINE} of them the hot set has clear edges", _FINE),
    _Rule(QUOTA, lambda plan: FIGURE_UPDATES * plan.scale / (_PACE * _quota_s(plan)), "the window is scaled"),
)  # fmt: skip


def groups(plan: Plan) -> dict[str, Group]:
    """Every group at full size and at the plan's scale."""
    full = plan.__class__(Fraction(1), TABLE_UPDATES, plan.policies)
    found = {}
    for rule in _RULES:
        there, here = rule.value(full), rule.value(plan)
        beyond = rule.matters_below is not None and min(there, here) >= rule.matters_below
        kept = beyond or abs(here / there - 1) <= KEPT
        found[rule.name] = Group(rule.name, float(there), float(here), kept, rule.note)
    return found
