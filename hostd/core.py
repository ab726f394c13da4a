"""The host as a state machine: a VM's message in, messages out; no socket, no clock of its own (architecture 2).

It answers EPT faults at once, holds the barrier at the end of each quantum, and then, with all VMs parked, settles
memory contention, lets host-side tiering work, and sends everyone the next quantum. What a message may not do is
refused with a reason, and changes nothing.
"""

from typing import Any

import msgspec
import numpy as np

from guestd.meter import STAGES, Snapshot
from guestd.tiering.registry import policy_of
from hostd.contention import Contention
from hostd.errors import RefusedMessage
from hostd.flat_memory import FlatMemory
from hostd.pebs_buffer import PebsLeak
from hostd.vm import Vm
from proto.config import GuestConfig, HostConfig
from proto.counters import COUNTERS, flush_totals, split
from proto.layout import VmMemory
from proto.messages import Advance, Bye, EptFault, Failed, Hello, Mapped, Stop, Tick, ToGuest, ToHost, Welcome
from proto.units import PAGE_SIZE, PS_PER_S

Out = list[tuple[int, ToGuest]]
"""Messages to send, with the VM that each is for."""


class HostCore:
    """See the module.

    ``vms``: VM -> its state; ``reports``: VM -> its part of summary.json; ``failures``: [{vm, kind, message}].
    """

    def __init__(self, config: HostConfig, guests: list[GuestConfig]) -> None:
        self._config = config
        self._guests = {guest.vm: guest for guest in guests}
        self.vms: dict[int, Vm] = {}
        self._joined: set[int] = set()
        self._running: set[int] = set(self._guests)
        self._leaving: set[int] = set()
        """Done with their run, and yet to say bye."""
        self._ticked: set[int] = set()
        everyone = range(max(self._guests, default=0) + 1)
        vcpus = [self._guests[vm].vcpus if vm in self._guests else 0 for vm in everyone]
        self._contention = Contention(config.costs, vcpus)
        self._now_ps = 0
        self._until_ps = 0
        self._peak = [0, 0]
        self._loads: list[tuple[int, int]] = []
        self._stopping = False
        self._leak: PebsLeak | None = None
        self._foreign_records: dict[int, int] = {}
        """VM -> PEBS records of other VMs that it could read at its last barrier."""
        self.reports: dict[int, dict[str, Any]] = {}
        self.failures: list[dict[str, Any]] = []

    @property
    def done(self) -> bool:
        """Every VM has said bye or is lost."""
        return not self._running and not self._leaving

    def attach(self, vm: int, memory: VmMemory) -> None:
        """VM ``vm`` has its memory."""
        config = self._guests[vm]
        self.vms[vm] = Vm(config, policy_of(config.policy, config.stages), memory)
        if self._config.kernel.pebs == "shared" and self._leak is None:
            self._leak = PebsLeak(list(self._guests.values()), memory.pebs)

    def receive(self, vm: int, message: ToHost) -> Out:
        """Act on a message of VM ``vm``. Raises RefusedMessage, having changed nothing."""
        match message:
            case Hello():
                return self._hello(vm)
            case EptFault():
                return [(vm, self._ept_fault(vm, message))]
            case Tick():
                return self._tick(vm, message)
            case Bye():
                return self._bye(vm, message)
            case Failed():
                return self.lost(vm, message.kind, message.message)

    def agent_cpu_s(self, vm: int, tick: Tick) -> float:
        """Measured CPU so far of what manages VM ``vm``: its agent, or this host for a host-side design."""
        return self.vms[vm].cpu_ns / 1e9 if self.vms[vm].flat else tick.agent_cpu_s

    def lost(self, vm: int, kind: str, message: str) -> Out:
        """VM ``vm`` died, hung or failed: it never holds up the barrier again."""
        if vm not in self._running and vm not in self._leaving:
            return []
        self.failures.append({"vm": vm, "kind": kind, "message": message})
        return self._leave(vm)

    def stop(self, reason: str) -> Out:
        """End the run: every VM is to report what it has."""
        self._stopping = True
        return [(vm, Stop(reason=reason)) for vm in sorted(self._running & self._joined)]

    # -- messages -----------------------------------------------------------------------------------------------

    def _hello(self, vm: int) -> Out:
        self._joined.add(vm)
        return [(vm, Welcome(config=self._guests[vm])), *self._barrier()]

    def _ept_fault(self, vm: int, message: EptFault) -> Mapped:
        # A VM that is told to stop while it waits at the barrier may still read all its memory, to check it.
        if vm not in self._running or (vm in self._ticked and not self._stopping):
            raise RefusedMessage("an EPT fault outside a quantum")
        if len(message.gpfns) % 8:
            raise RefusedMessage("gpfns must be int64[n]")
        mine = self.vms[vm]
        if mine.ended and not message.last:
            raise RefusedMessage("an EPT fault after the last")
        cost = mine.ept_fault(message.time_ps, np.frombuffer(message.gpfns, np.int64), last=message.last)
        return Mapped(cost_ps=cost.tobytes(), waits=mine.waiting.size > 0)

    def _tick(self, vm: int, message: Tick) -> Out:
        if vm not in self._running or vm in self._ticked or message.time_ps != self._until_ps:
            raise RefusedMessage(f"a tick for {message.time_ps} ps; the barrier of this VM is at {self._until_ps} ps")
        if self.vms[vm].ended and message.phase != "done":
            raise RefusedMessage("a tick of a VM that goes on after its last EPT fault")
        if len(message.counters) != 8 * COUNTERS or len(message.bandwidth_demand) != 8 * 4:
            raise RefusedMessage(f"counters must be int64[{COUNTERS}] and bandwidth_demand int64[4]")
        if len(message.scan_list) % 16:
            raise RefusedMessage("scan_list must be int64[n, 2]")
        self.vms[vm].take_list(np.frombuffer(message.scan_list, np.int64).reshape(-1, 2))
        self.vms[vm].heard(message.phase, np.frombuffer(message.counters, np.int64))
        demand = np.frombuffer(message.bandwidth_demand, np.int64)
        self._contention.settle(vm, demand, self.vms[vm].take_traffic())
        if message.phase == "done":
            self._running.discard(vm)
            self._leaving.add(vm)
        else:
            self._ticked.add(vm)
        return self._barrier()

    def _bye(self, vm: int, message: Bye) -> Out:
        if vm not in self._leaving and not self._stopping:
            raise RefusedMessage("bye before the run was done")
        try:
            report = self._with_host_part(vm, msgspec.json.decode(message.report, type=dict[str, Any]))
        except msgspec.DecodeError as error:
            raise RefusedMessage(f"the report is no JSON object: {error}") from error
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise RefusedMessage(f"the report is not of the form of summary.json: {error!r}") from error
        self.reports[vm] = report
        return self._leave(vm)

    def _leave(self, vm: int) -> Out:
        self._running.discard(vm)
        self._joined.discard(vm)
        self._leaving.discard(vm)
        self._ticked.discard(vm)
        if vm in self.vms:
            self.vms[vm].close()
        return self._barrier()

    # -- the barrier --------------------------------------------------------------------------------------------

    def _barrier(self) -> Out:
        """When the last running VM has arrived: the next quantum for all."""
        arrived = len(self._ticked) if self._until_ps else len(self._joined)
        if self._stopping or not self._running or arrived < len(self._running):
            return []
        quantum = self._config.engine.quantum_ps
        if self._until_ps:
            self._contention.close_quantum(quantum)
            self._loads.append((self._contention.utilisation_ppm[0], self._contention.utilisation_ppm[1]))
        self._now_ps, self._until_ps = self._until_ps, self._until_ps + quantum
        self._ticked.clear()
        running = sorted(self._running)
        if self._leak is not None:
            self._foreign_records |= self._leak.foreign_records(running)
        latencies = self._contention.latencies()
        budgets = self._contention.budgets(running, quantum)
        self._contention.keep(running)
        llc = self._llc_shares(running)
        self._orchestrate(running)
        out: Out = []
        for vm in running:
            operations = self.vms[vm].prepare(self._now_ps, self._until_ps)
            scanned, scanned_ps = self.vms[vm].scanned
            advance = Advance(until_ps=self._until_ps, latency_ps=latencies, bandwidth_budget=budgets[vm],
                              llc_bytes=llc[vm], operations=operations, scanned=scanned,
                              scanned_ps=scanned_ps)  # fmt: skip
            out.append((vm, advance))
        self._note_peak()
        return out

    def _orchestrate(self, running: list[int]) -> None:
        """Designs that manage all their VMs together decide; what they decide each VM does in the coming quantum."""
        states = [self.vms[vm] for vm in running]
        for decide in dict.fromkeys(state.orchestrate for state in states):
            if decide is not None:
                decide([state.tiering for state in states if state.orchestrate is decide])

    def _llc_shares(self, running: list[int]) -> dict[int, int]:
        """Bytes of the LLC that each VM holds in the quantum: by its vCPUs over those of all that have booted."""
        vcpus = {vm: self._guests[vm].vcpus * (self._guests[vm].start_ps < self._until_ps) for vm in running}
        everyone = max(1, sum(vcpus.values()))
        return {vm: self._config.costs.llc_bytes * own // everyone for vm, own in vcpus.items()}

    # -- accounts -----------------------------------------------------------------------------------------------

    def _used(self) -> tuple[int, int]:
        pairs = [vm.used() for vm in self.vms.values()]
        return sum(p[0] for p in pairs), sum(p[1] for p in pairs)

    def _note_peak(self) -> None:
        """At a barrier, where it does not depend on whose faults the host saw first."""
        self._peak = [max(pair) for pair in zip(self._peak, self._used(), strict=True)]

    def _overcommit(self) -> dict[str, Any]:
        """What all VMs were promised, against what it took to back them: what a populated, pinned VM denies a host."""
        backed = sum(vm.backed_pages for vm in self.vms.values())
        promised = sum(guest.fast_pages + guest.slow_pages for guest in self._guests.values())
        return {
            "promised_bytes": promised * PAGE_SIZE,
            "backed_bytes": backed * PAGE_SIZE,
            "touched_bytes": sum(vm.touched() for vm in self.vms.values()) * PAGE_SIZE,
            "pinned_bytes": sum(vm.pinned_pages for vm in self.vms.values()) * PAGE_SIZE,
            "ratio": promised / max(1, backed),
        }

    def _with_host_part(self, vm: int, report: dict[str, Any]) -> dict[str, Any]:
        """What the host knows of the VM: its memory, what threads did for it, and a host-side design's work."""
        state = self.vms[vm]
        report["memory"] = report.get("memory", {}) | {
            "backed_bytes": state.backed_pages * PAGE_SIZE,
            "touched_bytes": state.touched() * PAGE_SIZE,
            "pinned_bytes": state.pinned_pages * PAGE_SIZE,
        }
        if self._leak is not None:
            report["pebs"]["foreign_records_visible"] = self._foreign_records.get(vm, 0)
        if state.swap is not None:
            report["swap"] = state.swap.report()
            report["swap"]["in_pages"] -= state.swapped_in_last
        if state.config.host.backs_huge:
            report["host_thp"] = state.huge_pages()
        if isinstance(state.view, FlatMemory):
            report["flat_memory"] = state.view.report()
        if state.dirty_log is not None:
            report["pml"] |= state.dirty_log.report()
        return self._with_tiering(state, report) if state.flat else report

    def _with_tiering(self, state: Vm, report: dict[str, Any]) -> dict[str, Any]:
        """A host-side design's work on a VM: kernel counters of the host, CPU of its threads."""
        now, boot = state.accounts(), Snapshot.at_boot()
        before = state.populated or now
        mine = split(state.counters - before.counters)
        for part, counters in ((report, mine), (report["populate"], split(before.counters))):
            for name, value in counters["vmstat"].items():
                # Huge pages are either kernel's own: those of the host are in `host_thp`.
                if not name.startswith("thp_"):
                    part["vmstat"][name] += value
        report["flushes"] = flush_totals(report["vmstat"], report["kvm"])
        report["migration"] |= {
            "promoted_pages": report["vmstat"]["pgpromote_success"],
            "demoted_pages": report["vmstat"]["pgdemote_kswapd"] + report["vmstat"]["pgexchange_success"],
            "swapped_pairs": report["vmstat"]["pgexchange_success"],
            "failed_pages": report["vmstat"]["pgmigrate_fail"],
            "bytes": report["migration"]["bytes"] + mine["bytes"]["migrated"],
        }
        cpu = report["agent_cpu"]
        guest_thread_s = cpu["measured_s"]["total"]
        cpu |= now.cpu_since(before) | now.cores_since(before, report["virtual_s"])
        cpu |= {"where": "host", "guest_thread_s": guest_thread_s}
        report["populate"]["agent_cpu"] = before.cpu_since(boot)
        return report

    def host_report(self, measured_cpu: dict[str, Any]) -> dict[str, Any]:
        """The `host` object of summary.json but refusals and rates. ``measured_cpu``: the process's, by the server."""
        modelled = {vm: state.modelled_s() for vm, state in self.vms.items()}
        stages = {
            name: sum(float(state.meter.book[i]) for state in self.vms.values()) / 1e9 for i, name in enumerate(STAGES)
        }
        self._note_peak()
        used = self._used()
        loads = np.array(self._loads or [(0, 0)], np.int64)
        loaded = self._contention.latencies()
        tiers = []
        for tier, costs in enumerate((self._config.costs.fast, self._config.costs.slow)):
            tiers.append({
                "name": costs.name,
                "frames": sum((g.fast_pages, g.slow_pages)[tier] for g in self._guests.values()),
                "used": used[tier],
                "peak": self._peak[tier],
                "read_bytes": int(self._contention.served[tier]),
                "write_bytes": int(self._contention.served[tier + 2]),
                "utilisation": int(loads[:, tier].sum()) // len(loads) / 1e6,
                "loaded_latency_ns": loaded[2 * tier] / 1000,
            })  # fmt: skip
        return {
            "cpu": {
                "measured_s": measured_cpu["total_s"],
                "modelled_s": sum(modelled.values()),
                "tiering_s": stages,
                "by_vm": [
                    {"id": vm, "measured_s": measured_cpu["by_vm"].get(vm, 0.0), "tiering_s": state.cpu_ns / 1e9,
                     "modelled_s": modelled[vm]}
                    for vm, state in sorted(self.vms.items())
                ],
            },
            "virtual_s": self._now_ps / PS_PER_S,
            "overcommit": self._overcommit(),
            "tiers": tiers,
        }  # fmt: skip
