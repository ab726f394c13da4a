"""Sweeps: many runs as one experiment, on this machine or on a cluster, resumable, with one table of results.

`fleet.sweep.run.run_cells` runs any list of experiments in this way; docs/sweeps.md describes the files. It comes by
name (PEP 562), since `fleet --help` imports this package and must not wait for what runs need.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fleet.sweep.run import run_cells

__all__ = ["run_cells"]


def __getattr__(name: str) -> Any:
    if name == "run_cells":
        from fleet.sweep.run import run_cells

        return run_cells
    raise AttributeError(name)
