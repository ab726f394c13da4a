"""What a policy is: a declaration (name, view, stages, parameters with sources) and the object that runs it.

A policy is one file with a module-level `POLICY`; the built-in ones register in `registry`, third parties through an
entry point in the group ``tierfleet.policies`` that names such an object.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from guestd.params import Param
from guestd.tiering.view import PageView
from proto.arrays import Words
from proto.config import GuestConfig, Scalar

MIB = 1 << 20
Params = dict[str, Scalar]


RECORD_GROUPS = {"memory": 64, "memory+gpr": 208, "memory+gpr+xmm": 464, "memory+gpr+xmm+lbr": 1232}
"""What a PEBS record holds beside the basic group -> its bytes (adaptive PEBS, SDM vol. 3, 20.9.2: basic 32, memory 32,
registers 144, XMM 256, 32 LBR entries of 24)."""


LOAD_LATENCY, FAST_MISS, SLOW_MISS, STORES = 0, 1, 2, 3
"""Numbers of the events, and of the counters that count them: a record's `applicable_counters` is 1 << number."""


class Sampling(NamedTuple):
    """What a policy asks of the PMU; a period of 0 switches the event off."""

    load_period: int
    """Tagged loads above the threshold per record (MEM_TRANS_RETIRED.LOAD_LATENCY, 0x1cd)."""
    latency_threshold_ns: int
    store_period: int
    """Stores per record (MEM_INST_RETIRED.ALL_STORES, 0x82d0)."""
    fast_miss_period: int = 0
    """LLC-miss loads that the fast tier served per record (MEM_LOAD_L3_MISS_RETIRED.LOCAL_DRAM, 0x1d3)."""
    slow_miss_period: int = 0
    """The same of the slow tier (MEM_LOAD_RETIRED.LOCAL_PMM, 0x80d1)."""
    large: bool = True
    """Large PEBS: a PMI when the buffer is nearly full, and a drain at each context switch; else a PMI per record."""
    groups: str = "memory"
    """A key of RECORD_GROUPS."""

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return RECORD_GROUPS[self.groups]


TAKEN, FAILED = 0, 1


class HintRule(NamedTuple):
    """What a policy does in a hint fault that needs no more than `guestd.hint_faults`: TPP's, in a guest.

    A page that it wants is promoted at once if that leaves the fast node its high watermark.
    """

    active_only: bool
    """Pages on an active list are wanted, the others are marked accessed; false: all are wanted, none is marked."""
    tally: Words
    """int64[2], which is counted up: faults taken, and pages among them that were wanted but had to stay."""


class AgentThread(NamedTuple):
    """A thread that a policy's timer runs on; by default a kernel thread that the load balancer puts on some vCPU."""

    vcpu: int | None = None
    """The vCPU that it is pinned to."""
    own_core: bool = False
    """It runs beside the vCPUs and takes no time of theirs."""
    user: bool = False
    """It is one of the workload's process, whose page tables are loaded while it runs."""


def with_needs(config: GuestConfig, policy: "Policy") -> GuestConfig:
    """``config`` with what ``policy`` needs for this VM: a log of dirty pages all to itself, flat memory."""
    host = config.host
    if policy.logs_dirty:
        host = msgspec.structs.replace(host, pml=True, pml_harvest_ps=0)
    return msgspec.structs.replace(config, host=host, flat_memory=policy.flat_memory)


class PluginError(Exception):
    """A third party's policy cannot be used; the message names its entry point."""


class Tiering:
    """A running policy on one view. Hooks are called on the agent's thread; work is charged through ``view.meter``.

    ``reclaim_mark``: watermark of the fast node below which `on_pressure` is called at scheduler ticks.
    """

    reclaim_mark: int | None = None
    drains_at_context_switch = False
    hint_rule: HintRule | None = None
    """How its hint faults are taken without `on_hint_faults`; None: not at all."""
    by_definition: tuple[str, ...] = ()
    """Stages with a thread that never sleeps: their modelled CPU is the time that it ran, not the work that it did."""

    def __init__(self, view: PageView, params: Params) -> None:
        self.view = view
        self.params = params

    def start(self) -> None:
        """The VM begins to run (before populating)."""

    def on_timer(self, name: str) -> None:
        """A timer set with ``view.schedule`` is due."""

    def thread_of(self, name: str) -> AgentThread:
        """The thread that `on_timer(name)` runs on."""
        return AgentThread()

    def on_write_fault(self, page: int) -> int:
        """A write to a page that the policy write-protected; what that costs its vCPU, ps. By then it is writable."""
        raise NotImplementedError(f"page {page} is write-protected, and the policy does not say by whom")

    def on_hint_faults(self, pages: Words) -> Words:
        """NUMA hint faults on ``pages`` (int64[n]), each taken once; returns what each cost its vCPU, ps (int64[n])."""
        self.view.unprotect(pages)
        return np.full(pages.size, self.view.hint_fault_ps, np.int64)

    def on_samples(self, samples: Words) -> None:
        """PEBS records drained from one vCPU: int64[n, 5] rows (gVA, slow, latency ns, 1 << event, time ps)."""

    def on_pressure(self, budget_ps: int) -> None:
        """The fast node is below `reclaim_mark`; work for about ``budget_ps``."""

    def hot_set(self) -> Words | None:
        """Pages of the view that it takes for hot now (int64[n]); None: it has no notion. A head names its huge page.

        The emulator asks at sampling intervals, to compare it with the truth. It is no work of the policy: it must
        charge nothing, call no metered kernel and change nothing.
        """
        return None


@dataclass(frozen=True)
class Policy:
    """Declaration of a policy. ``view``: ``guest``, ``host`` or ``-`` (it manages nothing)."""

    name: str
    summary: str
    view: Literal["guest", "host", "-"]
    source: str
    stages: Mapping[str, str] = field(default_factory=dict)
    """Tracker, classifier and migrator: names of `parts`, or in words where they cannot be exchanged."""
    create: Callable[[PageView, Params], Tiering] = Tiering
    params: tuple[Param, ...] = ()
    min_memory_bytes: int = 16 * MIB
    sampling: Callable[[Params], Sampling | None] = field(default=lambda params: None)
    """What the policy asks of the guest's PMU."""
    warm_up: Params = field(default_factory=dict)
    """Parameters with which each mechanism acts within milliseconds, for compiling it before a run."""
    left_out: str = ""
    """What of the published design is not here, in words."""
    no_gain: str = ""
    """Why it need not beat random placement on a static hot set; empty = it must (tests/guestd/tiering)."""
    gains_ps: Callable[[Params, int], int] = field(default=lambda params, pages: 0)
    """Virtual time, with these parameters and so many pages of memory, by which a static hot set of a tenth of them
    that began in slow memory is placed better than at random. `fleet conformance` holds it to that."""
    logs_dirty: bool = False
    """It needs the log of dirty pages (PML), and harvests it itself: it is on for its VMs, whatever the host says."""
    flat_memory: bool = False
    """Its VMs' memory is in flat memory mode (`guestd.near_memory`), for which it takes a fast frame for each slow one:
    ``fast_ratio`` is 1/2 at least."""
    orchestrate: Callable[[Sequence["Tiering"]], None] | None = None
    """What a host-side design decides over all its running VMs of a host, called at each barrier before they act."""
    places_by_heat: bool = False
    """First touch puts the workload's truly hot pages on the fast node (the oracle)."""
    places_by_type: bool = False
    """First touch puts page tables, then heaps, then what else is mapped on the fast node, as far as it goes."""
    shares_fast: bool = False
    """Its VMs pool their fast memory and share it by their parameter ``weight`` (`fleet.weighted_sharing`)."""
    own_params: tuple[Param, ...] = ()
    """Parameters of no stage, where it is made of stages."""
    defaults: Params = field(default_factory=dict)
    """Its own defaults for parameters of its stages."""
    parts: Mapping[Any, Any] = field(default_factory=dict)
    """The stages that it is composed of (`guestd.tiering.stage.Stage` by kind); empty if they cannot be exchanged."""
    min_run_ps: Callable[[Params], int] = field(default=lambda params: 0)
    """Virtual time of a run below which it cannot have acted, by its parameters."""
    fast_share: Fraction | None = None
    """Share of a VM's memory that is fast, in place of the run's `fast_ratio`; None = as the run says. At 1 (0) the VM
    has its whole size in the fast (slow) tier, and no page can be anywhere else."""

    @property
    def moves_alone(self) -> bool:
        """Whether it moves pages of a VM that has the host to itself."""
        return self.orchestrate is None

    @property
    def min_fast_ratio(self) -> Fraction:
        """Least `fast_ratio` of its VMs."""
        return Fraction(1, 2) if self.flat_memory else Fraction(0)
