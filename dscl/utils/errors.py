"""The ways a run ends early on somebody's account: a wrong input, a failure outside the program, or a wish."""

AGAIN = "run the same command again to go on"


class UserError(ValueError):
    """The input is wrong. The message names what was given, what is allowed and what to change; exit status 2."""


class Failure(RuntimeError):
    """Something outside the program failed (a disk is full, say). One clear line, exit status 1."""


class Stopped(Exception):
    """Somebody asked the run to stop, and it has; one line, exit status 75: run it again and it goes on.

    `together`: all ranks agreed on it; otherwise this one stopped alone, before there was anything to save.
    """

    def __init__(self, text: str, together: bool = True) -> None:
        super().__init__(text)
        self.together = together
