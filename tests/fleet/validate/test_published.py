"""fleet.validate.published: the published figures stay where they belong, outside of everything that computes."""

import re
from itertools import chain
from pathlib import Path

import pytest

from fleet import hosts
from fleet.validate.published import COUNTERS, load

ROOT = Path(__file__).parent.parent.parent.parent
CHECK = ROOT / "fleet" / "validate"
SOURCES = [
    path
    for path in chain.from_iterable((ROOT / name).rglob("*") for name in ("proto", "guestd", "hostd", "fleet"))
    if path.suffix in (".py", ".toml") and CHECK not in path.parents
]


def test_every_figure_has_unit_and_source() -> None:
    published = load()
    assert published.figures
    for figure in published.figures.values():
        assert figure.value > 0
        assert figure.unit
        assert "seed" in figure.source


def test_the_raw_counters_give_the_totals_and_the_ratios() -> None:
    published = load()
    raw = published.raw
    for column in raw.values():
        assert sum(column[name] for name in COUNTERS) == column["total"]
    ours, h, g = raw["hyperplace"], raw["h-tpp"], raw["g-tpp"]
    expected = {
        "flushes_h_over_g": h["total"] / g["total"],
        "time_h_over_g": h["elapsed_s"] / g["elapsed_s"],
        "flushes_ours_over_g": ours["total"] / g["total"],
        "time_ours_over_g": ours["elapsed_s"] / g["elapsed_s"],
        "executions_per_request": h["tlb_flush"] / h["remote_tlb_flush"],
    }
    for name, value in expected.items():
        assert published.figures[name].value == pytest.approx(value, rel=0.02)


def test_nothing_outside_the_check_reads_the_published_figures() -> None:
    assert len(SOURCES) > 100
    for path in SOURCES:
        text = path.read_text()
        assert "published.toml" not in text, path
        assert not re.search(r"fleet\.validate\.published|validate import published", text), path


def test_no_cost_is_taken_from_a_published_outcome() -> None:
    published = load()
    numbers = {f"{int(value):,}" for column in published.raw.values() for value in column.values() if value > 10_000}
    for name in hosts.profile_names():
        for figure in hosts.load_profile(name).figures.values():
            assert "TLB flush" not in figure.source, (name, figure.key)
            assert "seed" not in figure.source.split(), (name, figure.key)
            assert not any(number in figure.source or number.replace(",", "") in figure.source for number in numbers)
