"""Memtis' counts: lazy halving is halving, and the histograms hold what was looked at since they were begun anew."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from guestd.meter import Meter
from guestd.mm.nodes import ACTIVE, F_ACTIVE, F_HUGE, INACTIVE, NO_PAGE, Nodes, lru_add, new_nodes
from guestd.tiering.access_counts import (
    BASE,
    BASE_HITS,
    BASE_HOT,
    BINS,
    CLOCK,
    EPOCH,
    FAST_HITS,
    HOT,
    UNITS,
    WARM,
    Heat,
    levels,
    new_heat,
    record,
    skew_bucket,
    survey,
    take,
    walk,
)
from proto.arrays import Words

SPAN = 1024
PAGES = 1024
"""Table 0 lies on the fast node, table 1 on the slow one, each page in the frame of its own number (there + SPAN)."""
BOOK = Meter().book


def small_nodes() -> Nodes:
    nodes = new_nodes(SPAN, SPAN, SPAN)
    for page in range(PAGES):
        frame = int(frame_of(page))
        nodes.page[frame] = page
        lru_add(nodes, frame, INACTIVE)
    return nodes


def frame_of(page: int | Words) -> Any:
    return page + SPAN * (page >= 512) - 512 * (page >= 512)


def make_huge(nodes: Nodes, head: int, huge: bool) -> None:
    """As split and collapse leave flags; the lists are not looked at meanwhile."""
    frame = int(frame_of(head))
    nodes.flags[frame] = (int(nodes.flags[frame]) & ~F_HUGE) | (F_HUGE if huge else 0)


def sample(heat: Heat, nodes: Nodes, pages: list[int]) -> tuple[int, int]:
    named = np.array(pages, np.int64)
    heads = np.where(nodes.flags[frame_of(named & ~511)] & F_HUGE, named & ~511, named)
    return record(BOOK, heat, nodes, named, frame_of(heads).astype(np.int32))


def cool(heat: Heat, *, anew: bool) -> None:
    heat.state[CLOCK] += 1
    if anew:
        heat.bins[:] = 0
        heat.state[EPOCH] += 1


def bin_of(count: int) -> int:
    return min(15, (count + 1).bit_length() - 1)


class Reference:
    """What the counts mean: everything known is halved at each cooling, on the spot."""

    def __init__(self, hot: int, skip: bool) -> None:
        self.count: dict[int, int] = {}
        self.counted: set[int] = set()
        self.young: set[int] = set()
        self.seed, self.skip = 1 << (hot + 1), skip

    def look(self, page: int) -> None:
        if page not in self.count:
            self.count[page] = self.seed
            if self.skip:
                self.young.add(page)
        self.counted.add(page)

    def sample(self, page: int) -> None:
        self.look(page)
        self.count[page] += 512

    def cool(self, *, anew: bool) -> None:
        for page in self.count:
            if page not in self.young:
                self.count[page] //= 2
        self.young.clear()
        if anew:
            self.counted.clear()


STEPS = st.lists(
    st.one_of(
        st.lists(st.integers(0, PAGES - 1).filter(lambda page: page % 97 < 3), min_size=1, max_size=20),
        st.sampled_from(["cool", "cool anew", "walk fast", "walk slow"]),
    ),
    max_size=12,
)


@settings(max_examples=40)
@given(STEPS, st.booleans(), st.integers(0, 5))
def test_lazy_halving_is_halving_and_the_histograms_agree(steps: list[Any], skip: bool, hot: int) -> None:
    heat, nodes, reference = new_heat(PAGES, hot, skip), small_nodes(), Reference(hot, skip)
    for step in steps:
        if isinstance(step, list):
            sample(heat, nodes, step)
            for page in step:
                reference.sample(page)
        elif step.startswith("cool"):
            cool(heat, anew=step == "cool anew")
            reference.cool(anew=step == "cool anew")
        else:
            node = int(step == "walk slow")
            assert walk(BOOK, heat, nodes, node)[0] >= 512
            for page in range(512 * node, 512 * node + 512):
                reference.look(page)
    base, huge = levels(heat)
    assert {int(page): int(base[page]) for page in np.flatnonzero(base >= 0)} == {
        page: bin_of(count) for page, count in reference.count.items()
    }
    assert (huge == NO_PAGE).all()
    # What is in the histogram lies where it was counted last, which halving that is still due has not changed.
    assert heat.bins[UNITS].sum() == heat.bins[BASE].sum() == len(reference.counted)
    assert (heat.bins >= 0).all()
    for node in (0, 1):
        walk(BOOK, heat, nodes, node)
    every = np.bincount([bin_of(reference.count.get(page, reference.seed)) for page in range(PAGES)], minlength=BINS)
    assert np.array_equal(heat.bins[UNITS], every)
    assert np.array_equal(heat.bins[BASE], every)
    base, _ = levels(heat)
    active = (nodes.flags[frame_of(np.arange(PAGES))] & F_ACTIVE) != 0
    assert np.array_equal(active, base >= hot), "a unit is on the active list if and only if it is hot"


def test_a_sample_of_a_base_page_weighs_as_much_as_512_of_a_huge_one() -> None:
    heat, nodes = new_heat(PAGES, 0, False), small_nodes()
    make_huge(nodes, 512, True)
    sample(heat, nodes, [0])
    sample(heat, nodes, [512 + i for i in range(512)])
    base, huge = levels(heat)
    assert base[0] == huge[1] == bin_of(512 + 2)
    assert heat.bins[UNITS, 9] == 513
    assert heat.bins[BASE, 9] == 513, "each sub-page had one of its own, and no seed"
    assert (base[512:] == NO_PAGE).all()


@given(st.lists(st.integers(0, 511), max_size=40), st.integers(0, 3), st.booleans())
def test_split_and_collapse_keep_counts_and_histograms(pages: list[int], coolings: int, first_huge: bool) -> None:
    heat, nodes = new_heat(PAGES, 1, False), small_nodes()
    make_huge(nodes, 0, first_huge)
    sample(heat, nodes, [0, *pages])
    for _ in range(coolings):
        cool(heat, anew=False)
    make_huge(nodes, 0, not first_huge)
    sample(heat, nodes, [0])
    hits = np.bincount([0, *pages], minlength=512)
    base, huge = levels(heat)
    if first_huge:
        expected = [bin_of((512 * int(hits[page]) >> coolings) + 512 * (page == 0)) for page in range(512)]
        assert base[:512].tolist() == expected
        assert np.array_equal(heat.bins[UNITS], np.bincount([_bin(heat, page) for page in range(512)], minlength=BINS))
    else:
        seeds = np.where(hits > 0, 4, 0)
        total = sum(int(512 * count + seed) >> coolings for count, seed in zip(hits, seeds, strict=True))
        assert huge[0] == bin_of(total // 512 + 1)
        assert heat.bins[UNITS].tolist() == [512 * (level == huge[0]) for level in range(BINS)]
    assert heat.bins.sum(axis=1).tolist() == [512, 512]


def _bin(heat: Heat, page: int) -> int:
    return bin_of(int(heat.total[page]))


def test_hits_are_counted_as_they_are_and_as_they_could_be() -> None:
    heat, nodes = new_heat(PAGES, 1, False), small_nodes()
    heat.state[BASE_HOT] = 9
    sample(heat, nodes, [0, 600, 600, 600])
    assert heat.state[[FAST_HITS, BASE_HITS]].tolist() == [1, 2], "the first sample of a page found it below bin 9"


def test_take_gives_the_hot_from_one_list_and_what_is_not_warm_from_the_other() -> None:
    heat, nodes = new_heat(PAGES, 1, False), small_nodes()
    sample(heat, nodes, list(range(512)))  # bin 9: hot
    heat.state[[HOT, WARM]] = 10, 9
    out = np.zeros(600, np.int64)
    # The tail of the active list is the oldest; all of it is no longer hot, so it leaves the list.
    assert take(BOOK, heat, nodes, 0, ACTIVE, 4, out) == (0, 512)
    assert nodes.size[:2].tolist() == [512, 0]
    assert take(BOOK, heat, nodes, 0, INACTIVE, 4, out) == (0, 512), "all warm"
    heat.state[WARM] = 10
    count, visited = take(BOOK, heat, nodes, 0, INACTIVE, 4, out)
    assert (count, visited) == (4, 4)
    assert out[:4].tolist() == [0, 1, 2, 3], "from the tail"
    heat.state[[HOT, WARM]] = 9
    assert take(BOOK, heat, nodes, 0, INACTIVE, 600, out) == (0, 512)
    assert nodes.size[:2].tolist() == [0, 512], "what is hot is found so, and goes to the active list"
    count, _ = take(BOOK, heat, nodes, 0, ACTIVE, 3, out)
    assert out[:count].tolist() == [0, 1, 2]
    assert take(BOOK, heat, nodes, 0, ACTIVE, 0, out) == (0, 0)


@given(st.integers(0, 1 << 20))
def test_the_buckets_of_skewness(skew: int) -> None:
    # 0, 1, 2-3, 4-7, ... 512-1023, then steps of 1024, which an exact multiple ends.
    expected = skew.bit_length() if skew < 1024 else min(20, 11 + (skew - 1) // 1024)
    assert skew_bucket(skew) == expected


def test_the_survey_finds_skewed_huge_pages() -> None:
    heat, nodes = new_heat(PAGES, 1, False), small_nodes()
    for head in (0, 512):
        make_huge(nodes, head, True)
    sample(heat, nodes, [5] * 600 + [512 + i for i in range(512)])
    heat.state[[HOT, BASE_HOT]] = 9
    buckets, counts = np.zeros(2, np.uint8), np.zeros(2, np.int64)
    survey(BOOK, heat, np.array([0, 512]), buckets, counts)
    assert buckets.tolist() == [skew_bucket(600 * 600 // 11), 0], "one sub-page has it all, or all have the same"
    assert counts.tolist() == [1 + 512, 600 + 512 + 2 * 4]
    sample(heat, nodes, [5] * 8000)  # bin 13: too hot to split
    survey(BOOK, heat, np.array([0, 512]), buckets, counts)
    assert buckets[0] == 0
