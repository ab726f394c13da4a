"""fleet.sweep.where: filters over points."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import SpecError
from fleet.sweep.where import holds

POINT: dict[str, object] = {
    "vms": 4,
    "seconds": 20,
    "policy": "h-tpp",
    "memory": "2GiB",
    "policy.scan_period": "60ms",
    "huge": True,
}


@pytest.mark.parametrize(
    ("expression", "truth"),
    [
        ("vms <= 4", True),
        ("vms < 4 or policy != 'h-tpp'", False),
        ("not (vms == 3) and policy in ['h-tpp', 'g-tpp']", True),
        ("policy not in ('none',)", True),
        ("1 < vms < 9", True),
        ("vms * 2 - 1 == 7", True),
        ("vms % 2 == 1", False),
        ("memory <= '4GiB'", True),
        ("memory == '2048MiB'", True),
        ("policy.scan_period > '1s'", False),
        ("policy.scan_period == '0.06s'", True),
        ("seconds <= '10s'", False),
        ("vms < 5 and policy != '1e99999999'", True),
        ("huge", True),
        ("vms > -1", True),
    ],
)
def test_an_expression_is_judged_by_the_axes(expression: str, truth: bool) -> None:
    assert holds(expression, POINT, "where") is truth


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("vms <=", "is no expression"),
        ("vmz == 1", "did you mean 'vms'"),
        ("policy.scan_perod == 1", "did you mean 'policy.scan_period'"),
        ("__import__('os')", "only axes"),
        ("vms.real[0]", "only axes"),
        ("policy < 3", "makes no sense at vms=4"),
        ("vms / 0 == 1", "makes no sense"),
        ("'%q' % vms", "makes no sense"),
        ("not " * 3000 + "huge", "."),
        ("[x for x in 'a']", "only axes"),
    ],
)
def test_anything_else_is_refused(expression: str, says: str) -> None:
    with pytest.raises(SpecError, match=says.replace("[", r"\[")) as caught:
        holds(expression, POINT, "s.toml: where")
    assert str(caught.value).startswith("s.toml: where: ")


NUMBERS = st.integers(-5, 5)
LEAVES = st.one_of(
    st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["<", "<=", "==", "!=", ">", ">="]), NUMBERS).map(
        lambda parts: f"{parts[0]} {parts[1]} {parts[2]}"
    ),
)
TREES = st.recursive(
    LEAVES,
    lambda below: st.one_of(
        st.tuples(below, st.sampled_from(["and", "or"]), below).map(lambda p: f"({p[0]}) {p[1]} ({p[2]})"),
        below.map(lambda inner: f"not ({inner})"),
    ),
    max_leaves=8,
)


@given(TREES, NUMBERS, NUMBERS)
def test_it_means_what_python_means(expression: str, a: int, b: int) -> None:
    scope: dict[str, Any] = {"__builtins__": {}}
    assert holds(expression, {"a": a, "b": b}, "") is bool(eval(expression, scope, {"a": a, "b": b}))
