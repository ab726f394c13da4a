"""All policies by name: the built-in ones and those that other packages offer."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points

from guestd.tiering import (
    bounds,
    hemem,
    heteroos,
    heterovisor,
    hyperplace,
    memstrata,
    memtis,
    nomad,
    none,
    oracle,
    raminate,
    tpp,
    tpp_mainline,
    vtmm,
)
from guestd.tiering.policy import PluginError, Policy
from guestd.tiering.stage import Stage, with_stages

GROUP = "tierfleet.policies"
BUILT_IN = (
    none.POLICY,
    bounds.ALL_SLOW,
    bounds.ALL_FAST,
    oracle.POLICY,
    tpp.G_TPP,
    tpp_mainline.POLICY,
    tpp.H_TPP,
    memtis.POLICY,
    hemem.POLICY,
    nomad.POLICY,
    hyperplace.POLICY,
    heterovisor.POLICY,
    heteroos.POLICY,
    raminate.POLICY,
    vtmm.POLICY,
    memstrata.POLICY,
)


@cache
def policies() -> dict[str, Policy]:
    """Name -> policy. Raises PluginError if a third party's cannot be loaded or takes a name that is taken."""
    found = {policy.name: policy for policy in BUILT_IN}
    for point in entry_points(group=GROUP):
        where = f"the policy plug-in {point.name!r} ({point.value})"
        try:
            policy = point.load()
        except Exception as error:  # whatever a third party's module raises when it is imported
            raise PluginError(
                f"{where} cannot be loaded: {type(error).__name__}: {error}; fix or uninstall it"
            ) from error
        if not isinstance(policy, Policy):
            raise PluginError(f"{where} is no guestd.tiering.policy.Policy")
        if policy.name in found:
            raise PluginError(f"{where} is named {policy.name!r}, which there is already; give it another name")
        found[policy.name] = policy
    return found


@cache
def stages() -> dict[str, Stage]:
    """Name -> stage, of all policies that are composed of stages. Raises PluginError if two stages share a name."""
    found: dict[str, Stage] = {}
    for policy in policies().values():
        for stage in policy.parts.values():
            if found.setdefault(stage.name, stage) is not stage:
                raise PluginError(f"policy {policy.name!r} has a stage named {stage.name!r}, which there is already")
    return found


def policy_of(name: str, chosen: Mapping[str, str]) -> Policy:
    """The policy, with some of its stages exchanged by name. Raises KeyError, and StageError if they do not fit."""
    return with_stages(policies()[name], {stages()[stage].kind: stages()[stage] for stage in chosen.values()})
