"""A claim's verdict: emulated beside published, the ratio, and how far costs that nobody has published move it."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from msgspec import Struct

from fleet.validate.claims import Claim, Results
from fleet.validate.groups import Group
from fleet.validate.published import Published

AGREES_WITHIN = 0.25


class Verdict(StrEnum):
    """In plain words."""

    AGREES = "agrees"
    DIRECTION = "same direction"
    DISAGREES = "disagrees"
    NOT_COMPARABLE = "not comparable at this scale"
    NOT_RUN = "not run"


class Judgement(Struct, frozen=True):
    """One claim, judged."""

    claim: str
    statement: str
    verdict: Verdict
    basis: str
    published: float | None
    emulated: float | None
    ratio: float | None
    """Emulated over published."""
    low: float | None
    high: float | None
    """Range of the emulated value over the plausible ranges of the costs in ``varied``, each moved alone."""
    varied: dict[str, list[float]]
    """The emulated value with one unpublished cost at its lowest and its highest."""
    unvaried: tuple[str, ...]
    """Unpublished costs that the claim names and that this call left at their defaults."""
    range_verdicts: tuple[str, ...]
    """What the verdict would be at either end of the range, where that is another one."""
    breaks: tuple[str, ...]
    """Dimensionless groups that it needs and this scale breaks."""
    confounders: tuple[str, ...]
    evidence: str
    source: str


def judge(
    claim: Claim,
    results: Results,
    moved: Mapping[str, Sequence[Results]],
    published: Published,
    groups: Mapping[str, Group],
) -> Judgement:
    """The judgement. ``moved``: by cost, the results with it at either end (without those where a run failed)."""
    figure = published.figures[claim.published] if claim.published else None
    breaks = tuple(name for name in claim.needs if not groups[name].kept)
    missing = [cell for cell in claim.cells if cell not in results]
    failed = [cell for cell in claim.cells if cell in results and _failed(results[cell], cell in claim.may_die)]
    value: float | None = None
    evidence = ""
    varied: dict[str, list[float]] = {}
    span: list[float] = []
    ends: tuple[str, ...] = ()
    if missing or failed:
        verdict = Verdict.NOT_RUN
        evidence = "not there: " + ", ".join(missing) if missing else "failed: " + ", ".join(failed)
    elif claim.holds:
        holds, evidence = claim.holds(results)
        verdict = Verdict.AGREES if holds else Verdict.DISAGREES
    else:
        assert claim.value is not None and figure is not None
        value = claim.value(results)
        varied = {cost: [claim.value(other) for other in ends_of] for cost, ends_of in moved.items()}
        span = [value, *(end for at_ends in varied.values() for end in at_ends)]
        verdict = compare(value, figure.value, claim.neutral(results))
        ends = tuple(
            end
            for at in (min(span), max(span))
            if (end := compare(at, figure.value, claim.neutral(results))) != verdict
        )
        verdict = Verdict.NOT_COMPARABLE if breaks else verdict
    return Judgement(
        claim=claim.key,
        statement=claim.statement,
        verdict=verdict,
        basis=claim.basis,
        published=figure.value if figure else None,
        emulated=value,
        ratio=value / figure.value if figure and value is not None else None,
        low=min(span) if moved and span else None,
        high=max(span) if moved and span else None,
        varied=varied,
        unvaried=tuple(cost for cost in claim.costs if cost not in moved),
        range_verdicts=tuple(dict.fromkeys(ends)),
        breaks=breaks,
        confounders=claim.confounders,
        evidence=evidence,
        source=figure.source if figure else "seed, in words",
    )


def compare(emulated: float, published: float, neutral: float) -> Verdict:
    """``agrees`` within 25 %, ``same direction`` if both lie on the same side of ``neutral``, else ``disagrees``."""
    if abs(emulated / published - 1) <= AGREES_WITHIN:
        return Verdict.AGREES
    return Verdict.DIRECTION if (emulated - neutral) * (published - neutral) > 0 else Verdict.DISAGREES


def _failed(summary: Mapping[str, Any], may_die: bool) -> bool:
    """Whether nothing can be learnt from it; ``may_die``: a VM that died in it is something."""
    died = may_die and any(error.get("vm") is not None for error in summary["errors"])
    return summary["outcome"] != "ok" and not died
