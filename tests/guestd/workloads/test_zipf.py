"""Zipf's law: tables against the law in floating point, draws against the tables."""

from decimal import localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.jit import int64, kernel
from guestd.random import State, next_u64, streams
from guestd.workloads import zipf
from guestd.workloads.zipf import HEAD, MASS_SHIFT, Zipf, new_zipf
from proto.arrays import Words

DRAWS = 2_000_000


@kernel
def draw(z: Zipf, u: Words, fine: Words, out: Words) -> None:
    for i in range(u.size):
        out[i] = zipf.draw_rank(z, u[i], fine[i])


@kernel
def histogram(z: Zipf, rng: State, draws: int, counts: Words) -> None:
    for _ in range(draws):
        r = next_u64(rng)
        counts[zipf.draw_rank(z, int64(r >> np.uint64(32)), int64(r) & 0xFFF)] += 1


@kernel
def masses(z: Zipf, out: Words) -> None:
    for rank in range(out.size):
        out[rank] = zipf.mass(z, rank)


CASES = [(1, "0.99"), (5, "0.5"), (HEAD, "0.99"), (HEAD + 1, "0.99"), (200_000, "0.99"), (50_000, "1"),
         (100_000, "1.3"), (3000, "0.2")]  # fmt: skip


@pytest.mark.parametrize(("ranks", "exponent"), CASES)
def test_masses_are_the_law(ranks: int, exponent: str) -> None:
    out = np.zeros(ranks, np.int64)
    masses(new_zipf(ranks, exponent), out)
    weights = np.arange(1, ranks + 1) ** -float(exponent)
    law = weights / weights.sum()
    found = out / (1 << MASS_SHIFT)
    assert found.sum() == pytest.approx(1, abs=1e-6)
    head = slice(0, HEAD)
    assert np.allclose(found[head], law[head], rtol=1e-6, atol=2**-31), "the first ranks exactly"
    assert np.allclose(found, law, rtol=5e-3), "the tail to half a per cent"


@pytest.mark.parametrize(("ranks", "exponent"), CASES)
def test_draws_follow_the_masses(ranks: int, exponent: str) -> None:
    """Pearson's chi-square over ranks grouped to at least 100 expected draws."""
    z = new_zipf(ranks, exponent)
    out, counts = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    masses(z, out)
    histogram(z, streams(9, 1)[0], DRAWS, counts)
    expected = out / (1 << MASS_SHIFT) * DRAWS
    group = np.unique((np.cumsum(expected) / 100).astype(int), return_inverse=True)[1]
    wanted, observed = np.bincount(group, expected), np.bincount(group, counts)
    chi_square = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = max(1, wanted.size - 1)
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5


@given(ranks=st.integers(1, (1 << 31) - 1), exponent=st.sampled_from(("0.01", "0.7", "0.99", "1", "1.21", "3")),
       u=st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=20))  # fmt: skip
def test_ranks_are_in_range_and_rise_with_the_draw(ranks: int, exponent: str, u: list[int]) -> None:
    draws = np.array([0, *sorted(u), (1 << 32) - 1])
    out = np.zeros_like(draws)
    fine = np.zeros_like(draws)
    fine[-1] = 4095
    draw(new_zipf(ranks, exponent), draws, fine, out)
    assert out[0] == 0 and (np.diff(out) >= 0).all()
    assert out.max() < ranks


@pytest.mark.parametrize("exponent", ["0.99", "2", "3"])
@pytest.mark.parametrize("ranks", [1_000_000, (1 << 31) - 1])
def test_the_end_of_the_tail_is_linear_in_the_draw(ranks: int, exponent: str) -> None:
    """The last draws against the table in unbounded integers; the very last comes within one draw of the end."""
    z = new_zipf(ranks, exponent)
    left = (1 << 32) - int(z.head[-1])
    fine = np.arange(0, 4096, 65)
    out = np.zeros_like(fine)
    draw(z, np.full_like(fine, (1 << 32) - 1), fine, out)
    for got, bits in zip(out.tolist(), fine.tolist(), strict=True):
        q, inside = divmod((left - 1) * 4096 + bits, left)
        start, end = int(z.tail[q]), int(z.tail[q + 1])
        rank = start + (end - start) * inside // left - (1 << 15) >> 16
        resolution = (end - start) / (1 << 39)
        assert got == pytest.approx(rank, abs=1 + resolution)
    assert ranks - 1 - int(out[-1]) <= 1 + resolution + (end - start >> 16) / left


def test_tables_do_not_depend_on_the_decimal_context() -> None:
    first = new_zipf(100_000, "0.99")
    new_zipf.cache_clear()
    with localcontext() as context:
        context.prec = 5
        again = new_zipf(100_000, "0.99")
    assert again is not first
    for table in ("head", "guide", "tail", "cells"):
        assert np.array_equal(getattr(first, table), getattr(again, table))
