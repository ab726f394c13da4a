"""fleet.sweep.axes: what an axis may say, and which points axes make."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import SpecError
from fleet.spec import Registries, installed
from fleet.sweep.axes import points, values_of


@pytest.fixture(scope="module")
def registries() -> Registries:
    return installed()


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ([1, 2, "4GiB"], [1, 2, "4GiB"]),
        ("1..4", [1, 2, 3, 4]),
        ("1..9:2", [1, 3, 5, 7, 9]),
        ("1..8:3", [1, 4, 7]),
        ("0.1..0.5:0.1", [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("1..3, 6,9", [1, 2, 3, 6, 9]),
        (["1..3", "6"], [1, 2, 3, "6"]),
        ("g-tpp,h-tpp", ["g-tpp", "h-tpp"]),
        (3, [3]),
        (True, [True]),
    ],
)
def test_an_axis_is_a_list_a_range_or_a_comma_list(
    written: object, means: list[object], registries: Registries
) -> None:
    found = values_of("vms", written, "axes: vms", registries)
    assert found == means
    assert [type(value) for value in found] == [type(value) for value in means]


def test_named_sets_are_those_of_the_registry(registries: Registries) -> None:
    every = values_of("policy", "all-policies", "", registries)
    assert every == list(registries.policies)
    for view in ("guest", "host"):
        named = values_of("policy", view, "", registries)
        assert named == [name for name, kind in registries.policies.items() if kind.view == view]
        assert named
    assert values_of("policy", ["none", "host"], "", registries) == [
        "none",
        *values_of("policy", "host", "", registries),
    ]
    assert values_of("workload", "all-workloads", "", registries) == list(registries.workloads)
    assert values_of("workload", "guest", "", registries) == ["guest"]


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ([], "has no value"),
        ("9..1", "upwards"),
        ("1..9:0", "upwards"),
        ("1..900000000", "at most"),
        ("1,,2", "empty item"),
        ([1, 2, 1], "names 1 twice"),
        ([float("nan"), float("nan")], "names nan twice"),
        ([[1]], "must be text, a number"),
        ({"a": 1}, "must be text, a number"),
    ],
)
def test_what_is_no_axis_is_refused(written: object, says: str, registries: Registries) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        values_of("vms", written, "s.toml: axes: vms", registries)
    assert str(caught.value).startswith("s.toml: axes: vms")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_points_are_the_product_of_the_groups(lengths: list[int], data: st.DataObject) -> None:
    names = [f"axis{number}" for number in range(len(lengths))]
    axes: dict[str, list[object]] = {}
    for name, length in zip(names, lengths, strict=True):
        axes[name] = [f"{name}:{number}" for number in range(length)]
    tied = data.draw(st.sets(st.sampled_from(names)))
    group = sorted(tied)
    same = len({len(axes[name]) for name in group}) == 1
    zipped = [group] if group and same else []
    made = points(axes, zipped, "")
    free = [name for name in names if not zipped or name not in group]
    assert len(made) == math.prod(len(axes[name]) for name in free) * (len(axes[group[0]]) if zipped else 1)
    assert len({tuple(point.values()) for point in made}) == len(made)
    assert all(list(point) == names for point in made)
    plain = [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*axes.values())]
    for point in made:
        assert point in plain
        if zipped:
            assert len({str(point[name]).split(":")[1] for name in group}) == 1


@pytest.mark.parametrize(
    ("zipped", "says"),
    [([["a", "x"]], "no axis 'x'"), ([["a", "b"]], "a has 2, b has 3"), ([["a", "c"], ["c"]], "c is named twice")],
)
def test_axes_that_cannot_advance_together_are_refused(zipped: list[list[str]], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        points({"a": [1, 2], "b": [1, 2, 3], "c": [3, 4]}, zipped, "")
