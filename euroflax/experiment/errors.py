"""The three ways in which a command can end other than well, each with its exit status."""


class ExperimentError(Exception):
    """The user's mistake: one fault a line, each saying field, value, rule and fix. Exit status 2."""

    exit_status = 2

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class RunFailed(Exception):
    """The run failed, and running it again will not help. Exit status 1."""

    exit_status = 1


class Interrupted(Exception):
    """The run was stopped from outside: the same command goes on from the last checkpoint. Exit status 75."""

    exit_status = 75
