"""All policies by name: the built-in ones and those that other packages offer."""

from functools import cache
from importlib.metadata import entry_points

from guestd.tiering import hyperplace, none, oracle, tpp
from guestd.tiering.policy import Policy

GROUP = "tierfleet.policies"


@cache
def policies() -> dict[str, Policy]:
    """Name -> policy; a third party's may not take a built-in name (it is left out then)."""
    found = {policy.name: policy for policy in (none.POLICY, oracle.POLICY, tpp.G_TPP, tpp.H_TPP, hyperplace.POLICY)}
    for point in entry_points(group=GROUP):
        policy = point.load()
        found.setdefault(policy.name, policy)
    return found
