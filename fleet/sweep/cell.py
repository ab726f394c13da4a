"""The process that one cell runs in: ``python -m fleet.sweep.cell SPEC OUT --parent PID``.

It is `fleet run` that dies with the sweep that started it, also with one that is killed outright: its zygote and host
then die with it (`fleet.launcher`). What it prints serves nobody; its results are in OUT.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fleet.errors import FleetError
from proto.errors import ProtoError
from proto.process import die_with_parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit code of `fleet run`."""
    parser = argparse.ArgumentParser(prog="fleet.sweep.cell", description="One cell of a sweep.")
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parent", type=int, required=True, help="process whose death is also this one's")
    given = parser.parse_args(arguments)
    die_with_parent(given.parent, signal.SIGKILL)
    try:
        from fleet.run import run_experiment
        from fleet.spec import load

        return run_experiment(load(given.spec), given.out, as_json=True)
    except (FleetError, ProtoError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return getattr(error, "exit_code", 2)


if __name__ == "__main__":
    sys.exit(main())
