"""What the emulator sees of a guest that no kernel could: each access as it is executed, for truth and page heat.

At the end of each sampling interval (those of the time series) the policy's hot set is held against the true one
(`guestd.hotness`), and, if the run asks for it, page heat is written (`guestd.heat`). It runs on the vCPUs' thread
between their accesses: no virtual time, and nothing on an agent's account. Populating is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from guestd.heat import PageHeat
from guestd.hotness import FAST_NODE, POLICY, Truth, in_fast, mark_frames, mark_mapped, scores
from guestd.machine import S
from guestd.vcpu import POSITION
from proto.arrays import Words

if TYPE_CHECKING:
    from guestd.guest import Guest


class Watch:
    """See the module. ``truth`` is None for a VM without fast memory, ``heat`` if the run does not record it."""

    def __init__(self, guest: Guest) -> None:
        config, self._guest = guest.config, guest
        counters = guest.machine.counters
        self.truth = Truth(guest.workload, config.fast_pages, counters) if config.fast_pages else None
        self.heat: PageHeat | None = None
        if config.heat_path:
            self.heat = PageHeat(config, guest.machine, guest.workload.space.first_gva(), guest.policy)
        self._hot_set = FAST_NODE
        """What the truth was last compared with."""
        self._counted = [0] * config.vcpus
        """How many of the accesses in its buffer were counted for each vCPU."""
        self._nothing = np.zeros(guest.workload.space.pages if self.heat is not None else 0, np.uint8)
        """The hot set of a VM without fast memory."""
        self._drained: list[Words] = []
        self._intervals = 0

    def begin(self) -> None:
        """The run phase begins."""
        if self.truth is not None:
            self.truth.begin()

    def executed(self, vcpu: int) -> None:
        """``vcpu`` has executed all that is in its buffer, which is about to be filled again."""
        self._count(vcpu)
        self._counted[vcpu] = 0

    def drained(self, samples: Words) -> None:
        """PEBS records (int64[n, 5], see `Tiering.on_samples`) were drained. On the agent's thread, so only kept."""
        if self.heat is not None:
            self._drained.append(samples[:, 0].copy())

    def barrier(self, now_ps: int) -> None:
        """All vCPUs have come to the barrier at ``now_ps``, or the run is over."""
        guest = self._guest
        running = guest.phase != "populate"
        if self.heat is not None:
            self._take_samples(self.heat)
            self.heat.barrier(now_ps)
        # As hostd.publisher takes its samples.
        interval = now_ps // guest.config.sample_ps
        if interval == self._intervals and not guest.finished:
            return
        self._intervals = interval
        for vcpu in range(guest.config.vcpus):
            self._count(vcpu)
        if not running:
            return
        believed = self._nothing
        if self.truth is not None:
            due = guest.finished or self.truth.due()
            if due or self.heat is not None:
                hot_set, believed = self._mark_believed(self.truth), self.truth.believed
            if due:
                self._hot_set = hot_set
                self.truth.judge()
        if self.heat is not None:
            self.heat.close_interval(guest.now, believed)

    def report(self) -> dict[str, Any]:
        """`hotness` and `locality` of a VM in summary.json, where they apply."""
        found: dict[str, Any] = {}
        if judged := scores(self._guest.machine.counters):
            found["hotness"] = {"hot_set": self._hot_set, **judged}
        if self.heat is not None:
            found["locality"] = self.heat.report()
        return found

    def close(self) -> None:
        """Give the big arrays back."""
        if self.heat is not None:
            self.heat.close()
        self.truth = self.heat = None

    def _count(self, vcpu: int) -> None:
        """What ``vcpu`` has executed since the last time."""
        vcpus = self._guest.machine.vcpus
        start, end = self._counted[vcpu], int(vcpus.field[vcpu, POSITION])
        self._counted[vcpu] = end
        if self._guest.phase == "populate":
            return
        for observer in (self.truth, self.heat):
            if observer is not None:
                observer.executed(vcpus.address[vcpu], start, end)

    def _take_samples(self, heat: PageHeat) -> None:
        if self._drained:
            heat.sampled(np.concatenate(self._drained))
            self._drained.clear()

    def _mark_believed(self, truth: Truth) -> str:
        """Mark the policy's hot set, or where it has no notion of one what lies in fast memory; which it was."""
        guest, machine, by_host = self._guest, self._guest.machine, self._guest.memory.believed
        hot = guest.tiering.hot_set()
        if by_host[0]:
            mark_frames(machine.gpt, by_host[1:], truth.believed)
        elif hot is not None:
            truth.believed[:] = 0
            mark_mapped(machine.gpt, machine.tables.upper, hot, truth.believed)
        else:
            in_fast(machine.gpt, machine.ept, int(machine.state[S.SLOW_FRAMES]), truth.believed)
        return POLICY if by_host[0] or hot is not None else FAST_NODE
