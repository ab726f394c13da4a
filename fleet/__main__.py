"""``python -m fleet`` is ``fleet``."""

from fleet.cli import main

main()
