"""GUPS: a hot set of the stated size gets its share, wherever it lies; heat is what a histogram of accesses shows."""

from decimal import Decimal, localcontext

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.workloads.base import Buffer
from guestd.workloads.gups import Gups, zipf_bounds
from proto.arrays import Words
from proto.config import Scalar
from proto.costs import Costs
from proto.trace import LLC_HIT, MODIFY, STORE
from tests.guestd.machines import guest_config

ACCESSES = 200_000


def make(costs: Costs, vcpus: int = 1, seed: int = 11, **params: Scalar) -> Gups:
    return Gups(msgspec.structs.replace(guest_config(costs, workload_params=params, vcpus=vcpus), seed=seed))


def buffer(size: int) -> Buffer:
    return Buffer(np.full(size, -1, np.int64), np.zeros(size, np.uint8), np.zeros(size, np.int32))


def histogram(gups: Gups, accesses: int = ACCESSES) -> Words:
    """Accesses per page of the array (int64[pages])."""
    block = buffer(accesses)
    assert gups.generate(0, block) == accesses
    assert (block.kind == MODIFY).all() and (block.think_ps == gups.think_ps).all() and (block.address % 8 == 0).all()
    pages = (block.address >> 12) - gups.first_page
    assert pages.min() >= 0 and pages.max() < gups.pages
    return np.bincount(pages, minlength=gups.pages)


@pytest.mark.parametrize("layout", ["end", "start", "scattered"])
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_the_hot_set_gets_its_share(layout: str, share: float, costs: Costs) -> None:
    gups = make(costs, layout=layout, hot_updates=share)
    assert (gups.pages, gups.hot) == (4096 * 7 // 8, 4096 // 16)
    counts = histogram(gups)
    heat = gups.heat()
    assert heat is not None
    hot = np.argsort(-heat[gups.first_page : gups.first_page + gups.pages], kind="stable")[: gups.hot]
    if layout == "end":
        assert sorted(hot) == list(range(gups.pages - gups.hot, gups.pages))
    elif layout == "start":
        assert sorted(hot) == list(range(gups.hot))
    else:
        assert np.ptp(hot) > gups.pages // 2
    sigma = (share * (1 - share) / ACCESSES) ** 0.5
    assert abs(counts[hot].sum() / ACCESSES - share) < 5 * sigma


@pytest.mark.parametrize("params", [{}, {"layout": "scattered"}, {"distribution": "uniform"}, {"distribution": "zipf"}])
def test_heat_is_what_a_histogram_shows(params: dict[str, Scalar], costs: Costs) -> None:
    """Pearson's chi-square over pages grouped by heat: near its degrees of freedom if the law is the stated one."""
    gups = Gups(guest_config(costs, workload_params=params))
    heat = gups.heat()
    assert heat is not None
    assert heat.sum() == heat[gups.first_page : gups.first_page + gups.pages].sum(), "no heat outside the array"
    weights = heat[gups.first_page : gups.first_page + gups.pages]
    counts = histogram(gups)
    order = np.argsort(-weights, kind="stable")
    cumulative = np.cumsum(weights[order]) / weights.sum()
    group = np.minimum((cumulative * 64).astype(int), 63)
    expected = np.bincount(group, weights[order] / weights.sum() * ACCESSES, 64)
    observed = np.bincount(group, counts[order], 64)
    filled = expected > 0
    chi_square = float((((observed - expected)[filled] ** 2) / expected[filled]).sum())
    freedom = int(filled.sum()) - 1
    assert chi_square < freedom + 6 * (2 * max(1, freedom)) ** 0.5 + 6


def hit_shares(gups: Gups, share_bytes: int) -> tuple[Words, Words]:
    """Accesses and hits per page of the array (int64[pages] each) when data has so much of the LLC."""
    gups.set_llc(share_bytes)
    block = buffer(ACCESSES)
    gups.generate(0, block)
    pages = (block.address >> 12) - gups.first_page
    assert set(np.unique(block.kind).tolist()) <= {MODIFY, MODIFY | LLC_HIT}
    return np.bincount(pages, minlength=gups.pages), np.bincount(pages, block.kind == (MODIFY | LLC_HIT), gups.pages)


def assert_share(hits: float, accesses: float, share: float) -> None:
    sigma = (share * (1 - share) * accesses) ** 0.5
    assert abs(hits - share * accesses) <= 5 * sigma


@pytest.mark.parametrize("layout", ["end", "scattered"])
@pytest.mark.parametrize(
    ("hot_updates", "fit", "hot_share", "cold_share"),
    [(0.9, 64, 0.25, 0.0), (0.9, 256, 1.0, 0.0), (0.9, 256 + 332, 1.0, 0.1), (0.0, 332, 0.0, 0.1)],
)
def test_the_llc_holds_the_hottest_lines(
    layout: str, hot_updates: float, fit: int, hot_share: float, cold_share: float, costs: Costs
) -> None:
    """``fit``: pages' worth of lines that fit; the hot set has 256 pages, the rest 3328."""
    gups = make(costs, layout=layout, hot_updates=hot_updates)
    accesses, hits = hit_shares(gups, fit * 4096)
    heat = gups.heat()
    assert heat is not None
    warm = heat[gups.first_page : gups.first_page + gups.pages]
    hot = warm == (warm.max() if hot_updates else 0)
    assert hot.sum() == 256
    assert_share(hits[hot].sum(), accesses[hot].sum(), hot_share)
    assert_share(hits[~hot].sum(), accesses[~hot].sum(), cold_share if hot_updates else fit / 3328)


def test_zipf_ranks_that_fit_always_hit_and_the_others_never(costs: Costs) -> None:
    gups = make(costs, distribution="zipf")
    fit = 100
    accesses, hits = hit_shares(gups, fit * 4096)
    assert (hits[gups.order[:90]] == accesses[gups.order[:90]]).all()
    assert not hits[gups.order[110:]].any(), "but for the quantile at the border, which is equally hot all over"
    # Hits are what the truth says that the hottest pages get.
    heat = gups.heat()
    assert heat is not None
    weights = np.sort(heat)[::-1]
    assert_share(hits.sum(), ACCESSES, float(weights[:fit].sum() / weights.sum()))


def test_the_llc_changes_no_address_and_populating_never_hits(costs: Costs) -> None:
    blocks = []
    for share in (0, 1 << 20, 1 << 40):
        gups = make(costs)
        gups.set_llc(share)
        first = buffer(512)
        gups.populate(0, first)
        assert (first.kind == STORE).all()
        gups.generate(0, block := buffer(1000))
        blocks.append(block)
    assert (blocks[0].address == blocks[1].address).all() and (blocks[0].address == blocks[2].address).all()
    assert (blocks[0].kind == MODIFY).all() and (blocks[2].kind == (MODIFY | LLC_HIT)).all()


def test_layouts_hold_the_same_heat(costs: Costs) -> None:
    heats = [make(costs, layout=layout).heat() for layout in ("end", "start", "scattered")]
    sorted_heats = [np.sort(heat).tolist() for heat in heats if heat is not None]
    assert sorted_heats[0] == sorted_heats[1] == sorted_heats[2]


def test_vcpus_draw_from_streams_of_their_own(costs: Costs) -> None:
    gups = make(costs, vcpus=2)
    blocks = [buffer(1000), buffer(1000)]
    for vcpu, block in enumerate(blocks):
        gups.generate(vcpu, block)
    assert (blocks[0].address == blocks[1].address).mean() < 0.05
    again = buffer(1000)
    make(costs, vcpus=2).generate(0, again)
    assert (again.address == blocks[0].address).all()
    other = buffer(1000)
    make(costs, vcpus=2, seed=12).generate(0, other)
    assert not (other.address - other.address.min() == blocks[0].address - blocks[0].address.min()).all()


@given(sizes=st.lists(st.integers(1, 2000), min_size=1, max_size=8))
def test_populate_touches_every_page_once_in_order(sizes: list[int], costs: Costs) -> None:
    gups = make(costs, vcpus=3)
    touched: list[int] = []
    turn = 0
    while True:
        block = buffer(sizes[turn % len(sizes)])
        count = gups.populate(turn % 3, block)
        if count == 0:
            break
        assert (block.kind[:count] == STORE).all()
        touched += (block.address[:count] >> 12).tolist()
        turn += 1
    assert touched == list(range(gups.first_page, gups.first_page + gups.pages))


@given(pages=st.integers(1, 1 << 24), exponent=st.sampled_from(("0.5", "0.99", "1.0", "1.2", "2")))
def test_zipf_bounds_rise_from_the_first_rank_to_the_last(pages: int, exponent: str) -> None:
    bounds = zipf_bounds(pages, exponent)
    assert bounds.size == 4097
    assert bounds[0] == 0 and bounds[-1] <= pages
    assert bounds[-1] >= pages - 1
    assert (np.diff(bounds) >= 0).all()


def test_zipf_bounds_do_not_depend_on_the_decimal_context() -> None:
    first = zipf_bounds(100_000, "0.99")
    with localcontext() as context:
        context.prec = 5
        assert Decimal(1) / 3 == Decimal("0.33333")
        assert (zipf_bounds(100_000, "0.99") == first).all()
