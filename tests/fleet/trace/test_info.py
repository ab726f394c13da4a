"""What is said about a trace."""

import json
from pathlib import Path

import numpy as np
import pytest

from fleet.trace.info import describe, page_references
from proto.trace import Trace, TraceMeta, read_trace

EXAMPLE = Path(__file__).parents[3] / "examples" / "hot_set.trace"


def trace(addresses: list[int], size: int = 8, meta: TraceMeta | None = None) -> Trace:
    n = len(addresses)
    return Trace(
        np.array(addresses, np.uint64),
        (np.arange(n) % 3).astype(np.uint8),
        np.full(n, size, np.uint16),
        np.full(n, 5, np.uint32),
        meta or TraceMeta(compute_unit="instruction"),
    )


def test_crossing_references_count_on_every_page_in_order() -> None:
    pages, reference = page_references(trace([4090, 0, 8190], 6000))
    assert pages.tolist() == [0, 1, 2, 0, 1, 1, 2, 3]
    assert reference.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_figures_of_a_small_trace() -> None:
    summary = describe(trace([0, 0, 4096, 0, 8190, 0]), "x.trace").summary()
    assert summary["references"] == 6
    assert summary["footprint"] == {"pages": 3, "bytes": 12288}
    assert summary["mix"] == {"loads": 2, "stores": 2, "modifies": 2}
    assert summary["page_crossing_references"] == 1
    assert summary["compute"] == {"unit": "instruction", "per_reference": 5.0, "dropped_per_reference": 0.0}
    assert summary["popularity"]["pages_used_once"] == 1
    assert summary["reuse"]["first_use_share"] == pytest.approx(3 / 7)
    assert json.loads(json.dumps(summary)) == summary


def test_histogram_holds_every_reuse() -> None:
    rng = np.random.default_rng(1)
    summary = describe(trace((rng.integers(0, 300, 2000) * 4096).tolist())).summary()
    histogram = summary["reuse"]["distance_histogram"]
    assert sum(bin_["reuses"] for bin_ in histogram) == 2000 - summary["footprint"]["pages"]
    assert summary["reuse"]["distance_pages"]["p50"] < summary["reuse"]["distance_pages"]["p99"] < 300


def test_fast_tier_of_a_hot_set() -> None:
    hot = [page * 4096 for page in range(10)]
    cold = [(100 + page) * 4096 for page in range(90)]
    tiers = describe(trace(hot * 99 + cold)).summary()["served_by_fast_tier"]
    tenth = next(tier for tier in tiers if tier["footprint_share"] == 0.1)
    assert tenth["pages"] == 10
    assert tenth["static"] == pytest.approx(990 / 1080)
    assert tenth["lru"] == pytest.approx(980 / 1080)  # all but the first uses
    assert next(tier for tier in tiers if tier["footprint_share"] == 0.05)["lru"] == 0  # a cycle longer than the memory
    for kind in ("static", "lru"):
        shares = [tier[kind] for tier in tiers]
        assert shares == sorted(shares)


def test_regions_are_named_and_add_up() -> None:
    heap = [0x4000000 + page * 4096 for page in range(4)]
    info = describe(trace([0x108000, *heap, 0x8000000, 0x1FFEFFF000]))
    assert [region.name for region in info.regions] == ["program", "mmap-1", "mmap-2", "stack"]
    assert [region.touched_pages for region in info.regions] == [1, 4, 1, 1]
    assert sum(region.references for region in info.regions) == 7
    assert (info.regions[1].start, info.regions[1].end) == (0x4000000, 0x4004000)


@pytest.mark.parametrize(
    ("address", "name"), [(0x5612_3456_7000, "program"), (0x7F01_2345_6000, "mmap"), (0x7FFD_1234_5000, "stack")]
)
def test_native_addresses(address: int, name: str) -> None:
    assert describe(trace([address])).regions[0].name == name


def test_the_example_is_small_and_has_a_hot_set() -> None:
    assert EXAMPLE.stat().st_size < 300_000
    summary = describe(read_trace(EXAMPLE)).summary()
    assert (summary["references"], summary["footprint"]["pages"]) == (96_188, 1_138)
    assert summary["recording"]["instructions"] == 32_648_631
    fifth = next(tier for tier in summary["served_by_fast_tier"] if tier["footprint_share"] == 0.2)
    assert fifth["static"] > 1.5 * 0.2  # better than pages used evenly
