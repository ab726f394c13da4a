"""One run from an experiment to its results: directory, processes, display, summary. What `fleet run` does.

It starts once everything was checked, so what goes wrong from here on is a failure of the run (exit code 1), and what
was gathered by then is kept.
"""

import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from fleet import doctor, figure, page_heat
from fleet.errors import LimitError
from fleet.experiment import Experiment
from fleet.launcher import run_fleet
from fleet.live import make_observer
from fleet.logs import launcher_log
from fleet.outcome import Outcome
from fleet.provenance import collect
from fleet.results import RunDirectory, default_name, finish, to_json
from fleet.table import print_summary

FAILED = 1
INTERRUPTED = 130


def run_experiment(experiment: Experiment, out: Path | None, as_json: bool) -> int:
    """Run it and leave the results in ``out`` (None: ``runs/<name>``); the exit code of the command.

    The result goes to standard output, everything else to standard error. Raises FleetError before anything starts.
    """
    refuse_too_large(experiment)
    provenance = collect()
    tenants = experiment.tenants
    name = experiment.name or default_name(
        datetime.now(),
        ["+".join([tenant.policy, *tenant.stages.values()]) for tenant in tenants],
        [tenant.workload for tenant in tenants],
    )
    directory = RunDirectory.create(out, name)
    directory.begin(experiment, provenance)
    guests = experiment.guests(directory.log_path, directory.events_path, directory.heat_path)
    host = experiment.host_config(directory.log_path("host"))
    doctor.raise_file_limit(len(guests))
    progress = Console(stderr=True, highlight=False)
    with (
        launcher_log(directory.log_path("launcher")) as log,
        make_observer(guests, json=as_json, console=progress) as observer,
    ):
        log.info("run %s starts: %d VMs, seed %d", directory.path.name, len(guests), experiment.seed)
        result = run_fleet(guests, host, directory.path, observer)
        log.info("run %s ends: %s", directory.path.name, result.outcome)
    summary = finish(directory, experiment, guests, result, provenance)
    if as_json:
        sys.stdout.write(to_json(summary))
    else:
        _report(summary, directory)
    return {Outcome.OK: 0, Outcome.INTERRUPTED: INTERRUPTED}.get(summary["outcome"], FAILED)


def refuse_too_large(experiment: Experiment) -> None:
    """Raises LimitError if this machine cannot hold the run."""
    if problems := doctor.check_run(experiment.guests()):
        raise LimitError("this machine cannot hold the run: " + "; ".join(problem.line() for problem in problems))


def _report(summary: Mapping[str, Any], directory: RunDirectory) -> None:
    """The readable end: figure, table, and where everything lies."""
    timeseries = directory.path / "timeseries.parquet"
    figure.draw(summary, timeseries, directory.figure_path)
    heat_drawn = directory.heat_table.exists() and page_heat.draw(summary, directory.heat_table, directory.heat_figure)
    # Whoever pipes the table keeps whole lines.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)
    print_summary(summary, console)
    ascii_only = not (console.encoding or "").lower().startswith("utf")
    for line in figure.sparklines(summary, timeseries, ascii_only=ascii_only):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"figure:  {directory.figure_path}", markup=False, soft_wrap=True)
    if heat_drawn:
        console.print(f"heat:    {directory.heat_figure}", markup=False, soft_wrap=True)
    console.print(f"results: {directory.path}", markup=False, soft_wrap=True)
