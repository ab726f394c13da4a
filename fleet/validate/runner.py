"""Runs the check: the experiments' cells, the same with unpublished costs at their bounds, and then the verdicts."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from fleet import hosts
from fleet.cells import Summary, failure, run_cells
from fleet.errors import SpecError
from fleet.experiment import Experiment
from fleet.names import unknown
from fleet.sensitivity import moved
from fleet.sweep.progress import Progress
from fleet.validate import claims as c
from fleet.validate import published
from fleet.validate.experiments import FIGURE_POLICIES, FIGURE_VMS, MEANT_TO_FAIL, TABLE_POLICIES, Plan, cells
from fleet.validate.groups import Group, groups
from fleet.validate.verdict import Judgement, judge

Extent = Literal["none", "quick", "all"]
"""Which of each claim's unpublished costs are moved: none, the most decisive (`Claim.quick`), or all."""


class FlushRow(Struct, frozen=True):
    """One design of the TLB-flush table, emulated beside published."""

    policy: str
    raw: dict[str, int]
    published: dict[str, float]
    net: int
    """Total flushes less the background: the fewest local flushes of one page of any column."""
    published_net: float
    invepts: int
    executions_per_request: float
    published_executions_per_request: float | None
    elapsed_s: float
    elapsed_with_populate_s: float
    guest_mode_ratio: float
    fast_ratio: float
    mops: float


class FigureRow(Struct, frozen=True):
    """One point of the scalability figure."""

    policy: str
    vms: int
    cores: float
    stages: dict[str, float]
    """The same, by stage."""
    stolen_cores: float
    """vCPU time that tiering took away in all, in cores: what burns on vCPUs and what they waited for."""
    virtual_s: float
    tco: float
    """Cores x price."""


class Report(Struct, frozen=True):
    """All of the check's outcome."""

    scale: str
    table_updates: int
    price: float
    judgements: list[Judgement]
    flushes: list[FlushRow]
    figure: list[FigureRow]
    groups: list[Group]
    absent: list[str]
    """Policies of the figure that this installation does not have."""
    failed: dict[str, str]
    """Cells that failed but for the one that is meant to -> why."""


def check(
    plan: Plan, extent: Extent, price: float, root: Path, only: Sequence[str] = (),
    *, jobs: int = 1, progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Run it. ``extent``: which unpublished costs are moved. ``price``: of a core.

    ``only``: keys of the claims to judge (none: all), and the cells that they need. Raises SpecError if unknown.
    """
    chosen = _chosen(only)
    needed = {cell for claim in chosen for cell in claim.cells}
    experiments = {name: one for name, one in cells(plan).items() if not only or name in needed}
    variants = cost_variants(chosen, experiments, extent)
    summaries = run_cells(experiments | _flat(variants), root, jobs=jobs, progress=progress)
    results = {name: summaries[name] for name in experiments}
    figures = published.load()
    kept = groups(plan)
    judgements = [
        judge(claim, results, _moved(claim, variants, results, summaries, extent), figures, kept) for claim in chosen
    ]
    return Report(
        scale=str(plan.scale),
        table_updates=plan.updates,
        price=price,
        judgements=judgements,
        flushes=flush_rows(results, figures),
        figure=figure_rows(results, price),
        groups=list(kept.values()),
        absent=[policy for policy in FIGURE_POLICIES if policy not in plan.policies],
        failed={
            name: failure(summary)
            for name, summary in summaries.items()
            if summary["outcome"] != "ok" and name != MEANT_TO_FAIL
        },
    )


Variants = dict[tuple[str, str], dict[str, Experiment]]
"""(cost, end) -> the cells that it moves."""


def _chosen(only: Sequence[str]) -> list[c.Claim]:
    known = {claim.key: claim for claim in c.CLAIMS}
    for key in only:
        if key not in known:
            raise SpecError("--claim: " + unknown("claim", key, known))
    return [claim for key, claim in known.items() if not only or key in only]


def _costs(claim: c.Claim, extent: Extent) -> list[tuple[str, tuple[str, ...]]]:
    most = {"none": 0, "quick": claim.quick, "all": len(claim.costs)}
    return list(claim.costs.items())[: most[extent]]


def cost_variants(claims: Iterable[c.Claim], experiments: Mapping[str, Experiment], extent: Extent) -> Variants:
    """The cells that have to run again, for each claim's costs at either bound."""
    found: Variants = {}
    for claim in claims:
        for cost, names in _costs(claim, extent):
            for name in names:
                if name not in experiments:
                    continue
                profile = hosts.load_profile(experiments[name].host)
                figure = profile.figures[cost]
                for end, bound in (("low", figure.low), ("high", figure.high)):
                    found.setdefault((cost, end), {})[name] = moved(experiments[name], figure, bound, profile)
    return found


def _flat(variants: Variants) -> dict[str, Experiment]:
    return {
        _variant_name(name, cost, end): experiment
        for (cost, end), cells_ in variants.items()
        for name, experiment in cells_.items()
    }


def _variant_name(cell: str, cost: str, end: str) -> str:
    return f"{cell}, {cost} {end}"


def _moved(
    claim: c.Claim, variants: Variants, results: Mapping[str, Summary], summaries: Mapping[str, Summary], extent: Extent
) -> dict[str, Sequence[Mapping[str, Summary]]]:
    """By cost, the results with the claim's cells replaced by those at a bound of the cost."""
    found: dict[str, Sequence[Mapping[str, Summary]]] = {}
    for cost, names in _costs(claim, extent):
        ends = []
        for end in ("low", "high"):
            there = {
                name: summaries[_variant_name(name, cost, end)]
                for name in names
                if name in variants.get((cost, end), {})
            }
            if there and all(summary["outcome"] == "ok" for summary in there.values()):
                ends.append(dict(results) | there)
        if ends:
            found[cost] = ends
    return found


def _ok(summary: Summary | None) -> bool:
    return summary is not None and summary["outcome"] == "ok"


def flush_rows(results: Mapping[str, Summary], figures: published.Published) -> list[FlushRow]:
    """The TLB-flush table."""
    there = [policy for policy in TABLE_POLICIES if _ok(results.get(f"table/{policy}"))]
    raws = {policy: c.raw(results[f"table/{policy}"]) for policy in there}
    background = min((raw["nr_tlb_local_flush_one"] for raw in raws.values()), default=0)
    published_background = min(raw["nr_tlb_local_flush_one"] for raw in figures.raw.values())
    rows = []
    for policy in there:
        summary, raw, known = results[f"table/{policy}"], raws[policy], figures.raw[policy]
        requests = known["remote_tlb_flush"]
        rows.append(
            FlushRow(
                policy=policy,
                raw=raw,
                published=known,
                net=raw["total"] - background,
                published_net=known["total"] - published_background,
                invepts=c.invepts(summary),
                executions_per_request=c.executions_per_request(summary),
                published_executions_per_request=known["tlb_flush"] / requests if requests else None,
                elapsed_s=c.elapsed_s(summary),
                elapsed_with_populate_s=c.elapsed_s(summary, populate=True),
                guest_mode_ratio=summary["vms"][0]["kvm"]["guest_mode_ratio"],
                fast_ratio=summary["vms"][0]["access"]["fast_ratio"],
                mops=summary["vms"][0]["throughput_mops"],
            )
        )
    return rows


def figure_rows(results: Mapping[str, Summary], price: float) -> list[FigureRow]:
    """The scalability figure's points, and what they cost."""
    rows = []
    for policy in FIGURE_POLICIES:
        for vms in FIGURE_VMS:
            summary: Any = results.get(f"figure/{policy}/{vms}")
            if _ok(summary):
                cores = c.cores(summary)
                rows.append(
                    FigureRow(
                        policy,
                        vms,
                        cores,
                        c.stage_cores(summary),
                        c.stolen_cores(summary),
                        c.elapsed_s(summary),
                        cores * price,
                    )
                )
    return rows
