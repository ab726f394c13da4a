"""A declared parameter of a policy or workload: its default has its type, and its source says where it is from."""

from typing import NamedTuple

from proto.config import Scalar


class Param(NamedTuple):
    """One parameter. ``source`` names paper section, kernel file or manual, or is ``unpublished``."""

    name: str
    default: Scalar
    unit: str
    help: str
    source: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None


def resolve(params: tuple[Param, ...], given: dict[str, Scalar]) -> dict[str, Scalar]:
    """Defaults overridden by ``given``; names and types were checked at the edge (fleet.spec)."""
    return {param.name: given.get(param.name, param.default) for param in params}
