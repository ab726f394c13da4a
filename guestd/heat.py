"""Page heat by gVA, gPA and hPA, and what a range tree makes of each: why Demeter (SOSP'25) samples gVA.

A program's hot data are neighbours in gVA. First touch, reclaim and migration put them into frames that are none, so
that ranges of gPA, and ranges of hPA even more, mix hot and cold. Each access of the run phase is counted in the 2 MiB
bin of each of its three addresses, as the page tables stand when its block of accesses has been executed; a page that
the host has swapped out by then is in no bin of hPA. At the end of an interval the pages of the policy's hot set are
counted in the same bins. hPA is an address within the VM's window of frames: fast ones
first, slow ones from the VM's size on. The addresses of each PEBS record go into a range tree for each space, with the
parameters of the stage `range-tree`; the roots are the VMAs' span, both guest nodes, and both tiers. Without sampling
there are no trees. It is all the emulator's own: no virtual time, and no agent's CPU.
"""

import os
from typing import Any, NamedTuple

import numpy as np

from guestd.jit import kernel
from guestd.machine import Machine
from guestd.meter import Meter
from guestd.params import resolve
from guestd.tiering.hyperplace import RANGE_TREE
from guestd.tiering.policy import Policy
from guestd.tiering.range_tree import COUNT, END, START, RangeTree
from proto.arrays import Bytes, Words
from proto.config import GuestConfig
from proto.entry import FRAME_MASK, FRAME_SHIFT, WRITABLE
from proto.layout import HEAT, HEAT_SPACES
from proto.units import PAGE_SHIFT, PS_PER_MS, TABLE_PAGES, TABLE_SHIFT

BIN_SHIFT = PAGE_SHIFT + TABLE_SHIFT
"""A bin is what a leaf table maps: 2 MiB."""


@kernel
def count_bins(address: Words, start: int, end: int, gpt: Words, ept: Words, gva: Words, gpa: Words,
               hpa: Words) -> None:  # fmt: skip
    """Count the accesses ``address[start:end]`` (dense byte addresses) in the bins of each space."""
    for i in range(start, end):
        page = address[i] >> PAGE_SHIFT
        gva[page >> TABLE_SHIFT] += 1
        if gpt[page] != 0:
            gpfn = (gpt[page] & FRAME_MASK) >> FRAME_SHIFT
            gpa[gpfn >> TABLE_SHIFT] += 1
            if (ept[gpfn] & WRITABLE) != 0:
                hpa[((ept[gpfn] & FRAME_MASK) >> FRAME_SHIFT) >> TABLE_SHIFT] += 1


@kernel
def count_mapped(gpt: Words, ept: Words, chosen: Bytes, gva: Words, gpa: Words, hpa: Words) -> None:
    """Count the workload's mapped pages of ``chosen`` (uint8[pages]; empty: all) in the bins of each space."""
    for page in range(gpt.size):
        if gpt[page] != 0 and (chosen.size == 0 or chosen[page] != 0):
            gpfn = (gpt[page] & FRAME_MASK) >> FRAME_SHIFT
            gva[page >> TABLE_SHIFT] += 1
            gpa[gpfn >> TABLE_SHIFT] += 1
            if (ept[gpfn] & WRITABLE) != 0:
                hpa[((ept[gpfn] & FRAME_MASK) >> FRAME_SHIFT) >> TABLE_SHIFT] += 1


class Captured(NamedTuple):
    """What the hottest of some ranges hold that fit a number of pages together."""

    ranges: int
    accesses: int


def captured(heat: Words, mapped: Words, ranking: Words, capacity: int) -> Captured:
    """The longest prefix of ``ranking`` (numbers of ranges) that fits ``capacity`` pages.

    ``heat``, ``mapped``: int64[ranges], accesses to each and pages in it.
    """
    fits = np.cumsum(mapped[ranking]) <= capacity
    prefix = ranking[: int(fits.sum())]
    return Captured(prefix.size, int(heat[prefix].sum()))


class Space:
    """One address space: its bins, and its tree. ``addresses``: int64[bins], where each bin begins, rising."""

    def __init__(self, addresses: Words, tree: RangeTree | None) -> None:
        self.addresses = addresses
        self.heat = np.zeros(addresses.size, np.int64)
        self.mapped = np.zeros(addresses.size, np.int64)
        self.hot = np.zeros(addresses.size, np.int64)
        self.tree = tree
        self.accesses = self.in_ranges = self.in_bins = self.hot_ranges = 0
        """Accesses of the run; those in the top ranges, and in the hottest bins; the last interval's top ranges."""

    def close_interval(self, capacity: int) -> None:
        """Book what of the interval's accesses the best ranges and bins hold that fit ``capacity`` pages."""
        self.accesses += int(self.heat.sum())
        self.in_bins += captured(self.heat, self.mapped, np.argsort(-self.heat, kind="stable"), capacity).accesses
        if self.tree is not None:
            leaves = self.tree.leaves
            edges = np.searchsorted(self.addresses, np.concatenate([leaves[START], leaves[END][-1:]]))
            heat, mapped = (_between(values, edges) for values in (self.heat, self.mapped))
            ranking = self.tree.ranking()
            self.hot_ranges, accesses = captured(heat, mapped, ranking[leaves[COUNT, ranking] > 0], capacity)
            self.in_ranges += accesses

    def report(self) -> dict[str, Any]:
        """This space's part of `locality`."""
        accesses = max(1, self.accesses)
        found: dict[str, Any] = {"bins_fast_ratio": self.in_bins / accesses}
        if self.tree is not None:
            found |= {"ranges": self.tree.used, "hot_ranges": self.hot_ranges,
                      "ranges_fast_ratio": self.in_ranges / accesses}  # fmt: skip
        return found


def _between(values: Words, edges: Words) -> Words:
    """Sums of ``values`` between neighbouring ``edges`` (int64[n + 1])."""
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])
    return np.diff(sums[edges])


class PageHeat:
    """See the module: one VM's. Writes `HEAT` records to ``config.heat_path``."""

    def __init__(self, config: GuestConfig, machine: Machine, first_gva: int, policy: Policy) -> None:
        self._config = config
        self._machine = machine
        own = {param.name for param in RANGE_TREE.params} if RANGE_TREE in policy.parts.values() else set()
        params = resolve(
            RANGE_TREE.params, {name: config.policy_params[name] for name in own & set(config.policy_params)}
        )
        self._tree_params = params
        self._epoch_ps = int(params["epoch_ms"]) * PS_PER_MS
        self._next_epoch_ps = self._epoch_ps
        unit = int(params["tau_split"]) * config.vcpus
        self._margin, self._eligible = int(params["alpha"]) * unit, unit
        size = config.total_pages << PAGE_SHIFT
        end = int(machine.table_gva[-1]) + (1 << BIN_SHIFT)
        nodes = [(0, size), (size, 2 * size)]
        frames = np.arange(2 * config.total_pages >> TABLE_SHIFT, dtype=np.int64) << BIN_SHIFT
        sampled = policy.sampling(resolve(policy.params, config.policy_params)) is not None
        self.spaces = [
            Space(addresses, self._tree(roots) if sampled else None)
            for addresses, roots in ((machine.table_gva, [(first_gva & -(1 << BIN_SHIFT), end)]), (frames, nodes),
                                     (frames, nodes))
        ]  # fmt: skip
        self._file = os.open(config.heat_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _tree(self, roots: list[tuple[int, int]]) -> RangeTree:
        return RangeTree(roots, int(self._tree_params["floor_mb"]) << 20, Meter().book)

    def executed(self, address: Words, start: int, end: int) -> None:
        """The accesses ``address[start:end]`` were made."""
        machine = self._machine
        count_bins(address, start, end, machine.gpt, machine.ept, *(space.heat for space in self.spaces))

    def sampled(self, gvas: Words) -> None:
        """PEBS records of these addresses (int64[n]) were drained."""
        machine, trees = self._machine, [space.tree for space in self.spaces]
        table = np.searchsorted(machine.table_gva, gvas, side="right") - 1
        entries = machine.gpt[table << TABLE_SHIFT | gvas >> PAGE_SHIFT & TABLE_PAGES - 1]
        gpfns = (entries & FRAME_MASK) >> FRAME_SHIFT
        backed = machine.ept[gpfns[entries != 0]]
        slots = (backed[(backed & WRITABLE) != 0] & FRAME_MASK) >> FRAME_SHIFT
        for tree, found in zip(trees, (gvas, gpfns[entries != 0] << PAGE_SHIFT, slots << PAGE_SHIFT), strict=True):
            if tree is not None:
                tree.record(np.ascontiguousarray(found))

    def barrier(self, now_ps: int) -> None:
        """The VM has come to ``now_ps``: the trees' epochs end as those of the policy do."""
        while self._next_epoch_ps <= now_ps:
            self._next_epoch_ps += self._epoch_ps
            for space in self.spaces:
                if space.tree is not None:
                    space.tree.advance(
                        self._margin,
                        self._eligible,
                        both_neighbours=self._tree_params["neighbours"] == "both",
                        decay=bool(self._tree_params["decay"]),
                        merge_after=int(self._tree_params["merge_after"]),
                    )

    def close_interval(self, now_ps: int, believed: Bytes) -> None:
        """A sampling interval ends: write its heat, and see what each space's best ranges hold of it.

        ``believed``: uint8[pages], what the policy takes for hot.
        """
        machine, every = self._machine, np.zeros(0, np.uint8)
        for space in self.spaces:
            space.mapped[:] = space.hot[:] = 0
        count_mapped(machine.gpt, machine.ept, every, *(space.mapped for space in self.spaces))
        count_mapped(machine.gpt, machine.ept, believed, *(space.hot for space in self.spaces))
        parts = []
        for number, space in enumerate(self.spaces):
            space.close_interval(self._config.fast_pages)
            some = np.flatnonzero(space.heat | space.hot)
            records = np.zeros(some.size, HEAT)
            records["time_ps"], records["vm"], records["space"] = now_ps, self._config.vm, number
            records["address"], records["accesses"] = space.addresses[some], space.heat[some]
            records["hot_pages"] = space.hot[some]
            parts.append(records)
            space.heat[:] = 0
        os.write(self._file, np.concatenate(parts).tobytes())

    def report(self) -> dict[str, Any]:
        """`locality` of a VM in summary.json."""
        return {name: space.report() for name, space in zip(HEAT_SPACES, self.spaces, strict=True)}

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
