"""What a person runs: the command line, experiment specs, host profiles, launcher, results and reports."""

__version__ = "0.1.0"
