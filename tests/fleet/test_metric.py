"""fleet.metric: paths into a summary, and what a wrong one is told."""

import pytest

from fleet.metric import MetricError, value

SUMMARY = {
    "elapsed": {"virtual_s": 2.5},
    "outcome": "ok",
    "vms": [
        {"flushes": {"total": 4}, "access": {"fast_ratio": 0.25}},
        {"flushes": {"total": 8}, "access": {"fast_ratio": 0.75}},
    ],
    "none": [],
}


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("elapsed.virtual_s", 2.5),
        ("vms.access.fast_ratio", 0.5),
        ("vms[*].access.fast_ratio", 0.5),
        ("vms[1].flushes.total", 8),
        ("sum(vms[*].flushes.total)", 12),
        ("max(vms.flushes.total)", 8),
        (" min( vms[*].flushes.total ) ", 4),
    ],
)
def test_a_path_gives_a_number(metric: str, expected: float) -> None:
    assert value(SUMMARY, metric) == expected


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("elapsed.virtual", "did you mean 'virtual_s'"),
        ("vms.flushes.totl", "did you mean 'total'"),
        ("vms.flushes", "is a table; go on with one of total"),
        ("outcome", "is no number"),
        ("elapsed.virtual_s.x", "has no parts"),
        ("elapsed[0].virtual_s", "is no list"),
        ("vms[2].flushes.total", "only 2"),
        ("none", "is empty"),
        ("median(vms.flushes.total)", "no function 'median'"),
        ("sum(vms", "write a path"),
        ("vms..x", "is no key"),
        ("", "is no key"),
    ],
)
def test_a_wrong_path_is_refused_in_one_line(metric: str, told: str) -> None:
    with pytest.raises(MetricError) as refusal:
        value(SUMMARY, metric)
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)
