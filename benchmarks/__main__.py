"""``python -m benchmarks``: all benchmarks, or some, as a table or as one JSON object; progress on standard error."""

import argparse
import json
import os
from importlib import import_module

from benchmarks.cli import cpu_model
from benchmarks.figures import print_figures, to_builtins
from fleet import numba_cache
from fleet.provenance import library_versions

NAMES = ("engine", "mechanisms", "hint_faults", "workloads", "fleet_start", "hypercall")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="How fast the emulator is on this machine."
    )
    parser.add_argument("name", nargs="*", help=f"some of {', '.join(NAMES)} [all]")
    parser.add_argument("--quick", action="store_true", help="small guests and few repetitions: about a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    if wrong := [name for name in given.name if name not in NAMES]:
        parser.error(f"{wrong[0]!r} is no benchmark; there are {', '.join(NAMES)}")
    # Before numba is imported: the same compiled kernels as a run's.
    os.environ.update(numba_cache.environment())
    report = {"machine": cpu_model(), "versions": library_versions(), "quick": given.quick, "figures": {}}
    if not given.json:
        print(f"{report['machine']}; median (least - most, n = repetitions)")
    for name in given.name or NAMES:
        module = import_module(f"benchmarks.{name}")
        figures = list(module.run(given.quick))
        report["figures"][name] = to_builtins(figures)
        if not given.json:
            print_figures(module.TITLE, figures)
    if given.json:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
