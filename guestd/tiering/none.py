"""`none`: first touch and no management; what every design must beat."""

from guestd.tiering.policy import Policy

POLICY = Policy(
    name="none",
    summary="first touch, no management",
    view="-",
    stages={"tracker": "-", "classifier": "-", "migrator": "-"},
    source="Linux default without NUMA balancing",
)
