"""fleet.validate.experiments: at full size nothing is touched, below it what has to go along does."""

from fractions import Fraction

import pytest

from fleet import hosts
from fleet.validate import experiments as e
from guestd.tiering.registry import policies

GIB = 1 << 30
SCALES = [Fraction(1, n) for n in (2, 16, 64, 256, 512)]


def test_at_full_size_everything_is_as_declared() -> None:
    plan = e.plan(Fraction(1))
    cell = e.table_cell(plan, "g-tpp")
    (tenant,) = cell.tenants
    assert (tenant.vcpus, tenant.memory_bytes, tenant.fast_ratio) == (36, 144 * GIB, Fraction(1, 4))
    assert tenant.transactions == e.FULL_TABLE_UPDATES
    assert cell.costs == hosts.costs(hosts.load_profile(hosts.DEFAULT_PROFILE))
    assert tenant.policy_params["scan_size_mb"] == 256
    assert tenant.kernel.hz == 250
    assert e.machine(Fraction(1)) == e.constants("g-tpp", Fraction(1)) == e.constants("hyperplace", Fraction(1)) == {}


@pytest.mark.parametrize("scale", SCALES)
def test_every_cell_resolves_and_its_quantum_is_a_tick(scale: Fraction) -> None:
    for name, cell in e.cells(e.plan(scale)).items():
        for tenant in cell.tenants:
            assert cell.engine.quantum_ps * tenant.kernel.hz == pytest.approx(10**12, rel=0.01), name


@pytest.mark.parametrize("vms", e.FIGURE_VMS)
def test_the_figure_divides_one_host(vms: int) -> None:
    cell = e.figure_cell(e.plan(Fraction(1, 512)), "g-tpp", vms)
    (tenant,) = cell.tenants
    assert tenant.vms * tenant.vcpus == 36
    assert tenant.vms * tenant.memory_bytes == 144 * GIB
    assert tenant.vms * tenant.transactions == 8_100_000_000


def test_only_what_is_installed_is_in_the_figure() -> None:
    plan = e.plan(Fraction(1, 512))
    without = e.Plan(plan.scale, plan.updates, plan.policies - {"g-tpp"})
    assert "figure/g-tpp/9" in e.cells(plan)
    assert not [name for name in e.cells(without) if name.startswith("figure/g-tpp")]


def test_the_scanners_rate_stays() -> None:
    for scale in SCALES:
        constants = e.constants("g-tpp", scale)
        rate = int(str(constants["policy.scan_size_mb"])) / float(e.pass_ms(scale))
        assert rate == pytest.approx(2.56, rel=0.03), scale


def test_the_constants_that_are_scaled_are_those_that_the_policies_declare() -> None:
    known = policies()
    for policy in ("g-tpp", "h-tpp", "hyperplace", "memtis"):
        if policy in known:
            declared = {f"policy.{param.name}": param.default for param in known[policy].params}
            nearly_full = e.constants(policy, Fraction(10**9 - 1, 10**9))
            assert nearly_full == {key: declared[key] for key in nearly_full}, policy
