"""``fleet validate`` and ``fleet sensitivity``."""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from fleet.errors import SpecError

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
DEFAULT_SCALE = "1/512"
JOBS = 2
"""Nothing here is measured CPU, which runs beside each other would disturb."""


def validate(
    scale: Annotated[
        str | None, typer.Option(metavar="F", help=f"Factor on memory, caches, updates and times [{DEFAULT_SCALE}]")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="The real size: 144 GiB. 2 h on 2 cores.")] = False,
    updates: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Updates of the table's GUPS before scale, which are not published."),
    ] = None,
    costs: Annotated[
        str, typer.Option(metavar="none|quick|all", help="Unpublished costs to move for a verdict's range.")
    ] = "quick",
    claim: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Only this claim and the runs it needs; repeatable.")
    ] = None,
    price: Annotated[float, typer.Option(metavar="P", min=0, help="Price of a core, for the TCO.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="K", min=0, help="Seed of all randomness.")] = 1,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where runs are kept; the same again runs only what is missing.")
    ] = Path("runs/validate"),
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Runs at once.")] = JOBS,
    as_json: Json = False,
) -> None:
    """Emulate the published experiments and put published and emulated figures side by side, with a verdict each.

    \b
    Examples:
      fleet validate
      fleet validate --scale 1/128 --costs all --out runs/check
      fleet validate --claim flushes_h_over_g --claim pml_no_filter
      fleet validate --full --costs none
    """
    import msgspec

    from fleet.atomic import write_atomic
    from fleet.cells import label
    from fleet.sweep.progress import Display
    from fleet.validate import experiments, runner, table

    if costs not in get_args(runner.Extent):
        raise SpecError(f"--costs: must be one of {', '.join(get_args(runner.Extent))}, not {costs!r}")
    if full and scale is not None:
        raise SpecError("--full: is --scale 1 already; give one of them")
    if not math.isfinite(price):
        raise SpecError(f"--price {price}: must be a finite number")
    plan = experiments.plan(_scale("1" if full else scale or DEFAULT_SCALE), updates, seed)
    console, progress = _consoles()
    with Display(progress, meant_to_fail={label(experiments.MEANT_TO_FAIL)}) as display:
        report = runner.check(plan, cast(runner.Extent, costs), price, out, claim or [], jobs=jobs, progress=display)
    plain = json.dumps(msgspec.to_builtins(report), indent=2) + "\n"
    write_atomic(out / "validate.json", plain)
    if as_json:
        sys.stdout.write(plain)
    else:
        table.print_report(report, console)
    raise typer.Exit(1 if report.failed else 0)


def sensitivity(
    spec: Annotated[Path, typer.Argument(help="Experiment as a TOML file.")],
    *,
    metric: Annotated[str, typer.Option(metavar="M", help="A path into summary.json, e.g. elapsed.virtual_s.")],
    cost: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this cost; repeatable.")] = None,
    grade: Annotated[
        list[str] | None, typer.Option(metavar="G", help="Only costs of this grade, e.g. estimated; repeatable.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in fleet run; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Results [runs/sensitivity-SPEC]")] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Runs at once.")] = JOBS,
    as_json: Json = False,
) -> None:
    """Move each cost of the host profile over its plausible range and say which ones a metric depends on.

    \b
    Examples:
      fleet sensitivity examples/tlb_flush_h_tpp.toml --metric elapsed.virtual_s
      fleet sensitivity examples/tlb_flush_h_tpp.toml --metric "sum(vms[*].flushes.total)" --cost invept --cost vmexit
      fleet sensitivity examples/tlb_flush_h_tpp.toml --metric "vms[*].throughput_mops" --grade estimated
    """
    import msgspec

    from fleet import hosts, tornado
    from fleet.sensitivity import analyse, choose, write
    from fleet.spec import load
    from fleet.sweep.progress import Display

    experiment = load(spec, {}, setting or [])
    profile = hosts.load_profile(_host(spec), spec.parent)
    figures = choose(profile, cost or [], grade or [])
    if not figures:
        raise SpecError("no cost to move: --cost and --grade leave none")
    directory = out or Path("runs") / f"sensitivity-{spec.stem}"
    console, progress = _consoles()
    with Display(progress) as display:
        effects = analyse(experiment, figures, profile, metric, directory, jobs=jobs, progress=display)
    path = write(effects, directory)
    for name in ("tornado.png", "tornado.svg"):
        tornado.draw(effects, directory / name)
    if as_json:
        sys.stdout.write(json.dumps(msgspec.to_builtins(effects), indent=2) + "\n")
        return
    tornado.print_effects(effects, console)
    console.print(f"figure:  {directory / 'tornado.png'}", markup=False, soft_wrap=True)
    console.print(f"results: {path}", markup=False, soft_wrap=True)


def _scale(text: str) -> Any:
    from fractions import Fraction

    try:
        scale = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise SpecError(f"--scale {text}: not a fraction; write e.g. 1/256") from None
    if not 0 < scale <= 1:
        raise SpecError(f"--scale {text}: must be above 0 and at most 1")
    return scale


def _host(spec: Path) -> str:
    """The profile that a spec file names."""
    import tomllib

    from fleet.hosts import DEFAULT_PROFILE

    return str(tomllib.loads(spec.read_text("utf-8")).get("host", DEFAULT_PROFILE))


def _consoles() -> tuple["Console", "Console"]:
    """For the result, and for progress on standard error."""
    from rich.console import Console

    tty = sys.stdout.isatty()
    return Console(highlight=False) if tty else Console(highlight=False, width=160), Console(stderr=True)
