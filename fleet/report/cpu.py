"""What tiering costs in CPU: cores against the number of VMs, and stacked by stage. Measured and modelled, never mixed.

The figures are those of the field: cores spent by agents over VMs (Demeter's figure 6 and its like), and the stages
track, classify and migrate of `guestd.tiering`.
"""

from collections.abc import Sequence

from fleet.report.figure import Absent, Axis, Figure, Look, Series, positions, values
from fleet.report.subject import Subject, advancing_with, axes_label

STAGES = ("track", "classify", "migrate")
_KINDS = (("measured", 0), ("modelled", 1))
MOST_SHOWN = 8


def cores_by_vms(found: Sequence[Subject]) -> Figure | Absent:
    """Cores of all agents together over the number of VMs: a pair of lines per policy (and other axes)."""
    title = "Cores spent by agents"
    if not any("vms" in subject.axes for subject in found):
        return Absent(title, "it takes a sweep with the axis vms")
    lines: dict[str, list[Subject]] = {}
    along = advancing_with("vms", [subject.axes for subject in found])
    for subject in found:
        lines.setdefault(axes_label(subject.axes, along), []).append(subject)
    series = []
    for index, (label, members) in enumerate(lines.items()):
        members.sort(key=_vms)
        for kind, dash in _KINDS:
            spreads = [(_vms(one), s) for one in members if (s := one.total(f"agent_cpu.{kind}_cores")) is not None]
            if not spreads:
                continue
            repeated = any(len(one.fleets) > 1 for one in members)
            series.append(
                Series(
                    f"{label} ({kind})",
                    values([vms for vms, _ in spreads]),
                    values([s.mean for _, s in spreads]),
                    Look(dash=dash, marker=index, colour=index),
                    low=values([s.low for _, s in spreads]) if repeated else None,
                    high=values([s.high for _, s in spreads]) if repeated else None,
                    shown=index < MOST_SHOWN,
                )
            )
    if not series:
        return Absent(title, "no VM of a finished cell tells its agent's CPU")
    note = (
        "CPU-seconds of all agents per virtual second. Measured (solid): what this machine spent on the agents; "
        "modelled (dashed): counted operations times their cost on the emulated host. Bars: range of the repetitions."
    )
    return Figure(
        "agent-cores", title, Axis("number of VMs", "", whole=True), Axis("CPU of agents", "cores"), tuple(series), note
    )


def _vms(subject: Subject) -> int:
    return int(float(str(subject.axes["vms"])))


def by_stage(found: Sequence[Subject]) -> Figure | Absent:
    """Agent CPU stacked by stage: a measured and a modelled bar for each VM or point."""
    title = "Agent CPU by stage"
    having = [subject for subject in found if subject.total("agent_cpu.modelled_s.total") is not None]
    if not having:
        return Absent(title, "no VM tells its agent's CPU")
    series = []
    for kind, edge in _KINDS:
        for number, stage in enumerate(STAGES):
            per_second = []
            for subject in having:
                spent = subject.total(f"agent_cpu.{kind}_s.{stage}")
                ran = subject.mean("virtual_s")
                per_second.append(1000 * spent.mean / ran.mean if spent and ran and ran.mean else None)
            series.append(
                Series(
                    f"{stage} ({kind})", positions(len(having)), values(per_second), Look(colour=edge, hatch=number),
                    "bar", stack=kind,
                )
            )  # fmt: skip
    note = (
        "Left bar, black outline: measured on this machine. Right bar, orange outline: modelled for the emulated host."
    )
    categories = tuple(subject.label for subject in having)
    x, y = Axis("", "", categories=categories), Axis("CPU of agents", "millicores")
    return Figure("agent-stages", title, x, y, tuple(series), note)
