"""The command line. Every command refuses bad input with one line on standard error and exit code 2.

Exit codes: 0 all well, 1 something in the run failed, 2 bad input, 130 interrupted. Libraries that take long to import
are imported by the command that needs them.
"""

import codecs
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar

import typer

from fleet import __version__
from fleet.conformance_cli import conformance
from fleet.errors import FleetError, SpecError
from fleet.names import unknown
from fleet.plain_table import print_table as _print_table
from fleet.report.cli import report
from fleet.sweep.cli import sweep
from fleet.sweep.results_cli import app as results_app
from fleet.sweep.results_cli import compare
from fleet.trace.cli import app as trace_app
from fleet.validate.cli import sensitivity, validate
from proto.errors import ProtoError

if TYPE_CHECKING:
    from fleet.hosts import Profile
    from fleet.spec import Kind
    from guestd.tiering.stage import Stage

INTERRUPTED = 130

K = TypeVar("K")

app = typer.Typer(
    name="fleet", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)  # fmt: skip
hosts_app = typer.Typer(rich_markup_mode=None)
app.add_typer(hosts_app, name="hosts")
app.add_typer(
    trace_app, name="trace", help="Import recorded memory accesses, and look into them.", no_args_is_help=False
)
app.command()(sweep)
app.add_typer(results_app, name="results", help="Look into the results of sweeps and runs.", no_args_is_help=False)
app.command()(compare)
app.command()(conformance)
app.command()(report)
app.command()(validate)
app.command()(sensitivity)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    """Tierfleet: a fleet of emulated VMs on tiered memory, and what tiering costs and gains each of them.

    \b
    Example: two VMs under TPP in the guest, for five virtual seconds
      fleet run --vms 2 --policy g-tpp --workload gups --memory 256MiB --seconds 5
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    spec: Annotated[Path | None, typer.Argument(help="Experiment as a TOML file; flags override it.")] = None,
    *,
    vms: Annotated[str | None, typer.Option(metavar="N", help="Number of VMs [1]")] = None,
    policy: Annotated[str | None, typer.Option(metavar="P", help="See fleet policies [none]")] = None,
    workload: Annotated[str | None, typer.Option(metavar="W", help="See fleet workloads [gups]")] = None,
    host: Annotated[
        str | None, typer.Option(metavar="PROFILE", help="See fleet hosts, or a TOML file [xeon-8360y-optane]")
    ] = None,
    vcpus: Annotated[str | None, typer.Option(metavar="N", help="vCPUs of each VM [1]")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of each VM, e.g. 16GiB [512MiB]")] = None,
    fast_ratio: Annotated[str | None, typer.Option(metavar="R", help="Share of it that is fast [0.2]")] = None,
    seconds: Annotated[str | None, typer.Option(metavar="S", help="Virtual time of the run phase [10]")] = None,
    transactions: Annotated[str | None, typer.Option(metavar="N", help="Or its length in accesses, per VM")] = None,
    scale: Annotated[str | None, typer.Option(metavar="F", help="Factor on memory, caches, transactions [1]")] = None,
    seed: Annotated[str | None, typer.Option(metavar="K", help="Seed of all randomness [1]")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="policy.K, workload.K, host.K, guest.K or engine.K; repeatable"
        ),
    ] = None,
    clock: Annotated[str | None, typer.Option(metavar="C", help="virtual (realtime: not yet) [virtual]")] = None,
    sample: Annotated[str | None, typer.Option(metavar="T", help="Interval of the time series [100ms]")] = None,
    heat: Annotated[
        bool | None, typer.Option("--heat/--no-heat", help="Record page heat by gVA, gPA and hPA [no]")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run [time-policy-workload]")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Directory for results [runs/NAME]")] = None,
    as_json: Json = False,
) -> None:
    """Run a fleet of VMs and say what tiering cost and gained each.

    \b
    Examples:
      fleet run examples/quickstart.toml
      fleet run --vms 3 --policy g-tpp --workload gups --memory 16GiB --scale 1/32 --seconds 20 --json
      fleet run --policy hyperplace --memory 16MiB --workload trace --set workload.file=examples/hot_set.trace
      fleet run --policy h-tpp --set host.invept=1us --set workload.layout=scattered
      fleet run --policy hyperplace --vcpus 4 --memory 1GiB --heat
    """
    flags = {
        "vms": vms, "policy": policy, "workload": workload, "host": host, "vcpus": vcpus, "memory": memory,
        "fast_ratio": fast_ratio, "seconds": seconds, "transactions": transactions, "scale": scale, "seed": seed,
        "clock": clock, "sample": sample, "heat": heat, "name": name,
    }  # fmt: skip
    from fleet.spec import load

    experiment = load(spec, flags, setting or [])
    from fleet.run import run_experiment

    raise typer.Exit(run_experiment(experiment, out, as_json))


@app.command()
def policies(
    name: Annotated[str | None, typer.Argument(help="Only this one, with its parameters.")] = None,
    params: Annotated[bool, typer.Option("--params", help="Also every parameter with unit and source.")] = False,
    stages: Annotated[bool, typer.Option("--stages", help="The stages that policies are made of instead.")] = False,
    as_json: Json = False,
) -> None:
    """List the tiering policies: which view of memory they work on, their stages, their source.

    \b
    Examples: everything that can be set on one of them; what its stages can be exchanged for, and how
      fleet policies g-tpp
      fleet policies --stages
      fleet run --policy g-tpp --set migrator=swap --memory 64MiB --seconds 5
    """
    from guestd.tiering.registry import policies as registry
    from guestd.tiering.registry import stages as all_stages

    if stages:
        _stages(all_stages(), as_json)
        return
    known = _only("policy", name, registry())
    if as_json:
        _print_json(
            {
                key: {"view": kind.view, "summary": kind.summary, "stages": dict(kind.stages), "source": kind.source,
                      "params": _params(kind)}
                for key, kind in known.items()
            }
        )  # fmt: skip
        return
    rows = [
        (key, kind.view, "\n".join(f"{stage}: {what}" for stage, what in kind.stages.items()), kind.source)
        for key, kind in known.items()
    ]
    _print_table(("policy", "view", "stages", "source"), rows)
    if params or name:
        _print_params("policy", known)


def _stages(known: "Mapping[str, Stage]", as_json: bool) -> None:
    """Print the stages: what each is, where it works, what it needs of the others."""
    from guestd.tiering.stage import KINDS

    if as_json:
        table = {
            name: {"kind": stage.kind, "views": list(stage.views), "summary": stage.summary, "source": stage.source,
                   "gives": sorted(stage.gives), "needs": sorted(stage.needs), "params": _params(stage)}
            for name, stage in known.items()
        }  # fmt: skip
        _print_json(table)
        return
    rows = [(stage.kind, name, ", ".join(stage.views), stage.summary, ", ".join(sorted(stage.needs)) or "-")
            for name, stage in sorted(known.items(), key=lambda item: KINDS.index(item[1].kind))]  # fmt: skip
    _print_table(("kind", "stage", "view", "what it does", "needs"), rows)


@app.command()
def workloads(
    name: Annotated[str | None, typer.Argument(help="Only this one, with its parameters.")] = None,
    params: Annotated[bool, typer.Option("--params", help="Also every parameter with unit and source.")] = False,
    as_json: Json = False,
) -> None:
    """List the workloads.

    \b
    Example: everything that can be set on one of them
      fleet workloads gups
    """
    from guestd.workloads.registry import workloads as registry

    known = _only("workload", name, registry())
    if as_json:
        _print_json({key: {"summary": kind.summary, "params": _params(kind)} for key, kind in known.items()})
        return
    _print_table(("workload", "summary"), [(key, kind.summary) for key, kind in known.items()])
    if params or name:
        _print_params("workload", known)


@hosts_app.callback(invoke_without_command=True)
def hosts(context: typer.Context, as_json: Json = False) -> None:
    """List the host profiles, or show every figure of one.

    \b
    Examples:
      fleet hosts
      fleet hosts show xeon-8360y-optane
      fleet run --host my-host.toml     (a file that may say: extends = "xeon-8360y-optane")
    """
    from fleet.hosts import describe, load_profile, profile_names

    if context.invoked_subcommand is not None:
        return
    profiles = [load_profile(name) for name in profile_names()]
    if as_json:
        _print_json({profile.name: describe(profile) for profile in profiles})
        return
    rows = [(profile.name, _tier(profile, "fast"), _tier(profile, "slow"), profile.summary) for profile in profiles]
    _print_table(("profile", "fast tier", "slow tier", "summary"), rows)


@hosts_app.command()
def show(
    name: Annotated[str, typer.Argument(help="A profile of fleet hosts, or a TOML file.")], as_json: Json = False
) -> None:
    """Show every figure of a host profile with unit, plausible range, grade and source.

    \b
    Example:
      fleet hosts show xeon-8360y-optane
    """
    from fleet.hosts import describe, load_profile

    profile = load_profile(name)
    if as_json:
        _print_json(describe(profile))
        return
    typer.echo(f"{profile.name}: {profile.summary} (clock {float(profile.clock_mhz) / 1000:g} GHz)")
    rows = []
    for figure in profile.figures.values():
        value = "curve" if isinstance(figure.value, tuple) else f"{figure.value} {figure.unit}"
        rows.append((figure.key, value, f"{figure.low} - {figure.high}", figure.grade, figure.source))
    _print_table(("figure", "value", "range", "grade", "source"), rows)
    for tier, label in profile.tier_names.items():
        for field, what in (
            ("curve", "idle latency by utilisation"),
            ("write_curve", "write bandwidth by writing threads"),
        ):
            points = profile.figures[f"{tier}.{field}"].value
            if isinstance(points, tuple):
                curve = ", ".join(f"{x}: {factor}" for x, factor in points)
                typer.echo(f"{tier} ({label}), factor on the {what}: {curve}")


@app.command()
def doctor(
    vms: Annotated[int, typer.Option(min=1, help="VMs that a run would have.")] = 10,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of each.")] = "512MiB",
    as_json: Json = False,
) -> None:
    """Check this machine's limits and name the fix for each that is too low. Exit code 1 if one is.

    \b
    Example: would a thousand small VMs fit?
      fleet doctor --vms 1000 --memory 64MiB
    """
    import msgspec

    from fleet.doctor import Demand, examine
    from proto.units import PAGE_SIZE, parse_bytes

    checks = examine(Demand(vms, vms * parse_bytes(memory) // PAGE_SIZE))
    well = all(check.ok for check in checks)
    if as_json:
        _print_json({"ok": well, "checks": msgspec.to_builtins(checks)})
    else:
        rows = [("ok" if check.ok else "FAILS", check.name, check.found, check.needed) for check in checks]
        _print_table(("", "check", "found", "needed"), rows)
        for check in checks:
            if not check.ok:
                typer.echo(f"fix {check.name}: {check.fix}")
    raise typer.Exit(0 if well else 1)


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version, and those of Python and the libraries that take part in a result.

    \b
    Example:
      fleet version --json
    """
    from fleet.provenance import library_versions

    if as_json:
        _print_json({"tierfleet": __version__} | library_versions())
        return
    typer.echo(f"tierfleet {__version__} ({', '.join(f'{k} {v}' for k, v in library_versions().items())})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run the command and exit with its code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    out = _outlive_readers() if arguments is None else None
    try:
        code = app(given, prog_name="fleet", standalone_mode=False)
        sys.stdout.flush()
        if out is not None and out.failed is not None:
            _complain(f"standard output: {out.failed.strerror}")
            code = code or 1
    except (FleetError, ProtoError) as error:
        _complain(str(error))
        code = getattr(error, "exit_code", 2)
    except typer.TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        _complain(message + (" See --help." if message.startswith("Missing") else ""))
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if os.environ.get("FLEET_DEBUG"):
            raise
        _complain(f"internal error: {type(error).__name__}: {error} (FLEET_DEBUG=1 shows where)")
        code = 1
    sys.exit(code or 0)


class _Output(io.FileIO):
    """A standard stream that may go away (head, less, a terminal, a full disk): what it does not take is dropped."""

    failed: OSError | None = None
    """Why something was, if not for a reader who has left."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            pass
        except OSError as error:
            self.failed = error
        return len(data)


def _outlive_readers() -> _Output:
    """No command ends for who reads its output; standard output's own end, which tells what was lost of it."""
    codecs.register_error("json", _as_json)
    out, err = (_Output(os.devnull if old is None else old.fileno(), "w", closefd=old is None)
                for old in (sys.stdout, sys.stderr))  # fmt: skip
    sys.stdout = _text(out, sys.stdout, line_buffering=out.isatty())
    sys.stderr = _text(err, sys.stderr, line_buffering=True)
    return out


def _text(raw: _Output, old: TextIO | None, *, line_buffering: bool) -> TextIO:
    """Characters that the encoding lacks become those of JSON."""
    encoding = old.encoding if old else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors="json", line_buffering=line_buffering)


def _as_json(error: UnicodeError) -> tuple[str, int]:
    """``\\u00fc``: what text and JSON alike can have in place of a character."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _complain(message: str) -> None:
    print("fleet: " + " ".join(message.split()), file=sys.stderr)


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _only(what: str, name: str | None, registry: Mapping[str, K]) -> dict[str, K]:
    """The whole registry, or the one entry of that name."""
    if name is None:
        return dict(registry)
    if name not in registry:
        raise SpecError(unknown(what, name, registry))
    return {name: registry[name]}


def _params(kind: "Kind | Stage") -> list[dict[str, Any]]:
    return [param._asdict() for param in kind.params]


def _print_params(space: str, known: Mapping[str, "Kind"]) -> None:
    rows = []
    for name, kind in known.items():
        for param in kind.params:
            values = "one of " + ", ".join(param.choices) if param.choices else param.unit
            rows.append((name, f"{space}.{param.name}", str(param.default), values, param.help, param.source))
    if rows:
        typer.echo()
        _print_table((space, "--set", "default", "unit", "meaning", "source"), rows)


def _tier(profile: "Profile", tier: str) -> str:
    latency = profile.figures[f"{tier}.latency_random"]
    bandwidth = profile.figures[f"{tier}.read_bandwidth"]
    return f"{profile.tier_names[tier]}: {latency.value} {latency.unit}, {bandwidth.value} {bandwidth.unit}"
