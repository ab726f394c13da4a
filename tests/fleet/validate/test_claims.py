"""fleet.validate.claims: the declarations fit the experiments, and words are checked by what they say."""

from fractions import Fraction
from typing import Any

from fleet import hosts
from fleet.validate import experiments as e
from fleet.validate.claims import CLAIMS, cores, executions_per_request, flushes, invepts, raw, stage_cores
from fleet.validate.groups import groups
from fleet.validate.published import COUNTERS, load

ABSENT = {"memtis", "hemem"}
"""Policies of the figure that an installation may not have."""


def vm(**changes: Any) -> dict[str, Any]:
    one = {
        "virtual_s": 8.0,
        "flushes": {"total": 15},
        "kvm": {"tlb_flush": 6, "remote_tlb_flush": 2},
        "vmstat": {"nr_tlb_local_flush_one": 3, "nr_tlb_remote_flush": 3, "nr_tlb_local_flush_all": 1},
        "instructions": {"invept_global": 6},
        "agent_cpu": {
            "modelled_cores": 0.5,
            "modelled_s": {"track": 3.0, "classify": 0.0, "migrate": 1.0, "total": 4.0},
        },
    }
    return one | changes


def test_declarations_name_what_is_there() -> None:
    plan = e.plan(Fraction(1, 512))
    cells, known = e.cells(plan), groups(plan)
    figures = load().figures
    assert len({claim.key for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.basis in ("mechanism", "by definition")
        assert (claim.published in figures) == (claim.value is not None) != (claim.holds is not None)
        assert set(claim.needs) <= set(known)
        for cell in claim.cells:
            assert cell in cells or ABSENT & set(cell.split("/"))
        for cost, moved in claim.costs.items():
            assert set(moved) <= set(claim.cells)
            figure = hosts.load_profile(hosts.DEFAULT_PROFILE).figures[cost]
            assert figure.low < figure.high
    assert set(figures) == {claim.published for claim in CLAIMS if claim.published}


def test_the_first_cost_of_a_claim_is_one_that_nobody_has_published() -> None:
    profile = hosts.load_profile(hosts.DEFAULT_PROFILE)
    for claim in CLAIMS:
        for cost in list(claim.costs)[:1]:
            assert profile.figures[cost].grade in ("estimated", "recalled")


def test_figures_are_sums_over_the_vms() -> None:
    summary = {"vms": [vm(), vm()]}
    assert raw(summary) == dict(zip(COUNTERS, (12, 4, 6, 6, 2), strict=True)) | {"total": 30}
    assert sum(raw(summary)[name] for name in COUNTERS) == flushes(summary)
    assert (invepts(summary), cores(summary), executions_per_request(summary)) == (12, 1.0, 3.0)
    assert stage_cores(summary) == {"track": 0.75, "classify": 0.0, "migrate": 0.25}
    assert executions_per_request({"vms": [vm(kvm={"tlb_flush": 6, "remote_tlb_flush": 0})]}) == 0


def test_words_can_turn_out_false() -> None:
    claims = {claim.key: claim for claim in CLAIMS}
    quiet = vm(instructions={"invept_global": 0, "invlpg": 0},
               migration={"promoted_pages": 1, "demoted_pages": 1})  # fmt: skip
    loud = quiet | {"instructions": {"invept_global": 9, "invlpg": 0}}

    def holds(key: str, **cells: dict[str, Any]) -> bool:
        check = claims[key].holds
        assert check is not None
        return check(
            {f"words/{name.replace('_', '-')}": {"outcome": "ok", "vms": [one]} for name, one in cells.items()}
        )[0]

    assert holds("guests_need_no_invept", none=quiet, g_tpp=quiet, hyperplace=quiet)
    assert not holds("guests_need_no_invept", none=quiet, g_tpp=loud, hyperplace=quiet)
    assert holds("guests_need_no_invept", none=loud, g_tpp=loud, hyperplace=loud)
    assert holds("host_needs_invept", none=quiet, h_tpp=loud)
    assert not holds("host_needs_invept", none=quiet, h_tpp=quiet)
    own, shared = {"pebs": {"records": 9}}, {"pebs": {"records": 9, "foreign_records_visible": 3}}
    assert holds("pebs_isolated", pebs_own=own, pebs_shared=shared)
    assert not holds("pebs_isolated", pebs_own=shared, pebs_shared=shared)
    assert not holds("pebs_isolated", pebs_own=own, pebs_shared=own)
    assert holds("pml_no_filter", pml={"pml": {"entries": 4, "useless_ratio": 0.1}})
    assert not holds("pml_no_filter", pml={"pml": {"entries": 4, "useless_ratio": 0.0}})
