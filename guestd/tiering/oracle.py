"""`oracle`: the workload's truly hot pages are placed on the fast node at first touch, for free; the upper bound."""

from guestd.tiering.policy import Policy

POLICY = Policy(
    name="oracle",
    summary="true hot set on the fast node from first touch on, for free",
    view="-",
    stages={"tracker": "oracle", "classifier": "oracle", "migrator": "first touch"},
    source="upper bound by construction",
    places_by_heat=True,
)
