"""Stages of different designs together: what fits runs and loses nothing, what does not is refused by both names."""

from itertools import product

import msgspec
import numpy as np
import pytest

from guestd.params import Param
from guestd.tiering.policy import Policy
from guestd.tiering.registry import policies, policy_of, stages
from guestd.tiering.stage import KINDS, Classifier, Evidence, Migrator, Stage, StageError, Tracker, composed
from proto.costs import Costs
from tests.small_fleet import check_memory, new_fleet, small_guest, until_populated

MADE_OF_STAGES = [policy for policy in policies().values() if policy.parts]


def exchanges(policy: Policy) -> list[dict[str, str]]:
    """Every way to exchange one stage of ``policy`` for another."""
    return [
        {kind: stage.name}
        for kind, stage in product(KINDS, stages().values())
        if stage.kind == kind and stage is not policy.parts[kind]
    ]


def fits(policy: Policy, chosen: dict[str, str]) -> bool:
    try:
        policy_of(policy.name, chosen)
    except StageError:
        return False
    return True


def mixes() -> list[tuple[str, dict[str, str]]]:
    """For each policy and kind one exchange that fits, so that every stage meets strangers."""
    found = []
    for number, policy in enumerate(MADE_OF_STAGES):
        for kind in KINDS:
            fitting = [chosen for chosen in exchanges(policy) if kind in chosen and fits(policy, chosen)]
            found += [(policy.name, fitting[number % len(fitting)])] if fitting else []
    return found


@pytest.mark.parametrize(("name", "chosen"), mixes(), ids=lambda value: value if isinstance(value, str) else str(value))
def test_a_mix_loses_no_page(name: str, chosen: dict[str, str], costs: Costs) -> None:
    policy = policy_of(name, chosen)
    config = msgspec.structs.replace(
        small_guest(costs, name, params=dict(policy.warm_up), pages=4096, run_ms=40), stages=chosen
    )
    fleet = new_fleet(config)
    while fleet.step():
        check_memory(fleet)
    assert fleet.host.failures == []
    report = fleet.host.reports[0]
    assert report["integrity"]["mismatches"] == 0
    assert report["policy"] == f"{name}+{next(iter(chosen.values()))}"


def test_most_exchanges_fit_and_every_other_names_both_sides() -> None:
    for policy in MADE_OF_STAGES:
        for chosen in exchanges(policy):
            name = next(iter(chosen.values()))
            try:
                mixed = policy_of(policy.name, chosen)
            except StageError as error:
                others = [stage.name for stage in policy.parts.values()] + [policy.name]
                assert f"{name!r}" in str(error)
                assert any(f"{other!r}" in str(error) for other in others if other != name)
            else:
                assert name in mixed.stages.values()
                params = [param.name for param in mixed.params]
                assert len(set(params)) == len(params), chosen


def test_every_stage_is_declared_completely() -> None:
    for name, stage in stages().items():
        assert stage.name == name
        assert stage.summary and stage.source
        assert set(stage.views) <= {"guest", "host"}
        assert set(stage.warm_up) <= {param.name for param in stage.params}


class Nothing(Tracker):
    pass


class Hottest(Classifier):
    def _observe(self, evidence: Evidence) -> None:
        self.seen = evidence.pages


class Stays(Migrator):
    pass


def stage(name: str, kind: str, create: type, **more: object) -> Stage:
    return Stage(name, kind, "a test's", "a test", create, **more)  # type: ignore[arg-type]


def test_defaults_of_a_policy_apply_to_its_stages_and_go_with_them() -> None:
    period = Param("period", 5, "ms", "of something", "a test")
    tracker = stage("nothing", "tracker", Nothing, params=(period,))
    policy = Policy("p", "a test's", "guest", "a test", defaults={"period": 7})
    made = composed(policy, tracker, stage("hottest", "classifier", Hottest), stage("stays", "migrator", Stays))
    assert [param.default for param in made.params] == [7]
    assert made.stages == {"tracker": "nothing", "classifier": "hottest", "migrator": "stays"}


def test_evidence_finds_pages_by_address_and_addresses_by_page(costs: Costs) -> None:
    guest = until_populated(new_fleet(small_guest(costs, run_ms=10)))
    view = guest.view
    pages = view.on_node(0, view.pages, 1, 50)
    by_page = Evidence(view, pages=pages)
    assert (by_page.addresses == guest.workload.space.gva(pages)).all()
    charged = int(view.meter.modelled_ps.sum())
    by_address = Evidence(view, addresses=by_page.addresses + 100)
    assert int(view.meter.modelled_ps.sum()) == charged, "found only when asked for"
    assert (by_address.pages == pages).all()
    assert int(view.meter.modelled_ps.sum()) - charged == costs.scan_pte_ps * 4 * pages.size
    outside = Evidence(view, addresses=np.array([0, 1 << 46, 1 << 47]))
    assert (outside.pages == -1).all()
    assert not by_page.writes.any()
