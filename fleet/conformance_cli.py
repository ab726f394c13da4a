"""The command `fleet conformance`: two tables, every policy on its own and every policy with every workload."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleet.errors import SpecError
from fleet.names import unknown

if TYPE_CHECKING:
    from rich.console import Console


def conformance(
    policy: Annotated[list[str] | None, typer.Argument(help="Only these policies [all]")] = None,
    *,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Of each policy's own VM (see below)")] = "16GiB",
    vcpus: Annotated[int, typer.Option(min=1, metavar="N", help="Of it")] = 4,
    seconds: Annotated[
        int, typer.Option(min=1, metavar="S", help="Virtual time at least; longer where a policy needs it")
    ] = 5,
    longest: Annotated[
        int,
        typer.Option(min=1, metavar="S", help="Virtual time beyond which no gain is waited for and asked of a policy"),
    ] = 120,
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Policies at once, alone")] = 2,
    pair_memory: Annotated[str, typer.Option(metavar="SIZE", help="Of each VM of the pairs")] = "256MiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check what every policy owes, yours and the built-in ones: no page lost, CPU booked, heat found.

    Policies run with their published parameters, which are for large guests: in a small one the same accesses fall on
    fewer pages, and a scan finds that every page, a cold one too, was accessed since the last. One policy takes
    two or three minutes on 2 cores, all of them half an hour.

    \b
    Examples: one policy, and only its content and CPU in a small guest
      fleet conformance hyperplace
      fleet conformance hyperplace --memory 256MiB --longest 1
    """
    from fleet.conformance import alone, pairs
    from fleet.spec import resolve
    from guestd.tiering.registry import policies
    from guestd.workloads.registry import workloads

    names = policy or list(policies())
    if wrong := [name for name in names if name not in policies()]:
        raise SpecError(unknown("policy", wrong[0], policies()))
    # Before the first of many runs, which would only tell then.
    for option, size in (("--memory", memory), ("--pair-memory", pair_memory)):
        for workload in ["gups"] if option == "--memory" else [name for name in workloads() if name != "trace"]:
            resolve({"memory": size, "workload": workload}, option, Path(), {})
    with _progress("alone") as progress:
        verdicts = alone(names, {"memory": memory, "vcpus": vcpus}, seconds, longest, jobs, progress)
    if not as_json:
        _print_alone(verdicts, memory)
    with _progress("with every workload") as progress:
        table = pairs(names, {"memory": pair_memory, "vcpus": 1}, progress)
    bad = {pair: vm for pair, vm in table.items() if vm["outcome"] != "ok" or vm["integrity"]["mismatches"]}
    if as_json:
        rows = [one._asdict() for one in verdicts]
        grid = [{"policy": key[0], "workload": key[1], "ok": key not in bad, "vm": vm} for key, vm in table.items()]
        sys.stdout.write(json.dumps({"alone": rows, "pairs": grid}) + "\n")
    else:
        _print_pairs(table, pair_memory)
    raise typer.Exit(1 if bad or any(one.broken for one in verdicts) else 0)


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)


def _print_alone(verdicts: list[Any], memory: str) -> None:
    from rich.table import Table

    console = _console()
    console.print(f"each policy alone, GUPS, {memory}:", markup=False)
    laws = Table(box=None, pad_edge=False)
    headings = ("policy", "virtual s", "fast %", "at end %", "random %", "CPU, cores", "pages up", "down", "mismatches")
    for heading in headings:
        laws.add_column(heading, justify="left" if heading == "policy" else "right")
    laws.add_column("verdict", overflow="fold")
    for one in verdicts:
        vm = one.vm
        if "access" not in vm:
            laws.add_row(one.policy, *["-"] * 8, "; ".join(one.broken))
            continue
        share = vm["memory"]["fast_bytes"] / vm["memory"]["total_bytes"]
        laws.add_row(one.policy, f"{vm['virtual_s']:.0f}", f"{100 * vm['access']['fast_ratio']:.1f}",
                     f"{100 * one.end_fast_ratio:.1f}", f"{100 * share:.1f}",
                     f"{vm['agent_cpu']['modelled_cores']:.3f}", str(vm["migration"]["promoted_pages"]),
                     str(vm["migration"]["demoted_pages"]), str(vm["integrity"]["mismatches"]),
                     "; ".join(one.broken) or f"ok{one.excuse and f' (no gain asked: {one.excuse})'}")  # fmt: skip
    console.print(laws)


def _print_pairs(table: dict[tuple[str, str], dict[str, Any]], pair_memory: str) -> None:
    from rich.table import Table

    console = _console()
    console.print(
        f"\nevery policy with every workload, {pair_memory}: mismatches / million accesses checked", markup=False
    )
    workloads = list(dict.fromkeys(workload for _, workload in table))
    grid = Table(box=None, pad_edge=False)
    for heading in ("policy", *workloads):
        grid.add_column(heading, justify="left" if heading == "policy" else "right")
    for policy in dict.fromkeys(policy for policy, _ in table):
        grid.add_row(policy, *(_cell(table[policy, workload]) for workload in workloads))
    console.print(grid)


def _cell(vm: dict[str, Any]) -> str:
    if vm["outcome"] != "ok":
        return str(vm["outcome"])
    return f"{vm['integrity']['mismatches']} / {vm['integrity']['accesses_checked'] / 1e6:.2f}"


@contextmanager
def _progress(what: str) -> "Iterator[Any]":
    """A bar on standard error, or a line for each step where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda done, total, label: console.print(
            f"{what}: {done} of {total} {label}", markup=False, soft_wrap=True
        )
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=f"{what}: {label}")
