"""Every error that a person meets; each docstring says when, each message is one line that says what to do."""


class FleetError(Exception):
    """Base of everything that ends a command with one line on standard error instead of a traceback."""

    exit_code = 2
    """2 = bad input or a machine that cannot do it; a run that failed has 1."""


class SpecError(FleetError):
    """A value of an experiment (file, flag or ``--set``) cannot be used."""


class ProfileError(FleetError):
    """A host profile does not exist, or a figure in it is missing, unknown or out of its own range."""


class LimitError(FleetError):
    """This machine cannot hold the run that was asked for; the message names the limit and the fix."""


class OutputError(FleetError):
    """The results cannot be written where they were asked for."""


class LaunchError(FleetError):
    """The processes of a fleet could not be started, or the host died."""

    exit_code = 1
