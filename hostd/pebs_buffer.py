"""What VMs can read of each other in a PEBS buffer of the host's (``host.pebs=shared``).

Earlier systems took it that guests' records go to the host's buffer, which every party to it can read (seed,
"EPT-Friendly PEBS"). Hardware does not do that: VM entry and exit switch the DS area. Here the host counts what would
leak if it did: records are never cleared, drained or not, and a record holds a gVA of its VM.
"""

from collections.abc import Sequence

import numpy as np

from guestd.params import resolve
from guestd.tiering.registry import policy_of
from proto.arrays import Words
from proto.config import GuestConfig
from proto.units import PAGE_SIZE


class PebsLeak:
    """Counts records by their VM in the buffer of a fleet (int64[words]; an area a vCPU)."""

    def __init__(self, guests: Sequence[GuestConfig], buffer: Words) -> None:
        self._areas: dict[int, Words] = {}
        area = buffer.size // sum(guest.vcpus for guest in guests)
        for guest in guests:
            policy = policy_of(guest.policy, guest.stages)
            sampling = policy.sampling(resolve(policy.params, guest.policy_params))
            if sampling is not None:
                words = sampling.record_bytes // 8
                records = guest.vcpus * (guest.kernel.ds_pages * PAGE_SIZE // sampling.record_bytes)
                first = guest.first_vcpu * area
                self._areas[guest.vm] = buffer[first : first + records * words].reshape(records, words)

    def foreign_records(self, vms: Sequence[int]) -> dict[int, int]:
        """For each VM: how many records of other VMs it can read now. A record begins with its format, never 0."""
        own = {vm: int(np.count_nonzero(area[:, 0])) for vm, area in self._areas.items()}
        return {vm: sum(own.values()) - own.get(vm, 0) for vm in vms}
