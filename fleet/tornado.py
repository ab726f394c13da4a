"""What a sensitivity analysis shows: a table of the costs by their effect, and the same as a tornado figure.

Costs that nobody has published (grade ``estimated``) are marked in both: a conclusion that hangs on one of them hangs
on a guess.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fleet.atomic import replacing
from fleet.sensitivity import DECIDES, Effect

MOST_BARS = 20
UNPUBLISHED = "estimated"


def print_effects(effects: Sequence[Effect], console: Console) -> None:
    """The costs that decide, each with what it does; the others in one line."""
    if not effects:
        return
    first = effects[0]
    console.print(f"{first.metric} = {first.at_default:.6g} at the spec's own costs", markup=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in ("cost", "range", "at low", "at high", "swing", "grade"):
        table.add_column(title, no_wrap=True, justify="right" if title in ("at low", "at high", "swing") else "left")
    deciding = [effect for effect in effects if effect.decides]
    for effect in deciding:
        span = f"{effect.low:g} - {effect.default:g} - {effect.high:g} {effect.unit}"
        grade = "UNPUBLISHED (estimated)" if effect.grade == UNPUBLISHED else effect.grade
        swing = f"{100 * effect.swing:.1f} %" if math.isfinite(effect.swing) else "from 0"
        row = (effect.cost, span, _value(effect.at_low), _value(effect.at_high), swing, grade)
        table.add_row(*(Text(cell) for cell in row))
    if deciding:
        console.print(table)
    else:
        console.print("no cost moves it by more than " + f"{100 * DECIDES:g} % over its plausible range")
    if failed := [effect.cost for effect in deciding if effect.failed]:
        console.print("the run at an end of its range failed: " + ", ".join(failed), markup=False, soft_wrap=True)
    guesses = [effect.cost for effect in deciding if effect.grade == UNPUBLISHED]
    if guesses:
        console.print("it depends on costs that nobody has published: " + ", ".join(guesses), soft_wrap=True)
    rest = len(effects) - len(deciding)
    if rest:
        console.print(f"{rest} other costs move it by at most {100 * DECIDES:g} %", markup=False)


def _value(number: float | None) -> str:
    return "-" if number is None else f"{number:.6g}"


def draw(effects: Sequence[Effect], target: Path) -> None:
    """The tornado: a bar a cost from its low to its high end, the default as a line; ``target``: .png or .svg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [effect for effect in effects if effect.swing > 0][:MOST_BARS] or list(effects[:1])
    figure = Figure(figsize=(10, 1.6 + 0.34 * len(shown)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, effect in enumerate(reversed(shown)):
        unpublished = effect.grade == UNPUBLISHED
        for end, value, grey in (("low", effect.at_low, "0.80"), ("high", effect.at_high, "0.40")):
            if value is None:
                continue
            axes.barh(
                place, value - effect.at_default, 0.7, effect.at_default, color=grey, edgecolor="black",
                linewidth=0.8, hatch="//" if unpublished else "", label=end,
            )  # fmt: skip
            bound = effect.low if end == "low" else effect.high
            axes.annotate(
                f"{bound:g} {effect.unit}", (value, place), fontsize=7, va="center",
                ha="left" if value >= effect.at_default else "right",
                xytext=(3 if value >= effect.at_default else -3, 0), textcoords="offset points",
            )  # fmt: skip
    names = [effect.cost + (" *" if effect.grade == UNPUBLISHED else "") for effect in reversed(shown)]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.axvline(shown[0].at_default, color="black", linewidth=1.2)
    axes.set_xlabel(shown[0].metric)
    axes.set_title("light: cost at its low end, dark: at its high end; hatched and * = unpublished", fontsize=9)
    axes.margins(x=0.15)
    axes.grid(axis="x", color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(target) as temporary:
        figure.savefig(temporary, format=target.suffix.removeprefix("."))
