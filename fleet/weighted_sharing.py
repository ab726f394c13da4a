"""Fast memory that VMs of a host share by weight (HeteroOS, ISCA'17, shares DRAM between VMs by weighted fairness).

Fast memory is the one resource that is scarce, so weighted dominant-resource fairness (Ghodsi et al., NSDI'11) is
weighted max-min fairness here: all shares grow alike in proportion to their weights, but none beyond what its VM can
use, which is its memory.
"""

from collections.abc import Sequence
from fractions import Fraction


def weighted_shares(wants: Sequence[int], weights: Sequence[int], room: int) -> list[int]:
    """Shares of ``room`` pages, at most the sum of ``wants``, by ``weights`` (> 0); whole pages, which sum to ``room``.

    What rounding leaves goes to the first VMs that can use it.
    """
    shares = [0] * len(wants)
    open_ = set(range(len(wants)))
    left = room
    while open_:
        level = Fraction(left, sum(weights[vm] for vm in open_))
        full = {vm for vm in open_ if wants[vm] <= level * weights[vm]}
        for vm in full or open_:
            shares[vm] = wants[vm] if full else int(level * weights[vm])
            left -= shares[vm]
        open_ = open_ - full if full else set()
    for vm, want in enumerate(wants):
        more = min(left, want - shares[vm], 1)
        shares[vm] += more
        left -= more
    return shares
