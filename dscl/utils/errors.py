"""Exceptions that end a run with one clear line: wrong input, a failure outside the program, a stop on purpose."""

RERUN_HINT = "run the same command again to go on"


class UserError(ValueError):
    """The input is wrong; exit status 2. The message names what was given, what is allowed and what to change."""


class ExternalFailure(RuntimeError):
    """Something outside the program failed, such as a full disk; exit status 1."""


class RunStopped(Exception):
    """The run stopped because of a signal; exit status 75. The same command resumes the run.

    all_ranks_agreed: whether all ranks stopped at the same point with everything saved. Otherwise this rank stopped
    alone, before there was anything to save.
    """

    def __init__(self, message: str, all_ranks_agreed: bool = True) -> None:
        super().__init__(message)
        self.all_ranks_agreed = all_ranks_agreed
