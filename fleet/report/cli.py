"""`fleet report`. Libraries that take long to import are imported when the command runs."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fleet.errors import OutputError


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a run or of a sweep.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the tables' data as one JSON object and nothing else.")
    ] = False,
) -> None:
    """Tables and figures of a run or a sweep: DIR/report.html, and each figure in DIR/report/ as SVG, PNG and CSV.

    \b
    Examples:
      fleet report runs/quickstart
      fleet report runs/scalability --json
    """
    import pyarrow as pa
    from rich.console import Console

    from fleet.report.content import read
    from fleet.report.terminal import print_report
    from fleet.report.write import write

    try:
        found = read(directory)
    except pa.ArrowInvalid as error:
        raise OutputError(f"{directory}: holds a damaged file: {error}") from None
    page = write(found)
    if as_json:
        sys.stdout.write(json.dumps({"report": str(page)} | found.plain(), indent=2, ensure_ascii=False) + "\n")
        return
    # Whoever pipes the table keeps whole lines.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=240)
    print_report(found, page, console)
