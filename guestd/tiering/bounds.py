"""`all-fast` and `all-slow`: a VM whose memory lies in one tier; between the two lies what placement can gain or lose.

The VM has its whole size in that tier (`Policy.fast_share`), so that every page, page tables and all, is there from its
first touch on. Nothing is managed.
"""

from fractions import Fraction

from guestd.tiering.policy import Policy

_STAGES = {"tracker": "-", "classifier": "-", "migrator": "-"}

ALL_FAST = Policy(
    name="all-fast",
    summary="all memory is fast, whatever the ratio says",
    view="-",
    stages=_STAGES,
    source="bound by construction: nothing can be placed better",
    fast_share=Fraction(1),
)
ALL_SLOW = Policy(
    name="all-slow",
    summary="all memory is slow, whatever the ratio says",
    view="-",
    stages=_STAGES,
    source="bound by construction: nothing can be placed worse",
    fast_share=Fraction(0),
)
