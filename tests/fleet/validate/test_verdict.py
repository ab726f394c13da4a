"""fleet.validate.verdict: plain words for a ratio, and what stands beside it."""

from dataclasses import replace
from typing import Any

import pytest

from fleet.validate.claims import Claim
from fleet.validate.groups import Group
from fleet.validate.published import Figure, Published
from fleet.validate.verdict import Verdict, compare, judge

PUBLISHED = Published({"x": Figure(2.0, "x", "seed, somewhere")}, {})
CLAIM = Claim(
    "x", "twice as many", "mechanism", ("a",), "x", lambda results: results["a"]["count"],
    needs=("kept",), costs={"invept": ("a",), "vmexit": ("a",)}, confounders=("kernels",),
)  # fmt: skip
WORDS = Claim("y", "it happens", "by definition", ("a",), holds=lambda results: (results["a"]["count"] > 0, "seen"))


def groups(kept: bool) -> dict[str, Group]:
    return {"kept": Group("kept", 1.0, 1.0 if kept else 9.0, kept, "")}


def ran(count: float, outcome: str = "ok") -> dict[str, Any]:
    return {"a": {"outcome": outcome, "count": count}}


@pytest.mark.parametrize(
    ("emulated", "published", "neutral", "verdict"),
    [
        (2.5, 2.0, 1.0, Verdict.AGREES),
        (1.5, 2.0, 1.0, Verdict.AGREES),
        (2.51, 2.0, 1.0, Verdict.DIRECTION),
        (1.1, 2.0, 1.0, Verdict.DIRECTION),
        (0.9, 2.0, 1.0, Verdict.DISAGREES),
        (1.0, 2.0, 1.0, Verdict.DISAGREES),
        (0.2, 0.5, 1.0, Verdict.DIRECTION),
        (1.2, 0.5, 1.0, Verdict.DISAGREES),
    ],
)
def test_a_ratio_in_plain_words(emulated: float, published: float, neutral: float, verdict: Verdict) -> None:
    assert compare(emulated, published, neutral) == verdict


def test_a_judgement_has_ratio_range_and_confounders() -> None:
    found = judge(CLAIM, ran(2.2), {"invept": [ran(0.5), ran(4.0)]}, PUBLISHED, groups(True))
    assert (found.verdict, found.emulated, found.published) == (Verdict.AGREES, 2.2, 2.0)
    assert found.ratio == pytest.approx(1.1)
    assert (found.low, found.high) == (0.5, 4.0)
    assert found.range_verdicts == (Verdict.DISAGREES, Verdict.DIRECTION)
    assert (found.varied, found.unvaried) == ({"invept": [0.5, 4.0]}, ("vmexit",))
    assert found.confounders == ("kernels",)
    assert found.basis == "mechanism"


def test_a_broken_group_leaves_the_figure_and_takes_the_verdict() -> None:
    found = judge(CLAIM, ran(2.2), {}, PUBLISHED, groups(False))
    assert (found.verdict, found.emulated, found.breaks) == (Verdict.NOT_COMPARABLE, 2.2, ("kept",))
    assert (found.low, found.high) == (None, None)


def test_what_did_not_run_has_no_figure() -> None:
    absent = judge(CLAIM, {}, {}, PUBLISHED, groups(True))
    assert (absent.verdict, absent.emulated, absent.evidence) == (Verdict.NOT_RUN, None, "not there: a")
    failed = judge(CLAIM, ran(2.0, "failed"), {}, PUBLISHED, groups(True))
    assert (failed.verdict, failed.evidence) == (Verdict.NOT_RUN, "failed: a")


def test_a_claim_in_words_is_not_judged_by_a_run_that_failed() -> None:
    error: dict[str, Any] = {"kind": "cell", "message": "killed", "vm": None}
    killed = {"a": ran(1, "failed")["a"] | {"errors": [error]}}
    assert judge(WORDS, killed, {}, PUBLISHED, {}).verdict is Verdict.NOT_RUN
    deadly = replace(WORDS, may_die=("a",))
    assert judge(deadly, killed, {}, PUBLISHED, {}).verdict is Verdict.NOT_RUN
    error["vm"] = 0
    assert judge(deadly, killed, {}, PUBLISHED, {}).verdict is Verdict.AGREES
    assert judge(WORDS, killed, {}, PUBLISHED, {}).verdict is Verdict.NOT_RUN


def test_a_claim_in_words_holds_or_not_by_its_evidence() -> None:
    assert judge(WORDS, ran(1), {}, PUBLISHED, {}).verdict is Verdict.AGREES
    no = judge(WORDS, ran(0), {}, PUBLISHED, {})
    assert (no.verdict, no.evidence, no.source) == (Verdict.DISAGREES, "seen", "seed, in words")
