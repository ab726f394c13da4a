"""fleet.spec_values: exact reading and writing of quantities."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import SpecError
from fleet.spec_values import Given, exact_size, exact_time, fraction, parameter, size, time_ps
from guestd.params import Param


def value(raw: object) -> Given:
    return Given(raw, "here", Path())


@given(st.integers(0, 10**18))
def test_a_time_written_exactly_reads_back(ps: int) -> None:
    assert time_ps(value(exact_time(ps))) == ps


@given(st.integers(0, 1 << 50))
def test_a_size_written_exactly_reads_back(count: int) -> None:
    assert size(value(exact_size(count))) == count


@given(st.fractions(0, 1))
def test_a_fraction_keeps_its_value(number: Fraction) -> None:
    assert fraction(value(str(number))) == number


def test_fractions_have_many_spellings() -> None:
    assert {fraction(value(raw)) for raw in (0.2, "0.2", "1/5", "20%", "2e-1")} == {Fraction(1, 5)}


@pytest.mark.parametrize("raw", ["", "x", "1/0", None, True, [1], float("nan"), float("inf")])
def test_what_is_no_number_is_refused(raw: object) -> None:
    with pytest.raises(SpecError, match="here: must be a number"):
        fraction(value(raw))


@pytest.mark.parametrize(
    ("unit", "default", "raw", "expected"),
    [
        ("ms", 1, "0.5s", 500),
        ("ms", 1, 7, 7),
        ("ns", 1.0, "1us", 1000.0),
        ("pages", 1, "2MiB", 512),
        ("pages", 1, "3 pages", 3),
        ("MiB", 1, "1GiB", 1024),
        ("samples", 1, "1e6", 1_000_000),
        ("samples", 1, "12 samples", 12),
        ("", 0.5, "1/4", 0.25),
        ("", True, "off", False),
        ("", "a", "b", "b"),
    ],
)
def test_a_parameter_is_read_in_its_own_unit(unit: str, default: int, raw: object, expected: object) -> None:
    read = parameter(Param("p", default, unit, "", ""), value(raw))
    assert read == expected
    assert type(read) is type(default)


@pytest.mark.parametrize(("raw", "default"), [("1e300", 1), ("1e400", 1.0), ("1ms", 1), (3, "text"), ("a\nb", "text")])
def test_what_does_not_fit_the_parameter_is_refused(raw: object, default: int) -> None:
    with pytest.raises(SpecError, match="here: "):
        parameter(Param("p", default, "", "", ""), value(raw))
